// routed_linear: a linear layer whose weight and bias depend on the head of the row.
//
//     out[i] = weight[h] rows[i] + bias[h]     for row_offsets[h] <= i < row_offsets[h + 1]
//
// rows         [N, D_in] float32 or float64, sorted by head; any strides.
// weight       [H, D_out, D_in] of the same dtype, any strides.
// bias         [H, D_out], any strides; may be absent.
// row_offsets  H + 1 ascending numbers from 0 to N.
// out          [N, D_out], contiguous; every element is written.
//
// One product a head by torch's own mm or addmm, that is by the vendor's BLAS, on views. The
// gradient of the rows is this op itself with the transposed weights; those of weights and biases
// are stratified_linear_backward's, with heads for strata.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pinet {

void routed_linear_cpu(torch::stable::Tensor rows, torch::stable::Tensor weight,
                       std::optional<torch::stable::Tensor> bias,
                       std::vector<int64_t> row_offsets, torch::stable::Tensor out);

}  // namespace pinet
