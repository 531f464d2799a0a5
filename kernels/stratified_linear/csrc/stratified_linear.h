// stratified_linear_backward: gradients of y = x W^T + b, those of W and b by stratum.
//
//     grad_rows      = grad W                              [N, D_in]
//     grad_weight[s] = sorted_grad[s]^T sorted_rows[s]     [S, D_out, D_in]
//     grad_bias[s]   = sum of grad over the rows of s      [S, D_out]
//
// grad         [N, D_out] float32 or float64, any strides.
// weight       [D_out, D_in] of the same dtype, any strides; absent where grad_rows is.
// sorted_grad  grad with its rows sorted by stratum; grad itself where they are.
// sorted_rows  the inputs [N, D_in] in the same order.
// row_offsets  S + 1 ascending numbers from 0 to N.
// ids          [N] int64, contiguous: the stratum of every row of grad.
//
// Each output may be absent; those given are contiguous, and every element is written.
//
// Products go to torch's own mm, that is to the vendor's BLAS: 1 + S calls on views, without the
// dispatcher or Python in between. An empty stratum is filled with zeros. Bias sums are those of
// stratum_sums.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pinet {

void stratified_linear_backward_cpu(
    torch::stable::Tensor grad, std::optional<torch::stable::Tensor> weight,
    torch::stable::Tensor sorted_grad, torch::stable::Tensor sorted_rows, std::vector<int64_t> row_offsets, torch::stable::Tensor ids,
    std::optional<torch::stable::Tensor> grad_rows, std::optional<torch::stable::Tensor> grad_weight,
    std::optional<torch::stable::Tensor> grad_bias);

}  // namespace pinet
