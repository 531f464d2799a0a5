#include "attention_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"
#include "small_gemm.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are returned by functions that are inlined always
#endif

namespace pinet {
namespace {

constexpr int64_t kPart = 64;  // keys whose dropout is computed at once

// Integers in the lanes of a vector of numbers.
template <class L, class T>
struct Bits {
  using One = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23;
  static constexpr int kBias = sizeof(T) == 8 ? 1023 : 127;
#if PINET_HAS_VECTORS
  typedef One Vec __attribute__((vector_size(sizeof(typename L::Vec))));
#else
  using Vec = One;
#endif

  // All ones where a < b, zeros elsewhere and for NaN.
  static PINET_INLINE Vec less(const typename L::Vec& a, const typename L::Vec& b) {
#if PINET_HAS_VECTORS
    return (Vec)(a < b);
#else
    return a < b ? ~One(0) : One(0);
#endif
  }

  static PINET_INLINE typename L::Vec choose(const Vec& where, const typename L::Vec& a,
                                             const typename L::Vec& b) {
    Vec x, y;
    std::memcpy(&x, &a, sizeof(x));
    std::memcpy(&y, &b, sizeof(y));
    x = (x & where) | (y & ~where);
    typename L::Vec out;
    std::memcpy(&out, &x, sizeof(out));
    return out;
  }
};

template <class L, class T>
PINET_INLINE typename L::Vec all(T x) {
  typename L::Vec zero = {};
  return zero + x;
}

// `x` in the first `count` lanes, `other` in the rest. Storing the rest lane by lane would make the
// next load of the whole vector wait.
template <class L, class T>
PINET_INLINE typename L::Vec only_first(const typename L::Vec& x, int64_t count, T other) {
  using B = Bits<L, T>;
  struct Window {
    typename B::One bits[2 * L::kCount];
    constexpr Window() : bits() {
      for (int i = 0; i < L::kCount; ++i) bits[i] = ~typename B::One(0);
    }
  };
  static constexpr Window window;
  typename B::Vec mask;
  const int64_t from = L::kCount - std::max<int64_t>(0, std::min<int64_t>(count, L::kCount));
  std::memcpy(&mask, window.bits + from, sizeof(mask));
  return B::choose(mask, x, all<L, T>(other));
}

// Largest lane, by halves.
template <class L, class T>
PINET_INLINE T largest_lane(const typename L::Vec& x) {
  T lanes[L::kCount];
  std::memcpy(lanes, &x, sizeof(lanes));
  if constexpr (L::kCount * sizeof(T) > 16) {
    using Half = Lanes<T, L::kCount / 2 * sizeof(T)>;
    typename Half::Vec low, high;
    std::memcpy(&low, lanes, sizeof(low));
    std::memcpy(&high, lanes + Half::kCount, sizeof(high));
    low = Bits<Half, T>::choose(Bits<Half, T>::less(low, high), high, low);
    return largest_lane<Half, T>(low);
  } else {
    T most = lanes[0];
    for (int i = 1; i < L::kCount; ++i) most = most < lanes[i] ? lanes[i] : most;
    return most;
  }
}

// exp(x) for x <= 0, about: 2^n times the Taylor series on |r| <= log(2) / 2. Zero below the
// smallest normal number; NaN stays NaN.
template <class L, class T>
PINET_INLINE typename L::Vec exponential(const typename L::Vec& given) {
  using Vec = typename L::Vec;
  using B = Bits<L, T>;
  constexpr bool is_double = sizeof(T) == 8;
  constexpr T lowest = is_double ? T(-708.0) : T(-87.0);
  constexpr T shift = is_double ? T(6755399441055744.0) : T(12582912.0);  // 1.5 * 2^mantissa
  // log(2) in two parts, of which the first times any n is exact.
  constexpr T high = is_double ? T(6.93147180369123816490e-01) : T(0.693359375);
  constexpr T low = is_double ? T(1.90821492927058770002e-10) : T(-2.12194440054690583e-4);
  const Vec floor = all<L, T>(lowest);
  const auto is_low = B::less(given, floor);
  const Vec x = B::choose(is_low, floor, given);
  const Vec shifted = x * T(1.44269504088896340736) + shift;
  const Vec n = shifted - shift;
  const Vec r = (x - n * high) - n * low;
  constexpr int kDegree = is_double ? 13 : 7;
  constexpr T inverse[14] = {T(1), T(1), T(1) / 2, T(1) / 6, T(1) / 24, T(1) / 120, T(1) / 720,
                             T(1) / 5040, T(1) / 40320, T(1) / 362880, T(1) / 3628800,
                             T(1) / 39916800, T(1) / 479001600, T(1) / T(6227020800.0)};
  Vec sum = all<L, T>(inverse[kDegree]);
  PINET_UNROLL
  for (int i = kDegree - 1; i >= 0; --i) sum = sum * r + inverse[i];
  typename B::Vec power;
  std::memcpy(&power, &shifted, sizeof(power));
  power = (power + B::kBias) << B::kMantissa;  // the low bits of `shifted` are n
  Vec two;
  std::memcpy(&two, &power, sizeof(two));
  return B::choose(is_low, all<L, T>(T(0)), sum * two);
}

// Two keys of a query's draws, by the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
struct Keys {
  uint32_t low, high;
};

PINET_INLINE Keys keys_of(int64_t seed, int64_t draw) {
  uint64_t z = static_cast<uint64_t>(seed) +
               UINT64_C(0x9E3779B97F4A7C15) * (static_cast<uint64_t>(draw) + 1);
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// Factors of `n` keys from position `at` on: zero or the scale. Multipliers of the 32-bit mixing:
// Wellons, "Prospecting for Hash Functions" (public domain).
template <class T>
PINET_INLINE void draw_factors(const Dropout& dropout, Keys keys, int64_t at, int64_t n,
                               T* factors) {
  const T scale = static_cast<T>(dropout.scale);
  const uint32_t threshold = dropout.threshold, low = keys.low, high = keys.high;
  const uint32_t first = static_cast<uint32_t>(at);
  for (uint32_t j = 0; j < static_cast<uint32_t>(n); ++j) {
    uint32_t x = (first + j) * 0x9E3779B9u + low;
    x = (x ^ (x >> 16)) * 0x7FEB352Du + high;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    factors[j] = x < threshold ? scale : T(0);
  }
}

template <class T>
PINET_INLINE int64_t seen_by(const Tile<T>& tile, int64_t r) {
  return std::max<int64_t>(0, std::min(tile.keys, tile.diagonal + r + 1));
}

// Where small_gemm stops reading the row of a query that sees `seen` keys.
template <class T>
PINET_INLINE int64_t read_of(const Tile<T>& tile, int64_t seen) {
  return std::min(rounded_up(tile.keys), rounded_up(seen + kStrip));
}

template <class Isa, class T>
PINET_INLINE void run_softmax(const Tile<T>& tile, const Dropout& dropout, bool first, T* maximum,
                              T* sum, T* out, int64_t out_row, int64_t width) {
  using L = Lanes<T, Isa::kBytes>;
  using Vec = typename L::Vec;
  constexpr T none = -std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* row = tile.scores + r * tile.stride;
    const int64_t seen = seen_by(tile, r), end = rounded_up(seen);
    // A NaN is never the larger one; its exponential below is NaN, and so is the sum.
    Vec most = all<L, T>(none);
    for (int64_t j = 0; j < end; j += L::kCount) {
      Vec x;
      std::memcpy(&x, row + j, sizeof(x));
      x = only_first<L, T>(x * tile.scale, seen - j, none);
      most = Bits<L, T>::choose(Bits<L, T>::less(most, x), x, most);
      std::memcpy(row + j, &x, sizeof(x));
    }
    const T before = first ? none : maximum[r];
    const T here = largest_lane<L, T>(most);
    const T now = before < here ? here : before;
    Vec sums = {};
    for (int64_t j = 0; j < end; j += L::kCount) {
      Vec x;
      std::memcpy(&x, row + j, sizeof(x));
      x = exponential<L, T>(x - now);
      sums += x;
      std::memcpy(row + j, &x, sizeof(x));
    }
    std::fill(row + end, row + read_of(tile, seen), T(0));
    if (dropout.threshold != 0) {
      const Keys keys = keys_of(dropout.seed, tile.draw + r * tile.draw_step);
      T factors[kPart];
      for (int64_t j = 0; j < seen; j += kPart) {
        const int64_t n = std::min(kPart, seen - j);
        draw_factors(dropout, keys, tile.first_key + j, n, factors);
        for (int64_t i = 0; i < n; ++i) row[j + i] *= factors[i];
      }
    }
    const T total = sum_lanes<L, T>(sums);
    maximum[r] = now;
    if (first) {
      sum[r] = total;
      continue;
    }
    const T rescale = std::exp(before - now);
    sum[r] = sum[r] * rescale + total;
    if (rescale != T(1))
      for (int64_t d = 0; d < width; ++d) out[r * out_row + d] *= rescale;
  }
}

template <class Isa, class T>
PINET_INLINE void run_derive(const Tile<T>& tile, const Dropout& dropout, T* grads, const T* lse,
                             const T* delta) {
  using L = Lanes<T, Isa::kBytes>;
  using Vec = typename L::Vec;
  constexpr T none = -std::numeric_limits<T>::infinity();
  T factors[kPart];
  std::fill(factors, factors + kPart, T(1));
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* row = tile.scores + r * tile.stride;
    T* grad = grads + r * tile.stride;
    const int64_t seen = seen_by(tile, r), end = rounded_up(seen), read = read_of(tile, seen);
    const Keys keys = keys_of(dropout.seed, tile.draw + r * tile.draw_step);
    for (int64_t part = 0; part < end; part += kPart) {
      const int64_t n = std::min(kPart, end - part);
      if (dropout.threshold != 0) draw_factors(dropout, keys, tile.first_key + part, n, factors);
      for (int64_t j = 0; j < n; j += L::kCount) {
        Vec x, g, factor;
        std::memcpy(&x, row + part + j, sizeof(x));
        std::memcpy(&g, grad + part + j, sizeof(g));
        std::memcpy(&factor, factors + j, sizeof(factor));
        x = only_first<L, T>(x * tile.scale, seen - part - j, none);
        g = only_first<L, T>(g, seen - part - j, T(0));
        x = exponential<L, T>(x - lse[r]);
        g = x * (g * factor - delta[r]) * tile.scale;
        x *= factor;
        std::memcpy(row + part + j, &x, sizeof(x));
        std::memcpy(grad + part + j, &g, sizeof(g));
      }
    }
    std::fill(row + end, row + read, T(0));
    std::fill(grad + end, grad + read, T(0));
  }
}

#define PINET_ATTENTION_ROWS(T)                                                               \
  PINET_FOR_EACH_ISA(softmax, run_softmax,                                                    \
                     (const Tile<T>& tile, const Dropout& dropout, bool first, T* maximum,    \
                      T* sum, T* out, int64_t out_row, int64_t width),                        \
                     (tile, dropout, first, maximum, sum, out, out_row, width))               \
  PINET_FOR_EACH_ISA(derive, run_derive,                                                      \
                     (const Tile<T>& tile, const Dropout& dropout, T* grads, const T* lse,    \
                      const T* delta),                                                        \
                     (tile, dropout, grads, lse, delta))

PINET_ATTENTION_ROWS(float)
PINET_ATTENTION_ROWS(double)

}  // namespace

Dropout make_dropout(double rate, int64_t seed) {
  if (rate <= 0.0) return {};
  const double levels = 4294967296.0;  // 2^32
  const double kept = std::min(std::max(std::floor((1.0 - rate) * levels + 0.5), 1.0), levels - 1);
  return {static_cast<uint32_t>(kept), levels / kept, seed};
}

void softmax_tile(const Tile<float>& tile, const Dropout& dropout, bool first, float* maximum,
                  float* sum, float* out, int64_t out_row, int64_t width) {
  softmax(tile, dropout, first, maximum, sum, out, out_row, width);
}
void softmax_tile(const Tile<double>& tile, const Dropout& dropout, bool first, double* maximum,
                  double* sum, double* out, int64_t out_row, int64_t width) {
  softmax(tile, dropout, first, maximum, sum, out, out_row, width);
}
void derive_tile(const Tile<float>& tile, const Dropout& dropout, float* grads, const float* lse,
                 const float* delta) {
  derive(tile, dropout, grads, lse, delta);
}
void derive_tile(const Tile<double>& tile, const Dropout& dropout, double* grads,
                 const double* lse, const double* delta) {
  derive(tile, dropout, grads, lse, delta);
}

}  // namespace pinet
