// Linear algebra on a few rows: matrices [k, k] of float64, row by row, k <= 64.

#pragma once

#include <cmath>
#include <utility>

namespace pinet {

inline double dot(int k, const double* a, const double* b) {
  double sum = 0.0;
  for (int i = 0; i < k; ++i) sum += a[i] * b[i];
  return sum;
}

inline double sum_of(int k, const double* a) {
  double sum = 0.0;
  for (int i = 0; i < k; ++i) sum += a[i];
  return sum;
}

inline double max_of(int k, const double* a) {
  double largest = a[0];
  for (int i = 1; i < k; ++i) largest = a[i] > largest ? a[i] : largest;
  return largest;
}

inline double min_of(int k, const double* a) {
  double least = a[0];
  for (int i = 1; i < k; ++i) least = a[i] < least ? a[i] : least;
  return least;
}

// y = A x for a symmetric A, by columns: every sum still runs in ascending order, and it vectorises.
inline void times(int k, const double* a, const double* x, double* y) {
  for (int i = 0; i < k; ++i) y[i] = 0.0;
  for (int j = 0; j < k; ++j)
    for (int i = 0; i < k; ++i) y[i] += a[j * k + i] * x[j];
}

// Solves A x = b and A y = d in place by elimination with row exchanges; A is destroyed.
inline void solve_two(int k, double* a, double* b, double* d) {
  for (int p = 0; p < k; ++p) {
    int best = p;
    for (int i = p + 1; i < k; ++i)
      if (std::fabs(a[i * k + p]) > std::fabs(a[best * k + p])) best = i;
    if (best != p) {
      for (int j = p; j < k; ++j) std::swap(a[p * k + j], a[best * k + j]);
      std::swap(b[p], b[best]);
      std::swap(d[p], d[best]);
    }
    const double inverse = 1.0 / a[p * k + p];
    for (int i = p + 1; i < k; ++i) {
      const double factor = a[i * k + p] * inverse;
      for (int j = p + 1; j < k; ++j) a[i * k + j] -= factor * a[p * k + j];
      b[i] -= factor * b[p];
      d[i] -= factor * d[p];
    }
  }
  for (int p = k - 1; p >= 0; --p) {
    double x = b[p], y = d[p];
    for (int j = p + 1; j < k; ++j) {
      x -= a[p * k + j] * b[j];
      y -= a[p * k + j] * d[j];
    }
    b[p] = x / a[p * k + p];
    d[p] = y / a[p * k + p];
  }
}

// Jacobi's method: A = sum_p values[p] v_p v_p^T with v_p row p of `vectors`. A is destroyed.
// Entries below 1e-17 of the largest are taken for zero; sweeps end when none is left, for k = 64
// after eleven or so, or after kMaxSweeps.
inline void eigen(int k, double* a, double* values, double* vectors) {
  constexpr int kMaxSweeps = 24;
  double size = 0.0;
  for (int i = 0; i < k * k; ++i) size = std::fabs(a[i]) > size ? std::fabs(a[i]) : size;
  for (int i = 0; i < k * k; ++i) vectors[i] = i % (k + 1) == 0 ? 1.0 : 0.0;
  bool changed = true;
  for (int sweep = 0; sweep < kMaxSweeps && changed; ++sweep) {
    changed = false;
    for (int p = 0; p < k; ++p) {
      for (int q = p + 1; q < k; ++q) {
        const double off = a[p * k + q];
        if (std::fabs(off) <= 1e-17 * size) continue;
        changed = true;
        const double slope = (a[q * k + q] - a[p * k + p]) / (2.0 * off);
        const double t = std::copysign(1.0 / (std::fabs(slope) + std::sqrt(slope * slope + 1.0)),
                                       slope);
        const double c = 1.0 / std::sqrt(t * t + 1.0), s = t * c;
        const double first = a[p * k + p] - t * off, second = a[q * k + q] + t * off;
        double* ap = a + p * k;
        double* aq = a + q * k;
        double* vp = vectors + p * k;
        double* vq = vectors + q * k;
        for (int i = 0; i < k; ++i) {
          const double x = ap[i], y = aq[i], v = vp[i], w = vq[i];
          ap[i] = c * x - s * y;
          aq[i] = s * x + c * y;
          vp[i] = c * v - s * w;
          vq[i] = s * v + c * w;
        }
        ap[p] = first;
        aq[q] = second;
        ap[q] = aq[p] = 0.0;
        for (int i = 0; i < k; ++i) {
          a[i * k + p] = ap[i];
          a[i * k + q] = aq[i];
        }
      }
    }
  }
  for (int i = 0; i < k; ++i) values[i] = a[i * k + i];
}

}  // namespace pinet
