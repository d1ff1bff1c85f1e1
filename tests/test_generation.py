"""Decoding with a cache: the logits of the full forward at every position, for all ten models; what it costs; the entry."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from flowhn import generate
from flowhn.config import build_model, compose, to_dict
from flowhn.data.tokenization import train_bpe
from flowhn.errors import UserError
from flowhn.models import CausalLM, Mamba1, Mamba2, ParallelBlock
from flowhn.models.generation import Sampling, decode_cost, generate_tokens

CELLS = (
    "llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_no", "flowhn_ae", "flowhn_fa", "flowhn_fac",
)  # fmt: skip
SPLIT = ("flowhn_ae", "flowhn_fa", "flowhn_fac")
# Eight Hymba layers hold every kind of pair: global first, window first, both windows.
DEEP = {"hymba": ("size.n_layers.hymba=8", "size.hymba.sliding_window=6")}
TOLERANCE = 1e-4


@cache
def config(cell: str, *overrides: str) -> dict:
    model, _, split = cell.partition("_")
    words = [f"model={model}", f"split={split or 'fac'}", "size=tiny", *DEEP.get(cell, ()), *overrides]
    return to_dict(compose("train", words))


def build(cell: str, *overrides: str) -> CausalLM:
    """Weights three times as large as drawn: logits of about 3, so that 1e-4 means something."""
    torch.manual_seed(0)
    model = build_model(config(cell, *overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.std() < 0.05:
                parameter.mul_(3)
    return model


def windowed(cell: str, window: int) -> CausalLM:
    return build(cell, f"split.window={window}") if cell in SPLIT else build(cell)


def ids(n_tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(2048, (batch, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


@torch.no_grad()
def extended(model: CausalLM, text: torch.Tensor, pieces: list[int], window: int | None = None) -> torch.Tensor:
    """Logits of a text read in pieces of these lengths, the rest token by token."""
    state = model.new_cache(window=window)
    pieces = [*pieces, *([1] * (text.shape[1] - sum(pieces)))]
    return torch.cat([model.extend(piece, state) for piece in text.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("n_tokens", [1, 9, 71])
def test_prefill_and_steps_are_the_forward_at_every_position(cell, n_tokens, compare):
    model, text = windowed(cell, 9), ids(n_tokens)  # 71 tokens: eight periods of the routing, FAC wraps in each
    with torch.no_grad():
        full = model(text)
    assert full.std() > 0.3
    for prompt in sorted({1, 2, n_tokens // 2, n_tokens - 1, n_tokens} - {0}):
        if prompt <= n_tokens:
            largest = (extended(model, text, [prompt]) - full).abs().max()
            compare(cell, "its own forward pass at every position", "logits of cached decoding", largest, TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_a_prompt_in_pieces(cell):
    model, text = windowed(cell, 16), ids(50)
    with torch.no_grad():
        full = model(text)
    torch.testing.assert_close(extended(model, text, [5, 20, 1, 17]), full, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.blocks.mamba2.mixer.d_conv=1",),
        ("+model.blocks.mamba2.mixer.n_groups=5", "size.mamba2.chunk_size=8"),
    ],
)
def test_mamba2_with_groups_and_without_convolution(overrides):
    model, text = build("mamba2", *overrides), ids(30)
    with torch.no_grad():
        torch.testing.assert_close(extended(model, text, [11, 6]), model(text), rtol=0, atol=TOLERANCE)


def test_a_long_prompt_is_cut_into_chunks_for_its_state(monkeypatch):
    from flowhn.models.mixers import stepwise

    model, text = build("mamba1"), ids(60)
    with torch.no_grad():
        full = model(text)
    monkeypatch.setattr(stepwise, "_ELEMENTS", 7 * 2 * 160 * 16)  # chunks of 7 tokens
    torch.testing.assert_close(extended(model, text, [40, 15]), full, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", SPLIT)
def test_a_frozen_window_is_the_split_with_that_window(cell):
    model, text = build(cell), ids(40)
    with pytest.raises(UserError, match="window"):
        model.new_cache()
    with torch.no_grad():
        torch.testing.assert_close(
            extended(model, text, [7], window=12), build(cell, "split.window=12")(text), rtol=0, atol=TOLERANCE
        )
        assert (extended(model, text, [7], window=12) - model(text)).abs().max() > 1e-2  # proportional: another routing
        # Training at T = W: the same as the window.
        torch.testing.assert_close(extended(model, text, [7], window=40), model(text), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", SPLIT)
def test_a_decoded_token_runs_one_branch_of_each_block(cell):
    model, text = windowed(cell, 9), ids(30)
    calls: list[tuple[int, str]] = []
    for index, block in enumerate(model.layers):
        for name in ("attention", "ssm"):
            branch = getattr(block, name)
            original = branch.extend
            branch.extend = lambda *a, _o=original, _c=(index, name), **k: (calls.append(_c), _o(*a, **k))[1]
    state = model.new_cache()
    with torch.no_grad():
        model.extend(text[:, :10], state)
        for t in range(10, 30):
            calls.clear()
            kept = [layer.attention.kept for layer in state.layers]
            model.extend(text[:, t : t + 1], state)
            assert sorted(index for index, _ in calls) == list(range(len(model.layers)))
            grown = [layer.attention.kept - before for layer, before in zip(state.layers, kept, strict=True)]
            assert grown == [int((index, "attention") in calls) for index in range(len(model.layers))]
    expected = [block.token_split(30).n_attn for block in model.layers]
    assert [layer.attention.kept for layer in state.layers] == expected


def test_hymba_keeps_windows_and_shares_keys():
    model = build("hymba")
    state, window, n_meta = model.new_cache(), 6, 8
    with torch.no_grad():
        model.extend(ids(40), state)
        for t in range(20):
            model.extend(ids(20)[:, t : t + 1], state)
    kept = [None if layer.attention is None else layer.attention.kept for layer in state.layers]
    # Pairs: layer 0 global; 2 has a window and 3 is global; 4 and 5 have windows; 7 is global.
    everything = 60 + n_meta
    assert kept == [everything, None, everything, None, n_meta + window - 1, None, everything, None]


def test_keys_and_values_outgrow_their_buffer():
    model, text = build("llama"), ids(600, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(extended(model, text, [250, 10, 300]), model(text), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_reordered_sequences_go_on_from_what_they_read(cell):
    model, text = windowed(cell, 9), ids(25, batch=3)
    rows = torch.tensor([2, 0, 0])
    state = model.new_cache()
    with torch.no_grad():
        model.extend(text[:, :20], state)
        state.reorder(rows)
        found = model.extend(text[:, 20:], state)
        wanted = model(torch.cat((text[rows, :20], text[:, 20:]), dim=1))[:, 20:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_step_flops_are_those_of_the_matrix_products(cell):
    """torch counts matrix products and attention on the meta device; convolutions and scans are the formulas' own."""
    model = copy.deepcopy(windowed(cell, 9)).to("meta")
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    for position in (1, 23, 24):
        state = model.new_cache()
        with torch.no_grad():
            model.extend(token.expand(1, position), state)
            with FlopCounterMode(display=False) as counter:
                model.extend(token, state)
        before = position + model.n_meta_tokens
        elementwise = sum(_elementwise(layer, before) for layer in model.layers)
        assert counter.get_total_flops() == model.step_flops(position) - elementwise


def _elementwise(layer: torch.nn.Module, before: int) -> int:
    if isinstance(layer, ParallelBlock) and not layer._section(before, before + 1, None).n_ssm:
        return 0
    total = 0
    for mixer in layer.modules():
        if isinstance(mixer, Mamba1):  # of the scan's 9 E N the output is a product that torch counts: 2 E N
            total += 2 * mixer.d_conv * mixer.d_inner + 7 * mixer.d_inner * mixer.d_state
        elif isinstance(mixer, Mamba2):
            total += 2 * mixer.d_conv * (mixer.d_inner + 2 * mixer.n_groups * mixer.d_state)
            total += 3 * mixer.d_inner * mixer.d_state
    return total


def test_fac_decodes_more_cheaply_than_no_split_llama_and_shm():
    window = 128
    costs = {}
    for cell in ("flowhn_fac", "flowhn_no", "llama", "shm"):
        with torch.device("meta"):
            model = build_model(config(cell))
        costs[cell] = decode_cost(model, window, n_tokens=window, window=window)
    fac = costs.pop("flowhn_fac")
    for cell, other in costs.items():
        assert fac.flops < 0.7 * other.flops, cell
        assert fac.added_bytes < other.added_bytes, cell
    # SHM's four layers hold two SSM states, FlowHN's three blocks three: a state is worth 19 tokens of its keys and values.
    assert fac.held_bytes < min(costs["flowhn_no"].held_bytes, costs["llama"].held_bytes)
    # 600 bytes: 80 of 128 tokens go to attention in each of 3 blocks, keys and values of 2 heads of 20, float32.
    n_attn = build("flowhn_fac").layers[0].token_split(window).n_attn
    assert fac.added_bytes == n_attn / window * 3 * 2 * 2 * 20 * 4
    assert costs["llama"].added_bytes == 4 * 2 * 2 * 20 * 4
    assert costs["flowhn_no"].added_bytes == 3 * 2 * 2 * 20 * 4


@pytest.mark.parametrize("cell", CELLS)
def test_bytes_are_those_of_a_real_cache(cell):
    model = windowed(cell, 9)
    state = model.new_cache()
    with torch.no_grad():
        model.extend(ids(21, batch=1), state)
    assert decode_cost(model, 20).held_bytes == state.nbytes


@pytest.mark.parametrize("cell", CELLS)
def test_generation_with_and_without_a_cache(cell):
    model, prompt = windowed(cell, 9), ids(5)
    sampling = Sampling(0.9, 40, 0.95)
    for options in ({}, {"sampling": sampling, "seed": 3}):
        made = [
            torch.stack(list(generate_tokens(model, prompt, max_new_tokens=12, use_cache=use, **options)))
            for use in (True, False)
        ]
        assert torch.equal(*made)
        assert made[0].shape == (12, 2)


def test_sampling():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    draw = lambda *given: Sampling(*given).draw(logits, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000  # noqa: E731
    assert draw(0.0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(draw(1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.03)
    torch.testing.assert_close(draw(1.0, 2), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    torch.testing.assert_close(draw(1.0, None, 0.6), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    assert draw(1.0, None, 0.01).tolist() == [1, 0, 0, 0]
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(draw(0.5), sharp / sharp.sum(), rtol=0, atol=0.03)
    for bad in ((-1.0,), (float("nan"),), (1.0, 0), (1.0, None, 0.0), (1.0, None, 1.5)):
        with pytest.raises(UserError):
            Sampling(*bad)


def write_run(folder: Path, cell: str, *overrides: str) -> Path:
    """The folder of a finished run with random weights and a small tokenizer."""
    folder.mkdir(parents=True)
    tokenizer = train_bpe(iter(["the cat sat on a mat, und das Mädchen las — ein Buch"] * 9), vocab_size=320)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = ("seq_len=16", "vocab_size=320", *overrides)
    (folder / "config.json").write_text(json.dumps({"config": config(cell, *words)}))
    save_file({k: v.contiguous() for k, v in build(cell, *words).state_dict().items()}, folder / "model.safetensors")
    return folder


def said(capsys, *words: object) -> tuple[str, str]:
    assert generate._main([str(word) for word in words]) == 0
    return capsys.readouterr()


def test_the_entry_streams_text_and_says_what_it_froze(tmp_path, capsys):
    run = write_run(tmp_path / "run", "flowhn_fac")
    asked = (run, "--prompt", "the cat", "--max-new-tokens", "30", "--temperature", "1", "--seed", "4")
    out, err = said(capsys, *asked)
    assert out.startswith("the cat")
    assert len(out) > 10
    assert "frozen at 16 tokens (the training length)" in err
    assert said(capsys, *asked) == (out, err)
    other, err = said(capsys, *asked, "--window", "8")
    assert "frozen at 8 tokens" in err
    assert other != out
    recomputed, err = said(capsys, *asked, "--no-cache")
    assert err == ""
    assert recomputed != out  # routed by the length, as in training
    fixed = write_run(tmp_path / "fixed", "flowhn_fac", "split.window=16")
    assert said(capsys, fixed, *asked[1:]) == (out, "")
    assert said(capsys, fixed, *asked[1:], "--no-cache") == (out, "")


def test_characters_wait_for_their_last_byte():
    class Bytes:
        eos_id = 0
        decode = staticmethod(lambda made: bytes(made).decode(errors="replace"))

    pieces = list(generate._characters(Bytes, iter([*"aé—".encode(), 0, 65])))
    assert [piece for piece in pieces if piece] == ["a", "é", "—"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--window", "0"], "window"),
        (["--prompt", "x", "--window", "8", "--no-cache"], "no-cache"),
        (["--prompt", "x", "--device", "nowhere"], "device"),
        ([], "prompt"),
    ],
)
def test_bad_input_is_said(tmp_path, words, named):
    run = write_run(tmp_path / "run", "flowhn_fac")
    with pytest.raises(UserError, match=named):
        generate._main([str(run), *words])


@pytest.mark.slow  # .ci/run runs it
def test_the_cost_table_has_all_ten(tmp_path, capsys):
    out, _ = said(capsys, "--cost", write_run(tmp_path / "run", "flowhn_fac"), "--window", "32")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:]
    assert rows == ["run", *CELLS]
