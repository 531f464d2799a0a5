// stratified_linear_fused: the products of stratified_linear_backward in one pass over the rows.
//
//     grad_rows      = grad W                              [N, D_in]
//     grad_weight[s] = grad[rows of s]^T rows[rows of s]   [S, D_out, D_in]
//     grad_bias[s]   = sum of grad over the rows of s      [S, D_out]
//
// grad         [N, D_out] float32, any strides.
// weight       [D_out, D_in] float32, any strides; absent where grad_rows is.
// rows         [N, D_in] float32, any strides.
// row_offsets  S + 1 ascending numbers from 0 to N.
// order        [N] int64, contiguous: the rows sorted by stratum; absent where they are.
//
// Each output may be absent; those given are contiguous, and every element is written.
//
// Rows go through in blocks that stay in the first cache for all three products. A stratum is cut
// into pieces whose height depends on N alone; their sums are added in order, so that no bit depends
// on threads. Rows out of order, or with columns apart, are copied a block at a time.
//
// cpu_has_tuned_blas: whether the vendor's BLAS behind torch is made for this processor, so that its
// products are the better ones.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pinet {

void stratified_linear_fused_cpu(
    torch::stable::Tensor grad, std::optional<torch::stable::Tensor> weight,
    torch::stable::Tensor rows, std::vector<int64_t> row_offsets,
    std::optional<torch::stable::Tensor> order, std::optional<torch::stable::Tensor> grad_rows,
    std::optional<torch::stable::Tensor> grad_weight,
    std::optional<torch::stable::Tensor> grad_bias);

bool cpu_has_tuned_blas();

}  // namespace pinet
