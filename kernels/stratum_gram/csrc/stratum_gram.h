// stratum_gram: inner products of the stratum gradients, per parameter.
//
//     out[p, s, t] = sum_c grads[p][s, c] * grads[p][t, c]        c over the elements of one slice
//
// grads  P tensors [S, ...], float32 or float64, each its own dtype; any strides. Slices that are
//        contiguous are read in place whatever the distance between strata (0 for an expanded
//        tensor); others are copied first.
// out    [P, S, S] float64, contiguous; every element is written. Zero where a slice is empty.
//
// Numerics. The columns of every parameter are cut into tasks, those into runs. Within a run each lane
// of a register sums its float32 products in float32: 128 of them with AVX-512, 256 with AVX2, 512
// otherwise. Runs, lanes and tasks are summed in float64. Float64 input is float64 throughout. Only
// t >= s is computed, the rest is its mirror, so `out` is exactly symmetric. A NaN or an infinity
// reaches the row and the column of its stratum and nothing else. A float32 product beyond 3e38 is
// infinite, one below 1e-45 is zero: meant for gradients between 1e-19 and 1e19.
//
// Determinism. Cuts depend on shapes alone, every task has its own slot, slots are added in
// order: the same bits for any number of threads. Instruction sets differ in the last bits.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace pinet {

// Columns per task: large enough that a task (0.1 ms) outweighs the cost of handing it out, small
// enough that two threads end together.
constexpr int64_t kTaskColumns = 16384;

// Bytes of one row in a run: 16 rows of it stay in a second-level cache of 256 KiB, 4 in the first.
// Shorter runs lose bandwidth, since every row is a stream of its own (README.md, Decisions).
constexpr int64_t kRunBytes = 8192;

// Products under which waking other threads costs more than it saves.
constexpr int64_t kSerialProducts = 1 << 18;

void stratum_gram_cpu(std::vector<torch::stable::Tensor> grads, torch::stable::Tensor out);

}  // namespace pinet
