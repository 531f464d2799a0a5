"""CUDA backend of ``stratum_solve``: agreement, balanced and mgda.

One program solves one Gram, held in registers as a tile [S_PAD, S_PAD] of float64; absent strata
are masked out, so that no index list has to reach the device. Vectors live along the rows of the
tile; ``_to_columns`` moves one across without arithmetic.
"""

import triton
import triton.language as tl

from .._tl import padded


def num_warps(strata):
    """Return one warp, whose threads need not wait for others, while a Gram fits its registers."""
    return 1 if strata <= 16 else 8


@triton.jit
def _to_columns(x, eye):
    return tl.sum(tl.where(eye, x[:, None], 0.0), axis=0)


@triton.jit
def _agreement(gram, square, m_s, eye):
    norm = tl.sqrt(tl.maximum(square, 0.0))
    inverse = tl.where(norm > 0, 1.0 / tl.maximum(norm, 2.2250738585072014e-308), 0.0)
    keep = (tl.sum(gram, axis=1) * inverse > 0) & m_s  # the sign of cos(m, g_k)
    nobody = tl.sum(keep.to(tl.int32), axis=0) == 0
    keep = keep | (m_s & nobody)
    kept_columns = _to_columns(keep.to(tl.float64), eye)
    cosines = gram * inverse[:, None] * _to_columns(inverse, eye)[None, :]
    score = tl.sum(cosines * kept_columns[None, :], axis=1)
    score = tl.where(keep, score, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=0))
    return share / tl.sum(share, axis=0)


@triton.jit
def _balanced(square, m_s, count):
    norm = tl.sqrt(tl.maximum(square, 0.0))
    largest = tl.max(norm, axis=0)
    seen = m_s & (norm > 1e-8 * tl.maximum(largest, 2.2250738585072014e-308))
    num_seen = tl.maximum(tl.sum(seen.to(tl.int32), axis=0), 1).to(tl.float64)
    mean = tl.sum(tl.where(seen, norm, 0.0), axis=0) / num_seen
    w = tl.where(seen, mean / tl.maximum(norm, 2.2250738585072014e-308) / num_seen, 0.0)
    return tl.where(largest <= 0, 1.0 / count, w)


@triton.jit
def _shorter_of_two(gram, square, m_s, eye):
    other = tl.sum(tl.where(eye, 0.0, _to_columns(square, eye)[None, :]), axis=1)
    both = tl.sum(tl.where(eye, 0.0, gram), axis=1)
    apart = square + other - 2 * both  # ||g_0 - g_1||^2
    equal = apart <= 2.220446049250313e-16 * (square + other)
    share = (other - both) / tl.where(equal, 1.0, apart)
    return tl.where(equal, 0.5, tl.minimum(tl.maximum(share, 0.0), 1.0))


@triton.jit
def _minimise(gram, square, m_s, eye, count, S: tl.constexpr, S_PAD: tl.constexpr):
    """The interior-point method of _simplex.py; elimination needs no exchanges: it is definite."""
    o_s = tl.arange(0, S_PAD)
    gram = gram / tl.maximum(tl.max(square, axis=0), 2.2250738585072014e-308)
    w = tl.where(m_s, 1.0 / count, 1.0)  # 1 where absent, so that nothing divides by zero
    gradient = tl.sum(gram, axis=1) / count
    z = gradient - tl.min(tl.where(m_s, gradient, float("inf")), axis=0) + 1.0
    z = tl.where(m_s, z, 1.0)
    for _ in range(20):
        inside = tl.where(m_s, w, 0.0)
        gap = tl.maximum(0.1 * (tl.sum(inside * z, axis=0) / count), 1e-12)
        target = gap / w
        gradient = tl.sum(gram * _to_columns(inside, eye)[None, :], axis=1)
        matrix = gram + tl.where(eye, (z / w)[:, None], 0.0)
        ones = tl.where(m_s, 1.0, 0.0).to(tl.float64)
        free = tl.where(m_s, target - gradient, 0.0)
        for p in range(S):
            at_row = o_s[:, None] == p
            column = tl.sum(tl.where(o_s[None, :] == p, matrix, 0.0), axis=1)
            row = tl.sum(tl.where(at_row, matrix, 0.0), axis=0)
            pivot = tl.sum(tl.where(o_s == p, column, 0.0), axis=0)
            factor = tl.where(o_s == p, 0.0, column / pivot)
            matrix -= factor[:, None] * row[None, :]
            ones -= factor * tl.sum(tl.where(o_s == p, ones, 0.0), axis=0)
            free -= factor * tl.sum(tl.where(o_s == p, free, 0.0), axis=0)
        diagonal = tl.sum(tl.where(eye, matrix, 0.0), axis=1)
        diagonal = tl.where(m_s, diagonal, 1.0)
        ones = ones / diagonal
        free = free / diagonal
        level = tl.sum(free, axis=0) / tl.sum(ones, axis=0)
        dw = free - level * ones
        dz = target - z - z / w * dw
        shrink = tl.where(m_s, tl.maximum(-dw / w, -dz / z), 0.0)
        step = 0.95 / tl.maximum(tl.max(shrink, axis=0), 0.95)
        w = tl.where(m_s, w + step * dw, 1.0)
        z = tl.where(m_s, z + step * dz, 1.0)
    w = tl.where(m_s, w, 0.0)
    return w / tl.sum(w, axis=0)


@triton.jit(do_not_specialize=["mask", "count"])
def _stratum_solve_kernel(
    out_ptr,  # [P, S] float64
    gram_ptr,  # [P, S, S] float64
    mask,  # bit s: stratum s is present
    count,  # how many are
    RULE: tl.constexpr,
    IS_PAIR: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
):
    """out[p] = the rule's weights for gram[p]; 0 where absent, NaN where the Gram is not finite."""
    pid = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, S_PAD)
    eye = o_s[:, None] == o_s[None, :]
    m_s = (((mask.to(tl.int64) >> o_s.to(tl.int64)) & 1) == 1) & (o_s < S)
    m_t = tl.sum(tl.where(eye, m_s[:, None].to(tl.int32), 0), axis=0) == 1
    p_gram = gram_ptr + pid * (S * S) + o_s[:, None] * S + o_s[None, :]
    gram = tl.load(p_gram, mask=m_s[:, None] & m_t[None, :], other=0.0)
    # NaN compares false, so it counts as bad too.
    good = (tl.abs(gram) <= 1.7976931348623157e308).to(tl.int32)
    num_bad = S_PAD * S_PAD - tl.sum(tl.sum(good, axis=1), axis=0)
    gram = tl.where(num_bad > 0, 0.0, gram)
    square = tl.sum(tl.where(eye, gram, 0.0), axis=1)
    count = count.to(tl.float64)
    if RULE == "agreement":
        w = _agreement(gram, square, m_s, eye)
    elif RULE == "balanced":
        w = _balanced(square, m_s, count)
    elif IS_PAIR:
        w = _shorter_of_two(gram, square, m_s, eye)
    else:
        w = _minimise(gram, square, m_s, eye, count, S, S_PAD)
    w = tl.where(num_bad > 0, float("nan"), w)
    tl.store(out_ptr + pid * S + o_s, tl.where(m_s, w, 0.0), mask=o_s < S)


def launch_options(rule, strata, is_pair=False):
    """Return the compile-time arguments; data, never tuned at run time."""
    return {"RULE": rule, "IS_PAIR": is_pair, "S": strata, "S_PAD": max(padded(strata), 2)}


def run(gram, rule, kept, out):
    """Write the weights of every Gram [P, S, S] into ``out`` [P, S] float64, contiguous."""
    gram = gram.contiguous()
    mask = sum(1 << s for s in kept)
    options = launch_options(rule, gram.shape[1], rule == "mgda" and len(kept) == 2)
    _stratum_solve_kernel[(gram.shape[0],)](
        out, gram, mask, len(kept), **options, num_warps=num_warps(gram.shape[1])
    )
