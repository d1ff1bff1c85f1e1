"""Triton kernels of the selective scan in token-major layout. Imported when they run; :mod:`scan_triton` launches them.

A program owns one sequence and a block of channels and walks over time in chunks of K tokens. Inside a chunk the loop
over states is outermost, and the K steps of one state are unrolled: a thread holds all K values of its channels, so
that the recurrence, the sum over states and the way back through the chunk's states stay in registers. Between
chunks the state of each (state, channel) waits in a small buffer that stays in the L2 cache.

A long sequence may be cut into segments of L tokens that run side by side (few sequences leave a GPU idle): row r of
``carry`` is segment r % S of sequence r // S, and START says that it holds the state before the segment. What comes in
at a segment's border is found beforehand, by a pass that only carries states.

Letters: B batch, T tokens, E channels, N states, S segments, K tokens per chunk, BE channels per program. Rows are (BE,).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) and exp(-|x|): max(x, 0) + 2 artanh(e / (2 + e)), since log2.approx is not exact near one."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    s = e / (2.0 + e)
    q = s * s
    series = 1 / 13 + q * (1 / 15)
    series = 1 / 9 + q * (1 / 11 + q * series)
    series = 1 / 5 + q * (1 / 7 + q * series)
    series = 1.0 + q * (1 / 3 + q * series)
    return tl.maximum(x, 0.0) + 2.0 * s * series, e


@triton.jit
def selective_scan_forward_kernel(
    u, delta, A2, B, C, D, bias, y, carry, states, total, n_tokens, n_channels, n_states, n_saved, n_blocks,
    n_segments, n_segment, u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t,
    K: tl.constexpr, BE: tl.constexpr, SAVE: tl.constexpr, OUTPUT: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """y (B, T, E) and, with SAVE, the state before every SAVE tokens: (B, n_saved, N, E).

    A2 is A^T log2(e), (N, E); carry (B S, N, E) holds the state between chunks and the last one at the end; total (B S, E),
    written without OUTPUT, is the sum of the segment's step sizes. n_segment, the tokens of a segment, is a multiple of SAVE.
    """
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch = row // n_segments
    first = (row % n_segments) * n_segment
    channel = (tl.program_id(0) % n_blocks) * BE + tl.arange(0, BE)
    inside = channel < n_channels
    u += batch * u_b + first * u_t
    delta += batch * delta_b + first * delta_t
    B += batch * B_b + first * B_t
    C += batch * C_b + first * C_t
    y += (batch * n_tokens + first) * n_channels
    carry += row * n_states * n_channels
    if SAVE > 0:
        states += (batch * n_saved + first // SAVE) * n_states * n_channels
    n_tokens = tl.minimum(n_segment, n_tokens - first).to(tl.int32)
    passed = tl.zeros((BE,), dtype=tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0)
    skip = tl.load(D + channel, mask=inside, other=0.0)
    for start in range(0, n_tokens, K):
        dt, dtu, out = (), (), ()
        for k in tl.static_range(K):
            there = inside & (start + k < n_tokens)
            x = tl.load(u + (start + k) * u_t + channel, mask=there, other=0.0).to(tl.float32)
            raw = tl.load(delta + (start + k) * delta_t + channel, mask=there, other=0.0).to(tl.float32)
            step, _ = _softplus(raw + shift)
            step = tl.where(start + k < n_tokens, step, 0.0)
            dt, dtu, out = dt + (step,), dtu + (step * x,), out + (skip * x,)
            passed += step
        for n in range(n_states):
            a2 = tl.load(A2 + n * n_channels + channel, mask=inside, other=0.0)
            place = carry + n * n_channels + channel
            h = tl.load(place, mask=inside if START else inside & (start > 0), other=0.0)
            summed = ()
            for k in tl.static_range(K):
                t = start + k
                if SAVE > 0 and k % SAVE == 0:
                    saved = states + ((t // SAVE).to(tl.int64) * n_states + n) * n_channels
                    tl.store(saved + channel, h, mask=inside & (t < n_tokens))
                b = tl.load(B + t * B_t + n, mask=t < n_tokens, other=0.0).to(tl.float32)
                h = tl.exp2(dt[k] * a2) * h + dtu[k] * b
                if OUTPUT:
                    c = tl.load(C + t * C_t + n, mask=t < n_tokens, other=0.0).to(tl.float32)
                    summed = summed + (out[k] + h * c,)
                else:
                    summed = summed + (out[k],)
            out = summed
            tl.store(place, h, mask=inside)
        if OUTPUT:
            for k in tl.static_range(K):
                there = inside & (start + k < n_tokens)
                tl.store(y + (start + k) * n_channels + channel, out[k].to(y.dtype.element_ty), mask=there)
        tl.debug_barrier()
    if not OUTPUT:
        tl.store(total + row * n_channels + channel, passed, mask=inside)


@triton.jit
def selective_scan_carry_kernel(
    dy, delta, A2, C, bias, carry, total, n_tokens, n_channels, n_states, n_blocks, n_segments, n_segment,
    dy_b, dy_t, delta_b, delta_t, C_b, C_t, K: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """carry (B S, N, E): exp(dt A) dh of each segment's first token, were there no later segment; total as above."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch = row // n_segments
    first = (row % n_segments) * n_segment
    channel = (tl.program_id(0) % n_blocks) * BE + tl.arange(0, BE)
    inside = channel < n_channels
    dy += batch * dy_b + first * dy_t
    delta += batch * delta_b + first * delta_t
    C += batch * C_b + first * C_t
    carry += row * n_states * n_channels
    n_tokens = tl.minimum(n_segment, n_tokens - first).to(tl.int32)
    shift = tl.load(bias + channel, mask=inside, other=0.0)
    passed = tl.zeros((BE,), dtype=tl.float32)
    n_chunks = tl.cdiv(n_tokens, K)
    for chunk in range(n_chunks):
        start = (n_chunks - 1 - chunk) * K
        dt, grad = (), ()
        for k in tl.static_range(K):
            there = inside & (start + k < n_tokens)
            raw = tl.load(delta + (start + k) * delta_t + channel, mask=there, other=0.0).to(tl.float32)
            step, _ = _softplus(raw + shift)
            step = tl.where(start + k < n_tokens, step, 0.0)
            dt, passed = dt + (step,), passed + step
            grad = grad + (tl.load(dy + (start + k) * dy_t + channel, mask=there, other=0.0).to(tl.float32),)
        for n in range(n_states):
            a2 = tl.load(A2 + n * n_channels + channel, mask=inside, other=0.0)
            place = carry + n * n_channels + channel
            back = tl.load(place, mask=inside & (chunk > 0), other=0.0)
            for k in tl.static_range(K - 1, -1, -1):
                t = start + k
                c = tl.load(C + t * C_t + n, mask=t < n_tokens, other=0.0).to(tl.float32)
                back = tl.exp2(dt[k] * a2) * (grad[k] * c + back)
            tl.store(place, back, mask=inside)
        tl.debug_barrier()
    tl.store(total + row * n_channels + channel, passed, mask=inside)


@triton.jit
def _sums(rows, K: tl.constexpr):
    """(K,): the sum of each row."""
    index = tl.arange(0, K)
    sums = tl.zeros((K,), dtype=tl.float32)
    for k in tl.static_range(K):
        sums = tl.where(index == k, tl.sum(rows[k], axis=0), sums)
    return sums


@triton.jit
def selective_scan_backward_kernel(
    dy, u, delta, A2, B, C, D, bias, states, du, ddelta, dA, dB, dC, dD, dbias, carry,
    n_tokens, n_channels, n_states, n_saved, n_blocks, n_padded, n_segments, n_segment,
    dy_b, dy_t, u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t,
    K: tl.constexpr, BE: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """du, ddelta (B, T, E); dA (B S, N, E), dD, dbias (B S, E), each segment's; dB, dC (n_blocks, B, N, n_padded), each
    block's share. Chunk by chunk from the last: its states from the saved one, then back through them.

    carry (B S, N, E) holds exp(dt A) dh of the following chunk's first token; with START that of the following segment's.
    """
    block = tl.program_id(0) % n_blocks
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    batch = row // n_segments
    first = (row % n_segments) * n_segment
    n_batch = tl.num_programs(0) // n_blocks // n_segments
    channel = block * BE + tl.arange(0, BE)
    inside = channel < n_channels
    dy += batch * dy_b + first * dy_t
    u += batch * u_b + first * u_t
    delta += batch * delta_b + first * delta_t
    B += batch * B_b + first * B_t
    C += batch * C_b + first * C_t
    du += (batch * n_tokens + first) * n_channels
    ddelta += (batch * n_tokens + first) * n_channels
    dA += row * n_states * n_channels
    carry += row * n_states * n_channels
    states += (batch * n_saved + first // K) * n_states * n_channels
    dB += (block * n_batch + batch) * n_states * n_padded + first
    dC += (block * n_batch + batch) * n_states * n_padded + first
    n_tokens = tl.minimum(n_segment, n_tokens - first).to(tl.int32)
    n_chunks = tl.cdiv(n_tokens, K)
    shift = tl.load(bias + channel, mask=inside, other=0.0)
    skip = tl.load(D + channel, mask=inside, other=0.0)
    sum_D = tl.zeros((BE,), dtype=tl.float32)
    sum_bias = tl.zeros((BE,), dtype=tl.float32)
    for chunk in range(n_chunks):
        saved = n_chunks - 1 - chunk
        start = saved * K
        dt, dtu, grad, d_dtu, d_dt = (), (), (), (), ()
        for k in tl.static_range(K):
            there = inside & (start + k < n_tokens)
            x = tl.load(u + (start + k) * u_t + channel, mask=there, other=0.0).to(tl.float32)
            raw = tl.load(delta + (start + k) * delta_t + channel, mask=there, other=0.0).to(tl.float32)
            step, _ = _softplus(raw + shift)
            step = tl.where(start + k < n_tokens, step, 0.0)
            given = tl.load(dy + (start + k) * dy_t + channel, mask=there, other=0.0).to(tl.float32)
            zero = tl.zeros((BE,), dtype=tl.float32)
            dt, dtu, grad, d_dtu, d_dt = (
                dt + (step,),
                dtu + (step * x,),
                grad + (given,),
                d_dtu + (zero,),
                d_dt + (zero,),
            )
        for n in range(n_states):
            a2 = tl.load(A2 + n * n_channels + channel, mask=inside, other=0.0)
            h = tl.load(states + (saved.to(tl.int64) * n_states + n) * n_channels + channel, mask=inside, other=0.0)
            place = n * n_channels + channel
            back = tl.load(carry + place, mask=inside if START else inside & (chunk > 0), other=0.0)
            d_a = tl.load(dA + place, mask=inside & (chunk > 0), other=0.0)
            decay, before, b, c, to_C = (), (), (), (), ()
            for k in tl.static_range(K):
                t = start + k
                b = b + (tl.load(B + t * B_t + n, mask=t < n_tokens, other=0.0).to(tl.float32),)
                c = c + (tl.load(C + t * C_t + n, mask=t < n_tokens, other=0.0).to(tl.float32),)
                decay, before = decay + (tl.exp2(dt[k] * a2),), before + (h,)
                h = decay[k] * h + dtu[k] * b[k]
                to_C = to_C + (grad[k] * h,)
            tl.store(dC + n * n_padded + start + tl.arange(0, K), _sums(to_C, K))
            to_B, new_dtu, new_dt = (), (), ()
            for k in tl.static_range(K - 1, -1, -1):
                d_h = grad[k] * c[k] + back
                back = decay[k] * d_h
                through = back * before[k]
                d_a += through * dt[k]
                to_B = (d_h * dtu[k],) + to_B
                new_dtu = (d_dtu[k] + d_h * b[k],) + new_dtu
                new_dt = (d_dt[k] + through * a2,) + new_dt
            d_dtu, d_dt = new_dtu, new_dt
            tl.store(dB + n * n_padded + start + tl.arange(0, K), _sums(to_B, K))
            tl.store(carry + place, back, mask=inside)
            tl.store(dA + place, d_a, mask=inside)
        for k in tl.static_range(K):
            there = inside & (start + k < n_tokens)
            x = tl.load(u + (start + k) * u_t + channel, mask=there, other=0.0).to(tl.float32)
            raw = tl.load(delta + (start + k) * delta_t + channel, mask=there, other=0.0).to(tl.float32) + shift
            e = tl.exp2(-tl.abs(raw) * LOG2_E)
            slope = tl.where(raw >= 0, 1.0, e) / (1.0 + e)
            d_raw = (d_dtu[k] * x + d_dt[k] * LN_2) * slope
            place = (start + k) * n_channels + channel
            tl.store(du + place, (grad[k] * skip + d_dtu[k] * dt[k]).to(du.dtype.element_ty), mask=there)
            tl.store(ddelta + place, d_raw.to(ddelta.dtype.element_ty), mask=there)
            sum_D += grad[k] * x
            sum_bias += tl.where(start + k < n_tokens, d_raw, 0.0)
        tl.debug_barrier()
    tl.store(dD + row * n_channels + channel, sum_D, mask=inside)
    tl.store(dbias + row * n_channels + channel, sum_bias, mask=inside)
