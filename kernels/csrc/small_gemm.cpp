#include "small_gemm.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace pinet {
namespace {

// kRows rows and kVectors registers of c, columns [from, to) of a.
template <class L, class T, int kRows, int kVectors>
PINET_INLINE void multiply(const Gemm<T>& g, int64_t row, int64_t column, int64_t from,
                           int64_t to) {
  using Vec = typename L::Vec;
  Vec sums[kRows][kVectors] = {};
  const T* a = g.a + row * g.a_row + from * g.a_col;
  const T* b = g.b + from * g.b_row + column;
  T* c = g.c + row * g.c_row + column;
  if (g.adds) {
    PINET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      PINET_UNROLL
      for (int v = 0; v < kVectors; ++v)
        std::memcpy(&sums[r][v], c + r * g.c_row + v * L::kCount, sizeof(Vec));
    }
  }
  for (int64_t i = from; i < to; ++i, a += g.a_col, b += g.b_row) {
    Vec x[kVectors];
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v) std::memcpy(&x[v], b + v * L::kCount, sizeof(Vec));
    PINET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const T scale = a[r * g.a_row];
      PINET_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] += scale * x[v];
    }
  }
  PINET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(c + r * g.c_row + v * L::kCount, &sums[r][v], sizeof(Vec));
  }
}

// Columns [at, n) of a strip, in panels of kVectors registers, then of fewer, then narrower ones.
template <class T, int kBytes, int kVectors, int kRows>
PINET_INLINE void multiply_strip(const Gemm<T>& g, int64_t row, int64_t at, int64_t n,
                                 int64_t from, int64_t to) {
  using L = Lanes<T, kBytes>;
  for (; at + kVectors * L::kCount <= n; at += kVectors * L::kCount)
    multiply<L, T, kRows, kVectors>(g, row, at, from, to);
  if (at >= n) return;
  if constexpr (kVectors > 1) {
    multiply_strip<T, kBytes, kVectors / 2, kRows>(g, row, at, n, from, to);
  } else if constexpr (kBytes > 16) {
    multiply_strip<T, kBytes / 2, 1, kRows>(g, row, at, n, from, to);
  } else {
    for (; at < n; ++at) multiply<OneLane<T>, T, kRows, 1>(g, row, at, from, to);
  }
}

template <class Isa, class T>
PINET_INLINE void run_gemm(const Gemm<T>& g) {
  constexpr int kVectors = Isa::kRegisters >= 32 ? 4 : 2;
  int64_t row = 0;
  while (row < g.m) {
    const int64_t left = g.m - row, rows = left >= kStrip ? kStrip : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const int64_t edge = g.diagonal + row + kStrip;
    const int64_t n = g.shape == Shape::kLeft ? std::min(g.n, rounded_up(edge)) : g.n;
    const int64_t to = g.shape == Shape::kLower ? std::min(g.k, edge) : g.k;
    const int64_t from =
        g.shape == Shape::kUpper ? std::max<int64_t>(0, row - g.diagonal) : int64_t(0);
    switch (rows) {
      case kStrip: multiply_strip<T, Isa::kBytes, kVectors, kStrip>(g, row, 0, n, from, to); break;
      case 4: multiply_strip<T, Isa::kBytes, kVectors, 4>(g, row, 0, n, from, to); break;
      case 2: multiply_strip<T, Isa::kBytes, kVectors, 2>(g, row, 0, n, from, to); break;
      default: multiply_strip<T, Isa::kBytes, kVectors, 1>(g, row, 0, n, from, to);
    }
    row += rows;
  }
}

PINET_FOR_EACH_ISA(run, run_gemm, (const Gemm<float>& g), (g))
PINET_FOR_EACH_ISA(run, run_gemm, (const Gemm<double>& g), (g))

}  // namespace

void small_gemm(const Gemm<float>& g) { run(g); }
void small_gemm(const Gemm<double>& g) { run(g); }

}  // namespace pinet
