"""The session script of issue 5: its jobs, the runs behind them, and what it brings home."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

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
from flowhn.reporting.rates import FAMILIES, chosen_rates, rate_table  # noqa: E402
from flowhn.reporting.record import find_records, write_record  # noqa: E402
from flowhn.reporting.summary import accuracy_block  # noqa: E402


def options(tmp_path: Path, **changes) -> argparse.Namespace:
    args = accuracy_session.parse(["daemon", "--work", str(tmp_path), "--size", "tiny", "--tokens", "9000"])
    return argparse.Namespace(**{**vars(args), "begun": time.time(), **changes})


@pytest.fixture
def session(tmp_path) -> accuracy_jobs.Session:
    return accuracy_jobs.Session(options(tmp_path))


def tried(model: str, lr: float, loss: float | None, **changes):
    record = fake(f"{model}_{lr:g}", artefact="table1_lr", model=model, config={"lr": lr}, **changes)
    return replace(record, losses={**record.losses, "final_val": loss})


def test_the_plan_has_everything_once_and_what_matters_most_first():
    jobs = accuracy_jobs.plan_jobs(30_000_000, 4_000_000, "lr,table,seed,variant,long")
    assert len({job.name for job in jobs}) == len(jobs)
    assert [job.kind for job in jobs] == sorted(
        [job.kind for job in jobs], key=["lr", "table", "seed", "variant", "long"].index
    )
    assert len([job for job in jobs if job.kind == "seed"]) == 3  # what is asked over long contexts is trained already
    assert {job.cell for job in jobs if job.kind == "table"} == set(load_artefact("table1").cells)
    assert {job.cell for job in jobs if job.kind == "variant"} <= set(load_artefact("beyond").cells)
    assert {job.cell for job in jobs if job.kind == "seed"} == {"flowhn_no", "flowhn_fac", "shm"}
    assert {load_artefact("table1_lr").cells[job.cell][0] for job in jobs if job.kind == "lr"} == {
        f"model={models[0]}" for family, models in FAMILIES.items() if family != "flowhn_no"
    }
    table = [
        job.tokens / accuracy_jobs.SPEED.get(job.cell, accuracy_jobs.FAC_SPEED) for job in jobs if job.kind == "table"
    ]
    assert table == sorted(table, reverse=True)  # longest first, so that the GPUs end together


def test_probes_of_flowhn_s_rate_are_planned_when_asked_for():
    probes = accuracy_jobs.plan_jobs(30_000_000, 4_000_000, "probe,table")
    names = [job.cell for job in probes if job.is_rate]
    assert names == ["flowhn_2.5e-4", "flowhn_no_5e-4", "flowhn_no_1e-3"]
    assert [job.cell for job in probes[:3]] == names  # before the table
    cells = load_artefact("table1_lr").cells
    assert set(names) <= set(cells)
    assert not {job.cell for job in accuracy_jobs.plan_jobs(1, 1, accuracy_session.parse(["daemon"]).kinds)} & set(
        names
    )
    assert max(job.seconds() for job in probes[:3]) < 20
    planned = plan_cells(load_artefact("table1_lr"), ["size=tiny", "budget=4096", f"models=[{','.join(names)}]"]).wanted
    assert {name: (run.config["lr"], run.config["choices"]["split"]) for name, run in planned.items()} == {
        "flowhn_2.5e-4": (2.5e-4, "fac"), "flowhn_no_5e-4": (5e-4, "no"), "flowhn_no_1e-3": (1e-3, "no"),
    }  # fmt: skip


def test_no_split_s_own_rate_is_chosen_apart_and_the_earlier_records_count(tmp_path, monkeypatch):
    kept = [tried("flowhn", 5e-4, 6.1936), tried("flowhn", 1e-3, 6.1942), tried("llama", 1e-3, 6.2)]
    for record in kept:
        write_record(tmp_path / "kept" / "s" / "records" / f"{record.cell}.json", record)
    monkeypatch.setattr(accuracy_jobs, "COMMITTED", tmp_path / "kept")
    session = accuracy_jobs.Session(options(tmp_path, kinds="probe,table", size="135m", tokens=30_000_000))
    no = {"choices": {"split": "no"}}
    fresh = [tried("flowhn", 2.5e-4, 6.4)]
    fresh += [
        replace(tried("flowhn", lr, loss), cell=f"flowhn_no_{lr:g}", config={"lr": lr, **no})
        for lr, loss in ((5e-4, 6.0), (1e-3, 5.9))
    ]
    for record in fresh:
        write_record(tmp_path / "runs" / record.cell / "record.json", record)
    assert chosen_rates(session.lr_records()) == {"flowhn": 5e-4, "flowhn_no": 1e-3, "llama": 1e-3}
    rates = {job.cell: session.rate(job) for job in session.jobs if job.kind == "table"}
    assert (rates["flowhn_no"], rates["flowhn_ae"], rates["flowhn_fac"], rates["llama"]) == (1e-3, 5e-4, 5e-4, 1e-3)


def test_a_split_s_own_rate_wins_over_its_model_s():
    artefact = replace(
        load_artefact("table1"), lr={"tiny": {"max_tokens": 100_000, "flowhn": 7e-3, "flowhn_no": 9e-3}}, seeds={}
    )
    runs = plan_cells(artefact, ["size=tiny", "budget=50000", "models=[flowhn_no,flowhn_fac]"]).wanted
    assert {label: run.config["lr"] for label, run in runs.items()} == {"flowhn_no": 9e-3, "flowhn_fac": 7e-3}


def test_a_job_is_the_run_that_reproduce_would_plan(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "rate", lambda job: 1e-3)
    for job in [job for job in session.jobs if job.cell in ("flowhn_fac", "fac_keys_rope", "llama_1e-3")]:
        if job.kind == "long":
            continue
        words = [f"size=tiny budget={job.tokens} data=files data.path=data data.val_path=valid output_dir={tmp_path}"]
        words = [*words[0].split(), f"models=[{job.cell}]", f"seeds=[{job.seed}]"]
        words += [] if job.kind == "lr" else ["eval=paper", "eval.data_dir=eval", "val_points=10", "lr=1e-3"]
        (planned,) = plan_cells(load_artefact(job.artefact), words).wanted.values()
        assert session.run_of(job).run_id == planned.run_id


def test_learning_rates_come_first_then_each_job_goes_to_one_gpu(session):
    other = accuracy_jobs.Session(session.args)
    taken = []
    while isinstance(job := session.next_job(), accuracy_jobs.Job):
        taken.append(job)
    assert job == "wait"
    assert {job.kind for job in taken} == {"lr"}
    for job in taken:
        session.finish(job, 5.0)
    first, second = session.next_job(), other.next_job()
    assert (first.cell, second.cell) == accuracy_jobs.LONGEST_FIRST[:2]


def test_what_no_longer_fits_is_left_out_and_a_measured_pace_counts(tmp_path):
    session = accuracy_jobs.Session(options(tmp_path, kinds="table,seed", tokens=30_000_000))
    hymba = session.jobs[0]
    session.args.seconds = hymba.seconds() - 10
    assert session.next_job().cell == "mamba1"
    for job in session.jobs[1:4]:
        session.finish(job, 0.5 * job.seconds())
    assert session.pace() == pytest.approx(0.55)
    assert session.next_job().cell == "hymba"
    session.args.seconds = 1
    assert session.next_job() == "done"


def test_long_context_waits_for_its_model(tmp_path):
    session = accuracy_jobs.Session(options(tmp_path, kinds="table,long"))
    for job in session.jobs:
        if job.kind == "table":
            session.claim(job)
    assert session.next_job() == "wait"
    session.finish(next(job for job in session.jobs if job.cell == "llama" and job.kind == "table"), 1.0)
    job = session.next_job()
    assert (job.kind, job.cell) == ("long", "llama")


def test_a_second_session_takes_the_committed_rates_and_other_seeds(tmp_path, monkeypatch):
    words = {"kinds": "seed,variant,long", "extra": ["llama:1"], "long_seed": 1, "tokens": 30_000_000, "size": "135m"}
    session = accuracy_jobs.Session(options(tmp_path, **words))
    names = [job.name for job in session.jobs]
    assert "seed-llama-s1" in names
    assert "long-llama-s1" in names
    rates = {"135m": {"max_tokens": 100_000_000, "flowhn": 7e-4}}
    monkeypatch.setattr("flowhn.artefacts.load_artefact", lambda name: replace(load_artefact(name), lr=rates))
    by_name = {job.name: job for job in session.jobs}
    assert session.rate(by_name["variant-fac_keys-s0"]) == 7e-4
    assert session.rate(by_name["seed-llama-s1"]) is None
    session.claim(by_name["seed-llama-s1"])
    assert not session.ready(by_name["long-llama-s1"])
    session.finish(by_name["seed-llama-s1"], 1.0)
    assert session.ready(by_name["long-llama-s1"])


def test_the_rate_with_the_lowest_loss_serves_its_family():
    records = [tried("shm", 5e-4, 7.0), tried("shm", 1e-3, 6.0), tried("shm", 2e-3, None), tried("mamba2", 5e-4, 6.5)]
    assert chosen_rates(records) == {"shm": 1e-3, "jamba": 1e-3, "hymba": 1e-3, "mamba2": 5e-4, "mamba1": 5e-4}
    frame = rate_table(records)
    assert list(frame["chosen"]) == [False, True, False, True]
    assert rate_table([]).empty


SETTING = "135m-files-30M"
WORDS = ["--kinds", "seed,variant,probe,long", "--extra", "flowhn_fac:0", "--extra", "llama:1", "--extra", "mamba2:1"]


def trained(cell: str, seed: int = 0, *, lr: float = 5e-4, day: int = 24, **changes):
    changes = {"tokens": 30_015_488, "config": {"lr": lr}, "created": f"2026-11-{day}T04:00:00+00:00", **changes}
    return fake(cell, seed=seed, **changes)


def come_home(tmp_path: Path, records, words=(), results=(), name="one") -> argparse.Namespace:
    """Pack the records of a session with these words and sort them into ``tmp_path/experiments``."""
    work = tmp_path / name
    args = accuracy_session.parse(["keep", str(tmp_path / "a.tgz"), "--work", str(work), *words])
    rates = tmp_path / "table1.yaml"
    if not rates.exists():
        rates.write_text((ROOT / "configs/artefacts/table1.yaml").read_text())
    args = argparse.Namespace(
        **{
            **vars(args),
            "out": args.file,
            "commit": "0" * 40,
            "into": str(tmp_path / "experiments"),
            "rates": str(rates),
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


def kept(tmp_path: Path, name: str) -> dict[tuple[str, int], object]:
    found = find_records(tmp_path / "experiments" / name / SETTING / "records")
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
    assert table1["lr"]["135m"] == {"max_tokens": 100_000_000, "llama": 2e-3, "flowhn": 1e-3}
    assert table1["cells"] == yaml.safe_load((ROOT / "configs/artefacts/table1.yaml").read_text())["cells"]


def test_tables_are_drawn_after_a_second_session_of_seeds_and_variants(tmp_path):
    """As scripts/refresh_experiments.py draws them."""
    first_session(tmp_path)
    assert not (tmp_path / "experiments" / "beyond").exists()
    second_session(tmp_path)
    for name in ("table1", "beyond", "table1_lr"):
        folder = tmp_path / "experiments" / name / SETTING
        refresh_experiments.redraw(folder, folder)
    gap = load_artefact("beyond").gap
    block = accuracy_block(tmp_path / "experiments", SETTING, gap=gap)
    assert "`fac_keys` has the lowest loss" in block
    frame = pd.read_csv(tmp_path / "experiments" / "beyond" / SETTING / "gap.csv").set_index("cell")
    assert set(frame.index) == {"flowhn_fac", "flowhn_no", "shm", "fac_keys"}
    assert frame.loc["fac_keys", "speed"] == pytest.approx(0.95)  # of FAC in the same session
    assert frame.loc["fac_keys", "closed_flowhn_no"] == pytest.approx(0.6)


def test_a_second_measurement_counts_in_beyond_and_the_table_keeps_its_own(tmp_path):
    first_session(tmp_path)
    second_session(tmp_path)
    assert kept(tmp_path, "table1")["flowhn_fac", 0].throughput["tps"] == 1000.0
    assert kept(tmp_path, "beyond")["flowhn_fac", 0].throughput["tps"] == 2000.0
    assert {seed for cell, seed in kept(tmp_path, "table1") if cell == "flowhn_fac"} == {0, 1}
    come_home(tmp_path, [trained("fac_rope", day=26)], ["--kinds", "variant"], name="three")
    assert kept(tmp_path, "beyond")["flowhn_fac", 0].throughput["tps"] == 2000.0  # not table1's older one again
    anew = [trained(cell, day=27, tps=3000.0) for cell in accuracy_jobs.LONGEST_FIRST]
    come_home(tmp_path, anew, ["--kinds", "table"], name="four")
    assert kept(tmp_path, "table1")["flowhn_fac", 0].throughput["tps"] == 3000.0  # with all ten beside it


def test_what_comes_home_says_what_plans_it(tmp_path):
    first_session(tmp_path)
    result = {"cell": "flowhn_fac", "seed": 1, "tasks": {}}
    second_session(tmp_path, results=[result])
    for name in ("table1", "table1_lr", "beyond", "long_context"):
        (line,) = (tmp_path / "experiments" / name / SETTING / "command.txt").read_text().splitlines()
        program, told, *words = shlex.split(line)
        assert (program, told) == ("./reproduce.sh", name)
        committed = ROOT / "experiments" / name / SETTING / "command.txt"
        assert not name.startswith("table1") or line == committed.read_text().strip()
        cell = "flowhn_5e-4" if name == "table1_lr" else "flowhn_fac"
        wanted = plan_cells(load_artefact(name), [*words, f"models=[{cell}]"]).wanted
        seeds = {"long_context": {1}, "table1_lr": {0}}.get(name, {0, 1})
        assert {run.config["seed"] for run in wanted.values()} == seeds


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


def test_a_session_without_the_table_trains_at_the_committed_rates(tmp_path):
    args = {"tokens": 30_000_000, "size": "135m"}
    (tmp_path / "a").mkdir()
    session = accuracy_jobs.Session(options(tmp_path / "a", kinds="seed,variant,probe", **args))
    probe = replace(tried("flowhn", 2.5e-4, 1.0), cell="flowhn_2.5e-4")
    write_record(session.work / "runs" / "p" / "record.json", probe)
    committed = load_artefact("table1").lr["135m"]["flowhn"]
    assert {session.rate(job) for job in session.jobs if job.kind == "variant"} == {committed}
    session.describe()
    on = accuracy_jobs.Session(options(tmp_path / "a", kinds="variant", **args))  # with an earlier call's records
    assert on.rate(on.jobs[0]) == committed
    table = accuracy_jobs.Session(options(tmp_path / "a", kinds="table", **args))
    assert {table.rate(job) for job in table.jobs if job.cell == "flowhn_fac"} == {2.5e-4}


def test_records_at_two_rates_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match=r"flowhn_fac.*different learning rates \(seed 0: 0.0005, seed 1: 0.001\)"):
        pool([trained("flowhn_fac"), trained("flowhn_fac", 1, lr=1e-3)], "135m")
    first_session(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "experiments").rglob("*.json")}
    with pytest.raises(UserError, match="different learning rates"):
        come_home(tmp_path, [trained("shm", 1), trained("flowhn_fac", 1, lr=1e-3)], ["--kinds", "seed"], name="two")
    assert {path: path.read_bytes() for path in (tmp_path / "experiments").rglob("*.json")} == before


def test_the_planned_session_follows_its_worth(tmp_path):
    args = accuracy_session.parse(["plan", *WORDS, "--long-seed", "1"])
    jobs = accuracy_jobs.plan_jobs(
        args.tokens, 1, args.kinds, extra=args.extra, long_seed=1, committed={("flowhn_no", 1)}
    )  # fmt: skip
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert names[:6] == [
        "seed-flowhn_fac-s0", "seed-flowhn_fac-s1", "seed-shm-s1", "variant-fac_keys_rope-s0", "variant-fac_rope-s0",
        "variant-fac_keys-s0",
    ]  # fmt: skip
    assert names[11:19] == [
        "long-flowhn_fac-s1", "long-shm-s1", "seed-flowhn_no-s1", "long-flowhn_no-s1", "seed-llama-s1", "long-llama-s1",
        "seed-mamba2-s1", "long-mamba2-s1",
    ]  # fmt: skip
    assert [job.kind for job in jobs[19:]] == ["probe"] * 3
    without = accuracy_jobs.plan_jobs(args.tokens, 1, "seed,variant", committed={("flowhn_no", 1)})
    assert "seed-flowhn_no-s1" not in {job.name for job in without}
    one, two = (accuracy_jobs.timetable(jobs, gpus=gpus, seconds=850) for gpus in (1, 2))
    assert set(two) == set(names)
    assert set(names[:12]) <= set(one) < set(names)
    assert max(one.values()) <= 850


def test_a_long_job_is_planned_with_its_training_and_does_not_wait_for_what_cannot_come(tmp_path):
    session = accuracy_jobs.Session(options(tmp_path, kinds="long", long_seed=1, tokens=30_000_000, size="135m"))
    assert {(job.kind, job.cell) for job in session.jobs} == {
        (kind, cell) for cell in accuracy_jobs.LONG_MODELS for kind in ("seed", "long")
    }
    assert not any(session.ready(job) for job in session.jobs if job.kind == "long")
    session.args.begun, session.args.seconds = time.time(), accuracy_jobs.LONG_SECONDS + 30
    assert session.next_job() == "done"  # neither a training whose question would not fit, nor waiting for it


def test_skipped_and_failed_jobs_say_nothing_of_the_pace(tmp_path):
    session = accuracy_jobs.Session(options(tmp_path, kinds="seed,variant", tokens=30_000_000))
    for job in session.jobs[:4]:
        session.finish(job, 0.01, counts=False)
    assert session.pace() == 1.0
    for job in session.jobs[4:7]:
        session.finish(job, job.seconds())
    assert session.pace() == pytest.approx(1.1)
    assert session.finished(session.jobs[0])


def test_a_record_without_weights_is_trained_again_where_they_are_asked(tmp_path, monkeypatch):
    session = accuracy_jobs.Session(options(tmp_path, kinds="seed,variant,long", long_seed=1))
    seed, variant = session.jobs[0], next(job for job in session.jobs if job.kind == "variant")
    for job in (seed, variant):
        run = session.run_of(job)
        write_record(run.record_path, replace(fake(job.cell, "tiny", job.seed), run_id=run.run_id))

    def fails(*args):
        raise RuntimeError("no GPU")

    monkeypatch.setattr(accuracy_session, "train", lambda *args: "trained")
    assert accuracy_session.run_job(session, variant, None) == ("its record is there already", False)
    assert accuracy_session.run_job(session, seed, None) == ("trained", True)
    run = session.run_of(seed)
    write_record(run.record_path, replace(fake(seed.cell, "tiny", 1), run_id=run.run_id))
    monkeypatch.setattr(accuracy_session, "train", fails)
    with pytest.raises(RuntimeError):
        accuracy_session.run_job(session, seed, None)
    assert run.record() is not None  # the old record is not lost


def test_what_is_compiled_first_is_what_runs_first(tmp_path):
    def cells(gpu: int, **words) -> list[str]:
        session = accuracy_jobs.Session(options(tmp_path, tokens=30_000_000, size="135m", **words))
        return [job.cell for job in accuracy_session.to_warm(session, gpu)]

    second = {"kinds": "seed,variant,probe,long", "extra": ["flowhn_fac:0"], "long_seed": 1}
    assert cells(0, gpus=1, **second) == ["flowhn_fac", "shm", "fac_keys_rope", "fac_rope"]
    assert cells(1, gpus=2, **second)[:2] == ["shm", "fac_rope"]
    assert cells(0, gpus=1, kinds="lr,table") == ["flowhn_5e-4", "hybrid_5e-4", "mamba_5e-4", "llama_5e-4"]


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


def test_the_committed_rates_are_those_of_the_committed_rows_and_won_before_them():
    """A rate that is tried later may win; the rows keep theirs until all ten are trained anew."""
    records = find_records(ROOT / "experiments" / "table1_lr")
    for size, rates in load_artefact("table1").lr.items():
        rows = [r for r in find_records(ROOT / "experiments" / "table1") if r.size == size]
        assert all(r.config["lr"] == rates.get(r.cell, rates[r.model]) for r in rows)
        begun = min(r.created for r in rows)
        before = [r for r in records if r.size == size and r.created < begun]
        assert {model: rate for model, rate in rates.items() if model != "max_tokens"} == chosen_rates(before)


def test_rates_of_an_artefact_hold_for_short_runs_of_their_size_alone(monkeypatch):
    artefact = replace(
        load_artefact("table1"), lr={"tiny": {"max_tokens": 100_000, "llama": 7e-3}}, seeds={"tiny": {"shm": [0, 1]}}
    )
    short = plan_cells(artefact, ["size=tiny", "budget=50000", "models=[llama,shm]"]).wanted
    assert [(label, run.config["lr"]) for label, run in short.items()] == [
        ("llama", 7e-3), ("shm seed 0", 2e-3), ("shm seed 1", 2e-3),
    ]  # fmt: skip
    for words in (
        ["size=tiny", "budget=200000"],
        ["size=350m", "budget=50000"],
        ["budget=50000", "size=tiny", "lr=1e-3"],
    ):
        (run,) = plan_cells(artefact, [*words, "models=[llama]"]).wanted.values()
        assert run.config["lr"] != 7e-3
    assert list(plan_cells(artefact, ["size=tiny", "budget=50000", "models=[shm]", "seeds=[3]"]).wanted) == [
        "shm seed 3"
    ]
