// Products of small matrices, some of them triangular, without packing.
//
//     c[m, n] = a[m, k] b[k, n], or added to c
//
// Rows of b and c are contiguous; a has any strides, so its transpose costs nothing. The rows of c
// are computed kStrip at a time. Below a diagonal, a strip leaves out what is not there:
//
//     kLeft      columns of c  >= diagonal + (first row of the strip) + kStrip, up to kGrain
//     kLower     columns of a  >= diagonal + (first row of the strip) + kStrip  (a lower triangular)
//     kUpper     columns of a  <  (first row of the strip) - diagonal           (a upper triangular)
//
// so that a must hold zeros in the part of a strip beyond its triangle, and nothing further.

#pragma once

#include <cstdint>

namespace pinet {

constexpr int64_t kStrip = 6;   // rows of c whose sums are in registers
constexpr int64_t kGrain = 16;  // elements: whole registers of every instruction set and type

enum class Shape { kFull, kLeft, kLower, kUpper };

template <class T>
struct Gemm {
  const T* a;
  int64_t a_row, a_col;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  int64_t m, n, k;
  bool adds;
  Shape shape;
  int64_t diagonal;
};

void small_gemm(const Gemm<float>& g);
void small_gemm(const Gemm<double>& g);

inline int64_t rounded_up(int64_t n) { return (n + kGrain - 1) / kGrain * kGrain; }

}  // namespace pinet
