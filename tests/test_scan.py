"""Selective scan and SSD against a float64 recurrence, step by step: values and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flowhn.models.mixers import recurrence, scan
from flowhn.models.mixers.scan import scan_backward, scan_forward, selective_scan
from flowhn.models.mixers.ssd import ssd_scan
from recurrences import reference_scan, reference_ssd, scan_inputs, ssd_inputs

LENGTHS = (1, 2, 3, 5, 16, 17, 64, 127, 255, 300)


def value_and_grads(function, inputs, dtype, weights):
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad((y * weights.to(dtype)).sum(), leaves)]


def errors(ours, reference):
    """Largest error against the largest value: gradients that sum over tokens have small entries by cancellation."""
    assert [a.shape for a in ours] == [b.shape for b in reference]
    pairs = zip(ours, reference, strict=True)
    return [float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs]


def assert_same(ours, reference, rtol):
    assert max(errors(ours, reference)) < rtol, errors(ours, reference)


def compare_both(compare, subject, dtype, ours, reference, rtol):
    output, *gradients = errors(ours, reference)
    name, oracle = f"{subject}, {str(dtype)[6:]}", "recurrence in float64"
    compare(name, oracle, "output, relative", output, rtol)
    compare(name, oracle, "gradients, relative", max(gradients), rtol)


def torch_scan(*inputs):
    return selective_scan(*inputs, kernel="torch")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_scan_matches_recurrence(n_tokens, dtype, rtol, compare):
    inputs = scan_inputs(n_tokens)
    weights = torch.randn(2, n_tokens, 6, dtype=torch.float64)
    reference = value_and_grads(reference_scan, inputs, torch.float64, weights)
    ours = value_and_grads(torch_scan, inputs, dtype, weights)
    compare_both(compare, "Mamba-1 scan on plain torch", dtype, ours, reference, rtol)


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(1, 300), rows=st.integers(1, 5), step=st.sampled_from([1, 24, 48, 1 << 16]),
    block=st.sampled_from([1, 100, 500, 1 << 18]), seed=st.integers(0, 99),
)  # fmt: skip
def test_scan_any_length_and_blocking(n_tokens, rows, step, block, seed):
    """Blocks of one step, ragged last blocks, sequences in several groups: the same result."""
    inputs = scan_inputs(n_tokens, rows=rows, seed=seed)
    weights = torch.randn(rows, n_tokens, 6, dtype=torch.float64)
    reference = value_and_grads(reference_scan, inputs, torch.float64, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_STEP_ELEMENTS", step)
        patch.setattr(scan, "_BLOCK_ELEMENTS", block)
        assert_same(value_and_grads(torch_scan, inputs, torch.float32, weights), reference, 3e-5)


@settings(max_examples=25, deadline=None)
@given(n_tokens=st.integers(0, 300), seed=st.integers(0, 99))
def test_chunked_order_matches_blocks(n_tokens, seed):
    """The order of work for devices other than CPU, run here, against the CPU operators; from no token up."""
    u, delta, A, B, C, _, _ = scan_inputs(n_tokens, seed=seed)
    dt, dy = F.softplus(delta), torch.randn_like(u)
    y, kept = scan_forward(u, dt, A, B, C)
    dx, ddt, dA, dB, dC = scan_backward(dy, u, dt, A, B, C, kept)
    time_first = [t.transpose(0, 1).contiguous() for t in (dy, u, dt, B, C)]
    a_nt = A.t().contiguous()
    parts = recurrence.backward_chunked(*time_first, a_nt)
    torch.testing.assert_close(recurrence.forward_chunked(*time_first[1:], a_nt).transpose(0, 1), y)
    for part, expected in zip(parts, (dx, ddt, dB, dC), strict=False):
        torch.testing.assert_close(part.transpose(0, 1), expected)
    torch.testing.assert_close(parts[4].t(), dA)


def test_scan_without_tokens():
    inputs = [tensor.requires_grad_() for tensor in scan_inputs(0)]
    y = torch_scan(*inputs)
    y.sum().backward()
    assert y.shape == (2, 0, 6)
    assert inputs[2].grad.abs().sum() == 0


def test_scan_long_steps_do_not_overflow():
    """Steps so long that the state is forgotten at once: decays underflow to 0, nothing becomes NaN."""
    u, delta, A, B, C, D, bias = scan_inputs(50)
    leaves = [t.float().requires_grad_() for t in (u, delta + 200, A, B, C, D, bias)]
    torch_scan(*leaves).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_scan_operator_contract():
    """torch's own checks of schema, fake shapes, autograd registration and tracing."""
    u, delta, A, B, C, _, _ = scan_inputs(9)
    args = tuple(t.requires_grad_() for t in (u, F.softplus(delta).detach(), A, B, C))
    torch.library.opcheck(scan_forward, args)


def test_scan_compiles_without_graph_break():
    inputs = [t.float().requires_grad_() for t in scan_inputs(21)]
    compiled = torch.compile(torch_scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), torch_scan(*inputs))


def test_scan_is_float32_under_autocast():
    inputs = [t.float() for t in scan_inputs(40)]
    expected = torch_scan(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch_scan(*inputs), expected, rtol=0, atol=0)
        assert torch_scan(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 512])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_ssd_matches_recurrence(n_tokens, chunk_size, compare):
    inputs = ssd_inputs(n_tokens)
    weights = torch.randn(2, n_tokens, 4, 3, dtype=torch.float64)
    reference = value_and_grads(reference_ssd, inputs, torch.float64, weights)
    ours = lambda *args: ssd_scan(*args, chunk_size=chunk_size)  # noqa: E731
    # Decays inside a chunk are differences of a running sum, which loses digits as the chunk grows.
    rtol = 5e-5 if chunk_size <= 64 else 2e-4
    for dtype, limit in ((torch.float32, rtol), (torch.float64, 1e-11)):
        name = "Mamba-2 SSD on plain torch" + (", chunks above 64" if chunk_size > 64 else "")
        compare_both(compare, name, dtype, value_and_grads(ours, inputs, dtype, weights), reference, limit)


def test_ssd_long_steps_do_not_overflow():
    x, dt, A, B, C = ssd_inputs(50)
    leaves = [t.float().requires_grad_() for t in (x, dt + 200, A, B, C)]
    ssd_scan(*leaves, chunk_size=16).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
