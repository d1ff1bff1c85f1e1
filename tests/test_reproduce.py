"""The main job on a small scale: records, tables, selection, interruption, and what a user gets wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowhn import reproduce
from flowhn.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["budget=4096", "val_points=1", "val_rows=4", "eval.limit=8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Output and cache folders shared by this file's tests: the docs corpus is prepared once."""
    folder = tmp_path_factory.mktemp("home")
    return [f"output_dir={folder}/out", f"cache_dir={folder}/cache"]


def main(*words: str) -> int:
    return reproduce._main(list(words))


def table_folder(home) -> Path:
    return Path(home[0].removeprefix("output_dir=")) / "table1" / "tiny-docs-4096"


@pytest.fixture(scope="module")
def two_models(home):
    assert main("table1", "models=[llama,flowhn_fac]", *SMALL, *home) == 0
    return table_folder(home)


def test_a_run_writes_table_figures_and_records(two_models):
    assert {"table.md", "table.csv", "figure4.png", "loss.png", "verdicts.md", "records"} <= set(os.listdir(two_models))
    assert (two_models / "command.txt").read_text() == (
        "./reproduce.sh table1 'models=[llama,flowhn_fac]' budget=4096 val_points=1 val_rows=4 eval.limit=8\n"
    )
    table = (two_models / "table.md").read_text()
    assert "FlowHN FAC_Split" in table
    assert "Llama" in table
    assert "not comparable" in table
    assert sorted(p.name for p in (two_models / "records").iterdir()) == ["flowhn_fac-s0.json", "llama-s0.json"]


def test_a_record_says_what_was_run_and_on_what(two_models):
    record = json.loads((two_models / "records" / "flowhn_fac-s0.json").read_text())
    assert record["config"]["choices"]["split"] == "fac"
    assert record["parameters"] > 500_000
    assert record["tokens"] == 4096
    assert record["steps"] == 8
    assert record["kernels"] == {"ssm": "torch", "attention": "sdpa"}
    assert record["device"]["type"] == "cpu"
    assert record["versions"]["torch"]
    assert record["losses"]["val"][-1][0] == 4096
    assert 0 < record["losses"]["final_val"] < 9
    assert record["evaluation"]["tasks"]["docs_continuation"]["n"] == 8
    assert record["memory"]["peak_bytes"] > 10**8
    assert record["git"].keys() == {"commit", "dirty"}


def test_a_finished_run_is_not_repeated_and_leaves_no_optimiser_state(two_models, home, monkeypatch):
    monkeypatch.setattr("flowhn.experiment.Workshop.run", lambda *a, **k: pytest.fail("ran again"))
    assert main("table1", "models=[llama,flowhn_fac]", *SMALL, *home) == 0
    runs = Path(home[0].removeprefix("output_dir=")) / "runs"
    assert not list(runs.glob("*/checkpoints"))
    assert len(list(runs.glob("*/model.safetensors"))) == 2


def test_another_selection_keeps_the_other_rows(two_models, home):
    assert main("table1", "model=llama", *SMALL, *home) == 0
    assert "FAC_Split" in (two_models / "table.md").read_text()
    assert "models=" not in (two_models / "command.txt").read_text(), "one model would not make this table"


@pytest.mark.slow  # .ci/run runs it
def test_keep_copies_the_result_and_loses_no_record(two_models, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["table1", "models=[llama]", *SMALL, *home, "--keep"]
    assert main(*words) == 0
    kept = tmp_path / "experiments" / "table1" / two_models.name
    assert sorted(path.name for path in (kept / "records").iterdir()) == ["flowhn_fac-s0.json", "llama-s0.json"]
    (kept / "records" / "shm-s0.json").write_text("{}")
    with pytest.raises(UserError, match=r"--keep would delete 1 of 3 records.*shm-s0"):
        main(*words)
    assert (kept / "records" / "shm-s0.json").is_file()


def test_evaluate_a_finished_run(two_models, home, capsys):
    from flowhn import evaluate, load

    (run,) = (two_models.parents[1] / "runs").glob("llama-*")
    import torch

    assert load(run)(torch.tensor([[1, 2, 3]])).shape == (1, 3, 2048)
    evaluate._main([str(run), "eval.limit=4", *home])
    result = json.loads((run / "eval-docs.json").read_text())
    assert result["tasks"]["docs_continuation"]["n"] == 4


def test_a_run_with_another_tokenizer_is_refused(two_models, tmp_path):
    import shutil

    from flowhn.loading import load_run

    (run,) = (two_models.parents[1] / "runs").glob("llama-*")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert load_run(copy).tokenizer is not None
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not the one it was trained with"):
        load_run(copy)
    (copy / "tokenizer.json").unlink()
    assert load_run(copy).tokenizer is None


def test_the_papers_text_brings_the_papers_tasks():
    from flowhn.config import compose

    assert compose("train", ["data=slimpajama"]).choices["eval"] == "paper"
    assert compose("train", ["data=slimpajama", "eval=none"]).choices["eval"] == "none"
    assert compose("train", []).choices["eval"] == "docs"


def test_dry_run_shows_parameters_and_which_records_exist(two_models, home, capsys):
    assert main("--dry-run", "table1", *SMALL, *home) == 0
    shown = capsys.readouterr().out
    assert shown.count("exists") == 2
    assert shown.count("missing") == 8
    assert "0.73M" in shown
    told = re.search(r"prepared data \(docs\), .*?: ([\d.]+) MB while it is made, ([\d.]+) MB after", shown)
    cache = Path(home[1].removeprefix("cache_dir=")) / "data"
    written = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
    assert written <= float(told[2]) < 4 * written
    assert float(told[2]) < float(told[1])
    row = next(line for line in shown.splitlines() if "flowhn_fac" in line)
    kept = re.findall(r"([\d.]+) MB", row)
    (folder,) = (path for path in (cache.parents[1] / "out" / "runs").glob("flowhn_fac-*"))
    written = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6
    assert written <= float(kept[1]) < 1.5 * written


def test_the_papers_text_is_announced_before_it_is_downloaded(home, capsys):
    assert main("--dry-run", "table1", "models=[llama]", "size=135m", "data=slimpajama", "budget=smoke", *home) == 0
    shown = capsys.readouterr().out
    size = re.search(r"prepared data \(slimpajama\), .*?: ([\d.]+) GB while it is made, ([\d.]+) GB after", shown)
    assert float(size[1]) > 25
    assert 12 < float(size[2]) < float(size[1])


def test_list_names_every_artefact_with_its_claim(capsys):
    assert main("--list") == 0
    shown = capsys.readouterr().out
    for path in (ROOT / "configs" / "artefacts").glob("*.yaml"):
        assert path.stem in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tabel1"], "did you mean table1"),
        (["models=[lama]"], "did you mean llama"),
        (["seeds=[a]"], "whole numbers"),
        (["seeds=[]"], "whole numbers"),
        (["models=[]"], "selects nothing"),
        (["split=fa"], "the same model under other names"),
        (["cell=x"], "the same model under other names"),
        (["sed=1"], "did you mean seed"),
        (["budget=lots"], "budget=lots"),
        (["size.n_heads=7", "models=[llama]"], "n_heads"),
        (["seq_len=1000000", "global_batch_tokens=1000000", "models=[llama]"], "seq_len"),
        (["global_batch_tokens=1000", "models=[llama]"], "global_batch_tokens"),
        (["device=cuda", "models=[llama]"], "device=cuda"),
        (["kernels=mamba_ssm", "models=[mamba1]"], "kernels=mamba_ssm"),
        (["data=files", "data.path=/nowhere/at/all", "models=[llama]"], "data.path"),
        (["split.ratio=1.5", "models=[flowhn_fac]"], "split.ratio"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_key(words, said, tmp_path, home, capsys):
    import torch

    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    where = [f"output_dir={tmp_path}/out", home[1]]
    try:
        code = main(*words, *SMALL, *where) if "budget=lots" not in words else main(*words, *where)
        text = capsys.readouterr().err
    except UserError as error:
        code, text = 2, str(error)
    assert code == 2
    assert said in text


def command(*words: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "flowhn.reproduce", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options,
    )  # fmt: skip


def test_the_command_line_says_one_sentence_and_exits_2(tmp_path):
    process = command("table1", "sed=1", f"output_dir={tmp_path}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.strip() == "error: unknown key sed; did you mean seed? (put + before it to add a new key)"
    assert out == ""


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_from_its_checkpoint(how, tmp_path, home, two_models):
    words = ["table1", "models=[llama]", "budget=61440", "val_points=2", "val_rows=4", "eval=none", home[1],
             f"output_dir={tmp_path}", "trainer.checkpoint.every_n_steps=5", "trainer.checkpoint.seconds=null"]  # fmt: skip
    process = command(*words)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoints/*.json")):  # a checkpoint counts once its manifest is there
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    assert not list(tmp_path.glob("runs/*/record.json"))
    assert main(*words) == 0
    (path,) = tmp_path.glob("runs/*/record.json")
    record = json.loads(path.read_text())
    assert record["resumed"] == 1
    assert record["steps"] == 120


def test_padding_counts_neither_as_tokens_nor_as_speed(tmp_path, home):
    """packing=pad: budget, record and tokens/s count real tokens; MFU counts what is computed."""
    from flowhn import train

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"one two three four five number {i}"}) + "\n" for i in range(400)))
    words = ["data=files", f"data.path={corpus}", "data.packing=pad", "data.loss_on_padding=false", "model=llama", "eval=none",
             "vocab_size=300", "seq_len=64", "global_batch_tokens=512", "budget=2000", "val_points=1", "val_rows=4"]  # fmt: skip
    assert train._main([*words, f"output_dir={tmp_path}", home[1]]) == 0
    (path,) = tmp_path.glob("runs/*/record.json")
    record = json.loads(path.read_text())
    per_step = record["tokens"] / record["steps"]
    assert per_step < 0.6 * 512
    assert record["tokens"] - per_step < 2000 <= record["tokens"]
    assert record["losses"]["val"][-1][0] == record["tokens"]
    throughput = record["throughput"]
    assert throughput["tps"] == pytest.approx(per_step / throughput["step_seconds"])
    assert throughput["mfu"] == pytest.approx(
        throughput["flops_per_token"] * throughput["tps"] / throughput["peak_flops"]
    )
