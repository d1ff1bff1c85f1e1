"""The session script of issue 5: its jobs, the runs behind them, and what it brings home."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from test_reporting import fake

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import accuracy_jobs  # noqa: E402
import accuracy_session  # noqa: E402

from flowhn.artefacts import load_artefact, plan_cells, rates_for  # noqa: E402
from flowhn.errors import UserError  # noqa: E402
from flowhn.reporting.rates import FAMILIES, chosen_rates, rate_table, with_table_rows  # noqa: E402
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
    kinds = [job.kind for job in jobs if job.cell not in accuracy_jobs.LATER_VARIANTS]
    assert kinds == sorted(kinds, key=["lr", "table", "seed", "variant", "long"].index)
    assert {job.cell for job in jobs[len(kinds) :]} == set(accuracy_jobs.LATER_VARIANTS)
    assert len([job for job in jobs if job.kind == "seed"]) == 3  # what is asked over long contexts is trained already
    assert {job.cell for job in jobs if job.kind == "table"} == set(load_artefact("table1").cells)
    ends = {"flowhn_no", "shm", "flowhn_fac"}  # rows of Table 1
    assert {job.cell for job in jobs if job.kind == "variant"} == set(load_artefact("beyond").cells) - ends
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
    assert names == ["flowhn_2.5e-4", "flowhn_no_5e-4", "flowhn_no_1e-3", "flowhn_no_2e-3"]
    assert [job.cell for job in probes[:4]] == names  # before the table
    cells = load_artefact("table1_lr").cells
    assert set(names) <= set(cells)
    assert not {job.cell for job in accuracy_jobs.plan_jobs(1, 1, accuracy_session.parse(["daemon"]).kinds)} & set(
        names
    )
    assert max(job.seconds() for job in probes[:4]) < 20
    planned = plan_cells(load_artefact("table1_lr"), ["size=tiny", "budget=4096", f"models=[{','.join(names)}]"]).wanted
    assert {name: (run.config["lr"], run.config["choices"]["split"]) for name, run in planned.items()} == {
        "flowhn_2.5e-4": (2.5e-4, "fac"), "flowhn_no_5e-4": (5e-4, "no"), "flowhn_no_1e-3": (1e-3, "no"),
        "flowhn_no_2e-3": (2e-3, "no"),
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
    table = next(job for job in session.jobs if job.cell == "flowhn_no" and job.kind == "table")
    assert session.rate(table) == 5e-4  # the committed one: not all rates of this session have been tried yet
    for job in [job for job in session.jobs if job.is_rate]:
        session.finish(job, 1.0)
    rates = {job.cell: session.rate(job) for job in session.jobs if job.kind == "table"}
    assert (rates["flowhn_no"], rates["flowhn_ae"], rates["flowhn_fac"], rates["llama"]) == (1e-3, 5e-4, 5e-4, 1e-3)


def test_a_split_s_own_rate_wins_over_its_model_s():
    artefact = replace(
        load_artefact("table1"), lr={"tiny": {"max_tokens": 100_000, "flowhn": 7e-3, "flowhn_no": 9e-3}}, seeds={}
    )
    runs = plan_cells(artefact, ["size=tiny", "budget=50000", "models=[flowhn_no,flowhn_fac]"]).wanted
    assert {label: run.config["lr"] for label, run in runs.items()} == {"flowhn_no": 9e-3, "flowhn_fac": 7e-3}


def test_rates_go_by_the_length_of_a_run():
    short, long = {"max_tokens": 60_000, "flowhn": 7e-3}, {"max_tokens": 90_000, "flowhn": 5e-3, "flowhn_no": 6e-3}
    artefact = replace(load_artefact("table1"), lr={"tiny": [short, long]}, seeds={})
    assert rates_for(artefact, "tiny", 60_000) == {"flowhn": 7e-3}
    assert rates_for(artefact, "tiny", 60_001) == {"flowhn": 5e-3, "flowhn_no": 6e-3}
    assert rates_for(artefact, "tiny", 90_001) == rates_for(artefact, "135m", 1) == {}
    words = ["size=tiny", "models=[flowhn_no,flowhn_fac]"]
    got = {
        budget: [run.config["lr"] for run in plan_cells(artefact, [*words, f"budget={budget}"]).wanted.values()]
        for budget in (50_000, 80_000)
    }
    assert got == {50_000: [7e-3, 7e-3], 80_000: [6e-3, 5e-3]}


def test_a_session_of_some_rows_tries_their_rates_first_and_trains_them_before_the_variants(tmp_path):
    words = [
        "plan",
        "--kinds",
        "table,seed,variant",
        "--rows",
        "flowhn_fac,flowhn_no",
        "--tries",
        "flowhn_2e-3,flowhn_no_1e-3",
    ]
    args = accuracy_session.parse([*words, "--variants", "fac_keys,fac_keys:1"])
    assert [job.name for job in accuracy_jobs.planned(args)] == [
        "lr-flowhn_2e-3-s0", "probe-flowhn_no_1e-3-s0", "table-flowhn_fac-s0", "table-flowhn_no-s0", "variant-fac_keys-s0",
        "variant-fac_keys-s1", "seed-flowhn_fac-s1", "seed-flowhn_no-s1", "seed-shm-s1",
    ]  # fmt: skip
    for wrong in (["--rows", "flowhn_none"], ["--tries", "flowhn_3e-3"]):
        with pytest.raises(UserError, match=f"{wrong[0]}={wrong[1]} is not one of"):
            accuracy_jobs.planned(accuracy_session.parse([*words, *wrong]))


def test_a_session_that_tries_no_split_s_rate_alone_takes_it_for_no_split_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_jobs, "COMMITTED", tmp_path / "none" / "table1_lr")
    session = accuracy_jobs.Session(
        options(
            tmp_path, kinds="table", size="135m", tokens=60_000_000, rows="flowhn_no,flowhn_fac", tries="flowhn_no_1e-3"
        )
    )
    record = replace(tried("flowhn", 1e-3, 4.2), cell="flowhn_no_1e-3", config={"lr": 1e-3, "choices": {"split": "no"}})
    write_record(tmp_path / "runs" / "one" / "record.json", record)
    for job in [job for job in session.jobs if job.is_rate]:
        session.finish(job, 1.0)
    rates = {job.cell: session.rate(job) for job in session.jobs if job.kind == "table"}
    committed = rates_for(load_artefact("table1"), "135m", 60_000_000)["flowhn"]
    assert rates == {"flowhn_no": 1e-3, "flowhn_fac": committed}


def test_rows_of_table_1_are_rates_tried_where_text_seed_and_tokens_are_the_same():
    tried_here = [
        replace(tried("flowhn", 1e-3, 4.2), cell="flowhn_no_1e-3", config={"lr": 1e-3, "choices": {"split": "no"}})
    ]
    no = {"lr": 5e-4, "choices": {"split": "no"}}
    row = replace(tried("flowhn", 5e-4, 4.4), cell="flowhn_no", config=no)
    others = [replace(row, cell="flowhn_fac"), replace(row, seed=1), replace(row, tokens=row.tokens + 1)]
    others += [replace(row, data={**row.data, "sha256": "other"}), replace(row, config={**no, "lr": 1e-3})]
    found = with_table_rows(tried_here, [row, *others])
    assert [(record.cell, record.config["lr"]) for record in found] == [("flowhn_no_1e-3", 1e-3), ("flowhn_no", 5e-4)]
    assert chosen_rates(found) == {"flowhn_no": 1e-3}


@pytest.mark.slow  # .ci/run runs it
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
    session.args.seconds = hymba.seconds() - 1
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


def test_a_session_without_the_table_trains_at_the_committed_rates(tmp_path):
    args = {"tokens": 30_000_000, "size": "135m"}
    (tmp_path / "a").mkdir()
    session = accuracy_jobs.Session(options(tmp_path / "a", kinds="seed,variant,probe", **args))
    probe = replace(tried("flowhn", 2.5e-4, 1.0), cell="flowhn_2.5e-4")
    write_record(session.work / "runs" / "p" / "record.json", probe)
    committed = rates_for(load_artefact("table1"), "135m", 30_000_000)["flowhn"]
    assert {session.rate(job) for job in session.jobs if job.kind == "variant"} == {committed}
    session.describe()
    on = accuracy_jobs.Session(options(tmp_path / "a", kinds="variant", **args))  # with an earlier call's records
    assert on.rate(on.jobs[0]) == committed
    table = accuracy_jobs.Session(options(tmp_path / "a", kinds="table", **args))
    assert {table.rate(job) for job in table.jobs if job.cell == "flowhn_fac"} == {2.5e-4}


WORDS = ["--kinds", "seed,variant,probe,long", "--extra", "flowhn_fac:0", "--extra", "llama:1", "--extra", "mamba2:1"]


def test_the_planned_session_follows_its_worth(tmp_path):
    args = accuracy_session.parse(["plan", *WORDS, "--long-seed", "1"])
    jobs = accuracy_jobs.plan_jobs(
        args.tokens, 1, args.kinds, extra=args.extra, long_seed=1, committed={("flowhn_no", 1)}
    )  # fmt: skip
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert names[:5] == [
        "seed-flowhn_fac-s0", "seed-flowhn_fac-s1", "seed-shm-s1",
        "variant-fac_keys_rope_conv_sum-s0", "variant-fac_rope_conv_sum-s0",
    ]  # fmt: skip
    assert names[16:24] == [
        "long-flowhn_fac-s1", "long-shm-s1", "seed-flowhn_no-s1", "long-flowhn_no-s1", "seed-llama-s1", "long-llama-s1",
        "seed-mamba2-s1", "long-mamba2-s1",
    ]  # fmt: skip
    assert names[24:26] == ["variant-fac_thin-s0", "variant-fac_keys_rope_window-s0"]
    assert [job.kind for job in jobs[-3:]] == ["probe"] * 3
    without = accuracy_jobs.plan_jobs(args.tokens, 1, "seed,variant", committed={("flowhn_no", 1)})
    assert "seed-flowhn_no-s1" not in {job.name for job in without}
    one, two = (accuracy_jobs.timetable(jobs, gpus=gpus, seconds=1350) for gpus in (1, 2))
    assert set(two) == set(names)
    assert set(names[:14]) <= set(one) < set(names)
    assert max(one.values()) <= 1350


def test_variants_asked_for_by_name_come_first(monkeypatch, capsys):
    words = ["plan", "--kinds", "table,variant", "--variants", "fac_keys,fac_bf16_residual,fac_keys:1"]
    names = [job.name for job in accuracy_jobs.planned(accuracy_session.parse(words))]
    named = ["variant-fac_keys-s0", "variant-fac_bf16_residual-s0", "variant-fac_keys-s1"]
    assert names[:4] == ["table-flowhn_fac-s0", *named]
    assert len(names) == len(set(names)) == 13
    monkeypatch.setattr(sys, "argv", ["accuracy_session.py", *words, "--variants", "fac_none"])
    with pytest.raises(SystemExit) as ended:
        accuracy_session.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("--variants=fac_none:0 is no row of beyond")


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


def test_a_long_context_result_says_what_was_asked_and_is_not_made_twice(tmp_path, monkeypatch):
    """The same as ``./reproduce.sh long_context`` looks for."""
    from flowhn import run_long_context

    session = accuracy_jobs.Session(options(tmp_path, kinds="long", long_override=["eval.limit=25"]))
    job = next(job for job in session.jobs if job.kind == "long")
    run = session.run_of(job)
    run.folder.mkdir(parents=True)
    monkeypatch.setattr(run_long_context, "evaluate_long", lambda *args: {"seconds": 3.0})
    assert accuracy_session.run_job(session, job, None) == ("3 s", True)
    told = json.loads((run.folder / "eval-long_context.json").read_text())
    suite = run_long_context.long_suite(load_artefact("long_context").suite["135m"])
    assert told["asked"] == run_long_context.asked_of(suite)
    assert accuracy_session.run_job(session, job, None) == ("its result is there already", False)


def test_what_is_compiled_first_is_what_runs_first(tmp_path):
    def cells(gpu: int, **words) -> list[str]:
        session = accuracy_jobs.Session(options(tmp_path, tokens=30_000_000, size="135m", **words))
        return [job.cell for job in accuracy_session.to_warm(session, gpu)]

    second = {"kinds": "seed,variant,probe,long", "extra": ["flowhn_fac:0"], "long_seed": 1}
    assert cells(0, gpus=1, **second) == [
        "flowhn_fac",
        "fac_keys_rope_conv_sum",
        "fac_rope_conv_sum",
        "fac_keys_rope_conv",
    ]
    assert cells(1, gpus=2, **second)[:2] == ["fac_keys_rope_conv_sum", "fac_keys_rope_conv"]
    assert cells(0, gpus=1, kinds="lr,table") == ["flowhn_5e-4", "hybrid_5e-4", "mamba_5e-4", "llama_5e-4"]


def test_the_committed_rates_are_those_of_the_committed_rows_and_won_before_them():
    """Each row has the rate that table1.yaml gives its length, and that had won in its family before, in the longest runs tried.

    No_Split may have FAC_Split's: it was first trained before it was tried itself.
    """
    records = find_records(ROOT / "experiments" / "table1_lr")
    table1 = load_artefact("table1")
    rows = [row for row in find_records(ROOT / "experiments" / "table1") if row.size in table1.lr]
    assert rows
    for row in rows:
        own = rates_for(table1, row.size, row.tokens)
        assert row.config["lr"] == own.get(row.cell, own[row.model]), row.run_id
        won: dict[str, float] = {}
        for tokens in sorted({record.tokens for record in records if record.tokens <= row.tokens}):
            tried = [r for r in records if (r.size, r.tokens) == (row.size, tokens) and r.created < row.created]
            won |= chosen_rates(tried)
        names = {"flowhn_no", "flowhn"} if row.cell == "flowhn_no" else {row.model}
        assert row.config["lr"] in {won[name] for name in names if name in won}, row.run_id


@pytest.mark.slow  # .ci/run runs it
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


def test_a_session_keeps_to_the_gpus_it_was_given(monkeypatch):
    """Beside another program that was given the first GPU of the machine."""
    for given, number, chosen in (("1", 0, "1"), ("2,5", 1, "5"), (None, 1, "1")):
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        monkeypatch.setenv(accuracy_session.GIVEN, "")  # what is set below goes with the test
        monkeypatch.delenv(accuracy_session.GIVEN)
        for _ in range(2):  # a worker that begins again in a fresh interpreter asks twice
            accuracy_session.choose_gpu(number)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UserError, match=r"--gpus=2.*CUDA_VISIBLE_DEVICES=1"):
        accuracy_session.check_gpus(2)


def test_a_worker_that_failed_is_started_again():
    """On one GPU the failed worker is the only one: nobody else keeps the session alive."""
    ended = lambda code: argparse.Namespace(exitcode=code)  # noqa: E731
    assert accuracy_session.goes_on({}, 1)
    assert accuracy_session.goes_on({0: ended(None)}, 1)
    assert accuracy_session.goes_on({0: ended(3)}, 1)
    assert accuracy_session.goes_on({0: ended(0), 1: ended(3)}, 2)
    assert not accuracy_session.goes_on({0: ended(0), 1: ended(0)}, 2)
