// Vectors of a fixed number of lanes, and the choice of an instruction set at run time.
//
// A kernel is written once, as a PINET_INLINE template over a vector width, and wrapped in one
// function per instruction set by PINET_FOR_EACH_ISA. The wrapper carries the target attribute, the
// inlined body takes it over. Compilers without GNU vectors get one lane and no choice: slow, right.

#pragma once

#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define PINET_INLINE inline __attribute__((always_inline))
#define PINET_HAS_VECTORS 1
#else
#define PINET_INLINE inline
#define PINET_HAS_VECTORS 0
#endif

#if PINET_HAS_VECTORS && defined(__x86_64__)
#define PINET_HAS_X86_CHOICE 1
#else
#define PINET_HAS_X86_CHOICE 0
#endif

// Before a loop of a constant count over arrays that are to be registers. GCC alone unrolls it too
// late: the arrays have memory by then, through which every tile's sums go.
#if defined(__clang__)
#define PINET_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define PINET_UNROLL _Pragma("GCC unroll 16")
#else
#define PINET_UNROLL
#endif

namespace pinet {

// kBytes: width of one register; kRegisters: how many of them there are.
struct Baseline {
  static constexpr int kBytes = 16;
#if defined(__x86_64__)
  static constexpr int kRegisters = 16;
#else
  static constexpr int kRegisters = 32;
#endif
};
struct Avx2 {
  static constexpr int kBytes = 32;
  static constexpr int kRegisters = 16;
};
struct Avx512 {
  static constexpr int kBytes = 64;
  static constexpr int kRegisters = 32;
};

#if PINET_HAS_VECTORS
template <class T, int kBytes>
struct Lanes {
  typedef T Vec __attribute__((vector_size(kBytes)));
  typedef double Wide __attribute__((vector_size(kBytes / sizeof(T) * sizeof(double))));
  static constexpr int kCount = kBytes / sizeof(T);
  static PINET_INLINE void add(double* sums, const Vec& x) {
    Wide sum;
    std::memcpy(&sum, sums, sizeof(sum));
    sum += __builtin_convertvector(x, Wide);
    std::memcpy(sums, &sum, sizeof(sum));
  }
};
#else
template <class T, int kBytes>
struct Lanes {
  using Vec = T;
  static constexpr int kCount = 1;
  static PINET_INLINE void add(double* sums, const Vec& x) { *sums += double(x); }
};
#endif

// One number where vectors end.
template <class T>
struct OneLane {
  using Vec = T;
  static constexpr int kCount = 1;
  static PINET_INLINE void add(double* sums, const Vec& x) { *sums += double(x); }
};

// Adds the lanes to as many float64 sums, one register of those at a time: Lanes::add goes through
// memory where these take two.
template <class L, class T>
PINET_INLINE void add_lanes(double* sums, const typename L::Vec& x) {
  if constexpr (L::kCount * sizeof(double) <= 16 || sizeof(T) == sizeof(double)) {
    L::add(sums, x);
  } else {
    using Half = Lanes<T, L::kCount / 2 * sizeof(T)>;
    for (int i = 0; i < 2; ++i) {
      typename Half::Vec half;
      std::memcpy(&half, reinterpret_cast<const char*>(&x) + i * sizeof(half), sizeof(half));
      Half::add(sums + i * Half::kCount, half);
    }
  }
}

// Sum of the lanes, by halves: the order depends on the width alone.
template <class L, class T>
PINET_INLINE T sum_lanes(const typename L::Vec& x) {
  T lanes[L::kCount];
  std::memcpy(lanes, &x, sizeof(lanes));
  if constexpr (L::kCount * sizeof(T) > 16) {
    using Half = Lanes<T, L::kCount / 2 * sizeof(T)>;
    typename Half::Vec low, high;
    std::memcpy(&low, lanes, sizeof(low));
    std::memcpy(&high, lanes + Half::kCount, sizeof(high));
    low += high;
    return sum_lanes<Half, T>(low);
  } else if constexpr (L::kCount == 4) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else if constexpr (L::kCount == 2) {
    return lanes[0] + lanes[1];
  } else {
    return lanes[0];
  }
}

// Level of the machine that runs this: 0 baseline, 1 AVX2 with FMA, 2 AVX-512.
inline int isa_level() {
#if PINET_HAS_X86_CHOICE
  static const int level = __builtin_cpu_supports("avx512f")                                 ? 2
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1
                                                                                             : 0;
  return level;
#else
  return 0;
#endif
}

}  // namespace pinet

// Defines `name(params)` that calls the template `body<Isa>(args)` for the best instruction set.
#if PINET_HAS_X86_CHOICE
#define PINET_FOR_EACH_ISA(name, body, params, args)                                            \
  static void name##_baseline params { body<pinet::Baseline> args; }                            \
  __attribute__((target("avx2,fma"))) static void name##_avx2 params { body<pinet::Avx2> args; } \
  __attribute__((target("avx512f,avx2,fma"))) static void name##_avx512 params {                \
    body<pinet::Avx512> args;                                                                   \
  }                                                                                             \
  static void name params {                                                                     \
    switch (pinet::isa_level()) {                                                               \
      case 2: return name##_avx512 args;                                                        \
      case 1: return name##_avx2 args;                                                          \
      default: return name##_baseline args;                                                     \
    }                                                                                           \
  }
#else
#define PINET_FOR_EACH_ISA(name, body, params, args) \
  static void name params { body<pinet::Baseline> args; }
#endif
