// stratum_combine: the weighted sum of the stratum gradients, for all parameters at once.
//
//     outs[p] (+)= sum_s w[p, s] * grads[p][s]              w[p, s] = weights[p, s] * scale
//
// grads       P tensors [S, ...], or [S, U, ...] where only U rows of the parameter were touched;
//             float32 or float64, any strides.
// weights     [P, S] or [1, S] float64, contiguous.
// scale       float64, one element; or none. Applied to weights other than 0.
// outs        P tensors [...] or [V, ...] of the dtype of their gradient, any strides.
// accumulate  P numbers; 0: outs[p] is written, whatever it held; 1: the sum is added to it.
// rows        touched rows, int64 [U], contiguous, ascending, distinct, in [0, V).
// row_of      P numbers: the rows of this parameter as an index into `rows`, or -1 for all.
//
// A stratum whose weight is exactly 0 is not read: NaN and infinity in it do not show. Where nothing
// is read the sum is 0. Other rows than the touched ones are set to 0, or left alone (accumulate).
//
// Layout. Read and written in place: slices that are contiguous inside, whatever the distance
// between strata, into contiguous outputs; and any dense layout that slices and output share. Other
// gradients, and other outputs, go through a contiguous copy.
//
// Numerics. Products and sums are made in the dtype of the gradient, in ascending order of s, with
// weights rounded to it once; the sum is added to what `outs` held at last. Elementwise, so that the
// bits do not depend on layout and threads. With and without FMA they differ.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pinet {

// Elements of an output per task: a tenth of a millisecond of memory traffic or so at S = 8.
constexpr int64_t kCombineElements = 16384;

// Elements read under which waking other threads costs more than it saves.
constexpr int64_t kCombineSerial = 1 << 17;

void stratum_combine_cpu(std::vector<torch::stable::Tensor> grads, torch::stable::Tensor weights,
                         std::optional<torch::stable::Tensor> scale,
                         std::vector<torch::stable::Tensor> outs, std::vector<int64_t> accumulate,
                         std::vector<torch::stable::Tensor> rows, std::vector<int64_t> row_of);

}  // namespace pinet
