// The module `_lane`: the interception's usual calls without Python, and what a step does for all
// parameters (gradients.cpp).
//
// `torch_function` is the `__torch_function__` of a mode. It passes on what no parameter takes part
// in, and makes the boundaries of linear layers, norms, lookups, sums and products itself where
// nothing is left to decide: settled sites, rows [N, ...] of one kind in dimension 0, on a CPU.
// Everything else goes to the interception in Python, which decides alike: `lane.py` says what the two
// share.

#include <torch/csrc/Exceptions.h>

#include "gradients.h"
#include "lane.h"

namespace pinet {

Names names;

namespace {

PyTypeObject* lane_type = nullptr;  // kept for the life of the process

// Python's own. Both may use one parameter, so it is told of the uses made here before.
PyObject* slow(Lane* lane, PyObject* mode, PyObject* func, PyObject* types, PyObject* args,
               PyObject* kwargs) {
  if (!tell_uses(lane)) return nullptr;
  THPObjectPtr out(PyObject_CallFunctionObjArgs(names.slow, mode, func, types, args,
                                                kwargs ? kwargs : Py_None, nullptr));
  ++lane->stamp;
  // Python may have come back here inside the call, with further uses.
  if (!out || (lane->occurrences && !tell_uses(lane))) return nullptr;
  return out.release();
}

// The lane of a mode; a new reference, or null with an error set.
Lane* lane_of(PyObject* mode) {
  if (active != nullptr && active->mode == mode)
    return reinterpret_cast<Lane*>(Py_NewRef(reinterpret_cast<PyObject*>(active)));
  THPObjectPtr held(PyObject_GetAttrString(mode, "lane"));
  if (!held) return nullptr;
  TORCH_CHECK_TYPE(Py_TYPE(held.get()) == lane_type, "__torch_function__: mode.lane is no Lane");
  return reinterpret_cast<Lane*>(held.release());
}

// torch_function(func, types, args=(), kwargs=None), of a mode
PyObject* torch_function(PyObject* mode, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count >= 2 && count <= 4, "__torch_function__: expected 2 to 4 arguments");
  PyObject *func = given[0], *types = given[1];
  THPObjectPtr none(PyTuple_New(0));
  PyObject* args = count > 2 ? given[2] : none.get();
  PyObject* kwargs = count > 3 && given[3] != Py_None ? given[3] : nullptr;
  Lane* lane = lane_of(mode);
  if (lane == nullptr) return nullptr;
  THPObjectPtr held(reinterpret_cast<PyObject*>(lane));
  if (!PyTuple_Check(args) || (kwargs && !PyDict_Check(kwargs)))
    return slow(lane, mode, func, types, args, kwargs);
  if (func == names.set_shared) {
    const int is_shared =
        PyTuple_GET_SIZE(args) > 0 ? PyObject_IsTrue(PyTuple_GET_ITEM(args, 0)) : lane->is_shared;
    if (is_shared < 0) return nullptr;
    lane->is_shared = is_shared != 0;
    return slow(lane, mode, func, types, args, kwargs);
  }
  if (lane->is_paused || lane->is_shared || !lane->by_id)
    return slow(lane, mode, func, types, args, kwargs);
  if (!at::GradMode::is_enabled()) return PyObject_Call(func, args, kwargs);
  int found = meets_root(lane, args);
  if (found == 0 && kwargs) {
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (found == 0 && PyDict_Next(kwargs, &at, &key, &value)) found = meets_root(lane, value);
  }
  if (found < 0) return nullptr;
  if (found == 0) {
    const int is_gradient_call = PySet_Contains(names.gradient_calls, func);
    if (is_gradient_call < 0) return nullptr;
    if (is_gradient_call == 0) return PyObject_Call(func, args, kwargs);
    return slow(lane, mode, func, types, args, kwargs);
  }
  PyObject* out = boundary(lane, func, args, kwargs);
  if (out != nullptr || PyErr_Occurred()) return out;
  return slow(lane, mode, func, types, args, kwargs);
  END_HANDLE_TH_ERRORS
}

bool read_names(PyObject* from, std::unordered_set<std::string>& to) {
  THPObjectPtr items(PySequence_List(from));
  if (!items) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(items.get()); ++i) {
    const char* name = PyUnicode_AsUTF8(PyList_GET_ITEM(items.get(), i));
    if (!name) return false;
    to.insert(name);
  }
  return true;
}

// configure(slow, set_shared, refuse, gradient calls, functions, sums, products, names of nodes, names
//           of nodes)
PyObject* configure(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *slow, *set_shared, *refuse, *calls, *same, *readers;
  PyObject *linear, *layer_norm, *embedding, *torch_layer_norm, *torch_embedding;
  PyObject *sums, *products;
  if (!PyArg_ParseTuple(args, "OOOO(OOOOO)O!O!OO", &slow, &set_shared, &refuse, &calls, &linear,
                        &layer_norm, &embedding, &torch_layer_norm, &torch_embedding,
                        &PyTuple_Type, &sums, &PyTuple_Type, &products, &same, &readers))
    return nullptr;
  names.slow = Py_NewRef(slow);
  names.set_shared = Py_NewRef(set_shared);
  names.refuse = Py_NewRef(refuse);
  names.gradient_calls = Py_NewRef(calls);
  names.linear = Py_NewRef(linear);
  names.layer_norm = Py_NewRef(layer_norm);
  names.embedding = Py_NewRef(embedding);
  names.torch_layer_norm = Py_NewRef(torch_layer_norm);
  names.torch_embedding = Py_NewRef(torch_embedding);
  names.sums = Py_NewRef(sums);
  names.products = Py_NewRef(products);
  if (!read_names(same, names.nodes.same_shape)) return nullptr;
  if (!read_names(readers, names.nodes.readers)) return nullptr;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef torch_function_def = {
    "__torch_function__",
    reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(torch_function)), METH_FASTCALL,
    nullptr};

// torch_function(mode): what serves as the `__torch_function__` of one mode. As an attribute of its
// own it costs less than a method of its class, which is bound anew at every call.
PyObject* make_torch_function(PyObject*, PyObject* mode) {
  return PyCFunction_New(&torch_function_def, mode);
}

PyMethodDef module_methods[] = {
    {"configure", configure, METH_VARARGS, nullptr},
    {"torch_function", make_torch_function, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_lane", nullptr, -1, module_methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace pinet

PyMODINIT_FUNC PINET_LANE_INIT() {
  THPObjectPtr module(PyModule_Create(&pinet::module_def));
  if (!module) return nullptr;
  pinet::lane_type = pinet::make_lane_type();
  PyObject* type = reinterpret_cast<PyObject*>(pinet::lane_type);
  if (!type || PyModule_AddObjectRef(module, "Lane", type) != 0) return nullptr;
  if (PyModule_AddFunctions(module, pinet::gradient_methods) != 0) return nullptr;
  if (PyModule_AddFunctions(module, pinet::direct_methods) != 0) return nullptr;
  return module.release();
}
