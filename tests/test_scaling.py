"""docs/scaling.md: tables up to date, formulas equal to the real modules."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

from flowhn.config import build_model, compose, to_dict
from script_loading import SCRIPTS, load_script

formulas = load_script("scaling_formulas")
scaling = load_script("scaling")


def real_model(shape, split: str = "fac", device: str = "meta"):
    """The project's own model of a shape, through its configs."""
    size = {"d_model": shape.d_model, "n_heads": shape.n_heads, "n_kv_heads": shape.n_kv_heads}
    words = ["model=flowhn", f"split={split}", "size=1b", "data=random", "eval=none", "trainer=cpu"]
    words += [f"size.{key}={value}" for key, value in size.items()]
    words += [f"size.n_layers.flowhn={shape.n_layers}", f"size.d_ff.flowhn={shape.d_ff}"]
    words += [f"vocab_size={shape.vocab_size}", f"seq_len={shape.seq_len}", f"global_batch_tokens={shape.seq_len}"]
    with torch.device(device):
        return build_model(to_dict(compose("train", words)))


TINY = formulas.Shape("tiny", 64, 160, 3, 4, 2, 512, 128)


def test_tables_are_up_to_date():
    done = subprocess.run([sys.executable, SCRIPTS / "scaling.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch, capsys):
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    changed = tmp_path / "scaling.md"
    changed.write_text(text.replace("1,144,363,968", "1,144,363,969"), encoding="utf-8")
    monkeypatch.setattr(scaling, "DOCUMENT", changed)
    assert scaling.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert scaling.main([]) == 0
    assert changed.read_text(encoding="utf-8") == text
    changed.write_text(text.replace("<!-- end pairs -->", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="pairs"):
        scaling.main([])


@pytest.mark.parametrize("shape", [scaling.B1, scaling.B7, TINY], ids=lambda shape: shape.name)
def test_parameters_flops_and_split_are_the_modules_own(shape):
    model = real_model(shape)
    block = model.layers[0]
    assert model.num_parameters() == shape.parameters
    assert sum(p.numel() for p in block.attention.parameters()) == shape.attn_parameters
    assert sum(p.numel() for p in block.ssm.parameters()) == shape.ssm_parameters
    assert sum(p.numel() for p in block.parameters()) == shape.block_parameters
    assert model.flops(shape.seq_len) == shape.forward_flops
    assert block.token_split(shape.seq_len).n_attn == shape.n_attn


def test_the_1b_is_the_projects_own():
    size = to_dict(compose("train", ["model=flowhn", "size=1b", "data=random"]))["size"]
    ours = scaling.B1
    assert (size["d_model"], size["d_ff"]["flowhn"], size["n_layers"]["flowhn"]) == (
        ours.d_model,
        ours.d_ff,
        ours.n_layers,
    )
    assert (size["n_heads"], size["n_kv_heads"], size["vocab_size"]) == (ours.n_heads, ours.n_kv_heads, ours.vocab_size)


@pytest.mark.parametrize("split", ["fa", "fac", "ae"])
def test_moved_tokens_are_those_of_the_splits(split):
    shape = formulas.Shape("short", 64, 160, 4, 4, 2, 512, 96)
    layers = real_model(shape, split).layers
    windows = []
    for layer in layers:
        ranges = layer.token_split(shape.seq_len).attn
        windows.append({token for start, stop in ranges for token in range(start, stop)})
    for before, after in itertools.pairwise(windows):
        assert len(before - after) == formulas.moved_tokens(shape, split)


def saved_numbers(model, run) -> int:
    """Numbers that autograd keeps for ``run``, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values()) // 4


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_activation_formula_is_what_autograd_keeps(layer):
    model = real_model(TINY, device="cpu")
    rows = 2
    x = torch.randn(rows, TINY.seq_len, TINY.d_model, requires_grad=True)
    kept = saved_numbers(model, lambda: model.layers[layer](x))
    assert sum(TINY.block_kept(cpu=True)) * rows == pytest.approx(kept, rel=0.08)
    # what the GPU does not keep is a part of what the CPU does
    assert sum(TINY.block_kept()) < sum(TINY.block_kept(cpu=True))


@pytest.mark.parametrize("branch", ["attention", "ssm"])
def test_activations_grow_with_width_as_the_formula_says(branch):
    """Twice the width and hidden width: the formula's ratio, not only its sum."""
    shapes = [formulas.Shape("a", d, 2 * d, 1, 4, 2, 64, 128) for d in (32, 128)]
    for shape in shapes:
        model = real_model(shape, device="cpu")
        x = torch.randn(1, 64, shape.d_model, requires_grad=True)
        kept = saved_numbers(model, lambda x=x, model=model: getattr(model.layers[0], branch)(x))
        count = shape.attn_kept if branch == "attention" else shape.ssm_kept
        assert sum(count(64, cpu=True)) == pytest.approx(kept, rel=0.08)


def test_memory_and_bytes_of_jobs_by_hand():
    shape, cluster = TINY, formulas.Cluster()
    p = shape.parameters
    alone = formulas.Job(shape, 1, "ddp", 1)
    assert alone.volume(cluster) == {"inside": 0, "between": 0}
    assert alone.step(cluster, 0.5)["communication"] == 0
    assert formulas.Job(shape, 4, "ddp", 1).volume(cluster)["between"] == 2 * 3 / 4 * 4 * p
    sharded = formulas.Job(shape, 4, "fsdp", 1, 3)
    assert sharded.volume(cluster) == {"inside": 3 / 4 * 8 * p * 3, "between": 0}
    assert sharded.memory(cluster)["AdamW"] == 8 * p / 4
    assert sharded.global_tokens == 4 * 3 * shape.seq_len
    mixed = formulas.Job(shape, 32, "hsdp", 1)
    assert mixed.volume(cluster)["between"] == 2 * 3 / 4 * 4 * p / 8
    for job in scaling.JOBS:
        memory, step = job.memory(cluster), job.step(cluster, 0.4)
        assert memory["sum"] == pytest.approx(sum(value for name, value in memory.items() if name != "sum"))
        assert step["mfu"] <= 0.4
        assert step["step"] >= step["compute"] + step["exposed"]


def test_the_nearest_record_gives_the_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RECORDS", tmp_path)
    mfu, source = scaling.single_gpu_mfu(scaling.B1)
    assert mfu == scaling.ASSUMED_MFU
    assert "assumed" in source
    folder = tmp_path / "figure4" / "records"
    folder.mkdir(parents=True)
    fixed = {"cell": "flowhn_fac", "status": "done", "protocol": "optimised", "precision": "bf16-mixed", "peer": None}
    fixed |= {
        "seq_len": 1024,
        "repeat": 0,
        "batch": 16,
        "git": {"commit": "0123456789"},
        "device": {"name": "NVIDIA H200"},
    }
    for size, parameters, mfu in (("135m", 132_396_448, 0.3), ("1b", scaling.B1.parameters, 0.5)):
        record = fixed | {"size": size, "parameters": parameters, "mfu": mfu}
        (folder / f"{size}.json").write_text(json.dumps(record))
    (folder / "slow.json").write_text(
        json.dumps(fixed | {"size": "1b", "protocol": "published", "parameters": 1, "mfu": 1})
    )
    mfu, source = scaling.single_gpu_mfu(scaling.B1)
    assert (mfu, source) == (0.5, "measured (16 x 1024 tokens, commit 0123456)")
    mfu, source = scaling.single_gpu_mfu(scaling.B7)
    assert mfu == 0.5
    assert source.startswith("assumed as measured at 1b")
