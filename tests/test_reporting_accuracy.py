"""Tables of issue 5: gaps closed by variants, accuracy over length, overlap of questions and training text, more claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from flowhn.errors import UserError
from flowhn.reporting.artefact import write_artefact
from flowhn.reporting.bench import write_bench_record
from flowhn.reporting.bench_figures import throughput_figure
from flowhn.reporting.beyond import gap_table, readable_gap
from flowhn.reporting.cells import pool
from flowhn.reporting.figures import loss_figure, loss_vs_time_figure
from flowhn.reporting.gap_figure import gap_figure
from flowhn.reporting.long_context import answer, long_context_figure, read_results, write_long_context
from flowhn.reporting.rate_lines import rate_lines
from flowhn.reporting.reasons import at_equal_cost, depth_lines, equal_cost_lines, lack_lines
from flowhn.reporting.record import write_record
from flowhn.reporting.speeds import DaySpread
from flowhn.reporting.summary import _with_records, accuracy_block
from flowhn.reporting.variant_lines import beyond_lines, budget_words, fastest_lines
from flowhn.reporting.verdicts import verdicts
from test_reporting import fake, timed

GAP = {"of": "flowhn_fac", "to": ["flowhn_no", "shm"]}


def variants() -> list:
    return [
        fake("flowhn_fac", loss=4.70, tps=1000.0), fake("flowhn_fac", seed=1, loss=5.0), fake("flowhn_no", loss=4.50, tps=700.0),
        fake("shm", loss=4.30, tps=640.0), fake("fac_a", loss=4.60, tps=900.0), fake("fac_b", loss=4.55, tps=899.0),
        fake("fac_c", loss=4.80, tps=1000.0),
    ]  # fmt: skip


def test_share_of_the_gap_and_of_the_speed():
    frame = gap_table(variants(), size="135m", **GAP).set_index("cell")
    assert list(frame.index) == ["shm", "flowhn_no", "fac_b", "fac_a", "flowhn_fac", "fac_c"]
    assert set(frame["seeds"]) == {"0"}  # the second seed of one row is not held against rows of one seed
    assert frame.loc["fac_a", "closed_flowhn_no"] == pytest.approx(0.5)
    assert frame.loc["fac_a", "closed_shm"] == pytest.approx(0.25)
    assert frame.loc["fac_c", "closed_flowhn_no"] == pytest.approx(-0.5)
    assert frame["reached"].to_dict() == {
        "shm": False, "flowhn_no": False, "fac_b": False, "fac_a": True, "flowhn_fac": False, "fac_c": False,
    }  # fmt: skip
    shown = readable_gap(frame.reset_index(), **GAP).set_index("row")
    judged = "half the gap to FlowHN No_Split at 90 % of the speed"
    assert shown.loc["fac_a", judged] == "yes"
    assert shown.loc["fac_b", judged] == "no"
    beside = shown["speed beside FlowHN FAC_Split"]
    assert (beside["fac_a"], beside["fac_b"]) == ("90.0 %", "89.9 %")  # what a verdict turns on can be read
    assert shown.loc["FlowHN FAC_Split", "gap to FlowHN No_Split closed"] == "0 %"
    reached = [*variants(), fake("flowhn_no_conv", loss=4.4, tps=950.0)]
    shown = readable_gap(gap_table(reached, size="135m", **GAP), **GAP)
    assert shown[judged].value_counts()[""] == 4  # No_Split's variant is none of FAC_Split's


def test_a_share_that_rounds_to_nothing_has_no_sign():
    near = [*variants(), fake("fac_d", loss=4.7002, tps=1000.0)]
    shown = readable_gap(gap_table(near, size="135m", **GAP), **GAP).set_index("row")
    assert shown.loc["fac_d", "gap to FlowHN No_Split closed"] == "0 %"


def test_where_the_first_is_not_ahead_the_next_is_the_goal():
    records = [fake("flowhn_no", loss=4.9, tps=700.0) if r.cell == "flowhn_no" else r for r in variants()]
    frame = gap_table(records, size="135m", **GAP)
    assert set(frame[frame["reached"]]["cell"]) == set()
    shown = readable_gap(frame, **GAP).set_index("row")["half the gap to SHM at 90 % of the speed"]
    assert shown["fac_a"] == "no"
    near = [*records, fake("fac_d", loss=4.45, tps=990.0)]
    shown = readable_gap(gap_table(near, size="135m", **GAP), **GAP).set_index("row")
    assert shown.loc["fac_d", "half the gap to SHM at 90 % of the speed"] == "yes"


def test_no_gap_is_no_share():
    ahead = [fake("flowhn_fac", loss=4.0), fake("flowhn_no", loss=4.5), fake("fac_a", loss=3.9)]
    frame = gap_table(ahead, size="135m", **GAP).set_index("cell")
    assert frame[["closed_flowhn_no", "closed_shm"]].isna().all(axis=None)
    assert not frame["reached"].any()
    shown = readable_gap(frame.reset_index(), **GAP).set_index("row")
    assert shown.loc["fac_a", "half the gap at 90 % of the speed"] == "–"


def test_gaps_that_cannot_be_counted_are_refused():
    with pytest.raises(UserError, match="no record of flowhn_fac"):
        gap_table([fake("shm")], size="135m", **GAP)
    with pytest.raises(UserError, match="share no seed"):
        gap_table([fake("flowhn_fac"), fake("shm", seed=1)], size="135m", **GAP)


def test_an_artefact_s_own_tables_are_written(tmp_path):
    (tmp_path / "overlap.json").write_text(
        json.dumps(
            {
                "n": 13,
                "tasks": {
                    "boolq": {"questions": 200, "overlapping": 3},
                    "arc_easy": {"questions": 0, "overlapping": 0},
                },
            }
        )
    )
    write_artefact(variants(), tmp_path, title="T", figures=["loss_vs_time"], tables=["gap"], gap=GAP)
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.md", "table.csv", "gap.md", "gap.csv", "gap.png", "records", "loss_vs_time.png", "overlap.json",
    }  # fmt: skip
    text = (tmp_path / "table.md").read_text()
    assert "at least one run of 13 words stands in the training text: BoolQ 3 of 200 (1.5 %), ARC-e 0 of 0" in text
    assert pd.read_csv(tmp_path / "gap.csv")["closed_shm"].notna().all()
    (tmp_path / "overlap.json").write_text("{}")
    with pytest.raises(UserError, match=r"overlap\.json is damaged"):
        write_artefact(variants(), tmp_path, title="T")


def test_loss_over_time_takes_the_measured_speed_not_the_clock_with_compilation():
    (axes,) = loss_vs_time_figure([fake("flowhn_fac", tps=1e6), fake("llama", tps=5e5)], size="135m").axes
    ends = sorted(line.get_xdata()[-1] for line in axes.get_lines() if len(line.get_xdata()) == 8)
    assert ends == pytest.approx([60.0, 120.0])
    (axes,) = loss_vs_time_figure([fake("llama", tps=None)], size="135m").axes
    assert axes.get_lines()[0].get_xdata()[-1] == 24.0  # no measured speed: its own clock


def results(folder, cells=("llama", "flowhn_fac"), lengths=(1024, 2048)) -> None:
    folder.mkdir(parents=True)
    for cell in cells:
        tasks = {
            f"{kind}_{length // 1024}k": {
                "n": 20, "length": length, "exact_match": 0.5, "exact_match_stderr": 0.1, "acc": 0.6, "acc_stderr": 0.1,
            }
            for kind in ("niah", "recall") for length in lengths
        }  # fmt: skip
        content = {"cell": cell, "seed": 0, "size": "135m", "seq_len": 1024, "tasks": tasks}
        (folder / f"{cell}-s0.json").write_text(json.dumps(content))


def test_accuracy_over_length(tmp_path):
    results(tmp_path / "evals")
    frame = read_results(tmp_path / "evals")
    assert len(frame) == 8
    assert set(frame["exact_match"]) == {50.0}
    figure = long_context_figure(frame)
    assert len(figure.axes) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Llama", "FlowHN FAC_Split"]
    written = write_long_context(tmp_path / "evals", tmp_path / "out")
    assert {path.name for path in written} == {"table.md", "table.csv", "long_context.png"}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| FlowHN FAC_Split | needle in a haystack |     2,048 |" in text
    assert (
        "All lengths and tasks: 80 exact matches in 160 questions; chosen right among four: FlowHN FAC_Split 48" in text
    )
    first, second = (bars[0].get_xdata() for bars in figure.axes[2].containers)
    assert (first < second).all()  # side by side
    assert "0 % everywhere" not in [one.get_text() for one in figure.axes[0].texts]


def test_long_contexts_are_told_beside_guessing():
    def asked(cell, acc, exact=0.0, n=200):
        return {
            "cell": cell,
            "kind": "niah",
            "length": 1024,
            "questions": n,
            "exact_match": exact,
            "acc": acc,
            "trained": 1024,
        }

    frame = pd.DataFrame([asked("llama", 25.0), asked("shm", 31.0)])
    text = answer(frame)
    assert text.startswith(
        "no exact match in 400 questions; chosen right among four: SHM 62, Llama 50, of 200 each (guessing: 50 ± 6.1)"
    )
    assert text.endswith("none is above guessing by two standard errors.")
    assert answer(pd.DataFrame([asked("llama", 25.0), asked("shm", 32.0)])).endswith("by two standard errors: SHM.")
    assert "none" in answer(pd.DataFrame([asked("shm", 31.1)]))
    above = answer(pd.DataFrame([asked("shm", 40.0, exact=0.5)]))
    assert above.startswith(
        "1 exact match in 200 questions; chosen right among four: SHM 80, of 200 each (guessing: 50 ± 6.1):"
    )
    assert above.endswith(" above guessing by two standard errors: SHM.")
    frame = frame.assign(exact_match_stderr=0.0, acc_stderr=3.0, seed=0)
    assert "0 % everywhere" in [one.get_text() for one in long_context_figure(frame).axes[0].texts]


def test_a_result_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match="no results of eval=long_context"):
        read_results(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a\.json is not a result"):
        read_results(tmp_path)


def test_the_fastest_of_all_and_the_price_of_the_split_are_judged():
    records = [
        timed("flowhn_fac", 900.0, 1.0, 1.01, acc=0.3),
        timed("flowhn_no", 700.0, 1.0, 1.01, acc=0.5),
        timed("llama", 1000.0, 1.0, 1.01, acc=0.4),
    ]
    frame = verdicts(records).set_index("claim")
    fastest = frame.loc["fac_fastest"]
    assert (fastest["second"], fastest["verdict"], fastest["holds"]) == ("llama", "worse", "no")
    assert "left out for want of TPS" in fastest["method"]
    price = frame.loc["no_over_fac"]
    assert (price["verdict"], price["holds"]) == ("better", "yes")
    assert price["printed"] == pytest.approx(38.85 - 37.41)


def test_the_readme_s_block_says_what_the_records_say(tmp_path):
    assert "not there yet" in accuracy_block(tmp_path, "s", gap=GAP)
    for record in [fake("flowhn_fac", acc=0.3), fake("flowhn_no", acc=0.5), fake("llama", acc=0.4)]:
        write_record(tmp_path / "table1" / "s" / "records" / f"{record.cell}.json", record)
    for record in [*variants(), fake("flowhn_no_conv", loss=4.4, tps=950.0)]:  # no variant of FAC_Split
        write_record(tmp_path / "beyond" / "s" / "records" / f"{record.cell}-{record.seed}.json", record)
    for rate, loss in ((1e-3, 6.0), (2e-3, 5.5)):
        record = fake(f"llama_{rate:g}", model="llama", config={"lr": rate}, loss=loss, tokens=4_000_000)
        write_record(tmp_path / "table1_lr" / "s" / "records" / f"{record.cell}.json", record)
    text = accuracy_block(tmp_path, "s", gap=GAP)
    assert "| FlowHN FAC_Split | 1 | 4.000 | 1,000 | 30.00 ± " in text
    assert "chosen per family at 4,000,000 tokens: llama 0.002 (of 0.001, 0.002; the highest tried)." in text
    assert "not tried themselves" not in text  # FlowHN's rate was not tried here, and Llama's family is Llama
    assert "another rate" not in text
    trained = fake("llama", acc=0.4, config={"lr": 1e-3})
    write_record(tmp_path / "table1" / "s" / "records" / "llama.json", trained)
    assert "at another rate than the one chosen here: Llama at 0.001." in accuracy_block(tmp_path, "s", gap=GAP)
    told = "3 variants of FAC_Split, 1 closes half of the gap to FlowHN No_Split or more at 90 % of FAC_Split's speed or more: "
    assert f"{told}`fac_a` (50 % at 90.0 %, seed 0)." in text
    assert "At the end of `fac_a`'s training" in text
    assert (
        "| No_Split beats FAC_Split in accuracy: the price of the split. (FlowHN FAC_Split) | +1.44† | +20.00 |" in text
    )


def test_rates_and_variants_of_other_budgets_are_told_as_such(tmp_path):
    no = {"lr": 5e-4, "choices": {"split": "no"}}
    rows = [fake("flowhn_fac", acc=0.3), fake("flowhn_no", acc=0.5, model="flowhn", loss=4.4, config=no)]
    for record in rows:
        write_record(tmp_path / "table1" / "135m-files-60M" / "records" / f"{record.cell}.json", record)
    better = fake("flowhn_no_1e-3", model="flowhn", loss=4.2, config={**no, "lr": 1e-3})
    short = [replace(better, tokens=4_000_000), replace(better, cell="flowhn_no_5e-4", config=no, tokens=4_000_000)]
    short[0] = replace(short[0], data={**better.data, "sha256": "another text"})
    short[1] = replace(short[1], data=short[0].data)
    for folder, record in [("60M", better), ("4M", short[0]), ("4M", short[1])]:
        write_record(tmp_path / "table1_lr" / f"135m-files-{folder}" / "records" / f"{record.cell}.json", record)
    more = [fake("flowhn_no", seed=1, loss=4.40), fake("fac_a", seed=1, loss=4.9, tps=950.0)]
    for record in [*variants(), *more]:
        write_record(tmp_path / "beyond" / "135m-files-30M" / "records" / f"{record.cell}-{record.seed}.json", record)
    text = accuracy_block(tmp_path, "135m-files-60M", gap=GAP)
    tokens = rows[0].tokens
    assert "chosen per family at 4,000,000 tokens of another selection of text: flowhn_no" in text
    told = "flowhn_no 0.001 (validation losses 0.0005: 4.400, 0.001: 4.200; the highest tried)."
    assert f"the lowest loss per family at {tokens:,} tokens: {told}" in text
    assert "at another rate than the one best here: FlowHN No_Split at 0.0005." in text
    assert f"Beyond the paper, at {variants()[0].tokens:,} tokens: of 3 variants" in text
    assert "it closes 50 % of the gap to FlowHN No_Split in seed 0 and 25 % over seeds 0, 1, at" in text
    assert "experiments/beyond/135m-files-30M/gap.md" in text


def test_a_row_of_more_seeds_is_judged_by_all_of_them():
    more = [fake("flowhn_no", seed=1, loss=4.40), fake("fac_a", seed=1, loss=4.9, tps=950.0)]
    frame = gap_table([*variants(), *more], size="135m", **GAP).set_index("cell")
    assert set(frame["seeds"]) == {"0"}
    assert (frame.loc["fac_a", "own_seeds"], frame.loc["fac_b", "own_seeds"]) == ("0, 1", "0")
    assert frame.loc["fac_a", "closed_flowhn_no"] == pytest.approx(0.5)
    assert frame.loc["fac_a", "closed"] == pytest.approx(0.25)  # (4.85 - 4.75) / (4.85 - 4.45)
    assert not frame.loc["fac_a", "reached"]
    shown = readable_gap(frame.reset_index(), **GAP).set_index("row")["to FlowHN No_Split, of all its seeds"]
    assert (shown["fac_a"], shown["fac_b"]) == ("25 % at 92.5 % (0, 1)", "")
    assert frame.loc["fac_a", "speed"] == pytest.approx(0.9)  # of seed 0


def ending(cell, tps, flops, *losses, **changes):
    """A record with a validation every 1,000 tokens, and what a second and a FLOP are to it."""
    record = timed(cell, tps, *[1.0] * (len(losses) - 1), **changes)
    for point, loss in zip(record.losses["val"], losses, strict=True):
        point[1] = loss
    record.throughput["flops_per_token"] = flops
    return record


def test_losses_are_read_where_fac_ends():
    records = [
        ending("flowhn_fac", 200.0, 50.0, 6.0, 5.0),  # 2,000 tokens: 10 s, 100,000 FLOPs
        ending("shm", 150.0, 100.0, 5.0, 4.0, 3.0),  # at 10 s 1,500 tokens; at those FLOPs 1,000
        ending("llama", 400.0, 40.0, 7.0, 6.0),  # has ended by then on both axes
        ending("flowhn_no", 50.0, 200.0, 4.0, 3.0),  # not yet validated at 10 s, nor at those FLOPs
    ]
    frame = at_equal_cost(pool(records, "135m")).set_index(["axis", "cell"])
    assert frame.loc["time", "end"].tolist() == [10.0] * 3
    assert frame.loc["FLOPs", "end"].tolist() == [100_000.0] * 3
    assert frame.loc[("time", "shm"), "loss"] == pytest.approx(4.5)
    assert frame.loc[("FLOPs", "shm"), "loss"] == pytest.approx(5.0)
    assert frame.loc[("time", "llama"), ["loss", "ends"]].tolist() == [6.0, True]
    assert frame.loc[("time", "flowhn_no"), "loss"] != frame.loc[("time", "flowhn_no"), "loss"]
    (text, _) = equal_cost_lines(records, "135m")
    assert (
        "(10.0 s at its measured speed; loss 5.000): Llama 6.000 (ended), SHM 4.500; at equal time FAC_Split is ahead of "
        "Llama alone." in text
    )
    assert "at equal FLOPs FAC_Split is ahead of Llama alone" in text  # SHM's 5.0 is as good as FAC's
    assert equal_cost_lines([ending("shm", 1.0, 1.0, 5.0, 4.0)], "135m") == []


def test_the_fastest_variant_that_reaches_the_goal_is_read_at_equal_cost(tmp_path):
    def made(cell, tps, *losses):
        record = ending(cell, tps, 50.0, *losses)
        record.losses["final_val"] = losses[-1]
        return record

    rows = [made("flowhn_fac", 200.0, 6.0, 5.0), made("flowhn_no", 120.0, 5.0, 4.0)]
    tried = [made("fac_a", 185.0, 5.0, 4.3), made("fac_b", 195.0, 5.0, 4.4)]
    tried += [made("fac_c", 199.0, 6.0, 4.9), made("flowhn_no_sum", 199.0, 5.0, 4.1)]

    def block(*records, artefact="beyond"):
        for record in records:
            write_record(tmp_path / artefact / "s" / "records" / f"{record.cell}-{record.seed}.json", record)
        lines = accuracy_block(tmp_path, "s", gap=GAP).splitlines()
        return [line for line in lines if line.startswith("At the end of `")]

    assert block(*rows, artefact="table1") == []
    (told,) = block(*rows, *tried)
    # fac_c closes too little, and a variant of No_Split is there to compare with.
    assert told.startswith("At the end of `fac_b`'s training (10.3 s at its measured speed; loss 4.400): ")
    assert "FAC_Split 5.000 (ended); at equal time `fac_b` is ahead of all of them." in told
    # A table of another budget has them beside its own: those lines are not of its text and length.
    for record in rows:
        write_record(tmp_path / "table1" / "135m-files-60M" / "records" / f"{record.cell}-0.json", record)
    (tmp_path / "beyond" / "135m-files-30M").symlink_to(tmp_path / "beyond" / "s")
    other = accuracy_block(tmp_path, "135m-files-60M", gap=GAP)
    assert "2 close half of the gap" in other
    assert "At the end of `" not in other
    seeds = [replace(record, seed=1) for record in (*rows, tried[1])]
    for record in seeds:
        write_record(tmp_path / "beyond" / "s" / "records" / f"{record.cell}-1.json", record)
    assert block()[0].startswith("At the end of `fac_b`'s training (10.3 s")  # both seeds of it
    assert block(made("fac_b", 150.0, 5.0, 4.4), replace(made("fac_b", 150.0, 5.0, 4.4), seed=1))[0].startswith(
        "At the end of `fac_a`'s training"
    )
    assert block(made("fac_a", 150.0, 5.0, 4.3)) == []


def test_depth_is_told_from_the_records_and_the_routes():
    records = [fake("flowhn_fac", config={"model": {"n_layers": 3}}), fake("shm", config={"model": {"n_layers": 7}})]
    seen = pd.DataFrame({"cell": ["flowhn_fac"], "mean": [61.7]})
    (text, _) = depth_lines(records, "135m", seen)
    assert "FlowHN has 3 blocks (6 mixers, two side by side in a block)" in text
    assert "one after another: SHM 7." in text
    assert "FAC_Split 62 %" in text
    assert depth_lines(records[:1], "135m", None) == []
    (text, _) = depth_lines(records, "135m", None, depths="tiny: no.")
    assert text.endswith("SHM 7. Would more blocks help? tiny: no.")


def test_what_fac_lacks_is_told_by_the_variants_that_have_it_alone():
    more = [fake("fac_rope", loss=4.66, tps=990.0), fake("fac_keys_rope", loss=4.5, tps=900.0)]
    (text, _) = lack_lines(gap_table([*variants(), *more], size="135m", **GAP))
    assert text == "Each alone closes, of FAC_Split's gap to No_Split: positions (RoPE) 20 %."
    assert lack_lines(gap_table(variants(), size="135m", **GAP)) == []
    assert lack_lines(None) == []


def test_every_marker_of_the_gap_has_the_number_of_its_row():
    figure = gap_figure(gap_table(variants(), size="135m", **GAP), **GAP)
    (axes,) = figure.axes
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
    numbers = {text.get_text(): text.xy for text in axes.texts if text.get_text().isdigit()}
    assert len(points) == len(numbers) == 6
    for told, point in points.items():
        assert numbers[told.split()[0]] == point
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(points)


@pytest.mark.parametrize(
    ("tps", "loss", "corner"),
    [(950.0, 4.55, ("right", "bottom")), (1050.0, 4.32, ("left", "bottom")), (950.0, 4.32, ("right", "top"))],
)
def test_the_goal_is_written_into_the_corner_that_is_free(tps, loss, corner):
    records = [
        *variants()[:4],
        fake("fac_a", loss=loss, tps=tps),
        fake("fac_b", loss=4.32, tps=905.0 if "top" in corner else 700.0),
    ]
    (axes,) = gap_figure(gap_table(records, size="135m", **GAP), **GAP).axes
    (told,) = [text for text in axes.texts if text.get_text().startswith("half the gap")]
    assert (told.get_ha(), told.get_va()) == corner


def test_a_variant_of_more_seeds_is_told_by_all_of_them_in_the_figure():
    more = [fake("flowhn_no", seed=1, loss=4.40), fake("fac_a", seed=1, loss=4.9, tps=950.0)]
    (axes,) = gap_figure(gap_table([*variants(), *more], size="135m", **GAP), **GAP).axes
    labels = {line.get_label().split()[1]: (line.get_label(), line.get_ydata()[0]) for line in axes.lines}
    assert labels["fac_a"] == ("3  fac_a  4.600 (25 %, seeds 0, 1)", 4.6)
    assert labels["fac_b"][0].endswith("4.550")


def test_the_goal_is_told_as_reached_or_not(tmp_path):
    write_record(tmp_path / "table1" / "s" / "records" / "a.json", fake("flowhn_fac", acc=0.3))
    for record in variants():
        write_record(tmp_path / "beyond" / "s" / "records" / f"{record.cell}-{record.seed}.json", record)
    told = accuracy_block(tmp_path, "s", gap=GAP)
    assert (
        "of 3 variants of FAC_Split, 1 closes half of the gap to FlowHN No_Split or more at 90 % of FAC_Split's speed"
        in told
    )
    assert "or more: `fac_a` (50 % at 90.0 %, seed 0). [" in told
    write_record(tmp_path / "beyond" / "s" / "records" / "fac_a-0.json", fake("fac_a", loss=4.61, tps=900.0))
    assert "**None closes half of the gap at 90 % of the speed.**" in accuracy_block(tmp_path, "s", gap=GAP)


def test_variants_that_reach_the_goal_are_told_by_seeds_and_speed():
    more = [
        fake("flowhn_no", seed=1, loss=4.6),
        fake("fac_a", seed=1, loss=4.7, tps=930.0),
        fake("fac_d", loss=4.5, tps=960.0),
    ]
    frame = gap_table([*variants(), *more], size="135m", **GAP)
    (text, _) = beyond_lines(frame, "s", GAP, days=DaySpread(0.02, same_code=True))
    assert "2 close half" in text
    assert text.index("`fac_a` (") < text.index("`fac_d` (")  # of two seeds, though slower
    assert "seeds 0, 1, above 90 % by less than the 2.0 % by which repeats of a speed differ)" in text
    assert "`fac_d` (100 % at 96.0 %, seed 0)" in text
    (text, _) = beyond_lines(
        gap_table(variants()[:5], size="135m", **GAP).assign(reached=False), "s", GAP, when=", at 5 tokens"
    )
    assert "of the speed at this length and rate.**" in text
    slow = [
        fake("flowhn_no", seed=1, loss=4.6),
        fake("fac_b", seed=1, loss=4.7, tps=930.0),
    ]  # over both seeds 91 % of the speed
    rows = [one for one in variants() if one.cell not in ("fac_a", "fac_c")]
    (text, _) = beyond_lines(gap_table([*rows, *slow], size="135m", **GAP), "s", GAP)
    assert "of 1 variant of FAC_Split, 1 closes half" in text  # though none has 90 % in the seed that all share
    assert beyond_lines(None, "s", GAP) == fastest_lines(None, Path("none"), "s", [], GAP) == []
    runs = [fake("flowhn_fac", config={"lr": 5e-4}, tokens=3_000), fake("shm", config={"lr": 1e-3})]
    assert budget_words(runs) == ", at 3,000 tokens (FAC_Split's learning rate 0.0005)"


def test_models_that_were_not_tried_are_told_with_whose_rate_they_have(tmp_path):
    rows = [fake(cell, acc=0.3, config={"lr": 1e-3}) for cell in ("flowhn_fac", "shm")]
    for cell, model in (
        ("flowhn_1e-3", "flowhn"),
        ("hybrid_1e-3", "shm"),
        ("mamba_1e-3", "mamba2"),
        ("llama_1e-3", "llama"),
    ):
        record = fake(cell, model=model, config={"lr": 1e-3}, loss=4.0)
        write_record(tmp_path / "table1_lr" / "s" / "records" / f"{cell}.json", record)
    (line, _) = rate_lines(tmp_path, "s", rows)
    told = "FlowHN No_Split, FlowHN AE_Split and FlowHN FA_Split have FAC_Split's; Jamba and Hymba have SHM's; Mamba-1 has "
    told += "Mamba-2's."
    assert f"Rates of models that were not tried themselves: {told}" in line


def test_variants_of_another_budget_stand_beside_fewer_of_this_one(tmp_path):
    settings = {"135m-files-4M": ("abc", 4), "135m-files-100M": ("ab", 100), "135m-files-30M": ("abc", 30)}
    settings["135m-docs-1B"] = ("abcd", 1000)
    for setting, (names, millions) in settings.items():
        (tmp_path / setting / "records").mkdir(parents=True)
        for cell in names:
            record = {"tokens": millions * 10**6}
            (tmp_path / setting / "records" / f"{cell}-s0.json").write_text(json.dumps(record))
    assert _with_records(tmp_path, "135m-files-60M") == ["135m-files-30M"]  # of two with three rows the longer
    assert _with_records(tmp_path, "135m-files-100M") == ["135m-files-100M", "135m-files-30M"]
    assert _with_records(tmp_path, "135m-files-30M") == ["135m-files-30M"]
    assert _with_records(tmp_path, "1b-files-60M") == []


def test_speeds_of_the_newest_code_stand_beside_those_of_the_training_runs(tmp_path):
    for cell in ("flowhn_fac", "llama"):
        write_record(tmp_path / "table1" / "s" / "records" / f"{cell}.json", timed(cell, 900.0, 1.0, 1.01, acc=0.4))
    assert "timed apart" not in accuracy_block(tmp_path, "s", gap=GAP)
    for cell, tps in (("flowhn_fac", 1198.0), ("llama", 1200.0)):
        record = {
            "schema": "flowhn-bench-1", "cell": cell, "size": "135m", "seq_len": 1024, "batch": 64, "protocol": "optimised",
            "peer": None, "status": "done", "tps": tps, "mfu": 0.4, "device": {"name": "NVIDIA H200", "count": 1},
            "git": {"commit": "c" * 40, "dirty": False}, "created": "2026-01-01",
        }  # fmt: skip
        write_bench_record(tmp_path / "figure4" / "h" / "records" / f"{cell}.json", record)
    text = accuracy_block(tmp_path, "s", gap=GAP)
    assert "timed apart (ccccccc, NVIDIA H200): " in text
    assert "FAC_Split's tokens/s over Llama's 0.998x" in text  # 1.00x would read as even


def test_every_model_has_its_place_in_every_panel_and_points_stay_inside():
    columns = ["cell", "model", "size", "tps", "mfu"]
    rows = [
        ("llama", "Llama", "135m", 100.0, 50.0),
        ("flowhn_fac", "FAC", "135m", 200.0, 40.0),
        ("flowhn_fac", "FAC", "1b", 20.0, 45.0),
    ]
    figure = throughput_figure(pd.DataFrame(rows, columns=columns))
    first, second, *twins = figure.axes
    assert first.get_xlim() == second.get_xlim()
    assert [bar.get_width() for axis in (first, second) for bar in axis.patches] == [pytest.approx(0.6)] * 3
    assert [bar.get_x() + 0.3 for bar in second.patches] == [pytest.approx(1.0)]
    assert [text.get_text() for text in second.texts] == ["not\nmeasured"]
    for axis, highest in [(first, 200 / 1e3), (second, 20 / 1e3), (twins[0], 50.0), (twins[1], 45.0)]:
        assert axis.get_ylim() == (0, pytest.approx(1.15 * highest))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Tokens/s (bars, left axis)",
        "MFU (points, right axis)",
    ]


def test_a_unigram_entropy_far_above_the_curves_is_a_note():
    losses = {"train": [], "val": [[1, 5.0, 1.0], [2, 4.0, 2.0]], "final_val": 4.0}
    far, near = (replace(fake("llama"), losses=losses | {"unigram_entropy": level}) for level in (7.0, 5.1))
    (axes,) = loss_figure([far]).axes
    assert axes.get_ylim()[1] < 5.5
    assert "unigram entropy 7.00, above the figure" in [text.get_text() for text in axes.texts]
    (axes,) = loss_figure([near]).axes
    assert axes.get_ylim()[1] > 5.1
    assert "unigram entropy 5.10" in [text.get_text() for text in axes.texts]


def test_reproduce_asks_each_trained_model_once(tmp_path, monkeypatch):
    from flowhn import run_long_context
    from flowhn.artefacts import load_artefact, plan_cells

    runs = plan_cells(
        load_artefact("long_context"), ["size=tiny", f"output_dir={tmp_path}", "models=[llama,shm]"]
    ).wanted
    write_record(runs["llama"].record_path, fake("llama", run_id=runs["llama"].run_id))
    asked = []

    def answer(run, suite, workshop):
        asked.append((run.config["cell"], suite["limit"], tuple(suite["tasks"])))
        task = {"n": 5, "length": 1024, "exact_match": 0.2, "exact_match_stderr": 0.1, "acc": 0.4, "acc_stderr": 0.1}
        return run_long_context.described(run.config, run.run_id) | {"tasks": {"niah_1k": task}}

    monkeypatch.setattr(run_long_context, "evaluate_long", answer)
    words = load_artefact("long_context").suite["tiny"]
    for _ in range(2):
        folder = run_long_context.measure_long_context(runs, tmp_path / "out", overrides=words, say=lambda text: None)
    assert asked == [("llama", 5, ("niah_1k", "niah_2k", "recall_1k", "recall_2k"))]
    assert "| Llama   | needle in a haystack |     1,024 |" in (folder / "table.md").read_text()
    assert read_results(folder / "evals")["trained"].tolist() == [128]
    run_long_context.measure_long_context(runs, tmp_path / "out", overrides=["eval.limit=7"], say=lambda text: None)
    assert len(asked) == 2  # other questions
    assert (
        run_long_context.measure_long_context({"shm": runs["shm"]}, tmp_path / "none", overrides=words, say=print)
        is None
    )
