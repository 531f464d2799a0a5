// stratum_solve: a rule's weights of the strata from the Gram of their gradients.
//
// gram  [P, S, S] float64, contiguous, symmetric. Of absent strata nothing is read.
// rule  a Rule below; pinet_fast.rules defines them, kernels/stratum_solve/reference.py states them.
// kept  the K >= 1 present strata, ascending, K <= kMaxStrata. Rules see their K x K Grams.
// c     radius of cagrad; ignored by the others.
// keys  [S, S] float64, contiguous, or none: pcgrad's stratum s meets the others by ascending
//       keys[s], equal ones by ascending id; none = by ascending cosine. Ignored by the others.
// out   [P, S] float64, contiguous; every element is written, 0 for absent strata.
//
// Numerics. Float64, no allocation, one thread, sums in ascending order, a bounded number of
// operations: the same bits for the same Gram, whatever its neighbours in the batch. The iterations
// are those of the reference, so results differ by rounding; eigenvalues are Jacobi's here and
// LAPACK's there. A Gram with a NaN or an infinity among its kept strata gets NaN weights.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pinet {

enum class Rule : int64_t { kAgreement, kBalanced, kMgda, kPcgrad, kImtlg, kAlignedMtl, kCagrad };

constexpr int64_t kMaxStrata = 64;

void stratum_solve_cpu(torch::stable::Tensor gram, int64_t rule, std::vector<int64_t> kept,
                       double c, std::optional<torch::stable::Tensor> keys,
                       torch::stable::Tensor out);

}  // namespace pinet
