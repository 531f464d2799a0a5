// What forwards make for a parameter: its values without graph, and its leaf (leaves.py).
//
// Both are made at the first use in a forward, and kept for the next one where nobody else has them:
// between the calls of a model little of this is in the caches, and what is not made costs nothing.

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "lane.h"

namespace pinet {

bool is_served(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor.is_conj() &&
         !tensor.is_neg() &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

namespace {

// Whether a leaf is as it was made, without gradient and hooks, and no other forward has it. The
// graph of an earlier one may lead to it still, from nodes of the lane's, which expect no backward any
// more. Where Python used the leaf it has hung a hook on it.
bool is_unused(const Parameter& parameter) {
  const at::Tensor& leaf = parameter.leaf;
  return !leaf.grad().defined() && torch::autograd::impl::hooks(leaf).empty() &&
         torch::autograd::impl::post_acc_grad_hooks(leaf) == nullptr &&
         (!parameter.entry || Py_REFCNT(parameter.entry.get()) == 1);
}

// Not where `p.data = ...` has put other values in the place of those before, or where the parameter
// was swapped for another. The memory of detached values is not given to others, so what has their
// address are they.
bool has_values_of(const Parameter& parameter, const at::Tensor& tensor) {
  const at::Tensor& detached = parameter.detached;
  return parameter.made_from == tensor.unsafeGetTensorImpl() &&
         detached.const_data_ptr() == tensor.const_data_ptr() &&
         detached.scalar_type() == tensor.scalar_type() && detached.sizes() == tensor.sizes() &&
         detached.strides() == tensor.strides();
}

// A leaf [S, ...] of stride 0 along S, without memory.
void make(Parameter& parameter, const at::Tensor& tensor, int64_t strata) {
  parameter.key = nullptr;
  parameter.entry = nullptr;
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  parameter.made_from = impl;
  parameter.detached = tensor.tensor_data();
  std::vector<int64_t> sizes = tensor.sizes().vec();
  std::vector<int64_t> strides = tensor.strides().vec();
  sizes.insert(sizes.begin(), strata);
  strides.insert(strides.begin(), 0);
  auto expanded = impl->shallow_copy_and_detach(impl->version_counter(), true);
  expanded->set_sizes_and_strides(sizes, strides);
  parameter.leaf = at::Tensor(std::move(expanded)).set_requires_grad(true);
}

void drop(Parameter& parameter) {
  parameter.made_from = nullptr;
  parameter.key = nullptr;
  parameter.entry = nullptr;
  parameter.leaf.reset();
  parameter.detached.reset();
}

bool make_ready(const Lane* lane, Parameter& parameter, PyObject* value) {
  const at::Tensor& tensor = THPVariable_Unpack(value);
  if (!is_served(tensor)) return false;  // it may have been converted since
  THPObjectPtr id(PyLong_FromVoidPtr(value));
  PyObject* root = id ? PyDict_GetItemWithError(lane->by_id, id.get()) : nullptr;
  if (!root) return false;
  const bool is_kept = parameter.leaf.defined() && parameter.root.get() == root &&
                       parameter.leaf.size(0) == lane->strata &&
                       has_values_of(parameter, tensor) && is_unused(parameter);
  if (!is_kept) {
    parameter.root = Py_NewRef(root);
    make(parameter, tensor, lane->strata);
  }
  parameter.forward = lane->number;
  return true;
}

bool make_entry(Parameter& parameter) {
  THPObjectPtr leaf(THPVariable_Wrap(parameter.leaf));
  parameter.key = PyLong_FromVoidPtr(parameter.root.get());
  if (!leaf || !parameter.key) return false;
  parameter.entry = PyTuple_Pack(2, parameter.root.get(), leaf.get());
  return static_cast<bool>(parameter.entry);
}

// Takes the leaf that Python has made in this forward, where there is one; it serves no other.
bool agree_with_python(const Lane* lane, Parameter& parameter) {
  PyObject* known = PyDict_GetItemWithError(lane->dense_leaves, parameter.key.get());
  if (!known) return !PyErr_Occurred();
  if (known == parameter.entry.get()) return true;
  if (!PyTuple_Check(known) || PyTuple_GET_SIZE(known) != 2 ||
      !THPVariable_CheckExact(PyTuple_GET_ITEM(known, 1)))
    return false;
  parameter.entry = Py_NewRef(known);
  parameter.leaf = THPVariable_Unpack(PyTuple_GET_ITEM(known, 1));
  parameter.made_from = nullptr;
  return true;
}

}  // namespace

void drop_replaced(Lane* lane) {
  for (auto& [value, parameter] : *lane->parameters) {
    if (!parameter.detached.defined()) continue;
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (!is_served(tensor) || tensor.const_data_ptr() != parameter.detached.const_data_ptr())
      drop(parameter);
  }
}

Parameter* parameter_of(Lane* lane, PyObject* value, bool is_dense) {
  const auto found = lane->parameters->find(value);
  if (found == lane->parameters->end()) return nullptr;
  Parameter& parameter = found->second;
  if (parameter.forward != lane->number) {
    if (!make_ready(lane, parameter, value)) return nullptr;
  } else if (parameter.detached.const_data_ptr() != THPVariable_Unpack(value).const_data_ptr()) {
    return nullptr;  // `p.data = ...` inside the forward
  }
  if (!is_dense) return &parameter;
  if (!parameter.entry && !make_entry(parameter)) return nullptr;
  return agree_with_python(lane, parameter) ? &parameter : nullptr;
}

bool use_dense(const Lane* lane, Parameter& parameter) {
  return PyDict_SetDefault(lane->dense_leaves, parameter.key.get(), parameter.entry.get());
}

}  // namespace pinet
