"""Triton kernels of the gated RMSNorm against plain torch in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch._library.utils import get_layout_constraint_tag

from flowhn.models.kernels import triton_usable
from flowhn.models.mixers import Mamba2, conv, scan_triton, ssd_triton
from flowhn.models.norms import GatedRMSNorm, gated_norm, gated_norm_backward
from interpreter import interpret, needs_interpreter

# sequences, tokens, channels, groups
SMALL = [(2, 5, 48, 1), (1, 1, 16, 1), (2, 7, 96, 3), (3, 40, 64, 2)]
LARGE = [(4, 300, 1536, 1), (2, 65, 4096, 1), (1, 1, 48, 1), (3, 33, 96, 3)]


def apart(tensor, columns):
    """The same values, rows and sequences lying apart, each tensor's in a way of its own."""
    n_batch, n_tokens, width = tensor.shape
    wide = tensor.new_full((n_batch, n_tokens + columns, width + columns), float("nan"))
    wide[:, :n_tokens, :width] = tensor.detach()
    return wide[:, :n_tokens, :width]


def gated_case(shape, device, dtype):
    """y, z (a slice of something wider, as in_proj gives it), weight, and the output's gradient."""
    n_batch, n_tokens, width, _ = shape
    generator = torch.Generator().manual_seed(0)
    draw = lambda *sizes: torch.randn(sizes, generator=generator).to(device, dtype)  # noqa: E731
    y, wide, dy = draw(n_batch, n_tokens, width), draw(n_batch, n_tokens, width + 24), draw(n_batch, n_tokens, width)
    weight = torch.linspace(0.5, 1.5, width, device=device)
    return apart(y, 8), apart(wide, 16), weight, apart(dy, 40)


def differences(shape, device, dtype):
    """Relative errors of the output and of the gradients of y, z (with what lies beside it) and weight."""
    *_, width, n_groups = shape
    y, wide, weight, dy = gated_case(shape, device, dtype)

    def run(function, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(leaves[0], leaves[1][..., :width], leaves[2])
        return [out, *torch.autograd.grad(out, leaves, dy.to(out.dtype))]

    def plain(y, z, weight):
        norm = GatedRMSNorm(width, n_groups=n_groups).double().to(device)
        del norm.weight
        norm.weight = weight
        return norm(y, z)

    found = run(lambda y, z, w: gated_norm(y, z, w, 1e-5, n_groups)[0], y, wide, weight)
    wanted = run(plain, y.double(), wide.double(), weight.double())
    assert all(tensor.isfinite().all() for tensor in found)
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, wanted, strict=True)]


INTERPRETED = """
import torch
from test_gated_norm import SMALL, differences

torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
for shape in SMALL:
    assert max(differences(shape, "cpu", torch.float32)) < 1e-5, shape
    assert max(differences(shape, "cpu", torch.float16)) < 2e-3, shape
"""


@needs_interpreter
def test_kernels_in_the_interpreter():
    interpret(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("shape", LARGE)
def test_gated_norm_on_the_gpu(shape, dtype, limit, compare):
    errors = differences(shape, "cuda", dtype)
    subject = f"gated norm {shape}, {str(dtype)[6:]}"
    compare(subject, "plain torch in float64", "output", errors[0], limit)
    compare(subject, "plain torch in float64", "gradients", max(errors[1:]), limit)


@pytest.mark.gpu
@pytest.mark.parametrize(("d_model", "padded"), [(768, 3392), (1024, 4416)])
def test_padded_rows_are_not_copied_on_the_gpu(d_model, padded):
    """in_proj's rows, of 3,352 and 4,384 columns, are read by three operators where they lie."""
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
    for name in ("conv_silu", "triton_ssd", "gated_norm"):
        assert f"flowhn.{name}.default" in forward
        assert f"flowhn.{name}_backward.default" in backward
    assert "_conv_silu" not in forward  # kernels named so copy what the operator reads
    assert "_gated_norm" not in forward


def test_operators_give_shapes_without_a_gpu():
    y, wide, weight, dy = (tensor.to("meta") for tensor in gated_case((2, 5, 48, 3), "cpu", torch.bfloat16))
    out, scales = gated_norm(y, wide[..., :48], weight, 1e-5, 3)
    assert (out.shape, out.dtype, scales.shape, scales.dtype) == (y.shape, torch.bfloat16, (2, 5, 3), torch.float32)
    found = gated_norm_backward(dy, y, wide[..., :48], weight, scales, 3)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in (y, y, weight)]
    assert all(t.is_contiguous() for t in (out, scales, *found))


def test_the_norm_hands_over_what_the_kernel_wants(monkeypatch):
    """What runs on CUDA but the kernel: which inputs take it, in which types and strides."""
    seen = []

    def stand_in(y, z, weight, eps, n_groups):
        seen.append((y.shape, z.shape, weight.dtype, eps, n_groups))
        return (y * z, None)

    monkeypatch.setattr("flowhn.models.norms.gated_norm", stand_in)
    monkeypatch.setattr("flowhn.models.norms.triton_usable", lambda: True)
    norm = GatedRMSNorm(8, n_groups=2, eps=1e-3).to(torch.bfloat16)

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    y, z = torch.ones(1, 2, 8), torch.ones(1, 2, 8).as_subclass(OnCuda)
    norm(y, z, kernel="triton")
    assert seen == [(y.shape, y.shape, torch.float32, 1e-3, 2)]
    for other in (z.double(), z[0], torch.ones(1, 2, 8)):  # float64, no sequences, a CPU
        norm(y, other, kernel="triton")
    assert len(seen) == 1


@pytest.mark.parametrize(
    "operator",
    [gated_norm, gated_norm_backward, conv.conv_silu, conv.conv_silu_backward, ssd_triton.kernel_forward,
     ssd_triton.kernel_backward, scan_triton.triton_forward, scan_triton.triton_backward],
)  # fmt: skip
def test_rows_may_lie_apart(operator):
    """torch.compile pads rows; without the tag it copies them back together for an operator."""
    tag = get_layout_constraint_tag(operator._opoverload, with_default=False)
    assert tag == torch.Tag.needs_fixed_stride_order
