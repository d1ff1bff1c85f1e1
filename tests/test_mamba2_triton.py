"""Mamba-2 between its two products on Triton kernels against plain torch in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._library.utils import get_layout_constraint_tag
from torch.nn import functional as F

from flowhn.models.kernels import triton_usable
from flowhn.models.mixers import Mamba2, conv, mamba2_triton, scan_triton, ssd_triton
from flowhn.models.mixers.mamba2_triton import inner_backward, inner_forward, mamba2_inner, takes
from interpreter import interpret, needs_interpreter

# sequences, tokens, heads, headdim, groups, d_state
SMALL = [(2, 37, 4, 16, 1, 16), (1, 1, 2, 16, 1, 16), (2, 70, 6, 24, 2, 20), (2, 40, 4, 24, 1, 100)]
LARGE = [(2, 300, 24, 64, 1, 128), (3, 65, 64, 64, 1, 128), (2, 129, 8, 32, 2, 48), (1, 1, 4, 64, 1, 128)]


def apart(tensor, columns):
    """The same values, rows and sequences lying apart."""
    n_batch, n_tokens, width = tensor.shape
    wide = tensor.new_full((n_batch, n_tokens + columns, width + columns), float("nan"))
    wide[:, :n_tokens, :width] = tensor.detach()
    return wide[:, :n_tokens, :width]


def inner_case(shape, device, dtype):
    """in_proj's output and the gradient of what becomes of it, in rows that lie apart, and a mixer in float32."""
    n_batch, n_tokens, n_heads, headdim, n_groups, d_state = shape
    torch.manual_seed(0)
    width = n_heads * headdim
    mixer = Mamba2(d_model=width // 2, d_state=d_state, headdim=headdim, n_groups=n_groups, backend="torch").to(device)
    for parameter in (mixer.norm.weight, mixer.D, mixer.conv1d.bias):
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    draw = lambda width: torch.randn(n_batch, n_tokens, width).to(device, dtype)  # noqa: E731
    return apart(draw(mixer.in_proj.out_features), 24), apart(draw(width), 8), mixer


def differences(shape, device, dtype):
    """Relative errors of the output and of the gradients of in_proj's output and of all parameters between the products."""
    projected, dout, mixer = inner_case(shape, device, dtype)
    names = [name for name, _ in mixer.named_parameters() if "_proj" not in name]

    def run(function, mixer, projected):
        projected = projected.detach().requires_grad_()
        out = function(mixer, projected)
        leaves = [projected, *(mixer.get_parameter(name) for name in names)]
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    def plain(mixer, projected):
        z, xbc, dt = mixer._cut(projected)
        xbc = conv.causal_conv_silu(xbc, mixer.conv1d.weight, mixer.conv1d.bias, kernel="torch")
        return mixer.norm(mixer._scan(xbc, dt), z)

    found = run(lambda mixer, projected: mixer._inner(projected), mixer, projected)
    wanted = run(plain, mixer.double(), projected.double())
    assert all(tensor.isfinite().all() for tensor in found)
    # At one token A's gradient is zero: an absolute error there.
    return [float((a.double() - b).norm() / (b.norm() if b.any() else 1)) for a, b in zip(found, wanted, strict=True)]


INTERPRETED = """
import torch
from flowhn.models.mixers import gated_norm_triton
from test_mamba2_triton import SMALL, differences

torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
for programs in (1, 8):
    gated_norm_triton.PROGRAMS = programs
    for shape in SMALL:
        assert max(differences(shape, "cpu", torch.float32)) < 1e-4, shape
        assert max(differences(shape, "cpu", torch.float16)) < 2e-2, shape
"""


@needs_interpreter
def test_kernels_in_the_interpreter():
    interpret(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("shape", LARGE)
def test_inner_on_the_gpu(shape, dtype, limit, compare):
    errors = differences(shape, "cuda", dtype)
    subject = f"Mamba-2 between its products {shape}, {str(dtype)[6:]}"
    compare(subject, "plain torch in float64", "output", errors[0], limit)
    compare(subject, "plain torch in float64", "gradients", max(errors[1:]), limit)


@pytest.mark.gpu
@pytest.mark.parametrize(("d_model", "padded"), [(768, 3392), (1024, 4416)])
def test_padded_rows_are_not_copied_on_the_gpu(d_model, padded):
    """torch.compile pads in_proj's rows, of 3,352 and 4,384 columns, and the operator reads them where they lie."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    if not triton_usable():
        pytest.skip("needs Triton on Ampere or newer")
    torch._dynamo.reset()
    mixer = Mamba2(d_model=d_model).cuda()
    x = torch.randn(2, 256, d_model, device="cuda", requires_grad=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            return torch.compile(mixer, dynamic=False)(x)

    _, codes = run_fw_bw_and_get_code(step)
    forward, backward = (code[code.index("def call(") :] for code in codes[:2])
    assert str(padded) in forward
    assert "flowhn.mamba2_inner.default" in forward
    assert "flowhn.mamba2_inner_backward.default" in backward
    assert "_mamba2_inner" not in forward  # kernels named so copy what the operator reads


def test_operators_give_shapes_without_a_gpu():
    projected, dout, mixer = inner_case((2, 70, 6, 24, 2, 20), "cpu", torch.bfloat16)
    small = [
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer._decay_rates(),
        mixer.D,
        mixer.dt_bias,
        mixer.norm.weight,
    ]
    projected, dout, *small = (tensor.detach().to("meta") for tensor in (projected, dout, *small))
    tiles = [16]
    found = inner_forward(projected, *small, 2, 20, 1e-5, tiles)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert [(tuple(t.shape), t.dtype) for t in found] == [
        ((2, 70, 144), bf16), ((2, 70, 224), bf16), ((2, 70, 144), bf16), ((2, 6, 5, 20, 24), bf16), ((2, 6, 5, 2, 16), fp32),
        ((2, 70, 2), fp32),
    ]  # fmt: skip
    taps, bias, A, D, dt_bias, weight = small
    gradients = inner_backward(dout, projected, taps, bias, A, D, weight, *found[1:], 2, 20, tiles)
    wanted = (projected, taps, bias, A, D, dt_bias, weight)
    assert [(t.shape, t.dtype) for t in gradients] == [(t.shape, t.dtype) for t in wanted]
    assert all(t.is_contiguous() for t in (*found, *gradients[1:]))
    assert gradients[0].stride() == (70 * 384, 384, 1)  # 374 columns


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


def test_what_the_operator_takes():
    projected = torch.ones(1, 2, 8).as_subclass(OnCuda)
    sizes = {"taps": 4, "group_width": 8}
    assert takes(projected, **sizes)
    assert not takes(torch.ones(1, 2, 8), **sizes)  # on a CPU
    assert not takes(projected.double(), **sizes)
    assert not takes(projected[:, :0], **sizes)
    assert not takes(projected, taps=5, group_width=8)
    assert not takes(projected, taps=4, group_width=8192)


def test_the_mixer_hands_over_what_lies_between_its_products(monkeypatch):
    """The one path that runs on CUDA alone, with a stand-in for the operator: the same output as the plain path."""
    mixer = Mamba2(d_model=32, d_state=16, headdim=16, n_groups=2)
    x = torch.randn(2, 9, 32)
    wanted = mixer(x)
    seen = []

    def stand_in(projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, *, n_groups, d_state, eps):
        seen.append((n_groups, d_state, eps))
        z, xbc, dt = projected.split((64, 128, 4), -1)
        xbc = F.silu(conv.causal_conv(xbc, conv_weight, conv_bias))
        y = plain_scan(xbc, dt, A, D, dt_bias)
        gated = (y * F.silu(z)).unflatten(-1, (n_groups, -1))
        return (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)).flatten(-2) * norm_weight

    def plain_scan(xbc, dt, A, D, dt_bias):
        assert torch.equal(A, mixer._decay_rates())
        assert dt_bias is mixer.dt_bias
        assert D is mixer.D
        return mixer._scan(xbc, dt)

    monkeypatch.setattr(mamba2_triton, "mamba2_inner", stand_in)
    monkeypatch.setattr("flowhn.models.mixers.mamba2.mamba2_inner", stand_in)
    monkeypatch.setattr("flowhn.models.mixers.mamba2.takes", lambda *_, **__: True)
    kernel = mixer.kernel
    calls = iter(["triton"])
    monkeypatch.setattr(mixer, "kernel", lambda device: next(calls, None) or kernel(device))
    torch.testing.assert_close(mixer(x), wanted)
    assert seen == [(2, 16, mixer.norm.eps)]


def test_one_call_for_all_leaves_types_to_the_operator(monkeypatch):
    """Parameters in float32 and the taps as (channels, K), whatever the mixer is kept in; a missing bias is zeros."""
    seen = []
    monkeypatch.setattr(mamba2_triton, "inner_forward", lambda *args: seen.append(args) or (args[0],))
    mixer = Mamba2(d_model=32, d_state=16, headdim=16).bfloat16()
    projected = torch.ones(1, 2, mixer.in_proj.out_features, dtype=torch.bfloat16)
    small = (mixer._decay_rates(), mixer.D, mixer.dt_bias, mixer.norm.weight)
    mamba2_inner(projected, mixer.conv1d.weight, None, *small, n_groups=1, d_state=16, eps=1e-5)
    ((given, taps, bias, *others),) = seen
    assert given is projected
    assert (taps.shape, bias.shape, bias.any()) == ((96, 4), (96,), False)
    assert {t.dtype for t in (taps, bias, *others[:4])} == {torch.float32}


@pytest.mark.parametrize(
    "operator",
    [inner_forward, inner_backward, conv.conv_silu, conv.conv_silu_backward, ssd_triton.kernel_forward,
     ssd_triton.kernel_backward, scan_triton.triton_forward, scan_triton.triton_backward],
)  # fmt: skip
def test_rows_may_lie_apart(operator):
    """torch.compile pads rows; without the tag it copies them back together for an operator."""
    tag = get_layout_constraint_tag(operator._opoverload, with_default=False)
    assert tag == torch.Tag.needs_fixed_stride_order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_calls_are_traced_whole(dtype):
    """No graph break on the way to an operator: torch.compile then sees a block as one graph."""

    class Stop(Exception):
        pass

    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "flowhn" in str(node.target))
        raise Stop

    projected, _, mixer = inner_case((2, 9, 4, 16, 1, 16), "cpu", dtype)
    xbc, dt = torch.ones(2, 9, 96, dtype=dtype), torch.ones(2, 9, 4, dtype=dtype)
    small = (-torch.ones(4), torch.ones(4), torch.ones(4))
    calls = {
        "flowhn.mamba2_inner.default": lambda: mixer._inner(projected),
        "flowhn.triton_ssd.default": lambda: ssd_triton.triton_ssd(xbc, dt, *small, n_groups=1, d_state=16),
        "flowhn.triton_scan.default": lambda: scan_triton.triton_scan(
            dt, dt, -torch.ones(4, 3), *[dt[..., :3]] * 2, *small[1:]
        ),
    }
    for call in calls.values():
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed):
            torch.compile(call, backend=backend, fullgraph=True)()
    assert seen == list(calls)
