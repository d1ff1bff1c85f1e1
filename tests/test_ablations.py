"""The ablations: their YAMLs, runs that they share, and tables, figures and answers from records with known numbers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from flowhn import reproduce
from flowhn.artefacts import artefact_files, load_artefact, plan_cells, rates_for
from flowhn.config import compose, to_dict
from flowhn.errors import UserError
from flowhn.reporting.ablation_tables import notes, readable
from flowhn.reporting.ablations import ABLATIONS, settings, write_ablation, write_overview
from flowhn.reporting.bench import write_bench_record
from flowhn.reporting.record import read_record, write_record
from flowhn.runs import meta_model
from flowhn.timed_artefacts import bench_words, count_cells

TRAINED = [name for name in ABLATIONS if name.startswith("ablation_")]
TIMED = [name for name in ABLATIONS if name.startswith("scaling_")]
TINY = ["budget=2048", "val_points=1", "val_rows=2", "seeds=[0]", "trainer.throughput.warmup_steps=1",
        "trainer.throughput.window_steps=1"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations")
    return [f"output_dir={folder}/out", f"cache_dir={folder}/cache"]


@pytest.fixture(scope="module")
def trained(home):
    """Two short runs: No_Split and FAC."""
    assert reproduce._main(["ablation_split", "models=[no,fac]", *TINY, *home]) == 0
    return Path(home[0].partition("=")[2])


@pytest.fixture(scope="module")
def record(trained):
    (path,) = trained.glob("runs/fac-*/record.json")
    return read_record(path)


@pytest.mark.slow  # .ci/run runs it
def test_gpu_budgets_train_with_table1_s_rates_and_share_its_runs():
    words = ["size=135m", "data=files", "data.path=TEXT", "data.val_path=VALID", "eval=paper", "val_points=10"]
    table = plan_cells(
        load_artefact("table1"), [*words, "budget=30M", "models=[flowhn_no,flowhn_fac]", "seeds=[0]"]
    ).wanted
    ids = {run.run_id for run in table.values()}
    assert {run.config["lr"] for run in table.values()} == {
        rates_for(load_artefact("table1"), "135m", 30_000_000)["flowhn"]
    }
    for name, cells in (("split", "no,fac"), ("ratio", "flops"), ("fusion", "no_concat_proj,fac_concat_proj")):
        runs = plan_cells(
            load_artefact(f"ablation_{name}"), [*words[1:], "budget=gpu", f"models=[{cells}]", "seeds=[0]"]
        ).wanted
        assert {run.run_id for run in runs.values()} <= ids


def test_rates_are_taken_over_without_seeds():
    table, split = load_artefact("table1"), load_artefact("ablation_split")
    assert all(load_artefact(name).lr == table.lr for name in TRAINED)
    assert table.seeds
    assert not split.seeds
    own = {"fac_keys_rope_conv_gated_bf16": [0, 1]}  # what configs/artefacts/beyond.yaml adds
    assert load_artefact("beyond").seeds == {"135m": {**table.seeds["135m"], **own}}


def make(folder: Path, record, rows) -> Path:
    """Records like ``record`` with other cells, numbers and configurations: ``(cell, seed, loss, tps, changes)``."""
    for cell, seed, loss, tps, changes in rows:
        config = copy.deepcopy(record.config)
        throughput = record.throughput | {"tps": tps, "attention_share": changes.pop("attention_share", 0.6)}
        for key, value in changes.items():
            node = config
            *path, last = key.split(".")
            for part in path:
                node = node[part]
            node[last] = value
        one = dataclasses.replace(
            record, cell=cell, seed=seed, run_id=f"{cell}{seed}", config=config, throughput=throughput,
            losses=record.losses | {"final_val": loss},
        )  # fmt: skip
        write_record(folder / "records" / f"{cell}-s{seed}.json", one)
    return folder


def test_every_ablation_has_a_yaml_with_three_budgets_and_a_question():
    assert set(ABLATIONS) <= set(artefact_files())
    for name in ABLATIONS:
        artefact = load_artefact(name)
        assert artefact.question.endswith("?")
        assert {"smoke", "laptop", "gpu"} <= set(artefact.budgets)


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize("budget", ["laptop", "gpu"])
def test_the_cells_of_an_ablation_are_different_runs_and_shared_ones_are_the_same(budget):
    runs = {}
    for name in TRAINED:
        wanted = plan_cells(load_artefact(name), [f"budget={budget}", "seeds=[0]"]).wanted
        runs[name] = {cell.partition(" ")[0]: run.run_id for cell, run in wanted.items()}
        assert len(set(runs[name].values())) == len(runs[name]), name
    fac = {runs["ablation_split"]["fac"], runs["ablation_fusion"]["fac_concat_proj"], runs["ablation_ratio"]["flops"],
           runs["ablation_ssm"]["fac_mamba1"], runs["ablation_balance"]["fac_flops"]}  # fmt: skip
    assert len(fac) == 1
    assert runs["ablation_ratio"]["time"] == runs["ablation_balance"]["fac_time"]
    assert (runs["ablation_depth"]["depth_3"] in fac) == (budget == "laptop")
    assert len({run for own in runs.values() for run in own.values()}) < sum(map(len, runs.values())) - 6


@pytest.mark.parametrize("budget", ["laptop", "gpu"])
def test_depths_have_the_same_parameters(budget):
    wanted = plan_cells(load_artefact("ablation_depth"), [f"budget={budget}", "seeds=[0]"]).wanted
    counts = [meta_model(run.config).num_parameters() for run in wanted.values()]
    assert len(counts) == 5
    assert max(counts) < 1.01 * min(counts)


def test_a_laptop_run_has_two_seeds_and_a_number_is_a_budget_too():
    artefact = load_artefact("ablation_balance")
    plan = plan_cells(artefact, [])
    assert plan.budget == "laptop"
    assert len(plan.wanted) == 8
    assert {run.config["tokens"] for run in plan.wanted.values()} == {100_000}
    plan = plan_cells(artefact, ["budget=20k", "seed=3"])
    assert plan.budget == "20k"
    assert {(run.config["tokens"], run.config["seed"]) for run in plan.wanted.values()} == {(20_000, 3)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ablation_split", "budget=gpuu"], "budget=gpuu is neither one of smoke, laptop, gpu nor a number"),
        (["scaling_length", "budget=10k"], "budget=10k is not one of smoke, laptop, gpu"),
        (["ablation_split", "split=fa"], "the same model under other names"),
        (["ablation_spilt"], "did you mean ablation_split"),
        (["scaling_size", "seeds=[0]"], "scaling_size is timed, not trained; repeat=1"),
    ],
)
def test_what_is_wrong_is_one_sentence(words, said, home):
    with pytest.raises(UserError, match=said.replace("?", ".")):
        reproduce._main([*words, home[0]])


def test_what_another_artefact_trained_is_not_trained_again(trained, home, monkeypatch):
    monkeypatch.setattr("flowhn.experiment.Workshop.run", lambda *a, **k: pytest.fail("ran again"))
    assert reproduce._main(["ablation_ratio", "models=[flops]", *TINY, *home]) == 0
    (folder,) = settings(trained / "ablation_ratio")
    frame = ABLATIONS["ablation_ratio"].table(folder)
    assert list(frame.chosen) == ["FLOP-balanced"]
    assert frame.attention_share[0] == pytest.approx(80 / 128)
    assert len(list(trained.glob("runs/*"))) == 2


def test_the_folder_has_all_that_the_issue_names(trained):
    (folder,) = settings(trained / "ablation_split")
    assert {path.name for path in folder.iterdir()} == {"records", "table.md", "table.csv", "figure.png", "command.txt"}
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    readme = (folder.parent / "README.md").read_text()
    assert "./reproduce.sh ablation_split 'models=[no,fac]'" in readme
    assert f"]({folder.name}/figure.png)" in readme
    for part in ("**Question.**", "**The paper.**", "**Answer.**", "**How far this goes.**", "times No_Split's"):
        assert part in readme
    assert sorted(path.name for path in (folder / "records").iterdir()) == ["fac-s0.json", "no-s0.json"]


def test_fusions_that_are_said_to_coincide_do(trained, home):
    """sum, mean and none with a split, same seed: the same losses to the last bit."""
    from flowhn import train

    losses = []
    for fusion in ("sum", "mean", "none"):
        words = [word for word in TINY if not word.startswith("seeds")]
        assert train._main(["split=fac", f"fusion={fusion}", f"cell=x_{fusion}", "eval=none", *words, *home]) == 0
        (path,) = trained.glob(f"runs/x_{fusion}-*/record.json")
        losses.append(read_record(path).losses["train"])
    assert losses[0] == losses[1] == losses[2]


def test_split_table_and_answer(record, tmp_path):
    rows = [
        ("no", 0, 5.0, 1000.0, {"choices.split": "no"}), ("no", 1, 5.2, 1200.0, {"choices.split": "no"}),
        ("fac", 0, 5.2, 3000.0, {}), ("fac", 1, 5.3, 3600.0, {}),
        ("keys", 0, 5.35, 2000.0, {"split.keys": "all"}), ("keys", 1, 5.35, 2000.0, {"split.keys": "all"}),
    ]  # fmt: skip
    frame = ABLATIONS["ablation_split"].table(make(tmp_path, record, rows))
    assert list(frame.label) == ["No_Split", "FAC_Split", "FAC_Split, attention to all keys"]
    assert list(frame.val_loss) == pytest.approx([5.1, 5.25, 5.35])
    assert list(frame.val_loss_spread) == pytest.approx([0.1, 0.05, 0.0])
    assert list(frame.tps) == [1100.0, 3300.0, 2000.0]
    assert ABLATIONS["ablation_split"].answer(frame) == (
        "Validation loss is lowest with No_Split (5.100 nats per token): 0.150 (not more than seeds differ) below the second, "
        "FAC_Split and 0.250 (more than seeds differ) below the last, FAC_Split, attention to all keys. The fastest is FAC_Split "
        "with 3,300 tokens/s, 3.00 times No_Split's 1,100."
    )
    assert "± seeds" in readable(frame)


def test_fusion_table_repeats_the_rows_that_coincide(record, tmp_path):
    rows = [
        ("a", 0, 5.0, 1000.0, {"choices.fusion": "concat_proj"}), ("b", 0, 4.9, 1100.0, {"choices.fusion": "sum"}),
        ("c", 0, 5.1, 1000.0, {"choices.fusion": "concat_proj", "fusion.coordinate_gradients": True}),
        ("d", 0, 4.8, 500.0, {"choices.fusion": "sum", "choices.split": "no"}),
        ("e", 0, 4.7, 500.0, {"choices.fusion": "mean", "choices.split": "no"}),
    ]  # fmt: skip
    ablation = ABLATIONS["ablation_fusion"]
    frame = ablation.table(make(tmp_path, record, rows))
    split = frame[frame.split == "fac"].set_index("fusion")
    assert split.coincides["mean"] == split.coincides["none"] == "sum"
    assert split.val_loss["mean"] == split.val_loss["none"] == 4.9
    assert frame[frame.split == "no"].coincides.isna().all()
    assert "sum has the lowest validation loss (4.900), 0.100 (one seed) below the published" in ablation.answer(frame)
    figure = ablation.figure(frame)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert sum("the same as sum" in label for label in labels) == 2


def test_ratio_marks_both_balanced_cuts(record, tmp_path):
    rows = [
        ("r3", 0, 5.3, 800.0, {"split.ratio": 0.3, "attention_share": 0.3}),
        ("r7", 0, 5.1, 1000.0, {"split.ratio": 0.7, "attention_share": 0.7}),
        ("flops", 0, 5.2, 900.0, {"attention_share": 0.625}),
        ("time", 0, 5.4, 950.0, {"split.balance": "time", "split.ratio": 0.75, "attention_share": 0.75}),
    ]  # fmt: skip
    ablation = ABLATIONS["ablation_ratio"]
    frame = ablation.table(make(tmp_path, record, rows))
    assert list(frame.chosen) == ["fixed", "FLOP-balanced", "fixed", "time-balanced"]
    assert ablation.answer(frame) == (
        "Validation loss is lowest at a share of 0.70 (5.100); the FLOP-balanced cut gives 0.62 and 5.200; the time-balanced cut "
        "gives 0.75 and 5.400. Training is fastest at a share of 0.70 (1,000 tokens/s); the FLOP-balanced cut reaches 90 % of "
        "that; the time-balanced cut reaches 95 % of that."
    )
    figure = ablation.figure(frame)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Fixed share",
        "FLOP-balanced",
        "time-balanced",
    ]
    marked = {round(line.get_xdata()[0], 3) for line in figure.axes[0].lines if line.get_linestyle() == ":"}
    assert marked == {0.625, 0.75}


def test_ssm_balance_and_depth_answers(record, tmp_path):
    rows = [("m1", 0, 5.0, 1000.0, {}), ("m2", 0, 5.1, 1500.0, {"choices.ssm": "mamba2"})]
    frame = ABLATIONS["ablation_ssm"].table(make(tmp_path / "ssm", record, rows))
    assert "by +0.100 with FAC_Split" in ABLATIONS["ablation_ssm"].answer(frame)
    assert "1.50 with FAC_Split" in ABLATIONS["ablation_ssm"].answer(frame)
    time = {"split.balance": "time", "split.ratio": 0.7, "attention_share": 0.7}
    rows = [("f", 0, 5.0, 1000.0, {"attention_share": 0.6}), ("t", 0, 4.9, 1100.0, time)]
    frame = ABLATIONS["ablation_balance"].table(make(tmp_path / "balance", record, rows))
    answer = ABLATIONS["ablation_balance"].answer(frame)
    assert "from 0.60 to 0.70 with FAC_Split (validation loss -0.100)" in answer
    assert "1.10 with FAC_Split" in answer
    assert "no token is left" not in answer
    edge = [rows[0], ("t", 0, 4.9, 1100.0, time | {"split.ratio": 1.0, "attention_share": 1.0})]
    frame = ABLATIONS["ablation_balance"].table(make(tmp_path / "edge", record, edge))
    assert "FAC_Split, time-balanced: no token is left for the SSM" in ABLATIONS["ablation_balance"].answer(frame)
    assert any("no token is left for the SSM" in note for note in notes(frame))
    deep = {"size.n_layers.flowhn": 6, "size.d_model": 64}
    rows = [("d3", 0, 5.0, 1000.0, {}), ("d6", 0, 5.2, 400.0, deep)]
    frame = ABLATIONS["ablation_depth"].table(make(tmp_path / "depth", record, rows))
    answer = ABLATIONS["ablation_depth"].answer(frame)
    assert answer.startswith(
        "Validation loss is lowest with 3 blocks of width 80 (5.000 nats per token): 0.200 (one seed) below 6 "
    )
    assert answer.endswith("tokens/s go from 1,000 to 400 (0.40 times).")
    for name, folder in (("ablation_ssm", "ssm"), ("ablation_balance", "balance"), ("ablation_depth", "depth")):
        assert ABLATIONS[name].figure(ABLATIONS[name].table(tmp_path / folder)).axes


def test_runs_too_short_to_time_have_a_table_and_no_figure(record, tmp_path):
    make(tmp_path / "a-b-c", record, [("fac", 0, 5.0, None, {})])
    (tmp_path / "a-b-c" / "figure.png").write_bytes(b"old")
    write_ablation("ablation_split", tmp_path / "a-b-c", title="T", command="c")
    assert not (tmp_path / "a-b-c" / "figure.png").exists()
    assert "No figure: no record has a measured tokens/s" in (tmp_path / "a-b-c" / "table.md").read_text()
    text = write_overview("ablation_split", tmp_path, {"title": "T", "question": "Q?", "claim": "it is so"}).read_text()
    assert "too short to time" in text
    assert "![" not in text


def test_an_empty_folder_and_two_sizes_are_refused(record, tmp_path):
    with pytest.raises(UserError, match="must hold records of one size, these have none"):
        ABLATIONS["ablation_split"].table(tmp_path)
    make(tmp_path, record, [("fac", 0, 5.0, 1.0, {})])
    write_record(tmp_path / "records" / "x.json", dataclasses.replace(record, cell="x", run_id="x", size="135m"))
    with pytest.raises(UserError, match="135m, tiny"):
        ABLATIONS["ablation_split"].table(tmp_path)


def bench_record(
    folder: Path, cell: str, size: str, tps: float, *, device: str = "CPU", kind: str = "cpu", T: int = 128
) -> None:
    tokens = 4 * T
    content = {
        "cell": cell, "size": size, "seq_len": T, "protocol": "optimised", "repeat": 0, "status": "done", "batch": 4,
        "device": {"name": device, "type": kind, "count": 2}, "git": {"commit": "abcdef1234", "dirty": False},
        "window_step_seconds": [tokens / tps / f for f in (0.96, 1.0, 1.04)], "tps": tps,
        "parameters": {"tiny": 7e5, "135m": 1.3e8}[size],
        "flops_per_token": 1e6 * T, "peak_flops": 1e12, "share_of_matmul": 0.1, "peak_bytes": None, "first_step_seconds": 1.0,
        "cell_seconds": 6.0,
    }  # fmt: skip
    write_bench_record(folder / "records" / f"{cell}-{size}-{T}-{kind}.json", content)


def test_scaling_size_shows_counts_and_what_was_timed_on_each_device(tmp_path):
    counts = count_cells("length", ["tiny"])
    assert {count["cell"] for count in counts} >= {"llama", "flowhn_fac"}
    fac = next(count for count in counts if count["cell"] == "flowhn_fac")
    assert fac["parameters"] == meta_model(to_dict(compose("train", ["data=random", "eval=none"]))).num_parameters()
    (tmp_path / "counts.json").write_text(json.dumps([*counts, {**fac, "size": "1b", "parameters": 7 * 10**8}]))
    bench_record(tmp_path, "flowhn_fac", "tiny", 4000.0)
    bench_record(tmp_path, "llama", "tiny", 5000.0)
    bench_record(tmp_path, "flowhn_fac", "135m", 1e6, device="H200", kind="cuda")
    ablation = ABLATIONS["scaling_size"]
    frame = ablation.table(tmp_path)
    assert frame.tps.notna().sum() == 3
    assert list(frame["size"].unique()) == ["tiny", "135m", "1b"]
    assert len(frame[(frame.cell == "flowhn_fac") & (frame["size"] == "tiny")]) == 1  # timed, so not counted once more
    answer = ablation.answer(frame)
    assert "From tiny to 1B, FlowHN FAC_Split grows 1,000 times in parameters" in answer
    assert "tiny on CPU, 2 threads: Llama with 5,000 tokens/s" in answer
    assert "135M on H200: FlowHN FAC_Split with 1,000,000 tokens/s" in answer
    write_ablation("scaling_size", tmp_path, title="T", command="c")
    assert "H200" in (tmp_path / "table.md").read_text()
    assert len(pd.read_csv(tmp_path / "table.csv")) == len(frame)


def test_scaling_length_says_what_is_kept(tmp_path):
    for T, fac, llama in ((128, 4000.0, 5000.0), (1024, 3000.0, 2500.0)):
        bench_record(tmp_path, "flowhn_fac", "tiny", fac, T=T)
        bench_record(tmp_path, "llama", "tiny", llama, T=T)
    ablation = ABLATIONS["scaling_length"]
    frame = ablation.table(tmp_path)
    assert list(frame.kept) == pytest.approx([100, 50, 100, 75])
    assert ablation.answer(frame) == (
        "From T = 128 to 1,024 on CPU, 2 threads, FlowHN FAC_Split keeps 75 ± 6 %, Llama keeps 50 ± 4 % of its tokens/s (±: "
        "the spread of both speeds over their timed windows). At 1,024 the fastest is FlowHN FAC_Split with 3,000 tokens/s."
    )
    bench_record(tmp_path, "llama", "tiny", 4000.0, T=2048)
    assert "(Llama by 60 % from 1,024 to 2,048) tell that these cells differ" in ablation.answer(
        ablation.table(tmp_path)
    )
    assert len(ablation.figure(frame).axes) == 2


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("budget", ["smoke", "laptop", "gpu"])
def test_timed_artefacts_are_commands_that_flowhn_bench_knows(name, budget, capsys):
    from flowhn.bench import plan

    label, words = bench_words(load_artefact(name), [f"budget={budget}"])
    assert label == budget
    specs = list(
        plan(
            to_dict(
                compose("bench", [word for word in words if not word.startswith("models=")] + ["models=[flowhn_fac]"])
            )
        )
    )
    assert {spec["seq_len"] for spec in specs} >= {"laptop": {128}, "gpu": {1024}, "smoke": {64}}[budget]
    if (name, budget) == ("scaling_length", "gpu"):
        assert {spec["seq_len"] for spec in specs} == {2**n for n in range(10, 16)}
    if (name, budget) == ("scaling_length", "laptop"):
        assert len({spec["batch"] * spec["seq_len"] for spec in specs}) == 1
    assert reproduce._main(["--dry-run", name, f"budget={budget}"]) == 0
    assert "flowhn-bench bench=" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ABLATIONS))
def test_every_ablation_runs_at_its_smoke_budget(name, home):
    """What .ci/run does with one command for all."""
    assert reproduce._main([name, "budget=smoke", *home]) == 0
    folder = Path(home[0].partition("=")[2]) / name
    assert "**Answer.**" in (folder / "README.md").read_text()
    assert any(setting.name.endswith("smoke") and (setting / "figure.png").is_file() for setting in settings(folder))
