"""The rules of ``stratum_solve`` on a GPU: the reference's formulas, constant for constant.

A Gram is a tile [S_PAD, S_PAD] of float64 and vectors live along its rows; ``_to_columns`` moves
one across without arithmetic. Rows and columns of absent strata are zero.
"""

import triton
import triton.language as tl


@triton.jit
def _to_columns(x, eye):
    return tl.sum(tl.where(eye, x[:, None], 0.0), axis=0)


@triton.jit
def agreement(gram, square, m_s, eye):
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
def balanced(square, m_s, count):
    norm = tl.sqrt(tl.maximum(square, 0.0))
    largest = tl.max(norm, axis=0)
    seen = m_s & (norm > 1e-8 * tl.maximum(largest, 2.2250738585072014e-308))
    num_seen = tl.maximum(tl.sum(seen.to(tl.int32), axis=0), 1).to(tl.float64)
    mean = tl.sum(tl.where(seen, norm, 0.0), axis=0) / num_seen
    w = tl.where(seen, mean / tl.maximum(norm, 2.2250738585072014e-308) / num_seen, 0.0)
    return tl.where(largest <= 0, 1.0 / count, w)


@triton.jit
def shorter_of_two(gram, square, m_s, eye):
    other = tl.sum(tl.where(eye, 0.0, _to_columns(square, eye)[None, :]), axis=1)
    both = tl.sum(tl.where(eye, 0.0, gram), axis=1)
    apart = square + other - 2 * both  # ||g_0 - g_1||^2
    equal = apart <= 2.220446049250313e-16 * (square + other)
    share = (other - both) / tl.where(equal, 1.0, apart)
    return tl.where(equal, 0.5, tl.minimum(tl.maximum(share, 0.0), 1.0))


@triton.jit
def _solve_two(matrix, a, b, m_s, eye, S: tl.constexpr, S_PAD: tl.constexpr):
    """Solve for two right sides; elimination without exchanges: the matrix is definite."""
    o_s = tl.arange(0, S_PAD)
    for p in range(S):
        column = tl.sum(tl.where(o_s[None, :] == p, matrix, 0.0), axis=1)
        row = tl.sum(tl.where(o_s[:, None] == p, matrix, 0.0), axis=0)
        pivot = tl.sum(tl.where(o_s == p, column, 0.0), axis=0)
        factor = tl.where(o_s == p, 0.0, column / pivot)
        matrix -= factor[:, None] * row[None, :]
        a -= factor * tl.sum(tl.where(o_s == p, a, 0.0), axis=0)
        b -= factor * tl.sum(tl.where(o_s == p, b, 0.0), axis=0)
    diagonal = tl.sum(tl.where(eye, matrix, 0.0), axis=1)
    diagonal = tl.where(m_s, diagonal, 1.0)
    return a / diagonal, b / diagonal


@triton.jit
def minimise(gram, square, m_s, eye, count, S: tl.constexpr, S_PAD: tl.constexpr):
    """The interior-point method of _simplex.py."""
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
        ones, free = _solve_two(matrix, ones, free, m_s, eye, S, S_PAD)
        level = tl.sum(free, axis=0) / tl.sum(ones, axis=0)
        dw = free - level * ones
        dz = target - z - z / w * dw
        shrink = tl.where(m_s, tl.maximum(-dw / w, -dz / z), 0.0)
        step = 0.95 / tl.maximum(tl.max(shrink, axis=0), 0.95)
        w = tl.where(m_s, w + step * dw, 1.0)
        z = tl.where(m_s, z + step * dz, 1.0)
    w = tl.where(m_s, w, 0.0)
    return w / tl.sum(w, axis=0)


@triton.jit
def _spectrum(matrix, eye, ROUNDS: tl.constexpr, S_PAD: tl.constexpr):
    """Return eigenvalues [S_PAD], vectors in columns [S_PAD, S_PAD], and which are not rounding.

    Jacobi's method. Round r turns all pairs (i, i xor r) at once, so S_PAD - 1 rounds make a sweep.
    """
    o_s = tl.arange(0, S_PAD)
    vectors = tl.where(eye, 1.0, 0.0).to(tl.float64)
    for step in range(ROUNDS):
        turn = step % (S_PAD - 1) + 1
        other = o_s ^ turn
        is_low = o_s < other
        at_other = o_s[None, :] == other[:, None]
        here = tl.sum(tl.where(eye, matrix, 0.0), axis=1)
        there = tl.sum(tl.where(at_other, _to_columns(here, eye)[None, :], 0.0), axis=1)
        off = tl.sum(tl.where(at_other, matrix, 0.0), axis=1)
        # Both of a pair take the number above the diagonal, or they would turn by different angles.
        swapped = tl.sum(tl.where(at_other, _to_columns(off, eye)[None, :], 0.0), axis=1)
        off = tl.where(is_low, off, swapped)
        apart = tl.where(is_low, there - here, here - there)
        none = off == 0
        ratio = apart / tl.where(none, 1.0, 2.0 * off)
        size = tl.abs(ratio)
        tangent = tl.where(ratio < 0, -1.0, 1.0) / (size + tl.sqrt(size * size + 1.0))
        tangent = tl.where(none, 0.0, tangent)
        cosine = 1.0 / tl.sqrt(tangent * tangent + 1.0)
        sine = tl.where(is_low, -tangent * cosine, tangent * cosine)
        c, s = _to_columns(cosine, eye)[None, :], _to_columns(sine, eye)[None, :]
        columns = tl.broadcast_to((tl.arange(0, S_PAD) ^ turn)[None, :], (S_PAD, S_PAD))
        vectors = c * vectors + s * tl.gather(vectors, columns, 1)
        matrix = c * matrix + s * tl.gather(matrix, columns, 1)
        rows = tl.broadcast_to(other[:, None], (S_PAD, S_PAD))
        matrix = cosine[:, None] * matrix + sine[:, None] * tl.gather(matrix, rows, 0)
    values = tl.sum(tl.where(eye, matrix, 0.0), axis=1)
    kept = values > 1e-12 * tl.maximum(tl.max(values, axis=0), 2.2250738585072014e-308)
    return values, vectors, kept


@triton.jit
def _of_power(powers, vectors, eye):
    """Return the row sums of vectors diag(powers) vectors^T."""
    return tl.sum(vectors * (_to_columns(powers, eye) * tl.sum(vectors, axis=0))[None, :], axis=1)


@triton.jit
def imtlg(gram, square, m_s, eye, count, ROUNDS: tl.constexpr, S_PAD: tl.constexpr):
    norm = tl.sqrt(tl.maximum(square, 0.0))
    inverse = tl.where(norm > 0, 1.0 / tl.maximum(norm, 2.2250738585072014e-308), 0.0)
    cosines = gram * inverse[:, None] * _to_columns(inverse, eye)[None, :]
    values, vectors, kept = _spectrum(cosines, eye, ROUNDS, S_PAD)
    powers = tl.where(kept, 1.0 / tl.where(kept, values, 1.0), 0.0)
    w = _of_power(powers, vectors, eye) * (inverse * tl.max(norm, axis=0))
    w = tl.where(m_s, w, 0.0)
    total = tl.sum(w, axis=0)
    mean = tl.abs(total) <= 1e-10 * tl.sum(tl.abs(w), axis=0)
    return tl.where(mean, 1.0 / count, w / tl.where(mean, 1.0, total))


@triton.jit
def alignedmtl(gram, square, m_s, eye, count, ROUNDS: tl.constexpr, S_PAD: tl.constexpr):
    gram = gram / tl.maximum(tl.max(square, axis=0), 2.2250738585072014e-308)
    values, vectors, kept = _spectrum(gram, eye, ROUNDS, S_PAD)
    nothing = tl.sum(kept.to(tl.int32), axis=0) == 0
    smallest = tl.min(tl.where(kept, values, float("inf")), axis=0)
    powers = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, values, 1.0)), 0.0)
    w = tl.sqrt(tl.where(nothing, 0.0, smallest)) * _of_power(powers, vectors, eye) / count
    return tl.where(nothing, 1.0 / count, w)


@triton.jit
def pcgrad(
    gram, square, m_s, m_t, eye, count, p_gram, keys_ptr,
    HAS_KEYS: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """Row i holds the projected gradient of stratum i, as coefficients of the given ones."""
    o_s = tl.arange(0, S_PAD)
    m = m_s[:, None] & m_t[None, :]
    inverse = tl.where(square > 0, 1.0 / tl.maximum(square, 2.2250738585072014e-308), 0.0)
    if HAS_KEYS:
        keys = tl.load(keys_ptr + o_s[:, None] * S + o_s[None, :], mask=m, other=0.0)
    else:
        root = tl.sqrt(inverse)
        keys = gram * root[:, None] * _to_columns(root, eye)[None, :]
    unmet = m & (o_s[:, None] != o_s[None, :])
    rows = tl.where(eye, 1.0, 0.0).to(tl.float64)
    products = gram  # rows @ gram
    for _ in range(S - 1):
        lowest = tl.min(tl.where(unmet, keys, float("inf")), axis=1)
        ahead = tl.where(unmet & (keys <= lowest[:, None]), o_s[None, :], S_PAD)
        other = tl.min(ahead, axis=1)  # of equal keys the lowest id; S_PAD where all were met
        at_other = o_s[None, :] == other[:, None]
        conflict = tl.sum(tl.where(at_other, products, 0.0), axis=1)
        share = tl.sum(tl.where(at_other, _to_columns(inverse, eye)[None, :], 0.0), axis=1)
        excess = tl.where(conflict < 0, conflict * share, 0.0)
        rows -= tl.where(at_other, excess[:, None], 0.0)
        p_other = p_gram + other[:, None] * S + o_s[None, :]
        m_other = (other < S_PAD)[:, None] & m
        products -= excess[:, None] * tl.load(p_other, mask=m_other, other=0.0)
        unmet = unmet & (o_s[None, :] != other[:, None])
    w = tl.sum(tl.where(m_s[:, None], rows, 0.0), axis=0) / count
    return tl.sum(tl.where(eye, w[None, :], 0.0), axis=1)


@triton.jit
def _times(gram, x, eye):
    return tl.sum(gram * _to_columns(x, eye)[None, :], axis=1)


@triton.jit
def _cone_shrink(inside, slope, curve):
    return (tl.sqrt(tl.maximum(slope * slope - curve * inside, 0.0)) - slope) / inside


@triton.jit
def cagrad(
    gram, square, m_s, eye, count, C: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr
):  # fmt: skip
    """The interior-point method of _cone.py, with its names."""
    gram = gram / tl.maximum(tl.max(square, axis=0), 2.2250738585072014e-308)
    linear = tl.sum(gram, axis=1) / count
    radius = C * tl.sqrt(tl.maximum(tl.sum(linear, axis=0) / count, 0.0))
    radius = tl.maximum(radius, 1e-7)
    gram += tl.where(eye & m_s[:, None], 1e-12, 0.0)
    w = tl.where(m_s, 1.0 / count, 0.0)
    z = tl.where(m_s, linear - tl.min(tl.where(m_s, linear, float("inf")), axis=0) + 1.0, 1.0)
    s = tl.sqrt(tl.sum(tl.sum(gram, axis=1), axis=0) / count / count) + 1.0
    p = radius
    v = tl.zeros([S_PAD], dtype=tl.float64)
    for _ in range(28):
        gw = _times(gram, w, eye)
        gv = _times(gram, v, eye)
        inside = tl.maximum(s * s - tl.sum(w * gw, axis=0), 1e-9 * s * s)
        inside_dual = tl.maximum(p * p - tl.sum(v * gv, axis=0), 1e-9 * p * p)
        product = s * p + tl.sum(v * gw, axis=0)
        gap = (tl.sum(tl.where(m_s, w * z, 0.0), axis=0) + product) / (count + 1.0)
        gap = tl.maximum(0.2 * gap, 1e-10)
        x = 1.0 / tl.sqrt(inside)
        y = 1.0 / tl.sqrt(inside_dual)
        half = tl.sqrt(tl.maximum(2.0 + 2.0 * product * x * y, 4.0))
        c = (s * x + p * y) / half
        h = x / y
        turn = 2.0 * c * c - 1.0
        u = (w * x - v * y) / half
        gu = (gw * x - gv * y) / half
        lift = gap * s / inside - radius
        share = tl.where(m_s, z / tl.where(m_s, w, 1.0), 1.0)
        outer = gu[:, None] * _to_columns(gu, eye)[None, :] * (2.0 / turn)
        matrix = h * (gram - outer) + tl.where(eye, share[:, None], 0.0)
        target = gap / tl.where(m_s, w, 1.0)
        right = target - linear - gap / inside * gw + 2.0 * c / turn * lift * gu
        ones = tl.where(m_s, 1.0, 0.0).to(tl.float64)
        ones, free = _solve_two(
            matrix, ones, tl.where(m_s, right, 0.0), m_s, eye, S, S_PAD
        )  # fmt: skip
        dw = free - tl.sum(free, axis=0) / tl.sum(ones, axis=0) * ones
        along = tl.sum(gu * dw, axis=0)
        ds = (lift / h + 2.0 * c * along) / turn
        dz = target - z - share * dw
        dp = radius - p
        dv = -gap / inside * w - v - h * (2.0 * u * (along - c * ds) + dw)
        dv = tl.where(m_s, dv, 0.0)
        shrink = tl.where(m_s, tl.maximum(-dw / tl.where(m_s, w, 1.0), -dz / z), 0.0)
        gdw = _times(gram, dw, eye)
        gdv = _times(gram, dv, eye)
        cone = _cone_shrink(
            inside, s * ds - tl.sum(gw * dw, axis=0), ds * ds - tl.sum(dw * gdw, axis=0)
        )
        dual = _cone_shrink(
            inside_dual, p * dp - tl.sum(gv * dv, axis=0), dp * dp - tl.sum(dv * gdv, axis=0)
        )
        longest = tl.maximum(tl.max(shrink, axis=0), tl.maximum(cone, dual))
        step = 0.99 / tl.maximum(longest, 0.99)
        w = tl.where(m_s, w + step * dw, 0.0)
        z = tl.where(m_s, z + step * dz, 1.0)
        s += step * ds
        p += step * dp
        v += step * dv
    return (1.0 / count - v) / (1.0 + C)
