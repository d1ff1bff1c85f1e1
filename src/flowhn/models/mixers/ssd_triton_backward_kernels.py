"""Triton kernels of the gradients of Mamba-2's state-space duality that take all chunks at once. Imported on a CUDA device only.

What they compute, and the letters, stand at the top of :mod:`flowhn.models.mixers.ssd_triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowhn.models.mixers.ssd_triton_kernels import _decay, _keys_and_queries, _pace, _place, _state, _tile


@triton.jit
def ssd_backward_x_kernel(
    dy, xbc, D, paces, d_states, d_xbc, n_tokens, n_heads, n_groups, n_chunks, n_blocks, stride_b, stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of x into d_xbc (B, T, H P + 2 G N), in one chunk of one sequence for HEADS heads of one group."""
    batch, chunk, block, group = _place(tl.program_id(0).to(tl.int64), n_groups, n_chunks, n_blocks)
    width = n_heads * P
    wide = width + 2 * n_groups * N
    p, n, t = tl.arange(0, PP), tl.arange(0, NP), tl.arange(0, L)
    row = chunk * L + t
    inside = row < n_tokens
    keys, queries = _keys_and_queries(xbc + batch * stride_b + width, row, inside, stride_t, n_groups, group, n, N)
    kind = xbc.dtype.element_ty
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # (source, token)
    for number in range(HEADS):
        head = block * HEADS + number
        state = (batch * n_heads + head) * n_chunks + chunk
        step, cs, total = _pace(paces, state, t, L)
        given = _tile(dy + batch * n_tokens * width + head * P, row, inside, width, p, P)
        dh = _state(d_states, state, n, p, N, P)
        dx = tl.dot(keys, dh, input_precision=PRECISION) * tl.exp(total - cs)[:, None]
        weights = (scores * tl.trans(_decay(t, cs))).to(kind)
        dx += tl.dot(weights, given, input_precision=PRECISION)
        dx = dx * step[:, None] + tl.load(D + head) * given.to(tl.float32)
        tl.store(
            d_xbc + batch * n_tokens * wide + row[:, None] * wide + head * P + p[None, :],
            dx.to(d_xbc.dtype.element_ty),
            mask=inside[:, None] & (p < P)[None, :],
        )


@triton.jit
def ssd_backward_scores_kernel(
    dy, xbc, paces, d_scores, d_paces, n_tokens, n_heads, n_groups, n_chunks, n_blocks, stride_b, stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, L: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of C[t] B[s] inside one chunk of one sequence, summed over HEADS heads of one group: d_scores (B, chunks,
    blocks, L, L).

    And into rows 0 to 2 of d_paces (B, H, chunks, ROWS, L) the gradients of cs and of step as far as they come from inside
    the chunk, and x dy summed over P.
    """
    batch, chunk, block, group = _place(tl.program_id(0).to(tl.int64), n_groups, n_chunks, n_blocks)
    width = n_heads * P
    p, n, t = tl.arange(0, PP), tl.arange(0, NP), tl.arange(0, L)
    row = chunk * L + t
    inside = row < n_tokens
    xbc += batch * stride_b
    keys, queries = _keys_and_queries(xbc + width, row, inside, stride_t, n_groups, group, n, N)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    summed = tl.zeros((L, L), dtype=tl.float32)
    for number in range(HEADS):
        head = block * HEADS + number
        state = (batch * n_heads + head) * n_chunks + chunk
        step, cs, _ = _pace(paces, state, t, L)
        x = _tile(xbc + head * P, row, inside, stride_t, p, P)
        given = _tile(dy + batch * n_tokens * width + head * P, row, inside, width, p, P)
        product = tl.dot(given, tl.trans(x), input_precision=PRECISION)
        place = d_paces + state * ROWS * L + t
        tl.store(place + 2 * L, tl.sum(tl.where(t[:, None] == t[None, :], product, 0.0), axis=1))
        product *= _decay(t, cs)
        summed += product * step[None, :]
        product *= scores
        d_step = tl.sum(product, axis=0)
        # y = W x: rows and columns of one product, whose sums cancel in that of the gradient of cs up to rounding. Not
        # d_step * step: fused with the difference, it would be rounded once less.
        product *= step[None, :]
        tl.store(place, tl.sum(product, axis=1) - tl.sum(product, axis=0))
        tl.store(place + L, d_step)
    start = d_scores + tl.program_id(0).to(tl.int64) * L * L
    tl.store(start + t[:, None] * L + t[None, :], summed.to(d_scores.dtype.element_ty))


@triton.jit
def ssd_backward_bc_kernel(
    dy, xbc, paces, states, d_states, d_scores, d_bc, d_paces, d_decays,
    n_tokens, n_heads, n_groups, n_chunks, n_blocks, stride_b, stride_t,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NB: tl.constexpr, PARTS: tl.constexpr, L: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of NB columns of B and C in one chunk of one sequence, summed over HEADS heads of one group: d_bc (blocks
    of a group, B, T, 2 G N). PARTS programs side by side take all N columns: more would not fit their registers.

    And, as far as they come from the part's columns of the states: into rows 3 + 2 part and 4 + 2 part of d_paces the
    gradients of cs and of step, and into d_decays (B, H, chunks, PARTS NB) that of exp(total), to be summed.
    """
    part = tl.program_id(0) % PARTS
    program = tl.program_id(0).to(tl.int64) // PARTS
    batch, chunk, block, group = _place(program, n_groups, n_chunks, n_blocks)
    width = n_heads * P
    p, t = tl.arange(0, PP), tl.arange(0, L)
    column = tl.arange(0, NB)
    n = part * NB + column
    row = chunk * L + t
    inside = row < n_tokens
    xbc += batch * stride_b
    keys, queries = _keys_and_queries(xbc + width, row, inside, stride_t, n_groups, group, n, N)
    d_keys = tl.zeros((L, NB), dtype=tl.float32)
    d_queries = tl.zeros((L, NB), dtype=tl.float32)
    for number in range(HEADS):
        head = block * HEADS + number
        state = (batch * n_heads + head) * n_chunks + chunk
        step, cs, total = _pace(paces, state, t, L)
        h = _state(states, state, n, p, N, P)
        dh = _state(d_states, state, n, p, N, P)
        tl.store(d_decays + (state * PARTS + part) * NB + column, tl.sum(h.to(tl.float32) * dh.to(tl.float32), axis=1))
        place = d_paces + (state * ROWS + 3 + 2 * part) * L + t
        # y += exp(cs) (C h)
        given = _tile(dy + batch * n_tokens * width + head * P, row, inside, width, p, P)
        product = tl.dot(given, tl.trans(h), input_precision=PRECISION) * tl.exp(cs)[:, None]
        d_queries += product
        tl.store(place, tl.sum(product * queries.to(tl.float32), axis=1))
        # h' = exp(total) h + sum_s exp(total - cs[s]) step[s] B[s] x[s]^T
        x = _tile(xbc + head * P, row, inside, stride_t, p, P)
        product = tl.dot(x, tl.trans(dh), input_precision=PRECISION) * tl.exp(total - cs)[:, None]
        d_keys += product * step[:, None]
        tl.store(place + L, tl.sum(product * keys.to(tl.float32), axis=1))
    inner = tl.load(d_scores + program * L * L + t[:, None] * L + t[None, :])
    d_queries += tl.dot(inner, keys, input_precision=PRECISION)
    d_keys += tl.dot(tl.trans(inner), queries, input_precision=PRECISION)
    n_batch = tl.num_programs(0) // PARTS // n_blocks // n_chunks
    part_of = (block % (n_blocks // n_groups)) * n_batch + batch
    start = d_bc + (part_of * n_tokens + row[:, None]) * (2 * n_groups * N) + group * N
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(start + n[None, :], d_keys, mask=mask)
    tl.store(start + n_groups * N + n[None, :], d_queries, mask=mask)


@triton.jit
def ssd_backward_dt_kernel(
    A, paces, d_paces, d_decays, d_dt, dA, dD, d_bias, n_tokens, n_heads, n_chunks, d_dt_stride_b, d_dt_stride_t,
    L: tl.constexpr, NB: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """From what the two kernels above left: the gradients of dt (B, T, H) and, of one sequence's head, of A, D and the bias
    (B, H). CHUNKS at a time."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // n_heads, (program % n_heads).to(tl.int32)
    t = tl.arange(0, L)[None, :]
    rate = tl.load(A + head)
    sums = tl.zeros((CHUNKS, L), dtype=tl.float32)
    skips, biases = sums, sums
    for first in range(0, n_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        mask = (chunk < n_chunks)[:, None]
        state = program * n_chunks + chunk
        place = paces + state[:, None] * 2 * L
        step = tl.load(place + t, mask=mask, other=0.0)
        total = tl.load(paces + state * 2 * L + 2 * L - 1, mask=chunk < n_chunks, other=0.0)
        place = d_paces + state[:, None] * ROWS * L + t
        d_cs, d_step = tl.load(place, mask=mask, other=0.0), tl.load(place + L, mask=mask, other=0.0)
        skips += tl.load(place + 2 * L, mask=mask, other=0.0)
        by_state = tl.zeros((CHUNKS, L), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            d_cs += tl.load(place + (3 + 2 * part) * L, mask=mask, other=0.0)
            by_state += tl.load(place + (4 + 2 * part) * L, mask=mask, other=0.0)
        column = tl.arange(0, PARTS * NB)[None, :]
        by_decay = tl.sum(tl.load(d_decays + state[:, None] * PARTS * NB + column, mask=mask, other=0.0), axis=1)
        d_total = tl.exp(total) * by_decay + tl.sum(by_state * step, axis=1)
        # cs is a running sum: a token's A step is in all later ones.
        d_decay = tl.cumsum(d_cs - by_state * step, axis=1, reverse=True) + d_total[:, None]
        sums += step * d_decay
        # softplus' = 1 - exp(-step), whose difference loses the digits of a small step
        slope = tl.where(step > 0.02, 1.0 - tl.exp(-step), step * (1.0 - step * (0.5 - step * (1 / 6 - step / 24))))
        d_raw = (d_step + by_state + rate * d_decay) * slope
        biases += d_raw
        row = chunk[:, None] * L + t
        tl.store(
            d_dt + batch * d_dt_stride_b + row * d_dt_stride_t + head,
            d_raw.to(d_dt.dtype.element_ty),
            mask=row < n_tokens,
        )
    tl.store(dA + program, tl.sum(tl.sum(sums, axis=1), axis=0))
    tl.store(dD + program, tl.sum(tl.sum(skips, axis=1), axis=0))
    tl.store(d_bias + program, tl.sum(tl.sum(biases, axis=1), axis=0))
