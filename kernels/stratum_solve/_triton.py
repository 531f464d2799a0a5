"""CUDA backend of ``stratum_solve``.

One program solves one Gram, held in registers as a tile [S_PAD, S_PAD] of float64; absent strata
are masked out, so that no index list has to reach the device. The rules are in _triton_rules.py.
"""

import triton
import triton.language as tl

from .._tl import padded
from ._triton_rules import (
    agreement,
    alignedmtl,
    balanced,
    cagrad,
    imtlg,
    minimise,
    pcgrad,
    shorter_of_two,
)

_SWEEPS = 9  # of Jacobi: off the diagonal nothing but rounding is left after seven (32 strata)

# What the compiler may take: left alone, it stops at 96 or 64 registers and spills a few bytes.
MAX_REGISTERS = 240


def num_warps(strata):
    """Return one warp, whose threads need not wait for others, while a Gram fits its registers."""
    return 1 if strata <= 16 else 8


@triton.jit(do_not_specialize=["mask", "count"])
def _stratum_solve_kernel(
    out_ptr,  # [P, S] float64
    gram_ptr,  # [P, S, S] float64
    keys_ptr,  # [S, S] float64, read if HAS_KEYS
    mask,  # bit s: stratum s is present
    count,  # how many are
    RULE: tl.constexpr,
    IS_PAIR: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    C: tl.constexpr,
    ROUNDS: tl.constexpr,
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
        w = agreement(gram, square, m_s, eye)
    elif RULE == "balanced":
        w = balanced(square, m_s, count)
    elif RULE == "pcgrad":
        p_first = gram_ptr + pid * (S * S)
        w = pcgrad(
            gram, square, m_s, m_t, eye, count, p_first, keys_ptr, HAS_KEYS, S, S_PAD
        )  # fmt: skip
    elif RULE == "imtlg":
        w = imtlg(gram, square, m_s, eye, count, ROUNDS, S_PAD)
    elif RULE == "alignedmtl":
        w = alignedmtl(gram, square, m_s, eye, count, ROUNDS, S_PAD)
    elif RULE == "cagrad" and C == 0:
        w = tl.where(m_s, 1.0 / count, 0.0)
    elif RULE == "cagrad":
        w = cagrad(gram, square, m_s, eye, count, C, S, S_PAD)
    elif IS_PAIR:
        w = shorter_of_two(gram, square, m_s, eye)
    else:
        w = minimise(gram, square, m_s, eye, count, S, S_PAD)
    w = tl.where(num_bad > 0, float("nan"), w)
    tl.store(out_ptr + pid * S + o_s, tl.where(m_s, w, 0.0), mask=o_s < S)


def launch_options(rule, strata, is_pair=False, has_keys=False, c=0.5):
    """Return the compile-time arguments; data, never tuned at run time."""
    size = max(padded(strata), 2)
    return {
        "RULE": rule,
        "IS_PAIR": is_pair,
        "HAS_KEYS": has_keys,
        "C": c if rule == "cagrad" else 0.0,  # a constant: as an argument it would be a float32
        "ROUNDS": _SWEEPS * (size - 1),
        "S": strata,
        "S_PAD": size,
    }


def run(gram, rule, kept, c, keys, out):
    """Write the weights of every Gram [P, S, S] into ``out`` [P, S] float64, contiguous."""
    gram = gram.contiguous()
    mask = sum(1 << s for s in kept)
    keys = keys.contiguous() if rule == "pcgrad" and keys is not None else None
    is_pair = rule == "mgda" and len(kept) == 2
    options = launch_options(rule, gram.shape[1], is_pair, keys is not None, c)
    _stratum_solve_kernel[(gram.shape[0],)](
        out,
        gram,
        keys,
        mask,
        len(kept),
        **options,
        num_warps=num_warps(gram.shape[1]),
        maxnreg=MAX_REGISTERS,
    )
