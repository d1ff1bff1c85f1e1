"""The Triton selective scan against the float64 recurrence, step by step: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowhn.errors import UserError
from flowhn.models import kernels
from flowhn.models.mixers import Mamba1, Mamba2
from flowhn.models.mixers.scan import selective_scan
from flowhn.models.mixers.scan_cuda import mamba_ssm_scan
from flowhn.models.mixers.scan_triton import (
    DEFAULT_TILES,
    Tiles,
    _across,
    _segments,
    triton_backward,
    triton_forward,
    triton_scan,
)
from interpreter import interpret, needs_interpreter
from recurrences import reference_scan, scan_inputs

# Relative to the largest value of each output. bfloat16: outputs are rounded to 8 bits.
LIMIT = {torch.float32: 3e-5, torch.bfloat16: 1.6e-2}
SMALL = Tiles(chunk=4, forward_chunk=8, forward_channels=4, backward_channels=8)


def case(n_tokens, width, n_states, dtype, *, device="cpu", rows=2, seed=0):
    """Leaves (u, delta | projection holding B and C as slices | A, D, bias) as the mixer has them, and y's gradient."""
    u, delta, A, B, C, D, bias = scan_inputs(n_tokens, rows=rows, width=width, n_states=n_states, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(rows, n_tokens, width, generator=generator)
    pad = torch.zeros(rows, n_tokens, 3)
    leaves = [torch.cat((delta, u), -1).to(dtype), torch.cat((pad, B, C), -1).to(dtype)]
    leaves += [t.float() for t in (A, D, bias)]
    return [leaf.to(device).requires_grad_() for leaf in leaves], dy.to(device, dtype)


def run(scan, leaves, dy):
    """Output and gradients of all leaves; u, delta, B and C are slices that are not contiguous."""
    wide, projected, A, D, bias = leaves
    delta, u = wide.chunk(2, -1)
    _, B, C = projected.split((3, A.shape[1], A.shape[1]), -1)
    y = scan(u, delta, A, B, C, D, bias)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def wanted(leaves, dy):
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    return run(reference_scan, exact, dy.double())


def worst(found, expected):
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in zip(found, expected, strict=True))
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs)


def interpreted_cases():
    """Runs in a process of its own, with TRITON_INTERPRET=1: prints the errors, for ``pytest -s``, and checks them."""
    torch.set_num_threads(1)
    whole = replace(SMALL, chunk=8, forward_channels=8)
    for n_tokens, width, n_states, dtype, tiles in (
        (1, 5, 3, torch.float32, SMALL),
        (13, 6, 4, torch.float32, SMALL),
        (17, 12, 8, torch.bfloat16, whole),
        (9, 6, 16, torch.float32, replace(whole, keep_states=False)),
        (10, 9, 2, torch.bfloat16, replace(SMALL, keep_states=False)),
        (30, 6, 4, torch.float32, replace(SMALL, segments=3)),
        (17, 5, 3, torch.float32, replace(SMALL, segments=2, keep_states=False)),
        (16, 9, 2, torch.bfloat16, replace(whole, segments=2)),
    ):
        leaves, dy = case(n_tokens, width, n_states, dtype)
        expected = wanted(leaves, dy)
        found = run(lambda *inputs, tiles=tiles: triton_scan(*inputs, tiles=tiles), leaves, dy)
        error = worst(found, expected)
        print(f"T {n_tokens} E {width} N {n_states} {dtype}: {error:.1e}")
        assert error < LIMIT[dtype]
        again = run(lambda *inputs, tiles=tiles: triton_scan(*inputs, tiles=tiles), leaves, dy)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        with torch.no_grad():
            (wide, projected, A, D, bias), n = leaves, n_states
            B, C = projected[..., 3 : 3 + n], projected[..., 3 + n :]
            assert torch.equal(
                triton_scan(wide[..., width:], wide[..., :width], A, B, C, D, bias, tiles=tiles), found[0]
            )
    long_steps, dy = case(6, 4, 4, torch.float32)
    with torch.no_grad():
        long_steps[0] += 200  # steps so long that the state is forgotten at once
    found = run(lambda *inputs: triton_scan(*inputs, tiles=SMALL), long_steps, dy)
    assert worst(found, wanted(long_steps, dy)) < LIMIT[torch.float32]


@needs_interpreter
def test_scan_in_the_interpreter():
    printed = interpret("import test_scan_triton; test_scan_triton.interpreted_cases()")
    assert printed.count("T ") == 8


@pytest.mark.parametrize("backwards", [False, True])
def test_what_comes_in_at_a_segments_border(backwards):
    """The combination in plain torch: each segment takes on what the one before (or behind) it hands on."""
    generator = torch.Generator().manual_seed(0)
    ends, total = torch.randn(6, 4, 5, generator=generator), torch.rand(6, 5, generator=generator)
    A2 = -torch.rand(4, 5, generator=generator)
    found = _across(ends, total, A2, 3, backwards=backwards).view(2, 3, 4, 5)
    for sequence in range(2):
        coming = torch.zeros(4, 5)
        for segment in reversed(range(3)) if backwards else range(3):
            torch.testing.assert_close(found[sequence, segment], coming)
            row = 3 * sequence + segment
            coming = ends[row] + torch.exp2(total[row] * A2) * coming


def cut(rows, n_tokens, n_channels=8, *, forward=False):
    like = torch.empty(rows, n_tokens, n_channels, device="meta")
    return _segments(like, [4, 8, 64, 1, 128, 1, 1, 0], forward=forward)


@pytest.mark.parametrize("forward", [True, False])
def test_few_long_sequences_are_cut_and_many_short_ones_are_not(forward):
    assert cut(128, 447, forward=forward) == (1, 448)
    assert cut(8, 4096, forward=forward) == (16, 256)
    n_segments, length = cut(2, 19_001, forward=forward)
    assert n_segments > 1
    assert length % 8 == 0
    assert (n_segments - 1) * length < 19_001 <= n_segments * length


def test_a_forward_of_many_channels_is_not_cut():
    assert cut(32, 1024, 1536) == (4, 256)
    assert cut(32, 1024, 1536, forward=True) == (1, 1024)
    assert cut(8, 4096, 1536, forward=True) == (16, 256)


def test_no_tokens_need_no_kernel():
    leaves, dy = case(0, 6, 4, torch.float32)
    found = run(triton_scan, leaves, dy)
    assert found[0].shape == (2, 0, 6)
    assert all(not gradient.any() for gradient in found[1:])


@pytest.mark.parametrize("keep", [True, False])
def test_declared_shapes(keep):
    """What torch.compile is told, in types and strides: everything dense, states as the kernel writes them."""
    u, delta, A, B, C, D, bias = (t.float().to("meta") for t in scan_inputs(13))
    u, B = u.bfloat16(), B.transpose(1, 2).contiguous().transpose(1, 2).bfloat16()
    tiles = [4, 8, 4, 1, 8, 1, int(keep)]
    y, states = triton_forward(u, delta, A, B, C, D, bias, tiles)
    assert (y.shape, y.dtype) == (u.shape, torch.bfloat16)
    assert states.shape == ((2, 4, A.shape[1], 6) if keep else (0,))
    gradients = triton_backward(y, u, delta, A, B, C, D, bias, states, tiles)
    for gradient, given in zip(gradients, (u, delta, A, B, C, D, bias), strict=True):
        assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype)
        assert gradient.is_contiguous()


def test_float64_is_left_to_torch():
    inputs = scan_inputs(9)
    torch.testing.assert_close(
        selective_scan(*inputs, kernel="triton"), reference_scan(*inputs), rtol=1e-12, atol=1e-12
    )


@pytest.fixture
def pretended(monkeypatch):
    """Set what works on the CUDA device that is not there."""

    def pretend(*, triton, mamba_ssm):
        def probe():
            if not mamba_ssm:
                raise ModuleNotFoundError("No module named 'mamba_ssm'")

        monkeypatch.undo()
        kernels.clear_cache()
        monkeypatch.setitem(kernels._PROBES, "mamba_ssm", probe)
        monkeypatch.setattr(kernels, "_triton_usable", lambda: triton)

    yield pretend
    monkeypatch.undo()
    kernels.clear_cache()


def test_triton_by_name(pretended):
    pretended(triton=True, mamba_ssm=False)
    assert kernels.resolve_ssm("triton", "cuda", True) == "triton"
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match="kernels=triton needs"):
            kernels.resolve_ssm("triton", device, True)
    pretended(triton=False, mamba_ssm=True)
    with pytest.raises(UserError, match="kernels=triton needs"):
        kernels.resolve_ssm("triton", "cuda", True)


def test_record_names_the_kernel_that_runs(pretended):
    """A Mamba-2 with a state too large for the Triton kernels has none: the record must not claim one."""
    models = {Mamba1: Mamba1(d_model=16), Mamba2: Mamba2(d_model=16, headdim=8, d_state=256)}
    used = lambda kind: kernels.kernels_used(models[kind], "cuda")["ssm"]  # noqa: E731
    pretended(triton=True, mamba_ssm=False)
    assert (used(Mamba1), used(Mamba2)) == ("triton", "torch")
    pretended(triton=True, mamba_ssm=True)
    assert used(Mamba2) == "mamba_ssm"
    pretended(triton=False, mamba_ssm=True)
    assert used(Mamba1) == "mamba_ssm"
    assert kernels.kernels_used(models[Mamba1], "cpu")["ssm"] == "torch"


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
OTHER_TILES = [
    replace(DEFAULT_TILES, keep_states=False),
    Tiles(8, 16, 32, 1, 32, 1),
    Tiles(8, 8, 128, 4, 128, 4),
    replace(DEFAULT_TILES, segments=1),
    replace(DEFAULT_TILES, segments=3, keep_states=False),
]
GPU_SHAPES = [  # tokens, channels, states
    (1, 100, 16), (2, 64, 8), (3, 96, 16), (7, 1, 16), (64, 129, 16), (255, 100, 32), (447, 300, 16), (1025, 70, 5),
    (2047, 64, 16), (4096, 33, 16),
]  # fmt: skip


def check_scan(compare, scan, subject, leaves, dy):
    """Output and gradients against the float64 recurrence; largest difference over the largest value."""
    dtype = leaves[0].dtype
    expected, found = wanted(leaves, dy), run(scan, leaves, dy)
    name, oracle = f"{subject}, {str(dtype)[6:]}", "recurrence in float64"
    compare(name, oracle, "output", worst(found[:1], expected[:1]), LIMIT[dtype])
    # A state that starts from zero does not decay: with one token A has no gradient (the third leaf's).
    kept = [i for i in range(1, len(found)) if not (leaves[0].shape[1] == 1 and i == 3)]
    compare(name, oracle, "gradients", worst([found[i] for i in kept], [expected[i] for i in kept]), LIMIT[dtype])
    return found


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(("n_tokens", "width", "n_states"), GPU_SHAPES)
def test_scan_on_the_gpu(n_tokens, width, n_states, dtype, compare):
    leaves, dy = case(n_tokens, width, n_states, dtype, device="cuda", rows=3)
    found = check_scan(compare, triton_scan, "Triton selective scan", leaves, dy)
    again = run(triton_scan, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("tiles", OTHER_TILES)
def test_other_tiles_on_the_gpu(tiles, dtype, compare):
    leaves, dy = case(447, 300, 16, dtype, device="cuda", rows=3)
    check_scan(
        compare, lambda *inputs: triton_scan(*inputs, tiles=tiles), "Triton selective scan, other tiles", leaves, dy
    )


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(("n_tokens", "width", "n_states"), GPU_SHAPES)
def test_mamba_ssm_scan_on_the_gpu(n_tokens, width, n_states, dtype, compare):
    """What ``kernels=mamba_ssm`` takes for Mamba-1."""
    if not kernels.kernel_status()["mamba_ssm"][0]:
        pytest.skip(f"mamba_ssm is {kernels.kernel_status()['mamba_ssm'][1]}")
    leaves, dy = case(n_tokens, width, n_states, dtype, device="cuda", rows=3)
    check_scan(compare, mamba_ssm_scan, "mamba_ssm selective scan", leaves, dy)


@pytest.mark.gpu
@each_dtype
def test_plain_scan_on_the_gpu(dtype, compare):
    """The path without any kernel package, whose order of work on CUDA is not the CPU's."""
    leaves, dy = case(1023, 64, 16, dtype, device="cuda", rows=3)
    plain = lambda *inputs: selective_scan(*inputs, kernel="torch")  # noqa: E731
    check_scan(compare, plain, "plain selective scan on CUDA", leaves, dy)


@pytest.mark.gpu
@each_dtype
def test_scan_compiled_on_the_gpu(dtype, compare):
    torch._dynamo.reset()  # what other tests compiled counts towards torch's recompile limit
    leaves, dy = case(301, 96, 16, dtype, device="cuda")
    compiled = torch.compile(lambda *inputs: selective_scan(*inputs, kernel="triton"), fullgraph=True, dynamic=False)
    check_scan(compare, compiled, "Triton selective scan, compiled", leaves, dy)


@pytest.mark.gpu
def test_operator_contract_on_the_gpu():
    u, delta, A, B, C, D, bias = (t.float().cuda().requires_grad_() for t in scan_inputs(9))
    for keep in (0, 1):
        torch.library.opcheck(triton_forward, (u, delta, A, B, C, D, bias, [4, 8, 64, 1, 128, 1, keep]))
