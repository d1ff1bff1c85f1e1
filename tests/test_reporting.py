"""Tables, figures and verdicts from invented records, and the paper's numbers with their slips."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import pandas as pd
import pytest
import yaml

from flowhn.errors import UserError
from flowhn.reporting import figures, paper, style
from flowhn.reporting.artefact import write_artefact
from flowhn.reporting.bench import write_bench_record
from flowhn.reporting.cells import Cell, pool
from flowhn.reporting.claims import CLAIMS
from flowhn.reporting.record import RunRecord
from flowhn.reporting.speeds import DaySpread, day_spreads, newest_speeds, other_code, repeats
from flowhn.reporting.style import CELLS
from flowhn.reporting.tables import DASH, table1, write_table
from flowhn.reporting.verdicts import paired_bootstrap, verdicts

GPU = {"type": "cuda", "name": "NVIDIA H200", "count": 1}
CPU = {"type": "cpu", "name": "A Processor", "count": 2}
SIX = paper.TASKS


def fake(cell, size="135m", seed=0, **changes) -> RunRecord:
    """A record; ``acc`` is the share right in every task, ``data`` the corpus; other names set fields of the record."""
    take = changes.pop
    acc, tps, loss = take("acc", 0.4), take("tps", 1000.0), take("loss", 4.0)
    mfu, n, tokens = take("mfu", 0.3), take("n", 1000), take("tokens", 60_000_000)
    correct, name = take("correct", None), take("data", "files")
    results = {}
    for task in take("tasks", SIX):
        results[task] = {
            "acc": acc,
            "acc_stderr": math.sqrt(acc * (1 - acc) / n),
            "acc_norm": None,
            "n": n,
            "chance": 0.25,
        }
        if correct is not None:
            results[task]["correct"] = {"acc": correct}
    model = cell.partition("_")[0]
    fields = dict(
        run_id=f"{cell}{size}{seed}", artefact="table1", cell=cell, model=model, size=size, seed=seed, status="done",
        created="2026-11-24T04:00:00+00:00", config={"eval": {"limit": None}}, git={"commit": None, "dirty": None},
        versions={}, device=CPU if size == "tiny" else GPU, kernels={"ssm": "torch", "attention": "sdpa"},
        parameters=133_000_000, tokens=tokens, steps=100, seq_len=1024, global_batch_tokens=65536,
        data={"name": name, "sha256": "ab" * 32},
        losses={
            "train": [[tokens, loss]],
            "val": [[int(tokens * i / 8), loss + 2 / i, 3.0 * i] for i in range(1, 9)],
            "final_val": loss, "unigram_entropy": 6.5,
        },
        throughput={"tps": tps, "mfu": mfu, "flops_per_token": 8e8, "peak_source": "datasheet, dense bf16"},
        memory={"peak_bytes": 1, "kind": "cuda"}, evaluation={"suite": "paper", "tasks": results},
        wall_seconds={"train": 1.0, "eval": 1.0, "total": 2.0}, resumed=0,
    )  # fmt: skip
    return RunRecord(**{**fields, **changes})


def ten(**options) -> list[RunRecord]:
    return [fake(cell, tps=1000.0 + 10 * i, loss=4 + 0.1 * i, **options) for i, cell in enumerate(CELLS)]


def markdown(tmp_path: Path, frame: pd.DataFrame) -> str:
    return write_table(frame, tmp_path, title="T")[0].read_text(encoding="utf-8")


# the paper's numbers


def test_printed_table_is_complete():
    frame = paper.table1()
    assert frame.groupby("size", sort=False).size().to_dict() == {"135m": 10, "350m": 7, "1b": 7}
    assert not frame.isna().any().any()
    fac = frame.set_index(["size", "cell"]).loc[("1b", "flowhn_fac")]
    assert [fac[column] for column in ("tokens", "tps", "mfu", "boolq", "average")] == [
        2 * 10**9,
        7926,
        47.63,
        56.78,
        41.97,
    ]


def test_figure4_has_ten_models_at_three_sizes_and_prefers_print():
    frame = paper.figure4().set_index(["size", "cell"])
    assert len(frame) == 30
    assert frame.loc[("135m", "llama"), "mfu"] == 22.33
    assert frame.loc[("1b", "mamba2"), "read_off_chart"]
    assert frame["read_off_chart"].sum() == 6


def test_slips_found_are_those_in_print():
    slips = paper.slips()
    averages = slips[slips["kind"] == "average"]
    assert list(zip(averages["size"], averages["cell"], averages["printed"], averages["computed"], strict=True)) == [
        ("135m", "shm", "37.96", "37.61"),
        ("135m", "flowhn_no", "38.85", "38.35"),
        ("1b", "hymba", "42.41", "42.49"),
    ]
    orders = slips[slips["kind"] == "column_order"]
    assert list(zip(orders["size"], orders["cell"], strict=True)) == [
        ("135m", "jamba"), ("135m", "shm"), ("350m", "jamba"), ("350m", "shm"),
    ]  # fmt: skip
    assert set(orders["computed"]) == {"boolq, hellaswag, piqa, winogrande"}
    rankings = slips[slips["kind"] == "ranking"]
    assert list(zip(rankings["size"], rankings["computed"], strict=True)) == [("1b", "Jamba")]


def test_a_mended_table_has_no_slips(monkeypatch):
    mended = paper.table1()
    rows = mended["cell"].isin(["jamba", "shm"]) & (mended["size"] != "1b")
    last = list(SIX[2:])
    mended.loc[rows, last] = mended.loc[rows, last[::-1]].to_numpy()
    mended["average"] = mended[list(SIX)].mean(axis=1).round(2)
    monkeypatch.setattr(paper, "table1", lambda: mended)
    assert set(paper.slips()["kind"]) == {"ranking"}  # Jamba's TPS at 1B is no misprint


# tables


def test_table_holds_the_records_numbers_beside_the_papers():
    frame = table1(ten(), size="135m").set_index("cell")
    assert list(frame.index) == list(CELLS)
    fac = frame.loc["flowhn_fac"]
    assert fac["tps"] == 1090
    assert fac["mfu"] == 30
    assert fac["arc_easy"] == 40
    assert fac["perplexity"] == pytest.approx(math.exp(4.9))
    assert fac["average_stderr"] == pytest.approx(100 * math.sqrt(0.24 / 1000) / math.sqrt(6))
    assert fac["paper_tps"] == 34430
    assert fac["paper_average"] == 37.41


def test_seeds_are_pooled_as_their_mean():
    records = [fake("llama", seed=seed, acc=acc, tps=tps) for seed, acc, tps in ((0, 0.4, 100), (1, 0.5, 300))]
    row = table1(records, size="135m").set_index("cell").loc["llama"]
    assert (row["seeds"], row["tps"], row["arc_easy"]) == (2, 200, 45)


def test_missing_cells_show_a_dash_and_are_listed(tmp_path):
    frame = table1([fake("llama", mfu=None), fake("shm", tps=None)], size="135m")
    text = markdown(tmp_path, frame)
    line = next(line for line in text.splitlines() if line.startswith("| Hymba"))
    assert DASH in line
    assert "nan" not in text.lower()
    assert "missing: records of Mamba-1" in text
    assert "MFU (Llama)" in text
    assert "TPS (SHM)" in text


def test_slips_are_shown_as_printed_and_marked(tmp_path):
    text = markdown(tmp_path, table1(ten(), size="135m"))
    assert "37.96†" in text
    assert "25.79†" in text
    assert "the printed average 37.96 is not the mean of its row, 37.61" in text


def test_tiny_has_the_papers_135m_for_reference_and_says_so(tmp_path):
    frame = table1(ten(size="tiny", tasks=("docs_continuation",), data="docs"), size="tiny")
    text = markdown(tmp_path, frame)
    assert "The paper has no size tiny: the columns 'paper 135M' are its numbers at 135M, for reference only." in text
    assert "**Comparable with the paper:** nothing." in text
    assert "TPS: not comparable. Ours on A Processor (cpu)" in text
    assert "34,430" in text


def test_comparable_columns_follow_from_the_records():
    def said(records):
        return {s["columns"]: s["comparable"] for s in table1(records, size="135m").attrs["statements"]}

    published = {
        "data": "slimpajama",
        "tokens": 10**9,
        "device": {"type": "cuda", "name": "NVIDIA RTX A6000", "count": 1},
    }
    assert said(ten(**published))["Accuracy"]
    assert said(ten(**published))["TPS"]
    assert said(ten(**published))["Tokens"]
    assert not said(ten(**{**published, "data": "files"}))["Accuracy"]
    assert not said(ten(**{**published, "tokens": 10**8}))["Accuracy"]
    assert not said(ten(**{**published, "device": GPU}))["TPS"]
    assert not said(ten(**{**published, "config": {"eval": {"limit": 100}}}))["Accuracy"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": CPU}, "the device"),
        ({"tokens": 10**6}, "number of training tokens"),
        ({"parameters": 140_000_000}, "in parameters"),
        ({"global_batch_tokens": 1}, "tokens of an optimiser step"),
    ],
)
def test_rows_that_cannot_be_compared_are_named(tmp_path, changes, told):
    text = markdown(tmp_path, table1([fake("llama"), fake("shm", **changes)], size="135m"))
    caution = next(line for line in text.splitlines() if line.startswith("**Caution:**"))
    assert told in caution
    assert "SHM" in caution


def test_no_caution_without_cause(tmp_path):
    assert "Caution" not in markdown(tmp_path, table1(ten(), size="135m"))


def test_records_that_cannot_be_pooled_are_refused():
    with pytest.raises(UserError, match="two different runs of llama"):
        table1([fake("llama"), fake("llama", run_id="other")], size="135m")
    with pytest.raises(UserError, match="differ in tokens"):
        table1([fake("llama"), fake("llama", seed=1, tokens=5)], size="135m")
    again = table1([fake("llama"), fake("llama")], size="135m").set_index("cell")
    assert again.loc["llama", "seeds"] == 1


def test_unknown_cells_come_after_the_papers(tmp_path):
    frame = table1([fake("my_model"), fake("flowhn_fac")], size="135m", expected=["flowhn_fac"])
    assert list(frame["cell"]) == ["flowhn_fac", "my_model"]
    assert math.isnan(frame.iloc[1]["paper_tps"])
    assert "my_model" in markdown(tmp_path, frame)


def test_csv_keeps_full_precision(tmp_path):
    _, path = write_table(table1([fake("llama", tps=1234.56789)], size="135m"), tmp_path, title="T", name="x")
    assert path.name == "x.csv"
    assert pd.read_csv(path).set_index("cell").loc["llama", "tps"] == 1234.56789


def test_every_markdown_row_has_as_many_cells_as_its_head(tmp_path):
    blocks, rows = [], []
    for line in [*markdown(tmp_path, table1(ten(), size="135m")).splitlines(), ""]:
        if line.startswith("|"):
            rows.append(line.count("|"))
        elif rows:
            blocks.append(rows)
            rows = []
    assert len(blocks) == 2
    assert all(len(set(block)) == 1 and len(block) == 12 for block in blocks)


# figures


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:24])


def texts(figure) -> str:
    figure.draw_without_rendering()
    found = [text.get_text() for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.texts)]
    return "\n".join([*found, *(text.get_text() for legend in figure.legends for text in legend.get_texts())])


@pytest.mark.parametrize("sizes", [("tiny",), ("135m", "350m", "1b")])
def test_figure4_labels_every_model_and_draws_every_bar(tmp_path, sizes):
    records = [record for size in sizes for record in ten(size=size)]
    figure = figures.figure4(records, tmp_path / "f.png")
    assert min(png_size(tmp_path / "f.png")) > 500
    shown = texts(figure)
    assert all(style.name(cell) in shown for cell in CELLS)
    ours = figure.axes[0]
    assert sorted({round(bar.get_height()) for bar in ours.patches}) == [1000 + 10 * i for i in range(10)]
    assert len(ours.patches) == 10 * len(sizes)
    assert len(figure.legends) == 1
    assert not list(tmp_path.glob(".*"))


def test_figure4_without_a_peak_says_so_and_draws_no_line(tmp_path):
    figure = figures.figure4([fake("llama", mfu=None)], tmp_path / "f.png")
    assert "peak is unknown" in texts(figure)
    ours = [axes for axes in figure.axes if axes.get_subplotspec().rowspan.start == 0]
    assert not [line for axes in ours for line in axes.lines]


@pytest.mark.parametrize("draw", [figures.loss_figure, figures.loss_vs_time_figure, figures.loss_vs_flops_figure])
def test_loss_figures_label_every_model_apart(tmp_path, draw):
    figure = draw(ten(), tmp_path / "loss.png")
    assert min(png_size(tmp_path / "loss.png")) > 500
    assert all(style.long_name(cell) in texts(figure) for cell in CELLS)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 8]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(lines) == len(looks) == 10
    assert "unigram entropy 6.50" in texts(figure)


def test_the_axes_of_the_loss_figures_are_tokens_seconds_and_flops(tmp_path):
    def last(draw):
        return draw([fake("llama")]).axes[0].lines[0].get_xdata()[-1]

    assert last(figures.loss_figure) == 60_000_000
    assert last(figures.loss_vs_time_figure) == 60_000  # at 1,000 tokens/s
    assert last(figures.loss_vs_flops_figure) == 60_000_000 * 8e8


def test_figures_without_numbers_are_refused():
    empty = fake("llama", tps=None, losses={"train": [], "val": [], "final_val": None, "unigram_entropy": None})
    with pytest.raises(UserError, match="throughput"):
        figures.figure4([empty])
    with pytest.raises(UserError, match="val_points"):
        figures.loss_figure([empty])
    with pytest.raises(UserError, match="several sizes"):
        figures.loss_figure([fake("llama"), fake("llama", size="1b")])


# verdicts


def verdict(records, claim, second=None):
    frame = verdicts(records)
    frame = frame[frame["claim"] == claim]
    return frame[frame["second"] == second].iloc[0] if second else frame.iloc[0]


@pytest.mark.parametrize(
    ("fac", "ae", "expected", "holds"),
    [(0.5, 0.4, "better", "yes"), (0.4, 0.5, "worse", "no"), (0.4, 0.401, "within noise", "undecided")],
)
def test_accuracy_verdicts_from_standard_errors(fac, ae, expected, holds):
    row = verdict([fake("flowhn_fac", acc=fac), fake("flowhn_ae", acc=ae)], "fac_over_ae_fa", "flowhn_ae")
    assert (row["verdict"], row["holds"]) == (expected, holds)
    assert "unpaired" in row["method"]
    assert row["printed"] == pytest.approx(37.41 - 36.33)


def answers(seed: int, n: int, share: float) -> str:
    rng = random.Random(seed)
    return "".join("1" if rng.random() < share else "0" for _ in range(n))


def test_the_paired_bootstrap_sees_what_pairing_shows():
    """Two models that agree on all but a few questions: unpaired it is noise, paired it is not."""
    base = answers(0, 1000, 0.5)
    flips = [i for i, bit in enumerate(base) if bit == "0"][:15]
    better = "".join("1" if i in flips else bit for i, bit in enumerate(base))
    a, b = ({"correct": text, "acc": text.count("1") / 1000, "tasks": ("piqa",)} for text in (better, base))
    paired = verdict([fake("flowhn_fac", **a), fake("flowhn_ae", **b)], "fac_over_ae_fa", "flowhn_ae")
    assert paired["verdict"] == "better"
    assert "paired bootstrap" in paired["method"]
    for options in (a, b):
        options.pop("correct")
    assert verdict([fake("flowhn_fac", **a), fake("flowhn_ae", **b)], "fac_over_ae_fa", "flowhn_ae")["verdict"] == (
        "within noise"
    )


def test_the_bootstrap_agrees_with_the_formula_and_with_itself():
    a, b = answers(1, 2000, 0.6), answers(2, 2000, 0.5)
    first, second = (Cell("x", "135m", (fake("x", correct=text, tasks=("piqa",)),)) for text in (a, b))
    error, low, high = paired_bootstrap(first, second, ["piqa"])
    differences = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / 2000
    formula = math.sqrt(sum((d - mean) ** 2 for d in differences)) / 2000
    assert error == pytest.approx(100 * formula, rel=0.03)
    assert low < 100 * mean < high
    assert high - low == pytest.approx(2 * 1.96 * 100 * formula, rel=0.05)
    assert paired_bootstrap(first, second, ["piqa"]) == (error, low, high)


def test_answers_of_different_length_fall_back_to_standard_errors():
    records = [fake("flowhn_fac", correct="01" * 20), fake("flowhn_ae", correct="01" * 10)]
    assert "unpaired" in verdict(records, "fac_over_ae_fa", "flowhn_ae")["method"]


def timed(cell, tps, *shares, **changes) -> RunRecord:
    """A record whose stretches between validations ran at these shares of its speed."""
    seconds, points = 5.0, [[1000, 5.0, 5.0]]
    for number, share in enumerate(shares, start=2):
        seconds += 1000 / (share * tps)
        points.append([1000 * number, 5.0, seconds])
    losses = {"train": [], "val": points, "final_val": 5.0, "unigram_entropy": 6.5}
    return fake(cell, tps=tps, losses=losses, **changes)


def test_the_spread_of_a_speed_is_measured_not_assumed(tmp_path):
    once = [timed("flowhn_fac", 1100), timed("hymba", 1000)]
    row = verdict(once, "fac_over_hymba_tps")
    assert row["verdict"] == "not testable"
    assert "each speed was measured once" in row["method"]
    seeds = [*once, timed("flowhn_fac", 900, seed=1), timed("hymba", 1000, seed=1)]
    row = verdict(seeds, "fac_over_hymba_tps")
    assert (row["low"], row["high"], row["verdict"]) == (pytest.approx(0.9), pytest.approx(1.1), "within noise")
    steady = [timed("flowhn_fac", 1030, 1.0, 1.0), timed("hymba", 1000, 1.0, 1.0)]
    for day, found in ((0.02, "better"), (0.04, "within noise")):
        frame = verdicts(steady, days={"NVIDIA H200": DaySpread(day, same_code=True)}).set_index("claim")
        assert frame.loc["fac_over_hymba_tps", "verdict"] == found
        assert f"{100 * day:.1f} %, by which" in frame.loc["fac_over_hymba_tps", "method"]
        assert "with the same code" in frame.loc["fac_over_hymba_tps", "method"]
    other = verdicts(steady, days={"NVIDIA H200": DaySpread(0.04, same_code=False)}).set_index("claim")
    assert "with other code (none was repeated" in other.loc["fac_over_hymba_tps", "method"]
    elsewhere = {"another": DaySpread(0.5, same_code=True)}
    assert verdicts(steady, days=elsewhere).set_index("claim").loc["fac_over_hymba_tps", "low"] == 1.03


def test_days_are_compared_cell_by_cell_from_the_committed_records(tmp_path):
    def bench(folder, name, tps, commit="a" * 40, **changes):
        record = {
            "schema": "flowhn-bench-1", "cell": "llama", "size": "135m", "seq_len": 1024, "batch": 64, "protocol": "optimised",
            "peer": None, "status": "done", "tps": tps, "device": {"name": "NVIDIA H200", "count": 1},
            "git": {"commit": commit, "dirty": False}, "created": f"2026-01-0{name[0]}", **changes,
        }  # fmt: skip
        write_bench_record(tmp_path / "figure4" / folder / "records" / name, record)

    assert day_spreads(tmp_path) == {}
    bench("a", "1.json", 1000.0)
    bench("a", "2.json", 2000.0, batch=128)  # another batch is another speed, not a spread
    bench("a", "3.json", 9000.0, overrides=["split.ratio=0.5"])  # and so is another model
    assert day_spreads(tmp_path) == {}
    bench("b", "4.json", 9000.0, status="oom")
    bench("b", "5.json", 1200.0, commit="b" * 40)
    assert day_spreads(tmp_path) == {"NVIDIA H200": DaySpread(pytest.approx(0.2), same_code=False)}
    assert repeats(tmp_path).empty
    (row,) = other_code(tmp_path).to_dict("records")
    assert (row["commit"], row["commit then"], row["difference %"]) == ("bbbbbbb", "aaaaaaa", "+20.0")
    bench("b", "6.json", 1060.0, commit="a" * 7)  # the same commit, by its short name
    assert day_spreads(tmp_path) == {"NVIDIA H200": DaySpread(pytest.approx(0.06), same_code=True)}
    (row,) = repeats(tmp_path).to_dict("records")
    assert (row["tokens/s, each run"], row["commit"], row["folder"]) == ("1,000; 1,060", "aaaaaaa", "a, b")
    bench("b", "7.json", 5000.0, git={"commit": "a" * 40, "dirty": True})  # what changed nobody knows
    assert day_spreads(tmp_path) == {"NVIDIA H200": DaySpread(pytest.approx(0.06), same_code=True)}
    assert newest_speeds(tmp_path, "NVIDIA H200", "1b") == newest_speeds(tmp_path, "A", "135m") == {}
    for name, tps in (("8a.json", 900.0), ("8b.json", 1300.0), ("8c.json", 1100.0)):
        bench("c", name, tps, commit="c" * 40)
    bench("c", "9.json", 300.0, commit="c" * 40, cell="shm")
    bench("c", "9b.json", 2.0, commit="d" * 40, protocol="published")
    newest = newest_speeds(tmp_path, "NVIDIA H200", "135m")
    assert {cell: record["tps"] for cell, record in newest.items()} == {"llama": 1100.0, "shm": 300.0}


def test_cells_of_an_artefact_are_told_apart():
    """Colour, marker and line of all cells that one figure may show are different."""
    configs = Path(__file__).resolve().parents[1] / "configs"
    for path in [*configs.glob("artefacts/*.yaml"), *configs.glob("bench/*.yaml")]:
        cells = (yaml.safe_load(path.read_text(encoding="utf-8")).get("cells")) or {}
        drawn = style.looks(cells)
        assert len({style.drawn_as(look) for look in drawn.values()}) == len(cells), path.name
        assert len({look.name for look in drawn.values()}) == len(cells), path.name
    beyond = yaml.safe_load((configs / "artefacts" / "beyond.yaml").read_text(encoding="utf-8"))["cells"]
    assert all(style.look(cell) == look for cell, look in style.looks(beyond).items())  # the same in every figure
    assert all(style.name(cell) != cell for cell in beyond)
    many = style.looks([f"mine_{number}" for number in range(100)])
    assert len({style.drawn_as(look) for look in many.values()}) == 100


def test_a_verdict_that_boolq_alone_decides_is_undecided():
    """Two models alike in five tasks, one of which says yes to all of BoolQ: better on average, and nothing is shown."""
    same, yes, no = answers(3, 1000, 0.4), "1" * 620 + "0" * 380, "0" * 620 + "1" * 380

    def record(cell, boolq, rest):
        made = fake(cell)
        for task in SIX:
            text = boolq if task == "boolq" else rest
            made.evaluation["tasks"][task] |= {"acc": text.count("1") / 1000, "correct": {"acc": text}}
        return made

    records = [record("flowhn_fac", yes, same[::-1]), record("flowhn_ae", no, same)]
    row = verdict(records, "fac_over_ae_fa", "flowhn_ae")
    assert (row["verdict"], row["holds"]) == ("better", "undecided (BoolQ alone)")
    assert row["rest_low"] < 0 < row["rest_high"]
    good = answers(4, 1000, 0.6)
    row = verdict([record("flowhn_fac", yes, good), record("flowhn_ae", no, same)], "fac_over_ae_fa", "flowhn_ae")
    assert (row["verdict"], row["holds"]) == ("better", "yes")
    row = verdict([record("flowhn_fac", no, same), record("flowhn_ae", no, good)], "fac_over_ae_fa", "flowhn_ae")
    assert (row["verdict"], row["holds"]) == ("worse", "no")


def by_task(cell: str, n: int = 1000, **shares: float):
    """A record whose answers to a task are right in the first ``share`` of the questions; 0.4 where none is given."""
    made = fake(cell)
    for task in SIX:
        text = ("1" * round(shares.get(task, 0.4) * n)).ljust(n, "0")
        made.evaluation["tasks"][task] |= {"acc": text.count("1") / n, "correct": {"acc": text}}
    return made


def test_a_verdict_that_hangs_on_one_more_task_is_undecided():
    other = by_task("flowhn_ae")
    row = verdict([by_task("flowhn_fac", boolq=0.6, winogrande=0.5), other], "fac_over_ae_fa", "flowhn_ae")
    assert row["rest_low"] > 0
    assert (row["verdict"], row["holds"]) == ("better", "undecided (BoolQ and WinoGrande)")
    row = verdict([by_task("flowhn_fac", piqa=0.5, winogrande=0.5), other], "fac_over_ae_fa", "flowhn_ae")
    assert (row["verdict"], row["holds"]) == ("better", "yes")


def test_the_best_of_many_is_judged_by_a_wider_interval():
    """A lead that is one over a given model is none over the best of five, which chance alone may have put last."""
    shares = dict.fromkeys(("piqa", "winogrande", "arc_easy"), 0.404)
    others = [
        by_task(cell) for cell in ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_ae", "flowhn_fa")
    ]
    one = verdict([by_task("flowhn_no", **shares), by_task("flowhn_fac")], "no_over_fac", "flowhn_fac")
    best = verdict([by_task("flowhn_no", **shares), by_task("flowhn_fac"), *others], "no_split_best", None)
    assert best["difference"] == one["difference"]
    assert best["low"] < one["low"] < one["high"] < best["high"]
    assert "99.4 % (95 % for the best of 9)" in best["method"]
    assert "95 %, mean" in one["method"]


@pytest.mark.parametrize(
    ("fac", "expected", "holds"),
    [(4000, "better", "yes"), (2000, "better", "partly"), (1010, "within noise", "undecided"), (500, "worse", "no")],
)
def test_speed_verdicts_by_ratio(fac, expected, holds):
    records = [timed("flowhn_fac", fac, 0.97, 1.0), timed("hymba", 1000, 1.0, 1.02)]
    row = verdict(records, "fac_over_hymba_tps")
    assert (row["verdict"], row["holds"], row["difference"]) == (expected, holds, fac / 1000)
    assert row["low"] == pytest.approx(fac / 1000 * 0.97 / 1.02)  # the slowest of one over the fastest of the other
    assert row["high"] == pytest.approx(fac / 1000)
    assert row["printed"] == pytest.approx(34430 / 9393)


def test_no_split_is_held_against_the_best_of_the_others():
    records = [fake(cell, acc={"flowhn_no": 0.5, "shm": 0.45}.get(cell, 0.4)) for cell in CELLS]
    row = verdict(records, "no_split_best")
    assert (row["second"], row["verdict"], row["holds"]) == ("shm", "better", "yes")
    partial = verdict([r for r in records if r.cell != "llama"], "no_split_best")
    assert partial["holds"] == "undecided"
    assert "Llama" in partial["method"]


@pytest.mark.parametrize(
    ("other", "claim", "told"),
    [
        ([], "fac_over_hymba_tps", "no record of Hymba"),
        ([fake("hymba", tps=None)], "fac_over_hymba_tps", "no TPS on record"),
        ([fake("hymba", device=CPU)], "fac_over_hymba_tps", "different devices"),
        ([fake("flowhn_ae", tasks=())], "fac_over_ae_fa", "not evaluated on all tasks"),
        ([fake("flowhn_ae", tokens=5)], "fac_over_ae_fa", "different numbers of tokens"),
        (
            [fake("flowhn_ae", data="docs", evaluation={"suite": "docs", "tasks": {}})],
            "fac_over_ae_fa",
            "different suites",
        ),
    ],
)
def test_what_cannot_be_tested_says_why(other, claim, told):
    row = verdict([fake("flowhn_fac"), *other], claim)
    assert row["verdict"] == row["holds"] == "not testable"
    assert told in row["method"]


def test_a_claim_judged_at_another_size_says_where_the_paper_makes_it():
    records = [fake(cell, size="tiny", tps=tps) for cell, tps in (("flowhn_fac", 5000), ("mamba2", 1000))]
    row = verdict(records, "fac_over_mamba2_tps")
    assert "the paper claims it at 1B" in row["method"]
    assert row["printed"] == pytest.approx(7926 / 1800)


def test_every_claim_is_judged_for_no_records_of_its_models():
    assert set(verdicts([fake("x")])["claim"]) == {claim.id for claim in CLAIMS}
    assert verdicts([]).empty


# the folder of an artefact


def test_artefact_folder(tmp_path):
    wanted = ["figure4", "loss", "loss_vs_time", "loss_vs_flops"]
    written = write_artefact(ten(), tmp_path, title="Table 1", figures=wanted)
    names = {"table.md", "table.csv", "verdicts.md", "verdicts.csv", *(f"{name}.png" for name in wanted)}
    kept = {f"{record.cell}-s0.json" for record in ten()}
    assert {path.name for path in tmp_path.iterdir()} == names | {"records"}
    assert {path.name for path in (tmp_path / "records").iterdir()} == kept
    assert {path.name for path in written} == names | kept
    assert all(path.stat().st_size > 500 for path in written)
    first = (tmp_path / "table.md").read_bytes()
    write_artefact(ten(), tmp_path, title="Table 1", figures=wanted)
    assert (tmp_path / "table.md").read_bytes() == first


def test_artefact_without_validation_drops_the_old_picture_and_says_so(tmp_path):
    (tmp_path / "loss.png").write_text("old")
    empty = {"train": [], "val": [], "final_val": None, "unigram_entropy": None}
    write_artefact([fake("llama", losses=empty)], tmp_path, title="T", figures=["loss"], expected=["llama"])
    assert not (tmp_path / "loss.png").exists()
    assert "loss.png is not drawn" in (tmp_path / "table.md").read_text()


def test_artefact_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(UserError, match="figures=pie"):
        write_artefact(ten(), tmp_path, title="T", figures=["pie"])
    with pytest.raises(UserError, match="one size"):
        write_artefact([fake("llama"), fake("llama", size="1b")], tmp_path, title="T")
    with pytest.raises(UserError, match="none"):
        write_artefact([], tmp_path, title="T")


def test_curves_of_seeds_are_averaged_where_both_have_points():
    records = [fake("llama", seed=seed, loss=loss) for seed, loss in ((0, 4.0), (1, 5.0))]
    records[1].losses["val"] = records[1].losses["val"][1:]
    points = pool(records, "135m")["llama"].curve()
    assert len(points) == 7
    assert points[-1] == [60_000_000, 4.75, 24.0, 4.25, 5.25]
