// Functions of layers that ask the lane at once, instead of by way of the stack of modes.
//
// That way costs as much as a small layer. Where the only mode is a lane's own these do what it would
// do; everywhere else they are the functions of torch that they stand for.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>

#include <utility>

#include "lane.h"

namespace pinet {
namespace {

// The lane whose mode alone would see a call made now, or null.
Lane* reached() {
  Lane* lane = active;
  if (lane == nullptr || lane->is_paused || lane->is_shared || !at::GradMode::is_enabled() ||
      !at::impl::torch_function_mode_enabled() || at::impl::PythonTorchFunctionTLS::stack_len() != 1)
    return nullptr;
  const auto& mode = at::impl::PythonTorchFunctionTLS::get_stack_at(0);
  return mode->ptr(getPyInterpreter()) == lane->mode ? lane : nullptr;
}

// Calls `boundary(lane)`, and the function of torch where there is no lane or Python decides.
template <class Boundary>
PyObject* directly(PyObject* torch_function, PyObject* const* args, Py_ssize_t count,
                   Py_ssize_t expected, const Boundary& boundary) {
  HANDLE_TH_ERRORS
  Lane* lane = count == expected ? reached() : nullptr;
  if (lane != nullptr) {
    THPObjectPtr held(Py_NewRef(reinterpret_cast<PyObject*>(lane)));
    const int64_t before = std::exchange(lane->depth, 1);
    const auto back = c10::make_scope_exit([lane, before] { lane->depth = before; });
    PyObject* out = boundary(lane);
    if (out != nullptr || PyErr_Occurred()) return out;
  }
  return PyObject_Vectorcall(torch_function, args, count, nullptr);
  END_HANDLE_TH_ERRORS
}

// linear(rows, weight, bias): F.linear
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return directly(names.linear, args, count, 3, [args](Lane* lane) {
    return linear_boundary(lane, args[0], args[1], args[2]);
  });
}

// layer_norm(rows, shape, weight, bias, eps): torch.layer_norm
PyObject* layer_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return directly(names.torch_layer_norm, args, count, 5, [args](Lane* lane) {
    return norm_boundary(lane, args[0], args[1], args[2], args[3], args[4]);
  });
}

// embedding(table, ids, padding): torch.embedding
PyObject* embedding(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return directly(names.torch_embedding, args, count, 3, [args](Lane* lane) {
    return lookup_boundary(lane, args[0], args[1], args[2]);
  });
}

PyCFunction as_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMethodDef direct_methods[] = {
    {"linear", as_method(linear), METH_FASTCALL, nullptr},
    {"layer_norm", as_method(layer_norm), METH_FASTCALL, nullptr},
    {"embedding", as_method(embedding), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace pinet
