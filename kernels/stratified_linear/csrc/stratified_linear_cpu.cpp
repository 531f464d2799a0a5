#include "stratified_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>

#include "../../stratum_sums/csrc/stratum_sums.h"
#include "row_chunks.h"
#include "views.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_matrix(const Tensor& x, int64_t rows, ScalarType dtype) {
  return x.is_cpu() && x.dim() == 2 && x.size(0) == rows && x.scalar_type() == dtype;
}

bool is_output(const std::optional<Tensor>& x, std::vector<int64_t> sizes, ScalarType dtype) {
  if (!x) return true;
  if (!x->is_cpu() || !x->is_contiguous() || x->scalar_type() != dtype ||
      x->dim() != static_cast<int64_t>(sizes.size()))
    return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (x->size(d) != sizes[d]) return false;
  return true;
}

}  // namespace

void stratified_linear_backward_cpu(Tensor grad, std::optional<Tensor> weight,
                                    Tensor sorted_grad, Tensor sorted_rows,
                                    std::vector<int64_t> row_offsets, Tensor ids,
                                    std::optional<Tensor> grad_rows,
                                    std::optional<Tensor> grad_weight,
                                    std::optional<Tensor> grad_bias) {
  const ScalarType dtype = grad.scalar_type();
  STD_TORCH_CHECK(
      (dtype == ScalarType::Float || dtype == ScalarType::Double) && grad.dim() == 2 &&
          grad.is_cpu() && is_matrix(sorted_grad, grad.size(0), dtype) &&
          sorted_grad.size(1) == grad.size(1) && is_matrix(sorted_rows, grad.size(0), dtype) &&
          weight.has_value() >= grad_rows.has_value() &&
          (!weight || (is_matrix(*weight, grad.size(1), dtype) &&
                       weight->size(1) == sorted_rows.size(1))),
      "pinet_cpp::stratified_linear_backward: expected grad [N, D_out], weight [D_out, D_in] and "
      "rows [N, D_in] on the CPU, all float32 or all float64");
  const int64_t count = grad.size(0), wide = grad.size(1), deep = sorted_rows.size(1);
  STD_TORCH_CHECK(row_offsets.size() >= 2 && row_offsets.front() == 0 &&
                      row_offsets.back() == count &&
                      std::is_sorted(row_offsets.begin(), row_offsets.end()),
                  "pinet_cpp::stratified_linear_backward: row_offsets must ascend from 0 to ",
                  count);
  const int64_t strata = static_cast<int64_t>(row_offsets.size()) - 1;
  STD_TORCH_CHECK(is_output(grad_rows, {count, deep}, dtype) &&
                      is_output(grad_weight, {strata, wide, deep}, dtype),
                  "pinet_cpp::stratified_linear_backward: outputs must be contiguous CPU tensors "
                  "of the dtype and sizes of the contract");
  if (grad_rows) mm(*grad_rows, grad, *weight);
  if (grad_weight) {
    const int64_t bytes = item_bytes(grad);
    const char* g = static_cast<const char*>(sorted_grad.data_ptr());
    const char* x = static_cast<const char*>(sorted_rows.data_ptr());
    char* out = static_cast<char*>(grad_weight->data_ptr());
    for (int64_t s = 0; s < strata; ++s, out += wide * deep * bytes) {
      const int64_t from = row_offsets[s], n = row_offsets[s + 1] - from;
      if (n == 0) {
        std::memset(out, 0, wide * deep * bytes);
        continue;
      }
      mm(view_of<2>(out, {wide, deep}, {deep, 1}, dtype),
         view_of<2>(g + from * sorted_grad.stride(0) * bytes, {wide, n},
                    {sorted_grad.stride(1), sorted_grad.stride(0)}, dtype),
         view_of<2>(x + from * sorted_rows.stride(0) * bytes, {n, deep},
                    {sorted_rows.stride(0), sorted_rows.stride(1)}, dtype));
    }
  }
  if (grad_bias) stratum_sums_cpu(grad, ids, *grad_bias);
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratified_linear_backward", TORCH_BOX(&pinet::stratified_linear_backward_cpu));
}
