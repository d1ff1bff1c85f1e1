"""Triton kernels of Mamba-2's state-space duality (Dao and Gu 2024, section 6). Imported on a CUDA device only.

For each head, with a = A step, cs its running sum inside a chunk of L tokens, h (N, P) the state before the chunk:

    W[t, s] = (C[t] B[s]) exp(cs[t] - cs[s]) step[s]  for s <= t
    y = W x + exp(cs) (C h) + D x          h' = exp(cs[L-1]) h + sum_s exp(cs[L-1] - cs[s]) step[s] B[s] x[s]^T

``states`` walks over the chunks of one head and stores h before each, ``carry`` walks back and stores dh, the gradient of
the state behind each. The others take all chunks at once, some heads of one group to a program: ``output`` makes y,
``backward_heads`` what each head has for itself, ``backward_shared`` the gradients of B and C, summed over those heads.
Letters: B batch, T tokens, H heads, P headdim, G groups of heads that share B and C, N d_state. x, B and C lie side by
side in one tensor xbc (B, T, H P + 2 G N), as the convolution leaves them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _steps(dt, row, inside, stride_t, A, bias):
    """Of a chunk (L,): dt + bias, step = softplus of it (0 outside the sequence), the running sum of A step, its last."""
    raw = tl.load(dt + row * stride_t, mask=inside, other=0.0).to(tl.float32) + bias
    step = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
    step = tl.where(inside, step, 0.0)
    return raw, step, tl.cumsum(step * A, axis=0), tl.sum(step * A, axis=0)


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
def _place(n_heads, n_groups, n_chunks, n_blocks):
    """Sequence, chunk, block of heads and its group of a program that takes one chunk."""
    program = tl.program_id(0).to(tl.int64)
    block = (program % n_blocks).to(tl.int32)
    chunk = (program // n_blocks % n_chunks).to(tl.int32)
    return program // n_blocks // n_chunks, chunk, block, block // (n_blocks // n_groups)


@triton.jit
def ssd_states_kernel(
    xbc, dt, A, bias, states, n_tokens, n_heads, n_groups, n_chunks, stride_b, stride_t, dt_stride_b, dt_stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states (B, H, chunks, N, P): the state before each chunk of one sequence's head."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, (program % n_heads).to(tl.int32)
    group = head // (n_heads // n_groups)
    p, n, t = tl.arange(0, PP), tl.arange(0, NP), tl.arange(0, L)
    xbc += batch * stride_b
    dt += batch * dt_stride_b + head
    b_start = xbc + n_heads * P + group * N
    kind = xbc.dtype.element_ty
    rate, offset = tl.load(A + head), tl.load(bias + head)
    h = tl.zeros((NP, PP), dtype=tl.float32)
    mask = (n < N)[:, None] & (p < P)[None, :]
    place = states + program * n_chunks * N * P + n[:, None] * P + p[None, :]
    for chunk in range(n_chunks):
        row = chunk * L + t
        inside = row < n_tokens
        tl.store(place + chunk * N * P, h.to(kind), mask=mask)
        _, step, cs, total = _steps(dt, row, inside, dt_stride_t, rate, offset)
        x = _tile(xbc + head * P, row, inside, stride_t, p, P).to(tl.float32) * (tl.exp(total - cs) * step)[:, None]
        keys = _tile(b_start, row, inside, stride_t, n, N)
        h = h * tl.exp(total) + tl.dot(tl.trans(keys), x.to(kind), input_precision=PRECISION)


@triton.jit
def ssd_carry_kernel(
    dy, xbc, dt, A, bias, d_states, n_tokens, n_heads, n_groups, n_chunks, stride_b, stride_t, dt_stride_b, dt_stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_states (B, H, chunks, N, P): the gradient of the state behind each chunk of one sequence's head."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, (program % n_heads).to(tl.int32)
    group = head // (n_heads // n_groups)
    width = n_heads * P
    p, n, t = tl.arange(0, PP), tl.arange(0, NP), tl.arange(0, L)
    dt += batch * dt_stride_b + head
    dy += batch * n_tokens * width + head * P
    c_start = xbc + batch * stride_b + width + (n_groups + group) * N
    kind = xbc.dtype.element_ty
    rate, offset = tl.load(A + head), tl.load(bias + head)
    dh = tl.zeros((NP, PP), dtype=tl.float32)
    mask = (n < N)[:, None] & (p < P)[None, :]
    place = d_states + program * n_chunks * N * P + n[:, None] * P + p[None, :]
    for number in range(n_chunks):
        chunk = n_chunks - 1 - number
        row = chunk * L + t
        inside = row < n_tokens
        tl.store(place + chunk * N * P, dh.to(kind), mask=mask)
        _, _, cs, total = _steps(dt, row, inside, dt_stride_t, rate, offset)
        given = _tile(dy, row, inside, width, p, P).to(tl.float32) * tl.exp(cs)[:, None]
        queries = _tile(c_start, row, inside, stride_t, n, N)
        dh = dh * tl.exp(total) + tl.dot(tl.trans(queries), given.to(kind), input_precision=PRECISION)


@triton.jit
def ssd_output_kernel(
    xbc, dt, A, D, bias, states, y, n_tokens, n_heads, n_groups, n_chunks, n_blocks,
    stride_b, stride_t, dt_stride_b, dt_stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, T, H P) of one chunk of one sequence for HEADS heads of one group."""
    batch, chunk, block, group = _place(n_heads, n_groups, n_chunks, n_blocks)
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
        _, step, cs, _ = _steps(
            dt + batch * dt_stride_b + head, row, inside, dt_stride_t, tl.load(A + head), tl.load(bias + head)
        )
        x = _tile(xbc + head * P, row, inside, stride_t, p, P)
        state = (batch * n_heads + head) * n_chunks + chunk
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


@triton.jit
def ssd_backward_heads_kernel(
    dy, xbc, dt, A, D, bias, states, d_states, d_xbc, d_dt, dA, dD, d_bias,
    n_tokens, n_heads, n_groups, n_chunks, n_blocks, stride_b, stride_t, dt_stride_b, dt_stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each of HEADS heads has for itself, in one chunk of one sequence.

    The gradients of x into d_xbc (B, T, H P + 2 G N), of dt into d_dt (B, T, H), of A, D and the bias into
    (B, chunks, H).
    """
    batch, chunk, block, group = _place(n_heads, n_groups, n_chunks, n_blocks)
    width = n_heads * P
    wide = width + 2 * n_groups * N
    p, n, t = tl.arange(0, PP), tl.arange(0, NP), tl.arange(0, L)
    row = chunk * L + t
    inside = row < n_tokens
    xbc += batch * stride_b
    keys, queries = _keys_and_queries(xbc + width, row, inside, stride_t, n_groups, group, n, N)
    kind = xbc.dtype.element_ty
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    for number in range(HEADS):
        head = block * HEADS + number
        rate = tl.load(A + head)
        raw, step, cs, total = _steps(
            dt + batch * dt_stride_b + head, row, inside, dt_stride_t, rate, tl.load(bias + head)
        )
        x = _tile(xbc + head * P, row, inside, stride_t, p, P)
        given = _tile(dy + batch * n_tokens * width + head * P, row, inside, width, p, P)
        state = (batch * n_heads + head) * n_chunks + chunk
        h = _state(states, state, n, p, N, P)
        dh = _state(d_states, state, n, p, N, P)
        # h' = exp(total) h + sum_s exp(total - cs[s]) step[s] B[s] x[s]^T
        d_total = tl.exp(total) * tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), axis=1), axis=0)
        dx = tl.dot(keys, dh, input_precision=PRECISION) * tl.exp(total - cs)[:, None]  # of step x, so far
        x_wide = x.to(tl.float32)
        by_state = tl.sum(dx * x_wide, axis=1)
        d_total += tl.sum(by_state * step, axis=0)
        # y += exp(cs) (C h)
        given_wide = given.to(tl.float32)
        from_state = tl.dot(queries, h, input_precision=PRECISION) * tl.exp(cs)[:, None]
        d_cs = tl.sum(from_state * given_wide, axis=1) - by_state * step
        # y = W x with W = weights step[s]; rows and columns of one product, so that what cancels does so exactly
        weights = scores * _decay(t, cs)
        dx += tl.dot(tl.trans(weights.to(kind)), given, input_precision=PRECISION)
        product = tl.dot(given, tl.trans(x), input_precision=PRECISION) * weights
        d_step = by_state + tl.sum(product, axis=0)
        product *= step[None, :]
        d_cs += tl.sum(product, axis=1) - tl.sum(product, axis=0)
        dx = dx * step[:, None] + tl.load(D + head) * given_wide
        tl.store(
            d_xbc + batch * n_tokens * wide + row[:, None] * wide + head * P + p[None, :],
            dx.to(d_xbc.dtype.element_ty),
            mask=inside[:, None] & (p < P)[None, :],
        )
        # cs is a running sum: a token's A step is in all later ones.
        d_decay = tl.cumsum(d_cs, axis=0, reverse=True) + d_total
        d_raw = tl.where(inside, (d_step + rate * d_decay) * tl.sigmoid(raw), 0.0)
        tl.store(d_dt + (batch * n_tokens + row) * n_heads + head, d_raw.to(d_dt.dtype.element_ty), mask=inside)
        sums = (batch * n_chunks + chunk) * n_heads + head
        tl.store(dA + sums, tl.sum(step * d_decay, axis=0))
        tl.store(dD + sums, tl.sum(tl.sum(x_wide * given_wide, axis=1), axis=0))
        tl.store(d_bias + sums, tl.sum(d_raw, axis=0))


@triton.jit
def ssd_backward_shared_kernel(
    dy, xbc, dt, A, bias, states, d_states, d_bc, n_tokens, n_heads, n_groups, n_chunks, n_blocks,
    stride_b, stride_t, dt_stride_b, dt_stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C in one chunk of one sequence, summed over HEADS heads: d_bc (blocks of a group, B, T, 2 G N)."""
    batch, chunk, block, group = _place(n_heads, n_groups, n_chunks, n_blocks)
    width = n_heads * P
    p, n, t = tl.arange(0, PP), tl.arange(0, NP), tl.arange(0, L)
    row = chunk * L + t
    inside = row < n_tokens
    xbc += batch * stride_b
    kind = xbc.dtype.element_ty
    d_scores = tl.zeros((L, L), dtype=tl.float32)
    d_keys = tl.zeros((L, NP), dtype=tl.float32)
    d_queries = tl.zeros((L, NP), dtype=tl.float32)
    for number in range(HEADS):
        head = block * HEADS + number
        _, step, cs, total = _steps(
            dt + batch * dt_stride_b + head, row, inside, dt_stride_t, tl.load(A + head), tl.load(bias + head)
        )
        x = _tile(xbc + head * P, row, inside, stride_t, p, P)
        given = _tile(dy + batch * n_tokens * width + head * P, row, inside, width, p, P)
        state = (batch * n_heads + head) * n_chunks + chunk
        h = _state(states, state, n, p, N, P)
        dh = _state(d_states, state, n, p, N, P)
        d_scores += tl.dot(given, tl.trans(x), input_precision=PRECISION) * _decay(t, cs) * step[None, :]
        given = (given.to(tl.float32) * tl.exp(cs)[:, None]).to(kind)
        d_queries += tl.dot(given, tl.trans(h), input_precision=PRECISION)
        x = (x.to(tl.float32) * (tl.exp(total - cs) * step)[:, None]).to(kind)
        d_keys += tl.dot(x, tl.trans(dh), input_precision=PRECISION)
    keys, queries = _keys_and_queries(xbc + width, row, inside, stride_t, n_groups, group, n, N)
    d_queries += tl.dot(d_scores.to(kind), keys, input_precision=PRECISION)
    d_keys += tl.dot(tl.trans(d_scores).to(kind), queries, input_precision=PRECISION)
    n_batch = tl.num_programs(0) // n_blocks // n_chunks
    part = (block % (n_blocks // n_groups)) * n_batch + batch
    start = d_bc + (part * n_tokens + row[:, None]) * (2 * n_groups * N) + group * N
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(start + n[None, :], d_keys, mask=mask)
    tl.store(start + n_groups * N + n[None, :], d_queries, mask=mask)
