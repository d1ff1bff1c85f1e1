"""``flowhn-bench``: planning, one process a cell, records that are kept, tables and goals from records alone."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from flowhn import bench, bench_cell
from flowhn.benchmark import peers
from flowhn.benchmark.peers import PEERS, build_peer, peer_kernels
from flowhn.benchmark.profile import kind_of, profile_steps, union
from flowhn.config import build_model, compose, groups, to_dict
from flowhn.errors import UserError
from flowhn.reporting.bench import (
    bench_table,
    find_bench_records,
    how_measured,
    read_bench_record,
    readable,
    write_bench,
    write_bench_record,
)
from flowhn.reporting.bench_figures import throughput_figure
from flowhn.reporting.goals import BASELINES, goals, readable_goals
from flowhn.reporting.missed import missed_lines

SMALL = ["sizes=[tiny]", "seq_len=16", "batch=1", "windows=2", "steps_per_window=1", "warmup_steps=0"]


def fake(cell: str, tps: float, size: str = "135m", **changes) -> dict:
    record = {
        "cell": cell, "size": size, "seq_len": 1024, "protocol": "optimised", "repeat": 0, "status": "done", "batch": 64,
        "parameters": 132_000_000, "tps": tps, "window_step_seconds": [64 * 1024 / tps * f for f in (0.99, 1.0, 1.01)],
        "first_step_seconds": 20.0, "flops_per_token": 4e8, "peak_flops": 989.4e12, "share_of_matmul": 4e8 * tps / 7.9e14,
        "peak_source": "datasheet, dense bf16", "matmul_flops": 7.9e14,
        "peak_bytes": 15 * 2**30, "device": {"name": "NVIDIA H200"}, "versions": {"torch": "2.11"}, "git": {"commit": "abc"},
    }  # fmt: skip
    return record | changes


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize("case", groups()["bench"])
def test_every_benchmark_plans_its_cells(case):
    config = to_dict(compose("bench", [f"bench={case}", "batch=8"]))
    specs = list(bench.plan(config))
    names = [bench.spec_name(spec) for spec in specs]
    assert len(names) == len(set(names)) > 0
    assert all(spec["batch"] >= 1 for spec in specs)


def test_a_cell_may_have_a_batch_of_its_own():
    specs = list(bench.plan(to_dict(compose("bench", ["sizes=[135m,1b]", "models=[llama,mamba1,hymba]"]))))
    batches = {(spec["size"], spec["cell"]): spec["batch"] for spec in specs}
    assert {cell: batches["135m", cell] for cell in ("llama", "mamba1", "hymba")} == dict.fromkeys(
        ("llama", "mamba1", "hymba"), 128
    )
    assert batches["1b", "llama"] == 64 > batches["1b", "hymba"] > batches["1b", "mamba1"]  # by the memory they need


def test_length_keeps_the_tokens_of_a_step():
    specs = list(bench.plan(to_dict(compose("bench", ["bench=length", "models=[llama]"]))))
    assert {spec["batch"] * spec["seq_len"] for spec in specs} == {65_536}
    assert [spec["seq_len"] for spec in specs] == [1024, 2048, 4096, 8192, 16384, 32768]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models=[lama]"], "did you mean llama"),
        (["sizes=[2b]"], "did you mean 1b"),
        (["protocol=fast"], "protocol=fast does not exist"),
        (["batch=0"], "batch=0 must be auto or a number"),
        (["overrides=['split.ratios=1']"], r"unknown key split\.ratios"),
        (["windoes=3"], "did you mean windows"),
    ],
)
def test_bad_requests_are_one_sentence_before_anything_is_measured(words, said):
    with pytest.raises(UserError, match=said):
        list(bench.plan(to_dict(compose("bench", words))))


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_every_option_with_its_comment(word, capsys):
    assert bench._main([word]) == 0
    told = capsys.readouterr().out
    options = set(to_dict(compose("bench", []))) - {"bench"}
    assert not [name for name in options if f"\n{name}: " not in told and name != "choices"]


def test_a_cell_is_measured_in_its_own_process_once(tmp_path, capsys, monkeypatch):
    words = [*SMALL, "models=[flowhn_fac]", f"output_dir={tmp_path}", "profile=true", "commit=1234567"]
    assert bench._main(words) == 0
    folder = tmp_path / "bench" / "figure4"
    (record,) = find_bench_records(folder / "records")
    assert record["status"] == "done"
    assert record["tps"] > 0
    assert record["kernels"]["attention"] == "sdpa"
    assert record["flops_per_token"] > 3 * 2 * 80 * 2048
    assert len(record["window_step_seconds"]) == 2
    assert sum(record["profile"]["kinds"].values()) == pytest.approx(record["profile"]["kernel_ms"])
    assert "FlowHN FAC_Split" in (folder / "table.md").read_text()
    assert (folder / "figure4.png").stat().st_size > 1000
    monkeypatch.setattr(bench, "_run", lambda *a: pytest.fail("measured again"))
    assert bench._main(words) == 0


def test_a_cell_that_dies_is_listed_and_measured_again(tmp_path, capsys, monkeypatch):
    words = [*SMALL, "models=[llama]", f"output_dir={tmp_path}"]
    dead = {"status": "failed", "reason": "RuntimeError: no kernel image"}
    monkeypatch.setattr(bench, "run_cell", lambda spec, timeout: dead)
    monkeypatch.setattr("flowhn.bench.environment", lambda: {"git": {"commit": None, "dirty": None}, "versions": {}})
    assert bench._main(words) == 2
    assert "RuntimeError: no kernel image" in capsys.readouterr().err
    (record,) = find_bench_records(tmp_path / "bench" / "figure4" / "records")
    assert record["status"] == "failed"


def test_max_minutes_leaves_the_rest_for_the_next_call(tmp_path, capsys, monkeypatch):
    done = {"status": "done", "git": {"commit": "a"}, **fake("llama", 1.0)}
    monkeypatch.setattr(bench, "_run", lambda spec, timeout: pytest.fail("started") if spec is None else done)
    assert bench._main([*SMALL, "max_minutes=0", f"output_dir={tmp_path}"]) == 0
    assert "not measured yet" in capsys.readouterr().out


def test_prepare_compiles_first_and_leaves_no_record_of_it(tmp_path, capsys, monkeypatch):
    asked = []

    def run(spec, timeout):
        asked.append(spec["windows"])
        if not spec["windows"]:
            return {"status": "prepared", "first_step_seconds": 1.0}
        return {**fake("llama", 1.0), "status": "done", "cell_seconds": 1.0}

    monkeypatch.setattr(bench, "_run", run)
    assert bench._main([*SMALL, "models=[llama]", "prepare=2", f"output_dir={tmp_path}"]) == 0
    assert asked == [0, 2]
    (record,) = find_bench_records(tmp_path / "bench" / "figure4" / "records")
    assert record["status"] == "done"
    assert record["cold_first_step_seconds"] == 1.0


def test_preparing_runs_one_step_and_times_nothing():
    (spec,) = bench.plan(to_dict(compose("bench", [*SMALL, "models=[llama]"])))
    result = bench_cell.measure({**spec, "windows": 0})
    assert result["status"] == "prepared"
    assert result["first_step_seconds"] > 0
    assert "tps" not in result


def test_batch_search_doubles_until_nothing_is_gained():
    speeds = {2: 100.0, 4: 150.0, 8: 151.0}

    def run(batch, windows, steps):
        return {"seconds": [batch * 10 / speeds[batch]]}

    best, tried = bench_cell._search({"first_batch": 2, "seq_len": 10}, run)
    assert best == 8
    assert [entry["batch"] for entry in tried] == [2, 4, 8]


def test_batch_search_stops_where_memory_ends():
    def run(batch, windows, steps):
        if batch > 4:
            raise torch.OutOfMemoryError("full")
        return {"seconds": [1.0]}

    best, tried = bench_cell._search({"first_batch": 2, "seq_len": 10}, run)
    assert best == 4
    assert tried[-1] == {"batch": 8, "status": "out of memory"}
    with pytest.raises(torch.OutOfMemoryError):
        bench_cell._search({"first_batch": 8, "seq_len": 10}, run)


def test_out_of_memory_is_a_result(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(bench_cell, "_build", full)
    (spec,) = bench.plan(to_dict(compose("bench", [*SMALL, "models=[llama]"])))
    result = bench_cell.measure(spec)
    assert result["status"] == "out of memory"
    frame = bench_table([fake("llama", 1.0) | result])
    assert "out of memory" in frame.status[0]


def test_tokens_are_random_and_the_next_ones_are_the_labels():
    ids, labels = bench_cell._tokens({"seed": 0, "seq_len": 64}, 4, 1000, torch.device("cpu"))
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    assert len(ids.unique()) > 150


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_our_size_and_the_same_targets(name):
    config = to_dict(compose("train", [f"model={name}", "size=tiny"]))
    peer = build_peer(name, config)
    ours = build_model(config).num_parameters()
    assert sum(parameter.numel() for parameter in peer.parameters()) == pytest.approx(ours, rel=0.02)
    data = torch.randint(2048, (2, 18))
    logits = peer.model(input_ids=data[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data[:, 1:-1].flatten())
    assert peer(data[:, :-1], data[:, 1:]).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_records_are_guarded(tmp_path):
    path = tmp_path / "records" / "a.json"
    write_bench_record(path, fake("llama", 5.0))
    assert read_bench_record(path)["tps"] == 5.0
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "tps": 6.0}))
    with pytest.raises(UserError, match="edited"):
        read_bench_record(path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_bench_record(path)


def test_goals_stand_beside_what_was_reached(tmp_path):
    records = [
        fake("flowhn_fac", 1_100_000), fake("flowhn_fac_mamba2", 1_000_000), fake("llama", 850_000), fake("peer_llama", 600_000),
    ]  # fmt: skip
    frame = goals(records).set_index("what")
    assert frame.loc["FlowHN FAC_Split", "met"] == "yes"
    assert frame.loc["FlowHN FAC_Split, Mamba-2 branch", "met"] == "no"
    lead = frame.filter(like="fastest", axis=0).iloc[0]
    assert lead.reached == pytest.approx(1_100_000 / 850_000)
    assert frame.filter(like="transformers", axis=0).iloc[0].reached == pytest.approx(850 / 600)
    write_bench(records, tmp_path, title="T")
    text = (tmp_path / "table.md").read_text()
    assert "Goal and reached" in text
    assert "each run" not in text
    assert pd.read_csv(tmp_path / "table.csv").tps.max() == 1_100_000


def lead(records, size="135m"):
    frame = goals(records)
    return frame[frame.what.str.contains("fastest of the baselines") & (frame["size"] == size)].iloc[0]


def test_a_lead_is_open_until_all_baselines_are_timed():
    fac = fake("flowhn_fac", 1_100_000)
    some = [fake(cell, 500_000) for cell in BASELINES[:-1]]
    assert lead([fac, *some]).met == "open"
    assert "5 of 6 timed" in lead([fac, *some]).what
    assert lead([fac, *some, fake(BASELINES[-1], 500_000)]).met == "yes"
    assert lead([fac, fake("llama", 1_000_000)]).met == "no"  # another baseline can only make it less
    full = {"status": "out of memory", "reason": "full", "first_batch": 16}
    assert lead([fac, *some, fake(BASELINES[-1], 1, **full, batch=64)]).met == "open"  # it may fit at a smaller batch
    unfit = lead([fac, *some, fake(BASELINES[-1], 1, **full, batch=1)])
    assert unfit.met == "yes"
    assert "1 did not fit" in unfit.what


def test_only_at_1b_the_better_branch_leads():
    for size, leader in (("135m", 1.0), ("350m", 1.0), ("1b", 2.0)):
        records = [fake("flowhn_fac", 1.0, size), fake("flowhn_fac_mamba2", 2.0, size), fake("llama", 1.0, size)]
        assert lead(records, size).reached == leader
        assert ("better branch" in lead(records, size).what) == (size == "1b")


def test_of_several_runs_the_median_counts_and_each_is_shown():
    records = [fake("flowhn_fac", tps, repeat=n) for n, tps in enumerate((1_000_000, 1_060_000, 1_100_000))]
    records += [fake("llama", 500_000, repeat=n) for n in range(3)]
    row = goals(records).set_index("what").loc["FlowHN FAC_Split"]
    assert (row.reached, row.met) == (1_060_000, "yes")
    assert row.spread == pytest.approx(100 * 50_000 / 1_060_000)
    assert lead(records).each == [2.0, 2.12, 2.2]
    shown = readable_goals(goals(records))
    assert shown["each run"][0] == "1,000,000; 1,060,000; 1,100,000"


def test_repeats_of_other_code_are_not_pooled():
    old = fake("llama", 200.0, git={"commit": "old"}, created="2026-01-01")
    new = [fake("llama", tps, repeat=n, created="2026-01-02") for n, tps in enumerate((100.0, 110.0))]
    frame = bench_table([old, *new])
    assert (frame.tps[0], frame.runs[0]) == (105.0, 2)


CPU = {
    "case": "cpu_peers", "protocol": "published", "seq_len": 128, "batch": 4, "peak_source": "measured matmul",
    "peak_bytes": None, "compile": False, "device": {"name": "A Processor", "type": "cpu", "count": 2},
}  # fmt: skip


def test_the_cpu_s_goals_are_ratios_of_medians_over_repeats(tmp_path):
    records = [fake("mamba1", tps, "tiny", repeat=n, **CPU) for n, tps in enumerate((1000, 1200, 900))]
    records += [fake("peer_mamba1", tps, "tiny", repeat=n, **CPU) for n, tps in enumerate((500, 400, 600))]
    records += [
        fake("jamba", 100.0, "tiny", **CPU),
        fake("peer_jamba", 101.0, "tiny", **CPU),
        fake("llama", 1, "tiny", **CPU),
    ]
    frame = goals(records)
    assert list(frame.what) == [
        "Mamba-1 over transformers' on the CPU, T 128, batch 4", "Jamba over transformers' on the CPU, T 128, batch 4"
    ]  # fmt: skip
    assert list(frame.met) == ["yes", "no"]
    assert frame.reached[0] == 2.0
    assert frame.each[0] == [2.0, 3.0, 1.5]
    write_bench(records, tmp_path, title="T")
    assert "Goal and reached" in (tmp_path / "table.md").read_text()


def test_cpu_cells_alternate_ours_and_the_peer():
    cells = [spec["cell"] for spec in bench.plan(to_dict(compose("bench", ["bench=cpu_peers"])))]
    assert cells[1::2] == [f"peer_{cell}" for cell in cells[::2]]
    assert cells[::2] == ["llama", "mamba1", "mamba2", "jamba"]


def test_the_text_names_the_peak_of_its_records():
    text = how_measured([fake("llama", 1.0)])
    assert "the device's peak (datasheet, dense bf16, 989.4 TFLOP/s)" in text
    assert "after MFU" in text
    records = [fake("llama", 1.0, "tiny", **CPU | {"peak_flops": peak}) for peak in (1e11, 4e11)]
    text = how_measured(records)
    assert "0.4 TFLOP/s): no datasheet" in text
    assert "datasheet, dense" not in text
    assert "of matmul %" not in readable(bench_table(records))  # on a CPU it differs by a factor between processes
    other = fake("shm", 1.0, "tiny", **CPU | {"peak_flops": 4e11})  # one peak for all rows: the fastest product of all
    assert bench_table([records[0], other]).mfu.tolist() == [pytest.approx(100 * 4e8 / 4e11)] * 2


def test_the_first_step_is_told_by_what_was_compiled_before_it():
    prepared = fake("llama", 1.0, cold_first_step_seconds=30.0, first_step_seconds=2.0)
    alone = fake("shm", 1.0, first_step_seconds=44.0)
    eager = fake("jamba", 1.0, first_step_seconds=0.5, compile=False)
    shown = readable(bench_table([prepared, alone, eager]))
    assert list(shown["first step s, compiling"]) == ["30", "≥ 44", ""]
    assert list(shown["first step s, warm caches"]) == ["2.0", "", "0.5"]
    assert "≥: not prepared" in how_measured([prepared, alone])
    assert "≥" not in how_measured([prepared])
    assert list(readable(bench_table([eager]))["first step s"]) == ["0.5"]  # nothing was compiled
    assert list(readable(bench_table([eager]))["first step s"]) == ["0.5"]  # nothing was compiled


def test_why_a_goal_is_missed_comes_from_the_profile():
    kinds = {"matrix products": 60.0, "SSM scan": 25.0, "loss": 15.0}
    profile = {"kinds": kinds, "kernel_ms": 100.0, "busy_ms": 100.0, "overlap_ms": 0.0}
    records = [fake("flowhn_fac", 1_000_000, profile=profile), fake("llama", 500_000)]
    per_token = 0.9 * 7.9e14 * 0.06 / (64 * 1024)  # nine tenths of the measured rate in 60 ms
    (line,) = missed_lines(records, lambda record: per_token)
    assert line.startswith("- FlowHN FAC_Split at 135m (FlowHN FAC_Split: 1,000,000 of 1,050,000 tokens/s")
    assert "products take 60 %" in line
    assert "711 TFLOP/s, 90 % of the 790 that the large product reached in the same process;" in line
    kept = [{**record, "matmul_flops_sustained": 7.2e14} for record in records]
    assert "in the same process (720 when it runs on for a second" in missed_lines(kept, lambda record: per_token)[0]
    assert "SSM scan 25 %, loss 15 %" in line
    assert missed_lines([fake("flowhn_fac", 1_100_000, profile=profile)], lambda record: 1.0) == []
    assert "Nothing was profiled" in missed_lines([fake("flowhn_fac", 1.0)], lambda record: 1.0)[0]


def test_product_flops_are_those_of_the_linear_layers_on_the_tokens_that_reach_them():
    path = Path(__file__).resolve().parents[1] / "scripts" / "refresh_experiments.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def both(*words):
        config = to_dict(compose("train", ["size=tiny", "seq_len=64", *words]))
        with torch.device("meta"):
            net = build_model(config)
        all_tokens = 6 * sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, torch.nn.Linear))
        return script.product_flops({"config": config, "seq_len": 64}), all_tokens, 3 * net.flops(64) / 64

    products, all_tokens, total = both("model=llama")
    assert products == all_tokens < total  # attention's own products are no linear layers
    products, all_tokens, total = both("model=flowhn", "split=fac")
    assert products < min(all_tokens, total)  # a branch sees a share of the tokens


def test_each_peer_stands_beside_ours_with_a_label_of_two_lines():
    frame = bench_table([fake(cell, 1.0) for cell in ("jamba", "llama", "fac_overlap", "peer_jamba", "peer_llama")])
    labels = [label.get_text() for label in throughput_figure(frame).axes[0].get_xticklabels()]
    assert labels[:4] == ["Llama", "transformers\nLlama", "Jamba", "transformers\nJamba"]


def test_repeats_are_pooled_with_their_spread():
    frame = bench_table([fake("llama", 100.0), fake("llama", 120.0, repeat=1)])
    assert len(frame) == 1
    assert frame.runs[0] == 2
    assert frame.tps[0] == 110.0
    assert frame.spread[0] > 9


def test_of_several_batches_the_fastest_counts():
    frame = bench_table([fake("llama", 100.0, batch=4), fake("llama", 120.0, batch=8), fake("llama", 90.0, batch=16)])
    assert (frame.batch[0], frame.tps[0], frame.runs[0]) == (8, 120.0, 1)


def test_overlap_is_what_the_union_does_not_cover():
    assert union([(0, 2), (1, 3), (5, 6)]) == 4
    assert kind_of("selective_scan_bwd_kernel<x>") == kind_of("ssd_backward_x_kernel") == "SSM scan"
    assert kind_of("nvjet_sm90_tst_192x192_64x4") == "matrix products"
    assert kind_of("triton_poi_fused_add_flowhn_triton_ssd_backward_slice_3") == "norms, gates, copies"
    assert kind_of("triton_red_fused__log_softmax_0") == "loss"
    assert kind_of("something new") == "other"
    found = profile_steps(lambda: torch.randn(64, 64) @ torch.randn(64, 64), device=torch.device("cpu"))
    assert found["kernel_ms"] > 0


def test_a_peer_that_cannot_be_compiled_runs_eagerly_and_says_so(monkeypatch):
    (spec,) = bench.plan(to_dict(compose("bench", [*SMALL, "bench=peers", "models=[peer_llama]"])))
    build = bench_cell._build

    def refuse(spec, config, device, compiles):
        if compiles:
            raise RuntimeError("cannot trace\nmore")
        return build(spec, config, device, compiles)

    monkeypatch.setattr(bench_cell, "_build", refuse)
    result = bench_cell.measure({**spec, "compile": True})
    assert (result["status"], result["compile"], result["compile_error"]) == ("done", False, "cannot trace")
    assert result["kernels"] == {"ssm": None, "attention": "sdpa"}
    (own,) = bench.plan(to_dict(compose("bench", [*SMALL, "models=[llama]"])))
    with pytest.raises(RuntimeError, match="cannot trace"):
        bench_cell.measure({**own, "compile": True})


def test_a_peers_kernels_are_the_functions_that_transformers_chose(monkeypatch):
    from transformers.models.mamba import modeling_mamba

    assert peer_kernels("llama") == {"ssm": None, "attention": "sdpa"}
    implementation = torch.nn.functional.relu
    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", lambda x: implementation(x))
    assert peer_kernels("mamba1")["ssm"] == "torch.nn.functional"


@pytest.mark.parametrize(
    "name", ["mamba1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mamba2", "jamba"))]
)
def test_a_compiled_peer_runs_its_kernels_outside_the_graph(name, monkeypatch):
    """is_exporting() is true while Dynamo traces: traced, transformers' wrapper would choose its loop over tokens."""
    module, functions = peers._SCANS[name]
    module, called = importlib.import_module(module), {}

    def watched(function, choose):
        def call(*args, **kwargs):
            called.setdefault(function, []).append(torch.compiler.is_compiling())
            return choose(*args, **kwargs)

        return call

    for function in functions:
        monkeypatch.setattr(module, function, watched(function, getattr(module, function)))
    peer = build_peer(name, to_dict(compose("train", [f"model={name}", "size=tiny"])))
    ids = torch.randint(2048, (1, 9))
    torch.compile(peer, backend="eager")(ids[:, :-1], ids[:, 1:])
    assert functions[0] in called
    assert not any(traced for calls in called.values() for traced in calls)


def test_a_peer_without_its_kernels_is_not_timed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(bench_cell, "peer_kernels", lambda name: {"ssm": f"transformers.models.{name}"})
    with pytest.raises(UserError, match=r"peer_mamba1 .*models="):
        bench_cell._check_peer("mamba1", torch.device("cuda"))
    bench_cell._check_peer("mamba1", torch.device("cpu"))
    for ssm in ("mamba_ssm.ops.selective_scan_interface", None):
        monkeypatch.setattr(bench_cell, "peer_kernels", lambda name, ssm=ssm: {"ssm": ssm})
        bench_cell._check_peer("mamba1", torch.device("cuda"))


def test_goals_of_length_and_of_the_published_code():
    records = [fake("flowhn_fac", 1_000_000), fake("flowhn_fac", 900_000, seq_len=8192)]
    frame = goals(records)
    assert frame[frame.what.str.contains("8,192")].reached.item() == pytest.approx(90.0)
    assert frame[frame.what.str.contains("published")].reached.item() == pytest.approx(1_000_000 / 96_200)
