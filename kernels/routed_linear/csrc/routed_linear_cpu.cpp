#include "routed_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "views.h"

namespace pinet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void routed_linear_cpu(Tensor rows, Tensor weight, std::optional<Tensor> bias,
                       std::vector<int64_t> row_offsets, Tensor out) {
  const ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK((dtype == ScalarType::Float || dtype == ScalarType::Double) && rows.is_cpu() &&
                      rows.dim() == 2 && weight.is_cpu() && weight.dim() == 3 &&
                      weight.scalar_type() == dtype && weight.size(2) == rows.size(1),
                  "pinet_cpp::routed_linear: expected rows [N, D_in] and weight [H, D_out, D_in] on "
                  "the CPU, both float32 or both float64");
  const int64_t count = rows.size(0), deep = rows.size(1), wide = weight.size(1);
  const int64_t heads = weight.size(0);
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->dim() == 2 && bias->size(0) == heads &&
                            bias->size(1) == wide && bias->scalar_type() == dtype),
                  "pinet_cpp::routed_linear: bias must be a CPU tensor [H, D_out] of the dtype of "
                  "rows");
  STD_TORCH_CHECK(static_cast<int64_t>(row_offsets.size()) == heads + 1 &&
                      row_offsets.front() == 0 && row_offsets.back() == count &&
                      std::is_sorted(row_offsets.begin(), row_offsets.end()),
                  "pinet_cpp::routed_linear: row_offsets must be H + 1 numbers that ascend from 0 "
                  "to ", count);
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.size(0) == count && out.size(1) == wide &&
                      out.is_contiguous() && out.scalar_type() == dtype,
                  "pinet_cpp::routed_linear: out must be a contiguous CPU tensor [N, D_out] of the "
                  "dtype of rows");
  const int64_t bytes = item_bytes(rows);
  const char* x = static_cast<const char*>(rows.data_ptr());
  const char* w = static_cast<const char*>(weight.data_ptr());
  const char* c = bias ? static_cast<const char*>(bias->data_ptr()) : nullptr;
  char* y = static_cast<char*>(out.data_ptr());
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t from = row_offsets[h], n = row_offsets[h + 1] - from;
    if (n == 0 || wide == 0) continue;
    const Tensor ours = view_of<2>(y + from * wide * bytes, {n, wide}, {wide, 1}, dtype);
    const Tensor in = view_of<2>(x + from * rows.stride(0) * bytes, {n, deep},
                                 {rows.stride(0), rows.stride(1)}, dtype);
    const Tensor transposed = view_of<2>(w + h * weight.stride(0) * bytes, {deep, wide},
                                         {weight.stride(2), weight.stride(1)}, dtype);
    if (c != nullptr) {
      addmm(ours, view_of<1>(c + h * bias->stride(0) * bytes, {wide}, {bias->stride(1)}, dtype),
            in, transposed);
    } else {
      mm(ours, in, transposed);
    }
  }
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("routed_linear", TORCH_BOX(&pinet::routed_linear_cpu));
}
