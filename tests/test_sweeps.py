"""Sweeps with ``flowhn-train -m``: grids, launchers, failures, the table at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from flowhn import train
from flowhn.config import compose, groups
from flowhn.errors import UserError
from flowhn.reporting.record import read_record
from flowhn.sweeps import UNFINISHED, Job, read_jobs, rotate, run_job, sweep_table, take_device, write_summary


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    small = ["model=llama", "budget=1024", "val_points=1", "val_rows=2", "eval=none"]
    return [*small, f"output_dir={folder}/out", f"cache_dir={folder}/cache"]


def out(home) -> Path:
    return Path(home[-2].partition("=")[2])


def sweep(home, *words: str) -> tuple[int, Path]:
    GlobalHydra.instance().clear()
    before = set((out(home) / "sweeps").glob("*"))
    folder = out(home) / "sweeps" / f"number-{len(before)}"
    return train._main(["-m", *words, *home, f"hydra.sweep.dir={folder}"]), folder


def test_a_grid_gives_a_table_of_what_was_varied(home, capsys):
    code, folder = sweep(home, "seed=0,1", "lr=1e-3,2e-3")
    assert code == 0
    frame = pd.read_csv(folder / "summary.csv")
    assert len(frame) == 4
    assert {"seed", "lr"} <= set(frame)
    assert "budget" not in frame
    assert (frame["val loss"] > 0).all()
    assert "4 runs, 0 failed" in capsys.readouterr().out


def test_finished_runs_are_not_repeated(home, monkeypatch):
    monkeypatch.setattr("flowhn.train.Workshop.run", lambda *a, **k: pytest.fail("ran again"))
    code, folder = sweep(home, "seed=0,1", "lr=1e-3,2e-3")
    assert code == 0
    assert len(read_jobs(folder)) == 4


def test_a_failed_run_does_not_stop_the_others_and_says_why(home, capsys):
    code, folder = sweep(home, "size.n_heads=4,7", "seed=0")
    assert code == 2
    good, bad = read_jobs(folder)
    assert good.record
    assert "n_heads=7" in bad.error
    assert "Traceback" in Path(bad.log).read_text()
    said = capsys.readouterr().out
    assert "2 runs, 1 failed" in said
    assert bad.log in said


def test_a_program_error_in_one_run_is_listed_too(tmp_path):
    def body():
        raise ZeroDivisionError("division by zero")

    assert run_job(body, folder=tmp_path / "0", number=0, overrides=["a=1"]) == float("inf")
    (job,) = read_jobs(tmp_path)
    assert job.error == "ZeroDivisionError: division by zero"


def test_ctrl_c_ends_the_sweep_and_the_run_is_listed(tmp_path):
    def body():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(body, folder=tmp_path / "0", number=0, overrides=["seed=3"])
    (job,) = read_jobs(tmp_path)
    assert job.error == UNFINISHED
    assert "1 runs, 1 failed" in write_summary(tmp_path)[0]


def test_a_launcher_that_gives_up_leaves_the_table_of_what_is_done(home, monkeypatch, capsys):
    """As joblib and submitit do when a process is killed: their error, after the table."""

    def crash(argv):
        folder = Path(next(word.partition("=")[2] for word in argv if word.startswith("hydra.sweep.dir=")))
        with pytest.raises(KeyboardInterrupt):  # stands for SIGKILL: nothing is written afterwards
            run_job(interrupt, folder=folder / "0", number=0, overrides=["seed=0"])
        raise SystemExit(1)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_hydra", crash)
    with pytest.raises(SystemExit):
        sweep(home, "seed=0,1")
    assert UNFINISHED in capsys.readouterr().out


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize("launcher", ["joblib", "local"])
def test_launchers_with_processes_of_their_own(launcher, home):
    code, folder = sweep(home, f"launcher={launcher}", "seed=0,2", "lr=1e-3")
    assert code == 0
    assert [Path(job.record).is_file() for job in read_jobs(folder)] == [True, True]


@pytest.mark.slow  # .ci/run runs it
def test_a_run_on_several_devices_is_a_command_of_its_own(home):
    """Two processes on the CPU."""
    code, folder = sweep(home, "device=cpu", "trainer.devices=2", "seed=5")
    assert code == 0
    (job,) = read_jobs(folder)
    assert read_record(Path(job.record)).config["trainer"]["devices"] == 2
    assert (folder / "0" / "output.log").read_text().count("[1/1] ") == 2  # both processes say what they begin


def test_its_failure_is_the_sentence_it_ended_with(home, monkeypatch):
    said = iter((b"so far so good\nerror: device 1 went away; try again\n", b""))

    def run(command, output):
        assert command[1:3] == ["-m", "flowhn.train"]
        output.write(next(said))
        return 2

    monkeypatch.setattr(train, "run_child", run)
    words = ["-m", "device=cpu", "trainer.devices=2", "seed=6", *home, f"hydra.sweep.dir={out(home)}/sweeps/fails"]
    for reason in ("device 1 went away; try again (output: ", "it ended with exit code 2 (output: "):
        GlobalHydra.instance().clear()
        assert train._main(words) == 2
        (job,) = read_jobs(out(home) / "sweeps" / "fails")
        assert job.error.startswith(reason)
    earlier = out(home) / "sweeps" / "fails" / "0" / "output.log.1"
    assert "so far so good" in earlier.read_text()  # kept, not written over


# A command that takes its time to save when it is asked to stop.
SAVES = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    time.sleep(0.5)
    with Path(sys.argv[1]).open("a") as file:
        file.write(f"saved on {number} ")
    sys.exit(128 + number)
if sys.argv[2] != "deaf":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1] + ".ready").touch()
time.sleep(60)
"""
PARENT = """
import signal, sys
from flowhn.child import run_child
from flowhn.cli import run_entry
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits a SIGINT that is ignored
command = [sys.executable, "-c", sys.argv[1], *sys.argv[2:4]]
run_entry(lambda argv: run_child(command, sys.stdout.buffer, grace=float(sys.argv[4])))
"""


@pytest.mark.parametrize(
    ("number", "kind", "grace", "code"),
    [
        (signal.SIGINT, "hears", 30, 130),
        (signal.SIGTERM, "hears", 30, 143),
        (signal.SIGTERM, "deaf", 0.5, 137),
    ],
)
def test_a_signal_goes_on_to_the_child_which_has_time_to_save(tmp_path, number, kind, grace, code):
    """Sent to the parent alone, or by the terminal to its whole group: the child is asked once."""
    saved = tmp_path / "saved"
    command = [sys.executable, "-c", PARENT, SAVES, str(saved), kind, str(grace)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    deadline = time.monotonic() + 60
    while not Path(f"{saved}.ready").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    begun = time.monotonic()
    _, said = process.communicate(timeout=40)
    assert process.returncode == code, said
    assert time.monotonic() - begun < 20
    assert "Traceback" not in said
    assert saved.read_text() == f"saved on {number} " if kind == "hears" else not saved.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_sweep_over_several_devices_saves_and_goes_on(home, tmp_path, number, code):
    """Two processes on the CPU; the signal reaches the sweep's own process alone."""
    words = ["-m", "device=cpu", "trainer.devices=2", "seed=7", *home, "budget=100k", f"output_dir={tmp_path}"]
    words += [f"hydra.sweep.dir={tmp_path}/sweep", "trainer.checkpoint.every_n_steps=5"]
    command = [sys.executable, "-m", "flowhn.train", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("runs/*/checkpoints/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/record.json"))
    GlobalHydra.instance().clear()
    assert train._main(words) == 0
    (record,) = tmp_path.glob("runs/*/record.json")
    assert read_record(record).resumed == 1
    earlier = tmp_path / "sweep" / "0" / "output.log.1"  # the second attempt began a log of its own
    assert "interrupted" in earlier.read_text() or number == signal.SIGTERM


def test_logs_of_earlier_attempts_are_kept_and_bounded(tmp_path):
    log = tmp_path / "output.log"
    for attempt in range(6):
        rotate(log)
        log.write_text(f"attempt {attempt}")
    rotate(tmp_path / "none.log")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {
        "output.log": "attempt 5",
        "output.log.1": "attempt 4",
        "output.log.2": "attempt 3",
        "output.log.3": "attempt 2",
    }


def test_lines_of_a_long_run_become_rarer(monkeypatch):
    """A week of a run that reports every 10 s, written to a file: the log's size is bounded."""
    from io import StringIO

    from rich.console import Console

    from flowhn import display
    from flowhn.runs import Progress

    now = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    text = StringIO()
    with display.Display(title="table1", n_runs=1, console=Console(file=text, width=200)) as shown:
        report = shown.watch("llama-135m-paper-s0")
        for now in range(0, 7 * 24 * 3600, 10):
            report(Progress("train", now, 7 * 24 * 3600, 12345.6, 3.21))
            if now == 3600:
                assert 100 < text.getvalue().count("\n") < 200
    assert 1000 < text.getvalue().count("\n") < 3000
    assert len(text.getvalue()) < 300_000


def test_each_process_takes_a_device_of_its_own(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    other = FileLock(tmp_path / ".device-0.lock")  # another process of the sweep
    other.acquire()
    take_device(tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    take_device(tmp_path)  # the next run in this process keeps it
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert compose("train", ["launcher=multi_gpu"]).trainer.devices == "auto"


@pytest.mark.parametrize(
    ("name", "n_runs"),
    [
        ("balance", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("split", 4), ("fusion", 6), ("ratio", 9), ("ssm", 8))
        ),
    ],
)
def test_ablations_as_sweeps_make_the_grid_of_their_file(name, n_runs, home, monkeypatch):
    ran = []

    def run(cfg):
        ran.append(cfg)
        raise UserError("not run here")

    monkeypatch.setattr(train, "_run", run)
    code, _ = sweep(home[1:], f"experiment=ablation_{name}")
    assert (code, len(ran)) == (2, n_runs)
    assert len({json.dumps(OmegaConf.to_container(cfg.model)) for cfg in ran}) == n_runs


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_same_command(home, tmp_path):
    """SIGKILL once a first run is done: what is done stays, the stopped run goes on from its checkpoint."""
    words = ["-m", "seed=0,1,2", *home, "budget=30k", f"output_dir={tmp_path}", "trainer.checkpoint.every_n_steps=5"]
    words += [f"hydra.sweep.dir={tmp_path}/sweep"]
    command = [sys.executable, "-m", "flowhn.train", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("runs/*-s1-*/checkpoints/*.json"))) < 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    (first,) = tmp_path.glob("runs/*-s0-*/record.json")
    before = first.stat().st_mtime_ns
    GlobalHydra.instance().clear()
    assert train._main(words) == 0
    assert first.stat().st_mtime_ns == before
    (second,) = tmp_path.glob("runs/*-s1-*/record.json")
    assert read_record(second).resumed == 1
    assert len(pd.read_csv(tmp_path / "sweep" / "summary.csv")) == 3


def test_a_search_for_rate_and_ratio(home):
    words = [word for word in home if not word.startswith("model=")]
    code, folder = sweep(words, "sweep=optuna", "hydra.sweeper.n_trials=2", "model=flowhn")
    assert code == 0
    ratios = {
        override for job in read_jobs(folder) for override in job.overrides if override.startswith("split.ratio=")
    }
    assert len(ratios) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lrr=1,2"], "unknown key lrr; did you mean lr"),
        (["model=lama,llama"], "model=lama does not exist; did you mean llama"),
        (["launcher=slurm", "seed=0,1"], "srun"),
        (["seed=[1,2"], "cannot be read"),
    ],
)
def test_bad_sweeps_are_one_sentence_before_anything_runs(words, said):
    with pytest.raises(UserError, match=said.replace("?", ".")):
        train._main(["-m", *words])


@pytest.mark.parametrize("missing", ["hydra_plugins", None])
@pytest.mark.parametrize("word", ["launcher=joblib", "launcher=local", "sweep=optuna"])
def test_a_launcher_that_is_not_installed_names_the_extra(monkeypatch, word, missing):
    """As after a plain ./reproduce.sh: no package at all in the namespace hydra_plugins, or not this plugin's."""
    for name in [name for name in sys.modules if name.startswith("hydra_plugins")]:
        monkeypatch.delitem(sys.modules, name)
    plugin = train._PLUGINS[word.partition("=")[2]]
    monkeypatch.setitem(sys.modules, missing or plugin, None)  # import fails as if it were not on the path
    with pytest.raises(UserError, match=r"flowhn\[sweep\]"):
        train._main(["-m", word, "seed=0,1"])


def test_every_launcher_and_search_composes():
    for group in ("launcher", "sweep"):
        for name in groups()[group]:
            compose("train", [f"{group}={name}"])


def test_the_table_leaves_out_runs_without_a_record():
    jobs = [Job(0, ["a=1"], error="no"), Job(1, ["a=2"], error="no")]
    assert sweep_table(jobs).empty
    assert json.loads(json.dumps(jobs[0].__dict__))["error"] == "no"
