"""``split.balance=time``: the cut from measured times, and that a run keeps it."""

from __future__ import annotations

import json

import pytest
import torch

import flowhn
from flowhn import train
from flowhn.benchmark import balance
from flowhn.benchmark.balance import balanced_cut, load_or_measure, measure_balance
from flowhn.config import build_model, compose, to_dict
from flowhn.errors import UserError


def test_the_cut_makes_the_slower_branch_fastest():
    assert balanced_cut(100, lambda n: n, lambda n: n) == 50
    assert balanced_cut(100, lambda n: 3.0 * n, lambda n: 1.0 * n) == 25
    assert balanced_cut(7, lambda n: 0.0, lambda n: 1.0 * n) == 7


def test_measuring_leaves_the_block_as_it_was(monkeypatch):
    block = build_model(to_dict(compose("train", ["size=tiny"]))).layers[0]
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    found = measure_balance(block, seq_len=64, batch_size=2, d_model=80, device="cpu")
    assert 0 <= found.n_attn <= 64
    assert int(found.ratio * 64) == found.n_attn
    assert [n for n, _ in found.attention] == [19, 32, 45]
    assert all(milliseconds > 0 for _, milliseconds in found.attention + found.ssm)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())
    assert all(parameter.grad is None for parameter in block.parameters())


def test_a_slow_branch_gets_fewer_tokens(monkeypatch):
    block = build_model(to_dict(compose("train", ["size=tiny"]))).layers[0]
    speeds = {id(block.attention): 1e-6, id(block.ssm): 3e-6}
    monkeypatch.setattr(balance, "_branch_seconds", lambda branch, n, **kwargs: n * speeds[id(branch)])
    found = measure_balance(block, seq_len=1000, batch_size=2, d_model=80, device="cpu")
    assert found.n_attn == 750
    assert found.n_attn_flops == balanced_cut(1000, block.attention.flops, block.ssm.flops)


def test_a_measurement_is_kept(tmp_path):
    made = balance.MeasuredBalance(0.5, 4, 3, 8, [[1, 1.0]], [[1, 1.0]], 2, "cpu")
    assert load_or_measure(tmp_path / "a" / "b.json", lambda: made) == made
    assert load_or_measure(tmp_path / "a" / "b.json", lambda: pytest.fail("measured again")) == made


def test_without_a_measurement_the_split_says_so():
    model = build_model(to_dict(compose("train", ["size=tiny", "split.balance=time"])))
    with pytest.raises(UserError, match=r"split\.balance=time"):
        model(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(UserError, match=r"split\.balance=speed must be"):
        build_model(to_dict(compose("train", ["size=tiny", "split.balance=speed"])))


@pytest.mark.slow  # .ci/run runs it
def test_a_run_measures_once_and_its_record_and_weights_know_the_cut(tmp_path, capsys):
    words = ["split.balance=time", "budget=1024", "val_points=1", "val_rows=2", "eval=none"]
    words += [f"output_dir={tmp_path}", f"cache_dir={tmp_path}/cache"]
    assert train._main(words) == 0
    (path,) = tmp_path.glob("runs/*/record.json")
    config = json.loads(path.read_text())["config"]
    found = config["measured_balance"]
    assert config["split"]["ratio"] == config["model"]["blocks"]["parallel"]["split"]["ratio"] == found["ratio"]
    assert found["seq_len"] == 128
    loaded = flowhn.load(path.parent)
    assert loaded.layers[0].token_split(128).n_attn == found["n_attn"]
    assert len(list((tmp_path / "cache" / "balance").glob("*.json"))) == 1
