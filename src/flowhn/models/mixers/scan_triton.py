"""The selective scan as Triton kernels that keep tokens before channels, as custom operators torch.compile can trace.

mamba_ssm's extension wants (B, E, T), so that its callers copy seven tensors a layer; these kernels read u, delta, B and
C where the projections left them (slices too, as long as the last dimension is dense) and need nothing but torch's own
Triton. :mod:`flowhn.models.mixers.scan_triton_kernels` says how they work. B and C's gradients are summed over blocks of
channels, those of A, D and the bias over sequences, by torch and not by atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from flowhn.models.kernels import ANY_STRIDES, takes_register_caps


@dataclass(frozen=True)
class Tiles:
    """How the work is cut. The defaults were the fastest tried on an H200 at 64 x 447 tokens, E 1536; the forward's cap of
    registers at E 1536 and 4096, where the backward has none, because at E 4096 it is slower with one (at E 1536, 128 x 447
    tokens, it would be 5 % faster with 168).

    Args:
        chunk: tokens of the backward's chunk (this, and channels and warps, powers of two); the state before each chunk is kept.
        forward_chunk: tokens the forward unrolls, a multiple of ``chunk``.
        forward_channels, backward_channels: channels of a program.
        forward_warps, backward_warps: warps of a program, of 32 threads.
        keep_states: keep the states for the backward (4 N / chunk bytes for each token and channel), or have the
            backward run the forward's recurrence once more.
        segments: pieces of a sequence that run side by side, for which the forward runs twice and a quarter of a backward is
            added; 0: as many as fill a GPU that too few sequences leave idle.
        forward_registers, backward_registers: the most of a thread's in the kernels of these names (0: as the compiler likes);
            with fewer more programs share a processor.
    """

    chunk: int = 4
    forward_chunk: int = 8
    forward_channels: int = 64
    forward_warps: int = 1
    backward_channels: int = 128
    backward_warps: int = 1
    keep_states: bool = True
    segments: int = 0
    forward_registers: int = 128
    backward_registers: int = 0


DEFAULT_TILES = Tiles()
_FIELDS = tuple(field.name for field in fields(Tiles))
_ROWS = 128  # segments of all sequences together that fill a GPU
_SHORTEST_SEGMENT = 256  # tokens; shorter ones cost more than they gain
# With so many programs a forward is faster whole, although it leaves a part of the GPU idle (0.9 ms against 1.1 with four
# segments, at 32 x 1024 tokens and E 1536 on an H200, which is 768 programs).
_ENOUGH_PROGRAMS = 600


def triton_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    tiles: Tiles = DEFAULT_TILES,
) -> Tensor:
    """:func:`flowhn.models.mixers.scan.selective_scan` on the Triton kernels; u, delta (B, T, E), B, C (B, T, N)."""
    inputs = (u, delta, A, B, C, D, delta_bias)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    cut = [
        int(getattr(tiles, name)) for name in _FIELDS
    ]  # not astuple: before Python 3.12 it copies, which Dynamo cannot trace
    cut[6] = int(tiles.keep_states and differentiable)
    u, delta, B, C = (_dense_rows(tensor) for tensor in (u, delta, B, C))
    y, _ = triton_forward(u, delta, A.float(), B, C, D.float(), delta_bias.float(), cut)
    return y


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _n_chunks(u: Tensor, tiles: Sequence[int]) -> int:
    return -(-u.shape[1] // tiles[0])


def _segments(u: Tensor, tiles: Sequence[int], *, forward: bool) -> tuple[int, int]:
    """How many segments a sequence is cut into, and the tokens of one (of all but the last)."""
    n_batch, n_tokens, n_channels = u.shape
    wanted = tiles[7] if len(tiles) > 7 else 1
    if not wanted:
        whole = forward and n_batch * -(-n_channels // tiles[2]) >= _ENOUGH_PROGRAMS
        wanted = 1 if whole else max(1, min(_ROWS // n_batch, n_tokens // _SHORTEST_SEGMENT))
    unit = max(tiles[0], tiles[1])  # a segment is whole chunks, of the forward and of the backward
    length = -(-n_tokens // (wanted * unit)) * unit
    return -(-n_tokens // length), length


def _registers(tiles: Sequence[int], place: int, device: torch.device) -> dict[str, int]:
    """The cap of registers that stands there, if one does."""
    return {"maxnreg": tiles[place]} if len(tiles) > place and tiles[place] and takes_register_caps(device) else {}


def _states_shape(u: Tensor, A: Tensor, tiles: Sequence[int]) -> tuple[int, ...]:
    return (u.shape[0], _n_chunks(u, tiles), A.shape[1], A.shape[0]) if tiles[6] else (0,)


def _scaled(A: Tensor) -> Tensor:
    """A^T log2(e), (N, E), for exp2."""
    return (A.t() * 1.4426950408889634).contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def _across(ends: Tensor, total: Tensor, A2: Tensor, n_segments: int, *, backwards: bool) -> Tensor:
    """What comes in at each segment's border, from what each segment alone hands on.

    Args:
        ends: (B S, N, E), a segment's own last state, or its own gradient at its beginning.
        total: (B S, E), the sum of a segment's step sizes; A2: (N, E).

    Returns:
        (B S, N, E), zeros for the segment that nothing comes in to.
    """
    ends = ends.unflatten(0, (-1, n_segments))  # (B, S, N, E)
    decay = torch.exp2(total.unflatten(0, (-1, n_segments)).unsqueeze(2) * A2)
    order = range(n_segments - 1, -1, -1) if backwards else range(n_segments)
    coming = torch.zeros_like(ends)
    for segment, following in pairwise(order):
        torch.addcmul(ends[:, segment], decay[:, segment], coming[:, segment], out=coming[:, following])
    return coming.flatten(0, 1)


def _run_forward(
    inputs: tuple[Tensor, ...], y: Tensor, states: Tensor, tiles: Sequence[int], *, save: int, output: bool
) -> None:
    """Writes y and states."""
    from flowhn.models.mixers.scan_triton_kernels import selective_scan_forward_kernel  # needs Triton

    u, delta, A, B, C, D, bias = inputs
    _, unrolled, channels, warps, *_ = tiles
    n_batch, n_tokens, n_channels = u.shape
    n_states, n_blocks = A.shape[1], -(-n_channels // channels)
    n_segments, length = _segments(u, tiles, forward=True)
    carry = A.new_empty((n_batch * n_segments, n_states, n_channels))
    total = A.new_empty((n_batch * n_segments, n_channels))
    A2 = _scaled(A)

    def launch(*, save: int, output: bool, start: bool) -> None:
        selective_scan_forward_kernel[(n_blocks * n_batch * n_segments,)](
            u, delta, A2, B, C, D, bias, y, carry, states, total,
            n_tokens, n_channels, n_states, _n_chunks(u, tiles), n_blocks, n_segments, length,
            *_strides(u, delta, B, C), K=unrolled, BE=channels, SAVE=save, OUTPUT=output, START=start, num_warps=warps,
            **_registers(tiles, 8, u.device),
        )  # fmt: skip

    if n_segments > 1:
        launch(save=0, output=False, start=False)
        carry = _across(carry, total, A2, n_segments, backwards=False)
    launch(save=save, output=output, start=n_segments > 1)


@torch.library.custom_op("flowhn::triton_scan", mutates_args=(), tags=ANY_STRIDES)
def triton_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, tiles: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """y (B, T, E) in u's type, and the kept states (B, chunks, N, E) in float32, empty where tiles keep none."""
    y = u.new_empty(u.shape)
    states = A.new_empty(_states_shape(u, A, tiles))
    if u.numel():
        save = tiles[0] if tiles[6] else 0
        _run_forward((u, delta, A, B, C, D, bias), y, states, tiles, save=save, output=True)
    return y, states


@torch.library.custom_op("flowhn::triton_scan_backward", mutates_args=(), tags=ANY_STRIDES)
def triton_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    states: Tensor,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and bias."""
    if not u.numel():
        return tuple(tensor.new_zeros(tensor.shape) for tensor in (u, delta, A, B, C, D, bias))
    from flowhn.models.mixers.scan_triton_kernels import (  # needs Triton
        selective_scan_backward_kernel,
        selective_scan_carry_kernel,
    )

    chunk, _, _, _, channels, warps, kept, *_ = tiles
    n_batch, n_tokens, n_channels = u.shape
    n_states, n_blocks, n_chunks = A.shape[1], -(-n_channels // channels), _n_chunks(u, tiles)
    n_segments, length = _segments(u, tiles, forward=False)
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    if not kept:
        states = A.new_empty(_states_shape(u, A, [chunk, 1, 0, 0, 0, 0, 1]))
        _run_forward((u, delta, A, B, C, D, bias), du, states, tiles, save=chunk, output=False)
    dy, A2 = _dense_rows(dy), _scaled(A)
    rows = n_batch * n_segments
    carry = A.new_empty((rows, n_states, n_channels))
    if n_segments > 1:
        total = A.new_empty((rows, n_channels))
        selective_scan_carry_kernel[(n_blocks * rows,)](
            dy, delta, A2, C, bias, carry, total, n_tokens, n_channels, n_states, n_blocks, n_segments, length,
            *_strides(dy, delta, C), K=chunk, BE=channels, num_warps=warps,
        )  # fmt: skip
        carry = _across(carry, total, A2, n_segments, backwards=True)
    dA = A.new_empty((rows, n_states, n_channels))
    dD, dbias = (A.new_empty((rows, n_channels)) for _ in range(2))
    dB, dC = (A.new_empty((n_blocks, n_batch, n_states, n_chunks * chunk)) for _ in range(2))
    selective_scan_backward_kernel[(n_blocks * rows,)](
        dy, u, delta, A2, B, C, D, bias, states, du, ddelta, dA, dB, dC, dD, dbias, carry,
        n_tokens, n_channels, n_states, n_chunks, n_blocks, n_chunks * chunk, n_segments, length,
        *_strides(dy, u, delta, B, C), K=chunk, BE=channels, START=n_segments > 1, num_warps=warps,
        **_registers(tiles, 9, u.device),
    )  # fmt: skip
    dB, dC = (part.sum(0)[:, :, :n_tokens].transpose(1, 2) for part in (dB, dC))
    return (
        du,
        ddelta,
        dA.sum(0).t().contiguous(),
        dB.to(B.dtype).contiguous(),
        dC.to(C.dtype).contiguous(),
        dD.sum(0),
        dbias.sum(0),
    )


@triton_forward.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, tiles: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), A.new_empty(_states_shape(u, A, tiles))


@triton_backward.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    bias: Tensor,
    states: Tensor,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddelta, dA, dB, dC, dD, dbias = (tensor.new_empty(tensor.shape) for tensor in (u, delta, A, B, C, D, bias))
    return du, ddelta, dA, dB, dC, dD, dbias


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.tiles = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    *inputs, states = ctx.saved_tensors
    return *triton_backward(dy, *inputs, states, ctx.tiles), None


triton_forward.register_autograd(_differentiate, setup_context=_save)
