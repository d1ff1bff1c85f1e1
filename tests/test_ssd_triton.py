"""Our Triton kernels of Mamba-2's SSD against plain torch in float64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowhn.models import kernels
from flowhn.models.mixers import Mamba2, mamba2
from flowhn.models.mixers.ssd import ssd_scan
from flowhn.models.mixers.ssd_triton import Tiles, _blocks, _power, kernel_backward, kernel_forward, triton_ssd
from interpreter import interpret, needs_interpreter

# sequences, tokens, heads, headdim, groups, d_state
SMALL = [
    (2, 37, 4, 16, 1, 16),
    (1, 64, 2, 32, 1, 48),
    (2, 50, 4, 16, 2, 16),
    (1, 1, 2, 16, 1, 16),
    (1, 130, 3, 16, 1, 24),
    (1, 40, 4, 24, 2, 20),
    (2, 40, 4, 24, 1, 100),
    (2, 33, 8, 16, 2, 20),
]
LARGE = [(2, n_tokens, 6, 64, 1, 128) for n_tokens in (1, 2, 7, 63, 64, 65, 255, 447, 1023, 4096)]
LARGE += [(3, 200, 8, 64, 2, 128), (2, 129, 4, 32, 1, 48), (2, 129, 5, 128, 1, 64)]
LARGE += [(2, 129, 2, 128, 1, 128), (1, 129, 4, 40, 1, 20), (24, 129, 24, 64, 1, 128), (1, 129, 4, 40, 1, 100)]


def ssd_case(shape, device, dtype, bias=-2.0):
    """xbc, dt (a slice of something wider, as in_proj gives it), A, D, dt_bias around ``bias``, and y's gradient."""
    n_batch, n_tokens, n_heads, headdim, n_groups, d_state = shape
    generator = torch.Generator().manual_seed(n_tokens)
    randn = lambda *sizes: torch.randn(*sizes, generator=generator)  # noqa: E731
    width = n_heads * headdim
    xbc = randn(n_batch, n_tokens, width + 2 * n_groups * d_state)
    xbc[..., width:] /= d_state**0.25
    A = -torch.rand(n_heads, generator=generator) * 8 - 1
    leaves = [xbc.to(dtype), randn(n_batch, n_tokens, n_heads + 3).to(dtype), A, randn(n_heads), randn(n_heads) + bias]
    return [leaf.to(device) for leaf in leaves], randn(n_batch, n_tokens, width).to(device, dtype)


def run(function, leaves, dy):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def plain(shape):
    _, _, n_heads, headdim, n_groups, d_state = shape

    def function(xbc, dt, A, D, bias):
        shared = n_groups * d_state
        x, B, C = xbc.split((n_heads * headdim, shared, shared), -1)
        x = x.unflatten(-1, (n_heads, headdim))
        B, C = (part.unflatten(-1, (n_groups, d_state)) for part in (B, C))
        y = ssd_scan(x, F.softplus(dt[..., :n_heads] + bias), A, B, C, chunk_size=64)
        return (y + D[:, None] * x).flatten(2)

    return function


def ours(shape, **tiles):
    _, _, n_heads, _, n_groups, d_state = shape

    def function(xbc, dt, A, D, bias):
        cut = Tiles(**tiles)
        return triton_ssd(xbc, dt[..., :n_heads], A, D, bias, n_groups=n_groups, d_state=d_state, tiles=cut)

    return function


def relative(found, wanted) -> float:
    """Root mean square of the difference over that of the reference."""
    found, wanted = found.detach(), wanted.detach()
    assert found.isfinite().all()  # max() of errors would pass over a NaN
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def differences(shape, device, dtype, function, **options):
    leaves, dy = ssd_case(shape, device, dtype, **options)
    wanted = run(plain(shape), [leaf.double() for leaf in leaves], dy.double())
    return [relative(a, b) for a, b in zip(run(function, leaves, dy), wanted, strict=True)]


# A's gradient is a sum over all tokens that cancels: float32 leaves 5e-5 of it at worst, here and in the interpreter.
DTYPES = pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)


def check(compare, subject, errors, dtype, limit):
    name = f"{subject}, {str(dtype)[6:]}"
    compare(name, "plain torch in float64", "output", errors[0], limit)
    compare(name, "plain torch in float64", "gradients", max(errors[1:]), limit)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", LARGE)
def test_ssd_on_the_gpu(shape, dtype, limit, compare):
    check(compare, "Triton SSD", differences(shape, "cuda", dtype, ours(shape)), dtype, limit)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", [LARGE[7], (3, 200, 8, 64, 2, 128)])
def test_compiled_ssd_on_the_gpu(shape, dtype, limit, compare):
    torch._dynamo.reset()
    compiled = torch.compile(ours(shape), dynamic=False, fullgraph=True)
    check(compare, "Triton SSD, compiled", differences(shape, "cuda", dtype, compiled), dtype, limit)


@pytest.mark.gpu
def test_the_same_input_gives_the_same_bits_on_the_gpu():
    leaves, dy = ssd_case(LARGE[7], "cuda", torch.bfloat16)
    first, second = (run(ours(LARGE[7]), leaves, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("sizes", [{"d_model": 768}, {"d_model": 80, "d_state": 48, "headdim": 32}])
def test_mixer_on_the_gpu(sizes, dtype, limit, compare):
    if not kernels.triton_usable():
        pytest.skip("Triton does not run here")
    torch.manual_seed(0)
    mixer = Mamba2(**sizes, backend="triton").cuda()
    exact = Mamba2(**sizes, backend="torch").double().cuda()
    exact.load_state_dict(mixer.state_dict())
    x, dy = torch.randn(2, 2, 447, sizes["d_model"], device="cuda")
    outputs = []
    for module, given in ((mixer, x), (exact, x.double())):
        given = given.requires_grad_()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=module is mixer and dtype == torch.bfloat16):
            y = module(given)
        outputs.append([y, *torch.autograd.grad(y, [given, *module.parameters()], dy.to(y.dtype))])
        x = x.detach()
    errors = [relative(a, b) for a, b in zip(*outputs, strict=True)]
    check(compare, f"Mamba-2 on Triton, width {sizes['d_model']}", errors, dtype, limit)


def test_heads_of_a_program_divide_a_groups():
    assert _blocks(24, 1, 8) == (3, 8)
    assert _blocks(24, 1, 7) == (4, 6)
    assert _blocks(5, 1, 8) == (1, 5)
    assert _blocks(8, 4, 8) == (4, 2)
    assert [_power(number) for number in (1, 16, 17, 48, 64, 128)] == [16, 16, 32, 64, 64, 128]


def test_operators_give_shapes_without_a_gpu():
    shape = (2, 130, 4, 16, 2, 24)
    leaves, dy = ssd_case(shape, "meta", torch.bfloat16)
    y, states, paces = kernel_forward(leaves[0], leaves[1][..., :4], *leaves[2:], 2, 24, [64])
    assert (y.shape, states.shape, paces.shape) == (dy.shape, (2, 4, 3, 24, 16), (2, 4, 3, 2, 64))
    found = kernel_backward(dy, leaves[0], leaves[1][..., :4], *leaves[2:4], states, paces, 2, 24, [64])
    assert [tuple(grad.shape) for grad in found] == [(2, 130, 160), (2, 130, 4), (4,), (4,), (4,)]


def test_the_mixer_hands_over_what_the_kernel_wants(monkeypatch):
    """On a CPU, with the plain scan in the kernel's place: forward, gradients, and decoding from a state."""

    def stand_in(xbc, dt, A, D, bias, *, n_groups, d_state):
        shape = (0, 0, A.shape[0], (xbc.shape[2] - 2 * n_groups * d_state) // A.shape[0], n_groups, d_state)
        return plain(shape)(xbc, dt, A, D, bias)

    torch.manual_seed(0)
    mixer = Mamba2(d_model=32, d_state=16, headdim=16, n_groups=2)
    x = torch.randn(2, 33, 32)
    wanted = run(lambda given, *_: mixer(given), [x, *mixer.parameters()][:1], torch.ones(2, 33, 32))
    monkeypatch.setattr(mamba2, "resolve_ssm", lambda requested, device, has_triton=False: "triton")
    monkeypatch.setattr(mamba2, "triton_ssd", stand_in)
    found = run(lambda given: mixer(given), [x], torch.ones(2, 33, 32))
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-5
    state = mixer.new_cache()
    parts = [mixer.extend(part, state) for part in x.split((20, 1, 12), dim=1)]
    assert relative(torch.cat(parts, dim=1), wanted[0]) < 1e-5


def test_large_states_are_left_to_others(monkeypatch):
    monkeypatch.setattr(kernels, "_triton_usable", lambda: True)
    monkeypatch.setattr(kernels, "_probe", lambda name: (True, "usable"))
    kernels._resolve_ssm.cache_clear()
    try:
        assert Mamba2(d_model=64).kernel("cuda") == "triton"
        assert Mamba2(d_model=64, d_state=256).kernel("cuda") == "mamba_ssm"
        assert Mamba2(d_model=64, d_state=256).kernel("cpu") == "torch"
    finally:
        kernels._resolve_ssm.cache_clear()


INTERPRETED = """
import torch
from flowhn.models.mixers import ssd_triton
from test_ssd_triton import SMALL, differences, ours

torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
ssd_triton._WALKS = 1
for shape in SMALL:
    for chunk, heads in ((16, 2), (64, 8)):
        tiles = {"chunk": chunk, "walk_heads": 1 + (heads < 8), "x_heads": heads, "output_heads": heads, "bc_heads": heads}
        assert max(differences(shape, "cpu", torch.float32, ours(shape, **tiles))) < 1e-4, (shape, tiles)
# 16 bits take other stages, and registers that the interpreter ignores; its products of bfloat16 are wrong.
for shape in ((3, 200, 8, 64, 2, 128), (2, 129, 2, 128, 1, 128)):
    assert max(differences(shape, "cpu", torch.float16, ours(shape))) < 1e-3, shape
# Steps of 1e-5: softplus and its slope must not lose their digits.
assert max(differences(SMALL[0], "cpu", torch.float32, ours(SMALL[0]), bias=-11.0)) < 1e-4
"""


@needs_interpreter
def test_kernels_in_the_interpreter():
    interpret(INTERPRETED)
