"""The convolution in front of a parallel block's branches (``short_conv``), which is not in the paper."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowhn.config import build_model, compose, to_dict
from flowhn.errors import UserError
from flowhn.models import CausalLM
from flowhn.models.generation import decode_cost
from flowhn.models.mixers.short_conv import ShortConv

ON = "model.blocks.parallel.short_conv=4"


def build(*words: str) -> CausalLM:
    """The weights of the convolution drawn, not zero: a model in training."""
    torch.manual_seed(0)
    model = build_model(to_dict(compose("train", ["size=tiny", "model=flowhn", *words]))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "short_conv.conv1d" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim == 2 and parameter.std() < 0.05:
                parameter.mul_(3)
    return model


def ids(n_tokens: int) -> torch.Tensor:
    return torch.randint(2048, (2, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def test_it_is_its_expression_and_starts_as_the_identity():
    layer, x = ShortConv(d_model=6), torch.randn(2, 9, 6)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.conv1d.weight.normal_()
    normed = F.rms_norm(x, (6,), layer.norm.weight, 1e-6)
    conv = F.conv1d(F.pad(normed.mT, (3, 0)), layer.conv1d.weight, groups=6).mT
    torch.testing.assert_close(layer(x), x + F.silu(conv))
    assert layer.flops(9) == 2 * 4 * 6 * 9


def test_without_the_switch_a_model_has_no_such_parameter():
    names = [dict(build(*words).named_parameters()).keys() for words in ([], [ON])]
    added = names[1] - names[0]
    assert len(added) == 6, added  # a norm and a convolution in each of three blocks
    assert all(".short_conv." in name for name in added)
    assert not names[0] - names[1]


@pytest.mark.parametrize("split", ["no", "ae", "fac"])
def test_no_token_sees_a_later_one(split):
    model, text = build(ON, f"split={split}"), ids(40)
    changed = text.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 2048
    with torch.no_grad():
        a, b = model(text), model(changed)
    torch.testing.assert_close(a[:, :25], b[:, :25], atol=1e-5, rtol=0)
    assert not torch.allclose(a[:, 25:], b[:, 25:], atol=1e-3)


@pytest.mark.parametrize(
    "words", [["split=no"], ["split=fac", "split.window=9"], ["split=fac", "split.window=9", "split.keys=all"]]
)
@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_forward(words):
    model, text = build(ON, *words), ids(24)
    state = model.new_cache()
    pieces = text.split([1, 2, 10, *[1] * 11], dim=1)
    logits = torch.cat([model.extend(piece, state) for piece in pieces], dim=1)
    torch.testing.assert_close(logits, model(text), atol=1e-4, rtol=0)
    alone = model.new_cache()
    model.extend(text[:1, :21], alone)
    assert decode_cost(model, 20).held_bytes == alone.nbytes


def test_tokens_of_the_attention_branch_meet_their_neighbours():
    """What it is for: in a split block the first token of a stretch sees its neighbour all the same."""
    near = {}
    for switch in ("null", "4"):
        model = build("split=ae", "size.n_layers.flowhn=1", f"model.blocks.parallel.short_conv={switch}")
        split = model.layers[0].token_split(16)
        first = next(start for start, _ in split.attn if start > 0) if split.attn[0][0] == 0 else split.attn[0][0]
        text = ids(16)
        changed = text.clone()
        changed[:, first - 1] = (changed[:, first - 1] + 1) % 2048
        with torch.no_grad():
            near[switch] = not torch.allclose(model(text)[:, first], model(changed)[:, first], atol=1e-6)
    assert near == {"null": False, "4": True}


def test_it_is_traced_whole():
    model = build(ON, "split=fac")
    compiled = torch.compile(model.layers[0], fullgraph=True, backend="eager", dynamic=False)
    x = torch.randn(2, 16, model.d_model)
    torch.testing.assert_close(compiled(x)[0], model.layers[0](x)[0])


@pytest.mark.parametrize("value", ["1", "true", "four", "2.5"])
def test_a_number_of_taps_that_is_none_names_its_key(value):
    with pytest.raises(UserError, match="short_conv"):
        build(f"model.blocks.parallel.short_conv={value}")


@pytest.mark.gpu
def test_the_kernel_computes_what_plain_torch_does():
    layer = ShortConv(d_model=768).cuda()
    torch.nn.init.normal_(layer.conv1d.weight, std=0.5)
    plain = ShortConv(d_model=768, backend="torch").cuda()
    plain.load_state_dict(layer.state_dict())
    inputs = [torch.randn(4, 257, 768, device="cuda").requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [own(x) for own, x in zip((layer, plain), inputs, strict=True)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(layer.conv1d.weight.grad, plain.conv1d.weight.grad, atol=5e-2, rtol=1e-3)
