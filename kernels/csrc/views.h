// Tensors over memory that outlives them, and torch's own products, through the C interface that
// ahead-of-time compiled models call: no dispatcher, no autograd, no Python.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>

namespace pinet {

// `dtype` is float32 or float64; strides count elements.
template <size_t kDims>
torch::stable::Tensor view_of(const void* data, std::array<int64_t, kDims> sizes,
                              std::array<int64_t, kDims> strides,
                              torch::headeronly::ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<void*>(data), kDims, sizes.data(), strides.data(), 0,
      dtype == torch::headeronly::ScalarType::Double ? aoti_torch_dtype_float64()
                                                     : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline int64_t item_bytes(const torch::stable::Tensor& x) {
  return x.scalar_type() == torch::headeronly::ScalarType::Double ? 8 : 4;
}

// out = a b
inline void mm(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
               const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = c + a b
inline void addmm(const torch::stable::Tensor& out, const torch::stable::Tensor& c,
                  const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace pinet
