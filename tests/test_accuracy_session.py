"""The session script of issue 5: its jobs, the runs behind them, and what it brings home."""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from test_reporting import fake

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import accuracy_jobs  # noqa: E402
import accuracy_keep  # noqa: E402
import accuracy_session  # noqa: E402

from flowhn.artefacts import load_artefact, plan_cells  # noqa: E402
from flowhn.reporting.rates import FAMILIES, chosen_rates, rate_table  # noqa: E402
from flowhn.reporting.record import find_records, write_record  # noqa: E402


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


def test_what_comes_home_is_sorted_and_the_rates_are_written(tmp_path):
    work, home = tmp_path / "work", tmp_path / "home"
    made = [tried("flowhn", 1e-3, 6.0), tried("llama", 2e-3, 6.0), fake("flowhn_fac"), fake("fac_keys")]
    made[0] = replace(made[0], cell="flowhn_1e-3")
    made[1] = replace(made[1], cell="llama_2e-3")
    for record in made:
        write_record(work / "runs" / record.cell / "record.json", record)
    result = {"cell": "flowhn_fac", "seed": 0, "tasks": {}}
    (work / "runs" / "flowhn_fac" / "eval-long_context.json").write_text(json.dumps(result))
    rates = tmp_path / "table1.yaml"
    rates.write_text((ROOT / "configs/artefacts/table1.yaml").read_text())
    args = argparse.Namespace(
        work=str(work), out=str(tmp_path / "a.tgz"), commit="0" * 40, file=str(tmp_path / "a.tgz"), into=str(home),
        setting="135m-files-30M", rates=str(rates),
    )  # fmt: skip
    accuracy_keep.pack(args)
    with tarfile.open(args.out) as archive:
        assert not [name for name in archive.getnames() if name.endswith((".safetensors", ".ckpt"))]
    accuracy_keep.keep(args)
    kept = {
        path.parent.name: find_records(path) for path in home.glob("*/135m-files-30M") if (path / "records").is_dir()
    }
    assert {name: [record.cell for record in records] for name, records in kept.items()} == {
        "table1": ["flowhn_fac"], "table1_lr": ["flowhn_1e-3", "llama_2e-3"], "beyond": ["fac_keys", "flowhn_fac"],
    }  # fmt: skip
    assert {record.git["commit"] for records in kept.values() for record in records} == {"0" * 40}
    assert (home / "long_context/135m-files-30M/evals/flowhn_fac-s0.json").is_file()
    table1 = yaml.safe_load(rates.read_text())
    assert table1["lr"]["135m"] == {"max_tokens": 100_000_000, "llama": 2e-3, "flowhn": 1e-3}
    assert table1["cells"] == yaml.safe_load((ROOT / "configs/artefacts/table1.yaml").read_text())["cells"]


def test_the_committed_rates_are_what_the_committed_records_choose():
    own = load_artefact("table1").lr
    for size, rates in own.items():
        records = [r for r in find_records(ROOT / "experiments" / "table1_lr") if r.size == size]
        assert {model: rate for model, rate in rates.items() if model != "max_tokens"} == chosen_rates(records)


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
