"""One run on several processes (gloo on the CPU): the same losses, one record, an end when one of them is lost.

All models, strategies and numbers of processes: scripts/compare_processes.py, the slow test here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from flowhn import train
from flowhn.config import config_dir, register_resolvers
from flowhn.errors import UserError
from flowhn.runs import process_rank
from script_loading import load_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "compare_processes.py"


compare = load_script("compare_processes")


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("runs/*/record.json")
    return json.loads(path.read_text())


@pytest.mark.slow  # .ci/run runs it
def test_two_processes_train_what_one_does(tmp_path):
    words = ["model=flowhn", "device=cpu", "budget=4096", "val_points=2", "val_rows=6", "eval=docs", "eval.limit=4",
             f"cache_dir={tmp_path}/cache"]  # fmt: skip
    assert train._main([*words, f"output_dir={tmp_path}/one"]) == 0
    command = [
        sys.executable,
        "-m",
        "flowhn.train",
        *words,
        "trainer=ddp",
        "device=cpu",
        "trainer.devices=2",
        f"output_dir={tmp_path}/two",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert [tokens for tokens, _ in one["losses"]["train"]] == [tokens for tokens, _ in two["losses"]["train"]]
    for (_, a), (_, b) in zip(one["losses"]["train"], two["losses"]["train"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for a, b in zip(one["losses"]["val"], two["losses"]["val"], strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-5)
    for task, numbers in one["evaluation"]["tasks"].items():
        assert numbers["correct"] == two["evaluation"]["tasks"][task]["correct"]
    assert one["tokens"] == two["tokens"] == 4096


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"NODE_RANK": "2"}, 2),
        ({"LOCAL_RANK": "0", "NODE_RANK": "2"}, 2),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        ({"SLURM_PROCID": "3"}, 3),
    ],
)
def test_the_number_of_a_process_comes_from_its_launcher(environment, rank, monkeypatch):
    for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert process_rank() == rank


@pytest.mark.slow
def test_two_sharded_processes_of_torchrun_train_what_one_does(tmp_path):
    alone = compare.Run(tmp_path, "alone", "model=flowhn", "precision=64-true", steps=6).finish()
    words = ["model=flowhn", "trainer=fsdp", "device=cpu", "precision=64-true"]
    (process,) = compare._torchrun(sharded := compare.Run(tmp_path, "sharded", *words, steps=6))
    assert process.wait(timeout=240) == 0, sharded.said()[-2000:]
    found = compare.difference(alone, sharded)
    assert found["batch_losses"] == 6
    assert found["max_loss_difference"] <= 1e-5
    # What does not decay in one process must not decay in several: decay alone moves such a weight by more than this.
    assert found["max_weight_difference"] <= 1e-6


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_another_number_goes_on(tmp_path):
    words = ["model=llama", *compare.STOPPED]
    alone = compare.Run(tmp_path, "alone", *words, steps=24).finish()
    run = compare.Run(tmp_path, "run", *words, *compare.spread("fsdp", 2), steps=24)
    process = run.start()
    compare.wait_for(run, process, compare.training(run))
    first, second = compare.family(process)
    second.kill()
    assert process.wait(timeout=60) not in (0, None)
    assert not psutil.wait_procs([first, second], timeout=30)[1]
    said = [line for line in run.said().splitlines() if line.startswith("error:")]
    assert said
    assert "process" in said[0]
    assert "goes on from the last checkpoint" in said[0]
    again = compare.Run(tmp_path, "run", *words, steps=24).finish()
    assert again.record()["resumed"] == 1
    found = compare.difference(alone, again)
    assert found["max_loss_difference"] <= 1e-5
    assert found["max_weight_difference"] <= 1e-5


def _asks(keeper, trainer, step: int, votes: list) -> bool:
    before = len(votes)
    keeper._vote(trainer, step)
    return len(votes) > before


def test_one_process_that_is_asked_to_stop_stops_all_within_seconds():
    from flowhn.training.resume import CheckpointKeeper

    keeper = CheckpointKeeper(
        folder=Path("."), run_id="", samples_per_step=1, every_n_steps=None, seconds=None, keep=2,
        schedule=SimpleNamespace(steps=()), throughput=None, stop=SimpleNamespace(requested=False),
    )  # fmt: skip
    votes = []

    def reduce(tensor, reduce_op):
        votes.append(tensor.tolist())
        theirs = tensor.clone()
        theirs[2] = 0.5  # seconds of a step on the slowest process
        return theirs

    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce=reduce, root_device="cpu"))
    asked = [step for step in range(1, 14) if _asks(keeper, trainer, step, votes)]
    assert asked == [1, 5, 9, 13]  # every two seconds, at the same steps on all
    keeper._stop.requested = True
    assert [keeper._vote(trainer, step)[0] for step in (14, 15, 16, 17)] == [False, False, False, True]


@pytest.mark.slow
def test_a_sweep_through_submitit_gives_each_run_two_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=llama", "data=random", "eval=none", "logger=none", "budget=2048", "val_points=1", "val_rows=4",
             f"cache_dir={tmp_path}/cache"]  # fmt: skip
    several = ["launcher=local", "trainer=ddp", "device=cpu", "trainer.devices=2"]
    command = [sys.executable, "-m", "flowhn.train", "-m", *several, *words, "seed=0,1", f"output_dir={tmp_path}/two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    for seed in (0, 1):
        assert train._main([*words, "device=cpu", f"seed={seed}", f"output_dir={tmp_path}/one-{seed}"]) == 0
        one = record_of(tmp_path / f"one-{seed}")
        (path,) = (tmp_path / "two").glob(f"runs/*-s{seed}-*/record.json")
        two = json.loads(path.read_text())
        for kind in ("train", "val"):
            for mine, theirs in zip(one["losses"][kind], two["losses"][kind], strict=True):
                assert mine[1] == pytest.approx(theirs[1], abs=1e-5)


def test_a_second_run_in_processes_of_a_launcher_is_one_sentence(monkeypatch):
    from flowhn.training import distributed

    monkeypatch.setattr(distributed, "_done_under_a_launcher", [])
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with distributed.process_group(2):
        pass
    with pytest.raises(UserError, match="torchrun starts the processes of one run only"), distributed.process_group(2):
        pass


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_lost_process_is_told_from_an_error_of_ones_own(error, is_lost):
    from flowhn.training.distributed import process_group

    with pytest.raises(UserError if is_lost else RuntimeError) as caught, process_group(2):
        raise error
    assert ("goes on from the last checkpoint" in str(caught.value)) == is_lost


def test_a_job_of_a_cluster_asks_for_what_the_run_needs():
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        words = ["launcher=slurm", "trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=4"]
        launcher = hydra_compose("train", words, return_hydra_config=True).hydra.launcher
        assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (4, 8, 8)
        alone = hydra_compose("train", ["launcher=slurm"], return_hydra_config=True).hydra.launcher
        assert (alone.nodes, alone.tasks_per_node, alone.gpus_per_node) == (1, 1, 1)
        unknown = hydra_compose("train", ["launcher=slurm", "trainer=ddp"], return_hydra_config=True).hydra.launcher
        with pytest.raises(Exception, match="has to be a number for a job of a cluster"):
            _ = unknown.tasks_per_node


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_model_strategy_and_number_of_processes(tmp_path):
    out = tmp_path / "processes.json"
    done = subprocess.run([sys.executable, SCRIPT, "--out", out], capture_output=True, text=True)
    result = json.loads(out.read_text())
    assert done.returncode == 0, result["failures"]
    assert len(result["rows"]) == 3 * 2 * 3
    assert result["failures"] == []
