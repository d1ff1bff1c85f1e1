"""Triton kernels of Mamba-2's state-space duality (Dao and Gu 2024, section 6). Imported on a CUDA device only.

For each head, with a = A step, cs its running sum inside a chunk of L tokens, h (N, P) the state before the chunk:

    W[t, s] = (C[t] B[s]) exp(cs[t] - cs[s]) step[s]  for s <= t
    y = W x + exp(cs) (C h) + D x          h' = exp(cs[L-1]) h + sum_s exp(cs[L-1] - cs[s]) step[s] B[s] x[s]^T

``states`` walks over the chunks of one head or two and stores step, cs and h before each, ``carry`` walks back and stores
dh, the gradient of the state behind each. The others take all chunks at once, some heads of one group to a program:
``output`` makes y, and in ``ssd_triton_backward_kernels.py`` ``backward_x`` makes the gradient of x, ``backward_scores`` that of
C[t] B[s], from which and from the states ``backward_bc`` makes those of B and C, all three summed over their heads. The last
two leave for ``backward_dt``, one program a head, what it needs for the gradients of dt, A, D and the bias.
Letters: B batch, T tokens, H heads, P headdim, G groups of heads that share B and C, N d_state. x, B and C lie side by
side in one tensor xbc (B, T, H P + 2 G N), as the convolution leaves them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(raw):
    """log(1 + exp(raw)), whose sum loses the digits of a small exp(raw)."""
    e = tl.exp(tl.minimum(raw, 20.0))
    small = e * (1.0 - e * (0.5 - e * (1 / 3 - e / 4)))
    return tl.where(raw > 20.0, raw, tl.where(e < 0.02, small, tl.log(1.0 + e)))


@triton.jit
def _pace(paces, number, t, L: tl.constexpr):
    """Of the chunk of that number among all of (B, H, chunks), (L,): step, the running sum of A step, and its last."""
    start = paces + number * 2 * L
    return tl.load(start + t), tl.load(start + L + t), tl.load(start + 2 * L - 1)


@triton.jit
def _tile(start, row, inside, stride_t, column, width: tl.constexpr):
    """(L, columns) of the tokens ``row``; zeros outside."""
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(start + row[:, None] * stride_t + column[None, :], mask=mask, other=0.0)


@triton.jit
def _keys_and_queries(start, row, inside, stride_t, n_groups, group, n, N: tl.constexpr):
    """B and C of a group, (L, N) each; ``start`` points behind x."""
    keys = _tile(start + group * N, row, inside, stride_t, n, N)
    return keys, _tile(start + (n_groups + group) * N, row, inside, stride_t, n, N)


@triton.jit
def _state(states, number, n, p, N: tl.constexpr, P: tl.constexpr):
    """The state (N, P) of that number among all of (B, H, chunks)."""
    mask = (n < N)[:, None] & (p < P)[None, :]
    return tl.load(states + (number * N * P + n[:, None] * P + p[None, :]), mask=mask, other=0.0)


@triton.jit
def _decay(t, cs):
    """exp(cs[t] - cs[s]) for s <= t, else 0. Masked before exp: above the diagonal the exponent is positive and may overflow."""
    return tl.exp(tl.where(t[:, None] >= t[None, :], cs[:, None] - cs[None, :], float("-inf")))


@triton.jit
def _place(program, n_groups, n_chunks, n_blocks):
    """Sequence, chunk, block of heads and its group of a program (int64) that takes one chunk."""
    block = (program % n_blocks).to(tl.int32)
    chunk = (program // n_blocks % n_chunks).to(tl.int32)
    return program // n_blocks // n_chunks, chunk, block, block // (n_blocks // n_groups)


@triton.jit
def _columns(heads, head, column, P: tl.constexpr, PP: tl.constexpr):
    """Where the channels of neighbouring heads lie, P of each in PP columns: offsets from ``heads``, and which there are."""
    return heads + (head + column // PP) * P + column % PP, column % PP < P


@triton.jit
def ssd_states_kernel(
    xbc, dt, A, bias, states, paces, n_tokens, n_heads, n_groups, n_chunks, stride_b, stride_t, dt_stride_b, dt_stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, WALKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """states (B, H, chunks, N, P): the state before each chunk of one sequence, for WALKED heads of one group. paces (B, H,
    chunks, 2, L): step = softplus(dt + bias), 0 outside the sequence, and the running sum of A step within the chunk."""
    program = tl.program_id(0).to(tl.int64)
    n_walks = n_heads // WALKED
    batch, head = program // n_walks, (program % n_walks).to(tl.int32) * WALKED
    group = head // (n_heads // n_groups)
    column, n, t = tl.arange(0, WALKED * PP), tl.arange(0, NP), tl.arange(0, L)
    xbc += batch * stride_b
    b_start = xbc + n_heads * P + group * N
    kind = xbc.dtype.element_ty
    channel, real = _columns(0, head, column, P, PP)
    first = (batch * n_heads + head) * n_chunks  # of this walk's among all of (B, H, chunks)
    place = states + (first + column // PP * n_chunks)[None, :] * N * P + n[:, None] * P + (column % PP)[None, :]
    mask = (n < N)[:, None] & real[None, :]
    h = tl.zeros((NP, WALKED * PP), dtype=tl.float32)
    for chunk in range(n_chunks):
        row = chunk * L + t
        inside = row < n_tokens
        tl.store(place + chunk * N * P, h.to(kind), mask=mask)
        weight = tl.zeros((L, WALKED * PP), dtype=tl.float32)
        decay = tl.zeros((WALKED * PP,), dtype=tl.float32)
        for number in tl.static_range(WALKED):
            rate, offset = tl.load(A + head + number), tl.load(bias + head + number)
            start = dt + batch * dt_stride_b + row * dt_stride_t + head + number
            raw = tl.load(start, mask=inside, other=0.0).to(tl.float32) + offset
            step = tl.where(inside, _softplus(raw), 0.0)
            cs, total = tl.cumsum(step * rate, axis=0), tl.sum(step * rate, axis=0)
            pace = paces + (first + number * n_chunks + chunk) * 2 * L + t
            tl.store(pace, step)
            tl.store(pace + L, cs)
            mine = column // PP == number
            weight = tl.where(mine[None, :], (tl.exp(total - cs) * step)[:, None], weight)
            decay = tl.where(mine, tl.exp(total), decay)
        x = tl.load(xbc + row[:, None] * stride_t + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        keys = _tile(b_start, row, inside, stride_t, n, N)
        x = (x.to(tl.float32) * weight).to(kind)
        h = h * decay[None, :] + tl.dot(tl.trans(keys), x, input_precision=PRECISION)


@triton.jit
def ssd_carry_kernel(
    dy, xbc, paces, d_states, n_tokens, n_heads, n_groups, n_chunks, stride_b, stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, WALKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_states (B, H, chunks, N, P): the gradient of the state behind each chunk of one sequence, for WALKED heads."""
    program = tl.program_id(0).to(tl.int64)
    n_walks = n_heads // WALKED
    batch, head = program // n_walks, (program % n_walks).to(tl.int32) * WALKED
    group = head // (n_heads // n_groups)
    width = n_heads * P
    column, n, t = tl.arange(0, WALKED * PP), tl.arange(0, NP), tl.arange(0, L)
    dy += batch * n_tokens * width
    c_start = xbc + batch * stride_b + width + (n_groups + group) * N
    kind = xbc.dtype.element_ty
    channel, real = _columns(0, head, column, P, PP)
    first = (batch * n_heads + head) * n_chunks
    place = d_states + (first + column // PP * n_chunks)[None, :] * N * P + n[:, None] * P + (column % PP)[None, :]
    mask = (n < N)[:, None] & real[None, :]
    dh = tl.zeros((NP, WALKED * PP), dtype=tl.float32)
    for number in range(n_chunks):
        chunk = n_chunks - 1 - number
        row = chunk * L + t
        inside = row < n_tokens
        tl.store(place + chunk * N * P, dh.to(kind), mask=mask)
        weight = tl.zeros((L, WALKED * PP), dtype=tl.float32)
        decay = tl.zeros((WALKED * PP,), dtype=tl.float32)
        for walked in tl.static_range(WALKED):
            _, cs, total = _pace(paces, first + walked * n_chunks + chunk, t, L)
            mine = column // PP == walked
            weight = tl.where(mine[None, :], tl.exp(cs)[:, None], weight)
            decay = tl.where(mine, tl.exp(total), decay)
        given = tl.load(dy + row[:, None] * width + channel[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        given = (given.to(tl.float32) * weight).to(kind)
        queries = _tile(c_start, row, inside, stride_t, n, N)
        dh = dh * decay[None, :] + tl.dot(tl.trans(queries), given, input_precision=PRECISION)


@triton.jit
def ssd_output_kernel(
    xbc, D, paces, states, y, n_tokens, n_heads, n_groups, n_chunks, n_blocks, stride_b, stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, T, H P) of one chunk of one sequence for HEADS heads of one group."""
    batch, chunk, block, group = _place(tl.program_id(0).to(tl.int64), n_groups, n_chunks, n_blocks)
    width = n_heads * P
    p, n, t = tl.arange(0, PP), tl.arange(0, NP), tl.arange(0, L)
    row = chunk * L + t
    inside = row < n_tokens
    xbc += batch * stride_b
    keys, queries = _keys_and_queries(xbc + width, row, inside, stride_t, n_groups, group, n, N)
    kind = xbc.dtype.element_ty
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    for number in range(HEADS):
        head = block * HEADS + number
        state = (batch * n_heads + head) * n_chunks + chunk
        step, cs, _ = _pace(paces, state, t, L)
        x = _tile(xbc + head * P, row, inside, stride_t, p, P)
        h = _state(states, state, n, p, N, P)
        out = tl.dot(queries, h, input_precision=PRECISION) * tl.exp(cs)[:, None]
        weights = (scores * _decay(t, cs) * step[None, :]).to(kind)
        out += tl.dot(weights, x, input_precision=PRECISION)
        out += tl.load(D + head) * x.to(tl.float32)
        tl.store(
            y + batch * n_tokens * width + row[:, None] * width + head * P + p[None, :],
            out.to(y.dtype.element_ty),
            mask=inside[:, None] & (p < P)[None, :],
        )
