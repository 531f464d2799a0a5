// stratified_norm_backward: backward of LayerNorm over the last dimension, with the gradients of its
// scale and shift by stratum, in one pass over the rows.
//
//     xhat[n]        = (rows[n] - mean[n]) * rstd[n]
//     grad_rows[n]   = rstd[n] * (g[n] - avg(g[n]) - xhat[n] * avg(g[n] * xhat[n]))
//     grad_weight[s] = sum_{n: ids[n] = s} grad[n] * xhat[n]
//     grad_bias[s]   = sum_{n: ids[n] = s} grad[n]                     g[n] = grad[n] * weight
//
// grad, rows   [N, D] of one dtype, float32 or float64; any strides; copied first where columns are
//              not neighbours.
// mean, rstd   [N] of the dtype of `rows`, contiguous.
// weight       [D] of the dtype of `rows`, contiguous; none means ones.
// ids          [N] int64, contiguous, in [0, num_strata), in any order.
// grad_rows    [N, D], contiguous. grad_weight, grad_bias: [S, D], contiguous. All of the dtype of
//              `rows`, each may be left out, what is given is fully written. Zero where a stratum is
//              empty.
//
// Numerics. Everything within a row is in the dtype of `rows`. Sums over rows: at most 16 of a
// stratum in that dtype, all above in float64, rounded once. A NaN or an infinity stays in its row,
// and in the columns of its stratum.
//
// Determinism. See csrc/row_chunks.h: the same bits for any number of threads. Instruction sets
// differ in the last bits.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace pinet {

constexpr int kNormBlock = 16;

// Elements under which waking other threads costs more than it saves.
constexpr int64_t kNormSerial = 1 << 15;

void stratified_norm_backward_cpu(torch::stable::Tensor grad, torch::stable::Tensor rows,
                                  torch::stable::Tensor mean, torch::stable::Tensor rstd,
                                  std::optional<torch::stable::Tensor> weight,
                                  torch::stable::Tensor ids, int64_t num_strata,
                                  std::optional<torch::stable::Tensor> grad_rows,
                                  std::optional<torch::stable::Tensor> grad_weight,
                                  std::optional<torch::stable::Tensor> grad_bias);

}  // namespace pinet
