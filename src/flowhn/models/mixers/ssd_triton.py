"""Mamba-2's state-space duality as Triton kernels of our own, as custom operators torch.compile can trace.

mamba_ssm's kernels compute the same; they try dozens of tilings in each process before the first step, and want x, B and C
apart, so that their gradients are copied together again for the convolution. These read xbc where the convolution left it
and write one gradient. :mod:`flowhn.models.mixers.ssd_triton_kernels` says how they work. Sums over chunks, sequences and
heads are taken by torch and not by atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flowhn.models.kernels import ANY_STRIDES, takes_register_caps


@dataclass(frozen=True)
class Tiles:
    """How the work is cut. ``warps`` of 32 threads and ``stages`` whose loads are under way at a time are a kernel's own; so is
    ``registers``, the most of a thread's (0: as the compiler likes). With fewer more programs share a processor, which hides
    the time that loads take; on an H200 that helps the walks, x and scores, while output and bc are faster without a cap.

    Args:
        chunk: tokens of a chunk, 16 or more and a power of two; the state before each one is kept for the backward.
        walk_heads, walk_warps, walk_stages, walk_registers: of the two kernels that walk over the chunks, states and carry:
            heads of a program, 1 or 2 (1 where 2 do not divide a group's, are wider than 64 each or would leave a GPU idle;
            it then has half the warps).
        output_heads, ...: of the kernel that makes y: heads of a program, at most (fewer where that does not divide those of
            a group).
        x_heads, ...: of the one that makes the gradient of x, likewise.
        bc_heads: heads of a program in the two that make those of B and C, likewise; what the programs made is summed.
        scores_warps, ...: of the first of them, which makes the gradient of C B.
        bc_warps, ...: of the second.
    """

    chunk: int = 64
    walk_heads: int = 1
    walk_warps: int = 4
    walk_stages: int = 2
    walk_registers: int = 128
    output_heads: int = 8
    output_warps: int = 4
    output_stages: int = 2
    output_registers: int = 0
    x_heads: int = 8
    x_warps: int = 4
    x_stages: int = 2
    x_registers: int = 168
    bc_heads: int = 32
    scores_warps: int = 4
    scores_stages: int = 2
    scores_registers: int = 128
    bc_warps: int = 4
    bc_stages: int = 2
    bc_registers: int = 0


DEFAULT_TILES = Tiles()
_FIELDS = tuple(field.name for field in fields(Tiles))
LARGEST = 128  # of headdim and d_state: a state of that size fits a program's registers
_COLUMNS = 64  # of the states, for which one program of the kernel for B and C has room
_WALKS = 264  # programs of two heads that fill an H200
_KERNELS = ("walk", "output", "x", "scores", "bc")
_UNCAPPED = {f"{name}_registers": 0 for name in _KERNELS}  # twice the elements of a head take more than the caps leave
# In float32 loads of one stage alone fit the shared memory of smaller GPUs.
_FLOAT32 = _UNCAPPED | {f"{name}_stages": 1 for name in _KERNELS}


def triton_ssd(
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    n_groups: int,
    d_state: int,
    tiles: Tiles = DEFAULT_TILES,
) -> Tensor:
    """``ssd(x, softplus(dt + dt_bias), A, B, C) + D x``.

    Args:
        xbc: (B, T, H P + 2 G N), x, B and C side by side, channels adjacent.
        dt: (B, T, H), in xbc's type or another.
        A, D, dt_bias: (H,); A negative.
        n_groups, d_state: G and N.
        tiles: how the work is cut.

    Returns:
        (B, T, H P) in xbc's type.

    Raises:
        ValueError: P or N above :data:`LARGEST`.
    """
    headdim = _sizes(xbc, A, n_groups, d_state)[1]
    if max(headdim, d_state) > LARGEST:
        raise ValueError(f"headdim={headdim} and d_state={d_state} must not be above {LARGEST}")
    tiles = fitting(tiles, xbc.dtype, headdim, d_state)
    xbc, dt = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (xbc, dt))
    return kernel_forward(xbc, dt, A.float(), D.float(), dt_bias.float(), n_groups, d_state, numbers(tiles))[0]


def numbers(tiles: Tiles) -> tuple[int, ...]:
    """The fields in order, as an operator takes them. Not ``astuple``: before Python 3.12 it copies, and Dynamo cannot."""
    return tuple(getattr(tiles, name) for name in _FIELDS)


def fitting(tiles: Tiles, dtype: torch.dtype, headdim: int, d_state: int) -> Tiles:
    """The tiles, with less under way at a time where elements or states are large."""
    if dtype == torch.float32:
        return replace(tiles, **_FLOAT32)
    if headdim <= 64:
        return tiles
    tiles = replace(tiles, **_UNCAPPED)
    if d_state <= 64:
        return tiles
    # States are twice as large, and some GPUs have 99 KiB for them.
    return replace(tiles, output_stages=min(tiles.output_stages, 2), bc_stages=1)


def _sizes(xbc: Tensor, A: Tensor, n_groups: int, d_state: int) -> tuple[int, int]:
    """Heads and headdim."""
    n_heads = A.shape[0]
    return n_heads, (xbc.shape[2] - 2 * n_groups * d_state) // n_heads


def states_shape(xbc: Tensor, A: Tensor, n_groups: int, d_state: int, chunk: int) -> tuple[int, ...]:
    n_heads, headdim = _sizes(xbc, A, n_groups, d_state)
    return xbc.shape[0], n_heads, -(-xbc.shape[1] // chunk), d_state, headdim


def _power(number: int) -> int:
    """The next power of two, at least 16, which a tile of a matrix product has."""
    return max(16, 1 << (number - 1).bit_length())


def _constants(xbc: Tensor, headdim: int, d_state: int, chunk: int) -> dict[str, object]:
    """Compile-time arguments of the kernels that multiply matrices."""
    # float32 as three TF32 products, 1e-6 off: exact ones use no tensor core and compile for a minute. 16 bits do not care.
    precision = "tf32x3" if xbc.dtype == torch.float32 else "tf32"
    padded = {"PP": _power(headdim), "NP": _power(d_state)}
    return {"P": headdim, "N": d_state, **padded, "L": chunk, "PRECISION": precision}


def _blocks(n_heads: int, n_groups: int, most: int) -> tuple[int, int]:
    """Blocks of heads, and the heads of one, which divide a group's."""
    per_group = n_heads // n_groups
    heads = next(number for number in range(min(most, per_group), 0, -1) if per_group % number == 0)
    return n_heads // heads, heads


def _launch(tiles: Tiles, kernel: str, device: torch.device) -> dict[str, int]:
    """Warps, stages and registers of a kernel."""
    words = {"num_warps": getattr(tiles, f"{kernel}_warps"), "num_stages": getattr(tiles, f"{kernel}_stages")}
    registers = getattr(tiles, f"{kernel}_registers")
    return words | ({"maxnreg": registers} if registers and takes_register_caps(device) else {})


def _walk(tiles: Tiles, xbc: Tensor, n_heads: int, n_groups: int, headdim: int) -> tuple[int, dict[str, int]]:
    """Programs of a walking kernel, and their heads, warps, stages and registers."""
    most = tiles.walk_heads if headdim <= 64 and xbc.shape[0] * n_heads >= tiles.walk_heads * _WALKS else 1
    n_walks, walked = _blocks(n_heads, n_groups, most)
    launch = _launch(tiles, "walk", xbc.device)
    launch["num_warps"] = max(1, launch["num_warps"] * walked // tiles.walk_heads)
    return xbc.shape[0] * n_walks, {"WALKED": walked, **launch}


@torch.library.custom_op("flowhn::triton_ssd", mutates_args=(), tags=ANY_STRIDES)
def kernel_forward(
    xbc: Tensor, dt: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, n_groups: int, d_state: int, tiles: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H P), the states before each chunk (B, H, chunks, N, P) in xbc's type, and float32 (B, H, chunks, 2, L): step
    and the running sum of A step."""
    from flowhn.models.mixers.ssd_triton_kernels import ssd_output_kernel, ssd_states_kernel  # needs Triton

    cut = Tiles(*tiles)
    n_heads, headdim = _sizes(xbc, A, n_groups, d_state)
    n_batch, n_tokens, _ = xbc.shape
    y = xbc.new_empty((n_batch, n_tokens, n_heads * headdim))
    states = xbc.new_empty(states_shape(xbc, A, n_groups, d_state, cut.chunk))
    paces = A.new_empty((*states.shape[:3], 2, cut.chunk))
    if y.numel():
        sizes = (n_tokens, n_heads, n_groups, states.shape[2])
        strides = xbc.stride()[:2]
        constants = _constants(xbc, headdim, d_state, cut.chunk)
        n_walks, walk = _walk(cut, xbc, n_heads, n_groups, headdim)
        ssd_states_kernel[(n_walks,)](
            xbc, dt, A, dt_bias, states, paces, *sizes, *strides, *dt.stride()[:2], **walk, **constants
        )
        n_blocks, heads = _blocks(n_heads, n_groups, cut.output_heads)
        ssd_output_kernel[(n_batch * states.shape[2] * n_blocks,)](
            xbc, D, paces, states, y, *sizes, n_blocks, *strides,
            HEADS=heads, **constants, **_launch(cut, "output", xbc.device),
        )  # fmt: skip
    return y, states, paces


@torch.library.custom_op("flowhn::triton_ssd_backward", mutates_args=(), tags=ANY_STRIDES)
def kernel_backward(
    dy: Tensor,
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    paces: Tensor,
    n_groups: int,
    d_state: int,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of xbc, dt, A, D, dt_bias."""
    if not dy.numel():
        return tuple(tensor.new_zeros(tensor.shape) for tensor in (xbc, dt, A, D, A))
    d_dt = dt.new_empty(dt.shape)
    d_xbc, *others = ssd_backward(dy, xbc, A, D, states, paces, n_groups, d_state, tiles, d_dt=d_dt)
    return d_xbc, d_dt, *others


def ssd_backward(
    dy: Tensor,
    xbc: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    paces: Tensor,
    n_groups: int,
    d_state: int,
    tiles: Sequence[int],
    *,
    d_dt: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of xbc, A, D and dt_bias; that of dt, (B, T, H) with adjacent heads, is written into ``d_dt``."""
    from flowhn.models.mixers import ssd_triton_backward_kernels as kernels  # needs Triton
    from flowhn.models.mixers.ssd_triton_kernels import ssd_carry_kernel

    cut = Tiles(*tiles)
    n_heads, headdim = _sizes(xbc, A, n_groups, d_state)
    n_batch, n_tokens, _ = xbc.shape
    n_chunks = states.shape[2]
    dy = dy.contiguous()
    sizes = (n_tokens, n_heads, n_groups, n_chunks)
    strides = xbc.stride()[:2]
    constants = _constants(xbc, headdim, d_state, cut.chunk)
    d_states = torch.empty_like(states)
    n_walks, walk = _walk(cut, xbc, n_heads, n_groups, headdim)
    ssd_carry_kernel[(n_walks,)](dy, xbc, paces, d_states, *sizes, *strides, **walk, **constants)
    d_xbc = xbc.new_empty(xbc.shape)
    n_blocks, heads = _blocks(n_heads, n_groups, cut.x_heads)
    kernels.ssd_backward_x_kernel[(n_batch * n_chunks * n_blocks,)](
        dy, xbc, D, paces, d_states, d_xbc, *sizes, n_blocks, *strides,
        HEADS=heads, **constants, **_launch(cut, "x", xbc.device),
    )  # fmt: skip
    columns = min(_power(d_state), _COLUMNS)
    parts = -(-d_state // columns)
    # What the gradients of dt, A, D and the bias are made of: rows 0 to 2 from the kernel for the scores, then two for each
    # part from that for B and C; and the latter's columns of the gradient of exp(total), zeros beyond N.
    d_paces = A.new_empty((*states.shape[:3], 3 + 2 * parts, cut.chunk))
    d_decays = A.new_empty((*states.shape[:3], parts * columns))
    n_blocks, heads = _blocks(n_heads, n_groups, cut.bc_heads)
    d_scores = xbc.new_empty((n_batch, n_chunks, n_blocks, cut.chunk, cut.chunk))
    rows = {"HEADS": heads, "ROWS": d_paces.shape[3]}
    kernels.ssd_backward_scores_kernel[(n_batch * n_chunks * n_blocks,)](
        dy, xbc, paces, d_scores, d_paces, *sizes, n_blocks, *strides,
        **rows, **constants, **_launch(cut, "scores", xbc.device),
    )  # fmt: skip
    del constants["NP"]
    d_bc = A.new_empty((n_blocks // n_groups, n_batch, n_tokens, 2 * n_groups * d_state))
    kernels.ssd_backward_bc_kernel[(n_batch * n_chunks * n_blocks * parts,)](
        dy, xbc, paces, states, d_states, d_scores, d_bc, d_paces, d_decays, *sizes, n_blocks, *strides,
        NB=columns, PARTS=parts, **rows, **constants, **_launch(cut, "bc", xbc.device),
    )  # fmt: skip
    dA, dD, d_bias = (A.new_empty((n_batch, n_heads)) for _ in range(3))
    kernels.ssd_backward_dt_kernel[(n_batch * n_heads,)](
        A, paces, d_paces, d_decays, d_dt, dA, dD, d_bias, n_tokens, n_heads, n_chunks, *d_dt.stride()[:2],
        L=cut.chunk, NB=columns, PARTS=parts, ROWS=d_paces.shape[3], CHUNKS=8,
    )  # fmt: skip
    d_xbc[..., n_heads * headdim :] = d_bc.sum(0)
    return d_xbc, dA.sum(0), dD.sum(0), d_bias.sum(0)


@kernel_forward.register_fake
def _(
    xbc: Tensor, dt: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, n_groups: int, d_state: int, tiles: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    n_heads, headdim = _sizes(xbc, A, n_groups, d_state)
    shape = states_shape(xbc, A, n_groups, d_state, tiles[0])
    y = xbc.new_empty((*xbc.shape[:2], n_heads * headdim))
    return y, xbc.new_empty(shape), A.new_empty((*shape[:3], 2, tiles[0]))


@kernel_backward.register_fake
def _(
    dy: Tensor,
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    states: Tensor,
    paces: Tensor,
    n_groups: int,
    d_state: int,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_xbc, d_dt, dA, dD, d_bias = (t.new_empty(t.shape) for t in (xbc, dt, A, D, A))
    return d_xbc, d_dt, dA, dD, d_bias


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.n_groups, ctx.d_state, ctx.tiles = inputs  # not dt_bias: it is in the steps
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    return *kernel_backward(dy, *ctx.saved_tensors, ctx.n_groups, ctx.d_state, ctx.tiles), None, None, None


kernel_forward.register_autograd(_differentiate, setup_context=_save)
