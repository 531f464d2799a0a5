// Work that threads share piece by piece.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace pinet {

// Calls work(i) for i in 0..count - 1; threads take them as they come.
template <class Work>
void in_turn(int64_t count, bool serial, const Work& work) {
  std::atomic<int64_t> next{0};
  auto take = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  if (serial || count < 2) {
    take(0, 1);
  } else {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, take);
  }
}

}  // namespace pinet
