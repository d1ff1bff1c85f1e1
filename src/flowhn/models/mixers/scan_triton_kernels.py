"""Triton kernels of the selective scan in token-major layout. Imported when they run; :mod:`scan_triton` launches them.

A program owns one sequence and a block of channels and walks over time in chunks of K tokens. Inside a chunk the loop
over states is outermost, and the K steps of one state are unrolled: a thread holds all K values of its channels, so
that the recurrence, the sum over states and the way back through the chunk's states stay in registers. Between
chunks the state of each (state, channel) waits in a small buffer that stays in the L2 cache.

Letters: B batch, T tokens, E channels, N states, K tokens per chunk, BE channels per program. Rows are (BE,).
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
    u, delta, A2, B, C, D, bias, y, carry, states, n_tokens, n_channels, n_states, n_saved, n_blocks,
    u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t,
    K: tl.constexpr, BE: tl.constexpr, SAVE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """y (B, T, E) and, with SAVE, the state before every SAVE tokens: (B, n_saved, N, E).

    A2 is A^T log2(e), (N, E); carry (B, N, E) holds the state between chunks and the last one at the end.
    """
    batch = (tl.program_id(0) // n_blocks).to(tl.int64)
    channel = (tl.program_id(0) % n_blocks) * BE + tl.arange(0, BE)
    inside = channel < n_channels
    u += batch * u_b
    delta += batch * delta_b
    B += batch * B_b
    C += batch * C_b
    y += batch * n_tokens * n_channels
    carry += batch * n_states * n_channels
    states += batch * n_saved * n_states * n_channels
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
        for n in range(n_states):
            a2 = tl.load(A2 + n * n_channels + channel, mask=inside, other=0.0)
            place = carry + n * n_channels + channel
            h = tl.load(place, mask=inside & (start > 0), other=0.0)
            summed = ()
            for k in tl.static_range(K):
                t = start + k
                if SAVE > 0 and k % SAVE == 0:
                    row = states + ((t // SAVE).to(tl.int64) * n_states + n) * n_channels
                    tl.store(row + channel, h, mask=inside & (t < n_tokens))
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
    n_tokens, n_channels, n_states, n_saved, n_blocks, n_padded,
    dy_b, dy_t, u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t,
    K: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """du, ddelta (B, T, E); dA (B, N, E), dD, dbias (B, E), each sequence's; dB, dC (n_blocks, B, N, n_padded), each
    block's share. Chunk by chunk from the last: its states from the saved one, then back through them.

    carry (B, N, E) holds exp(dt A) dh of the following chunk's first token.
    """
    block = tl.program_id(0) % n_blocks
    batch = (tl.program_id(0) // n_blocks).to(tl.int64)
    n_batch = tl.num_programs(0) // n_blocks
    channel = block * BE + tl.arange(0, BE)
    inside = channel < n_channels
    dy += batch * dy_b
    u += batch * u_b
    delta += batch * delta_b
    B += batch * B_b
    C += batch * C_b
    du += batch * n_tokens * n_channels
    ddelta += batch * n_tokens * n_channels
    dA += batch * n_states * n_channels
    carry += batch * n_states * n_channels
    states += batch * n_saved * n_states * n_channels
    dB += (block * n_batch + batch) * n_states * n_padded
    dC += (block * n_batch + batch) * n_states * n_padded
    shift = tl.load(bias + channel, mask=inside, other=0.0)
    skip = tl.load(D + channel, mask=inside, other=0.0)
    sum_D = tl.zeros((BE,), dtype=tl.float32)
    sum_bias = tl.zeros((BE,), dtype=tl.float32)
    for chunk in range(n_saved):
        saved = n_saved - 1 - chunk
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
            back = tl.load(carry + place, mask=inside & (chunk > 0), other=0.0)
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
    tl.store(dD + batch * n_channels + channel, sum_D, mask=inside)
    tl.store(dbias + batch * n_channels + channel, sum_bias, mask=inside)
