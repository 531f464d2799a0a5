// dropout_mask: zeros and scales that dropout multiplies by.
//
//     out[i] = lane(word(i / 4), i % 4) < kept ? 65536 / kept : 0,   kept = round((1 - rate) * 65536)
//
// out   float32 or float64, contiguous, of any shape; every element is written.
// rate  0 < rate < 1; kept is 1 at least and 65535 at most.
// word  number n is output n of SplitMix64 from the state `seed` (Steele, Lea and Flood, OOPSLA 2014),
//       found without those before it; its lanes are its four times 16 bits, the lowest first.
//
// Determinism. An element depends on the seed and its place alone: the same bits for any number of
// threads, on every instruction set.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pinet {

// Elements under which waking other threads costs more than it saves.
constexpr int64_t kMaskSerial = 1 << 17;

void dropout_mask_cpu(double rate, int64_t seed, torch::stable::Tensor out);

}  // namespace pinet
