// The two interior-point methods of the reference (_simplex.py, _cone.py), with its constants.

#pragma once

#include <algorithm>
#include <cmath>

#include "small_dense.h"
#include "stratum_solve.h"

namespace pinet {

// Largest step along (dw, dz) that keeps w and z positive, as the inverse of its length.
inline double shrink_of(int k, const double* w, const double* dw, const double* z,
                        const double* dz) {
  double shrink = -dw[0] / w[0];
  for (int i = 0; i < k; ++i) shrink = std::max({shrink, -dw[i] / w[i], -dz[i] / z[i]});
  return shrink;
}

// w = the shortest point w^T G w of the simplex; `gram` of order one.
inline void minimise(int k, const double* gram, double* w) {
  constexpr double kCentring = 0.1, kToBoundary = 0.95, kFloor = 1e-12;
  double matrix[kMaxStrata * kMaxStrata];
  double z[kMaxStrata], gradient[kMaxStrata], target[kMaxStrata], ones[kMaxStrata],
      free[kMaxStrata], dw[kMaxStrata], dz[kMaxStrata];
  std::fill(w, w + k, 1.0 / k);
  for (int i = 0; i < k; ++i) gradient[i] = sum_of(k, gram + i * k) / k;
  const double least = min_of(k, gradient);
  for (int i = 0; i < k; ++i) z[i] = gradient[i] - least + 1.0;
  for (int iteration = 0; iteration < 20; ++iteration) {
    const double gap = std::max(kCentring * (dot(k, w, z) / k), kFloor);
    times(k, gram, w, gradient);
    std::copy(gram, gram + k * k, matrix);
    for (int i = 0; i < k; ++i) {
      target[i] = gap / w[i];
      matrix[i * k + i] += z[i] / w[i];
      ones[i] = 1.0;
      free[i] = target[i] - gradient[i];
    }
    solve_two(k, matrix, ones, free);
    // `free` is the step that ignores sum(w) = 1; `level` is the multiplier of that constraint.
    const double level = sum_of(k, free) / sum_of(k, ones);
    for (int i = 0; i < k; ++i) {
      dw[i] = free[i] - level * ones[i];
      dz[i] = target[i] - z[i] - z[i] / w[i] * dw[i];
    }
    const double step = kToBoundary / std::max(shrink_of(k, w, dw, z, dz), kToBoundary);
    for (int i = 0; i < k; ++i) {
      w[i] += step * dw[i];
      z[i] += step * dz[i];
    }
  }
  const double sum = sum_of(k, w);
  for (int i = 0; i < k; ++i) w[i] /= sum;
}

inline double inside_cone(double height, double square) {
  return std::max(height * height - square, 1e-9 * (height * height));
}

// 1 / t at the least t > 0 with inside + 2 t slope + t^2 curve = 0; <= 0 if there is none.
inline double cone_shrink(double inside, double slope, double curve) {
  return (std::sqrt(std::max(slope * slope - curve * inside, 0.0)) - slope) / inside;
}

// result = the coefficients of radius g_w / ||g_w|| where w minimises linear . w + radius ||g_w||
// over the simplex. `gram` gets a ridge. Notation and derivation: _cone.py.
inline void support(int k, double* gram, const double* linear, double radius, double* result) {
  constexpr double kCentring = 0.2, kToBoundary = 0.99, kFloor = 1e-10, kRidge = 1e-12;
  double matrix[kMaxStrata * kMaxStrata];
  double w[kMaxStrata], z[kMaxStrata], v[kMaxStrata], gw[kMaxStrata], gv[kMaxStrata],
      u[kMaxStrata], gu[kMaxStrata], target[kMaxStrata], ones[kMaxStrata], free[kMaxStrata],
      dw[kMaxStrata], dz[kMaxStrata], dv[kMaxStrata], gdw[kMaxStrata], gdv[kMaxStrata];
  for (int i = 0; i < k; ++i) gram[i * k + i] += kRidge;
  const double least = min_of(k, linear);
  for (int i = 0; i < k; ++i) {
    w[i] = 1.0 / k;
    v[i] = 0.0;
    z[i] = linear[i] - least + 1.0;
  }
  double s = std::sqrt(sum_of(k * k, gram) / k / k) + 1.0;
  double p = radius;
  for (int iteration = 0; iteration < 28; ++iteration) {
    times(k, gram, w, gw);
    times(k, gram, v, gv);
    const double inside = inside_cone(s, dot(k, w, gw)), dual = inside_cone(p, dot(k, v, gv));
    const double product = s * p + dot(k, v, gw);
    const double gap = std::max(kCentring * ((dot(k, w, z) + product) / (k + 1)), kFloor);
    // The scaling point (c, g_u), and h such that h (2 J u u^T J - J) maps (s, w) to (p, v).
    const double x = 1.0 / std::sqrt(inside), y = 1.0 / std::sqrt(dual);
    const double half = std::sqrt(std::max(2.0 + 2.0 * product * x * y, 4.0));
    const double c = (s * x + p * y) / half, h = x / y, turn = 2.0 * c * c - 1.0;
    const double lift = gap * s / inside - radius;
    for (int i = 0; i < k; ++i) {
      u[i] = (w[i] * x - v[i] * y) / half;
      gu[i] = (gw[i] * x - gv[i] * y) / half;
    }
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j)
        matrix[i * k + j] = h * (gram[i * k + j] - gu[i] * gu[j] * (2.0 / turn));
      matrix[i * k + i] += z[i] / w[i];
      target[i] = gap / w[i];
      ones[i] = 1.0;
      free[i] = target[i] - linear[i] - gap / inside * gw[i] + 2.0 * c / turn * lift * gu[i];
    }
    solve_two(k, matrix, ones, free);
    const double level = sum_of(k, free) / sum_of(k, ones);
    for (int i = 0; i < k; ++i) dw[i] = free[i] - level * ones[i];
    const double along = dot(k, gu, dw);
    const double ds = (lift / h + 2.0 * c * along) / turn, dp = radius - p;
    for (int i = 0; i < k; ++i) {
      dz[i] = target[i] - z[i] - z[i] / w[i] * dw[i];
      dv[i] = -gap / inside * w[i] - v[i] - h * (2.0 * u[i] * (along - c * ds) + dw[i]);
    }
    times(k, gram, dw, gdw);
    times(k, gram, dv, gdv);
    const double shrink = std::max(
        {shrink_of(k, w, dw, z, dz),
         cone_shrink(inside, s * ds - dot(k, gw, dw), ds * ds - dot(k, dw, gdw)),
         cone_shrink(dual, p * dp - dot(k, gv, dv), dp * dp - dot(k, dv, gdv))});
    const double step = kToBoundary / std::max(shrink, kToBoundary);
    for (int i = 0; i < k; ++i) {
      w[i] += step * dw[i];
      z[i] += step * dz[i];
      v[i] += step * dv[i];
    }
    s += step * ds;
    p += step * dp;
  }
  for (int i = 0; i < k; ++i) result[i] = -v[i];
}

}  // namespace pinet
