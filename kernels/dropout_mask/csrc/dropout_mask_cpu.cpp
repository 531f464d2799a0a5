#include "dropout_mask.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 4;
constexpr int64_t kWords = 256;  // drawn at once: 2 KiB, which stay in the first-level cache
constexpr int64_t kBlock = kWords * kLanes;

// Which of the 65536 values of a lane are kept.
struct Kept {
  uint64_t seed;
  uint32_t values;
};

template <class Isa, class T>
PINET_INLINE void draw_blocks(Kept kept, int64_t from, int64_t to, int64_t count, T* out) {
  const T scale = static_cast<T>(65536.0 / kept.values);
  for (int64_t block = from; block < to; ++block) {
    uint64_t words[kWords];
    const uint64_t first = static_cast<uint64_t>(block * kWords) + 1;
    for (uint64_t i = 0; i < kWords; ++i) {
      uint64_t z = kept.seed + UINT64_C(0x9E3779B97F4A7C15) * (first + i);
      z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
      z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
      words[i] = z ^ (z >> 31);
    }
    uint16_t lanes[kBlock];
    std::memcpy(lanes, words, sizeof(lanes));
    const int64_t at = block * kBlock, n = std::min(kBlock, count - at);
    for (int64_t i = 0; i < n; ++i) out[at + i] = lanes[i] < kept.values ? scale : T(0);
  }
}

PINET_FOR_EACH_ISA(draw, draw_blocks,
                   (Kept kept, int64_t from, int64_t to, int64_t count, float* out),
                   (kept, from, to, count, out))
PINET_FOR_EACH_ISA(draw, draw_blocks,
                   (Kept kept, int64_t from, int64_t to, int64_t count, double* out),
                   (kept, from, to, count, out))

template <class T>
void run_typed(Kept kept, Tensor& out) {
  const int64_t count = out.numel(), blocks = (count + kBlock - 1) / kBlock;
  T* data = out.mutable_data_ptr<T>();
  const auto work = [&](int64_t from, int64_t to) { draw(kept, from, to, count, data); };
  if (count < kMaskSerial) {
    work(0, blocks);
  } else {
    torch::stable::parallel_for(0, blocks, 1, work);
  }
}

}  // namespace

void dropout_mask_cpu(double rate, int64_t seed, Tensor out) {
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(rate > 0.0 && rate < 1.0,
                  "pinet_cpp::dropout_mask: expected 0 < rate < 1, got ", rate);
  STD_TORCH_CHECK(out.is_cpu() && out.is_contiguous() &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Double),
                  "pinet_cpp::dropout_mask: out must be a contiguous CPU tensor, float32 or float64");
  const double values = std::floor((1.0 - rate) * 65536.0 + 0.5);
  const Kept kept{static_cast<uint64_t>(seed),
                  static_cast<uint32_t>(std::min(std::max(values, 1.0), 65535.0))};
  if (dtype == ScalarType::Double) {
    run_typed<double>(kept, out);
  } else {
    run_typed<float>(kept, out);
  }
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&pinet::dropout_mask_cpu));
}
