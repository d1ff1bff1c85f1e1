"""What an accuracy session brings home: records sorted into experiments/, the tables from them, and its packages."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from test_accuracy_session import WORDS, tried
from test_reporting import fake

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import accuracy_jobs  # noqa: E402
import accuracy_keep  # noqa: E402
import accuracy_session  # noqa: E402
import refresh_experiments  # noqa: E402

from flowhn.artefacts import load_artefact, plan_cells  # noqa: E402
from flowhn.errors import UserError  # noqa: E402
from flowhn.reporting.cells import pool  # noqa: E402
from flowhn.reporting.record import find_records, write_record  # noqa: E402
from flowhn.reporting.summary import accuracy_block  # noqa: E402

SETTING = "135m-files-30M"
ONE_TIER = "{max_tokens: 100000000, llama: 1.0e-3, mamba2: 2.0e-3, shm: 1.0e-3, flowhn: 5.0e-4}"
RATES = "135m-files-4M"  # learning rates lie by their own budget


def trained(cell: str, seed: int = 0, *, lr: float = 5e-4, day: int = 24, **changes):
    changes = {"tokens": 30_015_488, "config": {"lr": lr}, "created": f"2026-11-{day}T04:00:00+00:00", **changes}
    return fake(cell, seed=seed, **changes)


def come_home(tmp_path: Path, records, words=(), results=(), name="one") -> argparse.Namespace:
    """Pack the records of a session with these words and sort them into ``tmp_path/experiments``."""
    work = tmp_path / name
    args = accuracy_session.parse(["keep", str(tmp_path / "a.tgz"), "--work", str(work), *words])
    rates = tmp_path / "table1.yaml"
    if not rates.exists():
        rates.write_text(f"title: T\nlr: {{135m: {ONE_TIER}}}\ncells: {{}}\n")
    args = argparse.Namespace(
        **{
            **vars(args),
            "out": args.file,
            "commit": "0" * 40,
            "into": str(tmp_path / "experiments"),
            "rates": str(rates) if args.rates else "",
        }
    )
    accuracy_jobs.Session(args).describe()
    for record in records:
        write_record(work / "runs" / f"{record.cell}-s{record.seed}" / "record.json", record)
    for result in results:
        path = work / "runs" / f"{result['cell']}-s{result['seed']}" / "eval-long_context.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    accuracy_keep.pack(args)
    accuracy_keep.keep(args)
    return args


def folder_of(name: str) -> str:
    return RATES if name == "table1_lr" else SETTING


def kept(tmp_path: Path, name: str) -> dict[tuple[str, int], object]:
    found = find_records(tmp_path / "experiments" / name / folder_of(name) / "records")
    return {(record.cell, record.seed): record for record in found}


def first_session(tmp_path: Path) -> argparse.Namespace:
    rates = [replace(tried("flowhn", lr, loss), cell=f"flowhn_{name}") for name, lr, loss in
             (("5e-4", 5e-4, 6.1), ("1e-3", 1e-3, 6.2))]  # fmt: skip
    ten = [trained(cell, loss=5.1 if cell == "flowhn_fac" else 4.5) for cell in accuracy_jobs.LONGEST_FIRST]
    return come_home(tmp_path, [*rates, *ten, trained("flowhn_no", 1, loss=4.5)], ["--kinds", "lr,table,seed"])


def second_session(tmp_path: Path, more=(), results=()) -> argparse.Namespace:
    made = [trained("flowhn_fac", 0, day=25, tps=2000.0, loss=5.0), trained("flowhn_fac", 1, day=25, loss=5.0)]
    made += [trained("shm", 1, day=25), trained("fac_keys", day=25, tps=1900.0, loss=4.7)]
    return come_home(tmp_path, [*made, *more], [*WORDS, "--long-seed", "1"], results, name="two")


def test_what_comes_home_is_sorted_and_the_rates_are_written(tmp_path):
    made = [
        replace(tried("flowhn", 1e-3, 6.0), cell="flowhn_1e-3"),
        replace(tried("llama", 2e-3, 6.0), cell="llama_2e-3"),
    ]
    result = {"cell": "flowhn_fac", "seed": 0, "tasks": {}, "git": {"commit": None, "dirty": None}}
    result["training"] = {"git": {"commit": None, "dirty": None}}
    args = come_home(tmp_path, [*made, trained("flowhn_fac"), trained("fac_keys")], results=[result])
    with tarfile.open(args.out) as archive:
        assert not [name for name in archive.getnames() if name.endswith((".safetensors", ".ckpt"))]
    cells = {name: [cell for cell, _ in kept(tmp_path, name)] for name in ("table1", "table1_lr", "beyond")}
    assert cells == {
        "table1": ["flowhn_fac"], "table1_lr": ["flowhn_1e-3", "llama_2e-3"], "beyond": ["fac_keys", "flowhn_fac"],
    }  # fmt: skip
    named = {"commit": "0" * 40, "dirty": False}
    assert all(record.git == named for name in cells for record in kept(tmp_path, name).values())
    told = json.loads((tmp_path / "experiments/long_context" / SETTING / "evals/flowhn_fac-s0.json").read_text())
    assert told["git"] == told["training"]["git"] == named
    table1 = yaml.safe_load(Path(args.rates).read_text())
    before = yaml.safe_load(ONE_TIER)
    assert table1["lr"]["135m"] == {**before, "llama": 2e-3, "flowhn": 1e-3}  # other families keep theirs
    assert (table1["title"], table1["cells"]) == ("T", {})


@pytest.mark.slow  # .ci/run runs it
def test_tables_are_drawn_after_a_second_session_of_seeds_and_variants(tmp_path):
    """As scripts/refresh_experiments.py draws them."""
    first_session(tmp_path)
    assert not (tmp_path / "experiments" / "beyond").exists()
    second_session(tmp_path)
    for name in ("table1", "beyond", "table1_lr"):
        folder = tmp_path / "experiments" / name / folder_of(name)
        refresh_experiments.redraw(folder, folder)
    gap = load_artefact("beyond").gap
    block = accuracy_block(tmp_path / "experiments", SETTING, gap=gap)
    assert (
        "1 closes half of the gap to FlowHN No_Split or more at 90 % of FAC_Split's speed or more: `fac_keys` (60 % at 95.0 %"
        in block
    )
    frame = pd.read_csv(tmp_path / "experiments" / "beyond" / SETTING / "gap.csv").set_index("cell")
    assert set(frame.index) == {"flowhn_fac", "flowhn_no", "shm", "fac_keys"}
    assert frame.loc["fac_keys", "speed"] == pytest.approx(0.95)  # of FAC in the same session
    assert frame.loc["fac_keys", "closed_flowhn_no"] == pytest.approx(0.6)


def test_a_second_measurement_counts_in_beyond_and_the_table_keeps_its_own(tmp_path, capsys):
    first_session(tmp_path)
    second_session(tmp_path)
    assert kept(tmp_path, "table1")["flowhn_fac", 0].throughput["tps"] == 1000.0
    assert kept(tmp_path, "beyond")["flowhn_fac", 0].throughput["tps"] == 2000.0
    assert {seed for cell, seed in kept(tmp_path, "table1") if cell == "flowhn_fac"} == {0, 1}
    come_home(tmp_path, [trained("fac_rope", day=26)], ["--kinds", "variant"], name="three")
    assert kept(tmp_path, "beyond")["flowhn_fac", 0].throughput["tps"] == 2000.0  # not table1's older one again
    anew = [trained(cell, day=27, tps=3000.0) for cell in accuracy_jobs.LONGEST_FIRST]
    come_home(tmp_path, anew[1:], ["--kinds", "table"], name="nine")
    assert kept(tmp_path, "table1")["flowhn_fac", 0].throughput["tps"] == 1000.0  # rows of two sessions are not mixed
    assert f"did not come to {anew[0].cell}" in capsys.readouterr().out
    come_home(tmp_path, anew, ["--kinds", "table"], name="four")
    assert kept(tmp_path, "table1")["flowhn_fac", 0].throughput["tps"] == 3000.0  # with all ten beside it


def test_rows_trained_anew_replace_theirs_alone_where_that_is_asked(tmp_path):
    args = first_session(tmp_path)
    second_session(tmp_path)
    assert ("flowhn_fac", 1) in kept(tmp_path, "table1")
    before = yaml.safe_load(Path(args.rates).read_text())["lr"]["135m"]
    anew = [trained("flowhn_fac", day=27, lr=1e-3, tps=3000.0)]
    tried_long = replace(tried("flowhn", 1e-3, 4.0), cell="flowhn_1e-3", config={"lr": 1e-3, "tokens": 30_000_000})
    come_home(tmp_path, [*anew, tried_long], ["--kinds", "table", "--replace", "--lr-tokens", "30000000"], name="anew")
    rows = kept(tmp_path, "table1")
    assert ("flowhn_fac", 1) not in rows  # it had another rate
    assert (rows["flowhn_fac", 0].throughput["tps"], rows["llama", 0].throughput["tps"]) == (3000.0, 1000.0)
    long = tmp_path / "experiments" / "table1_lr" / "135m-files-30M"
    # The row that gave way stays as what it shows of its rate.
    tries = {record.cell: record.config["lr"] for record in find_records(long / "records")}
    assert tries == {"flowhn_1e-3": 1e-3, "flowhn_5e-4": 5e-4}
    words = shlex.split((long / "command.txt").read_text())
    assert words[1:5] == ["table1_lr", "models=[flowhn_5e-4,flowhn_1e-3]", "size=135m", "budget=30M"]
    assert len(kept(tmp_path, "table1_lr")) == 2
    # What is written plans the rows as they are; shorter runs keep their rates.
    shorter, own = yaml.safe_load(Path(args.rates).read_text())["lr"]["135m"]
    assert shorter == {**before, "max_tokens": 29_999_999}
    assert own == {
        "max_tokens": 100_000_000,
        **{cell: 5e-4 for cell in accuracy_jobs.LONGEST_FIRST[:7]},
        "flowhn": 1e-3,
    }
    short = replace(tried_long, cell="flowhn_2e-3", config={"lr": 2e-3, "tokens": 4_000_000})
    with pytest.raises(UserError, match="tried at 4,000,000 and 30,000,000 tokens"):
        come_home(tmp_path, [tried_long, short], name="three")


def test_a_session_s_tokens_name_the_folder(tmp_path):
    made = [trained(cell, tokens=60_030_976) for cell in accuracy_jobs.LONGEST_FIRST]
    come_home(tmp_path, made, ["--kinds", "table", "--tokens", "60000000"])
    assert [path.name for path in (tmp_path / "experiments" / "table1").iterdir()] == ["135m-files-60M"]


def test_what_comes_home_says_what_plans_it(tmp_path):
    first_session(tmp_path)
    result = {"cell": "flowhn_fac", "seed": 1, "tasks": {}}
    second_session(tmp_path, results=[result])
    for name in ("table1", "table1_lr", "beyond", "long_context"):
        (line,) = (tmp_path / "experiments" / name / folder_of(name) / "command.txt").read_text().splitlines()
        program, told, *words = shlex.split(line)
        assert (program, told) == ("./reproduce.sh", name)
        committed = ROOT / "experiments" / name / folder_of(name) / "command.txt"
        if name == "table1_lr":
            assert words[:3] == ["models=[flowhn_5e-4,flowhn_1e-3]", "size=135m", "budget=4M"]
            continue
        if name == "table1":
            assert line == committed.read_text().strip()  # which a test of its own plans
            continue
        artefact = load_artefact(name)
        if name == "beyond":  # the rows that are there, no others
            models = words.pop(0)
            rows = {cell for cell, _ in kept(tmp_path, name)}
            assert models == f"models=[{','.join(cell for cell in artefact.cells if cell in rows)}]"
        artefact = replace(artefact, cells={"flowhn_fac": artefact.cells["flowhn_fac"]})
        seeds = {run.config["seed"] for run in plan_cells(artefact, words).wanted.values()}
        assert seeds == ({1} if name == "long_context" else {0, 1})


def test_a_probe_that_wins_later_changes_no_rate_that_rows_were_trained_at(tmp_path, capsys):
    args = first_session(tmp_path)
    before = Path(args.rates).read_text()
    assert yaml.safe_load(before)["lr"]["135m"]["flowhn"] == 5e-4
    no = {"lr": 1e-3, "choices": {"split": "no"}}
    won = [replace(tried("flowhn", 2.5e-4, 5.9), cell="flowhn_2.5e-4")]
    won += [replace(tried("flowhn", 1e-3, 5.8), cell="flowhn_no_1e-3", config=no)]
    capsys.readouterr()
    second_session(tmp_path, more=won)
    assert Path(args.rates).read_text() == before
    told = [line for line in capsys.readouterr().out.splitlines() if "keeps the rates" in line]
    assert len(told) == 1
    assert "flowhn_no 0.001 (the table: 0.0005)" in told[0]
    assert "flowhn 0.00025 (the table: 0.0005)" in told[0]
    assert {"flowhn_2.5e-4", "flowhn_no_1e-3"} <= {cell for cell, _ in kept(tmp_path, "table1_lr")}


def test_rates_of_other_lengths_sizes_and_families_stay(tmp_path, capsys):
    path = tmp_path / "table1.yaml"
    tiers = "[{max_tokens: 1000, flowhn: 1.0e-3}, {max_tokens: 5000, flowhn: 5.0e-4, llama: 2.0e-3}]"
    path.write_text(f"title: T\nlr: {{tiny: {{max_tokens: 10, shm: 1.0e-3}}, 135m: {tiers}}}\ncells: {{}}\n")
    accuracy_keep.write_rates(path, [tried("llama", 1e-3, 5.0), tried("llama", 2e-3, 5.5)], 3000)
    lr = yaml.safe_load(path.read_text())["lr"]
    assert lr["tiny"] == {"max_tokens": 10, "shm": 1e-3}
    assert lr["135m"] == [{"max_tokens": 1000, "flowhn": 1e-3}, {"max_tokens": 5000, "llama": 1e-3, "flowhn": 5e-4}]
    before = path.read_text()
    capsys.readouterr()
    accuracy_keep._tell_rates(path, [tried("flowhn", 1e-3, 5.0)], 3000)
    assert "flowhn 0.001 (the table: 0.0005)" in capsys.readouterr().out
    accuracy_keep._tell_rates(path, [tried("flowhn", 1e-3, 5.0)], 900)
    assert capsys.readouterr().out == ""
    assert path.read_text() == before
    accuracy_keep.write_rates(path, [tried("llama", 1e-3, 5.0)], 9000)
    assert yaml.safe_load(path.read_text())["lr"]["135m"][2] == {"max_tokens": 100_000_000, "llama": 1e-3}


def test_records_at_two_rates_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match=r"flowhn_fac.*different learning rates \(seed 0: 0.0005, seed 1: 0.001\)"):
        pool([trained("flowhn_fac"), trained("flowhn_fac", 1, lr=1e-3)], "135m")
    first_session(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "experiments").rglob("*.json")}
    with pytest.raises(UserError, match="different learning rates"):
        come_home(tmp_path, [trained("shm", 1), trained("flowhn_fac", 1, lr=1e-3)], ["--kinds", "seed"], name="two")
    assert {path: path.read_bytes() for path in (tmp_path / "experiments").rglob("*.json")} == before


@pytest.fixture
def carried(tmp_path) -> Path:
    """A working tree with build/site.tar.xz, which holds the module ``founded``."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "build").mkdir()
    (tmp_path / "scripts" / "gpu_packages.sh").write_text((ROOT / "scripts" / "gpu_packages.sh").read_text())
    pack_module(tmp_path, "site", "founded")
    return tmp_path


def pack_module(folder: Path, archive: str, module: str) -> None:
    (folder / f"{module}.py").write_text("")
    with tarfile.open(folder / "build" / f"{archive}.tar.xz", "w:xz") as file:
        file.add(folder / f"{module}.py", arcname=f"{module}.py")


def source_packages(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    line = f"site={folder}/site; source scripts/gpu_packages.sh && need_packages {' '.join(names)} && echo fine"
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow  # .ci/run runs it
def test_packages_that_come_in_several_calls_are_each_unpacked(carried):
    assert source_packages(carried, "founded", "mamba_ssm").stdout == "fine\n"  # on a CPU without mamba_ssm
    pack_module(carried, "mamba", "later")
    done = source_packages(carried, "founded", "later")
    assert (done.returncode, done.stdout) == (0, "fine\n")
    assert {path.name for path in (carried / "site").glob(".*")} == {".site", ".mamba"}


def test_a_missing_package_is_one_sentence(carried):
    done = source_packages(carried, "founded", "absent")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("absent cannot be imported from")
    assert line.endswith("carry build/site.tar.xz in a call first")
