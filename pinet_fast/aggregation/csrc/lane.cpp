// The module `_lane`: the interception's usual calls without Python.
//
// `torch_function` is the `__torch_function__` of a mode. It passes on what no parameter takes part
// in, and makes the boundaries of linear layers, norms and lookups itself where nothing is left to
// decide: settled sites, rows [N, ...] of one kind in dimension 0, on a CPU. Everything else goes
// to the interception in Python, which decides alike: `lane.py` says what the two share.

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <unordered_map>
#include <utility>

#include "nodes.h"
#include "trace.h"

namespace pinet {
namespace {

enum Op { kLinear, kLayerNorm, kEmbedding, kNumOps };

// Uses of one parameter by one op, with rows of one kind.
struct Site {
  THPObjectPtr key;      // (sources, op, kind, dim), as the occurrences are counted
  int64_t settled = 0;   // occurrences 0..settled - 1 need no proof
};

// A parameter, and what this forward has made for it.
struct Parameter {
  at::Tensor tensor, detached, leaf;
  THPObjectPtr root;
  THPObjectPtr key, entry;  // id(root) and (root, leaf), as the leaves keep them
  // sites[op][kind of the forward's rows]; kinds by name
  std::array<std::unordered_map<std::string, Site>, kNumOps> sites;
};

// What Python has told of itself; kept for the life of the process.
struct Names {
  PyObject *set_shared, *slow, *refuse, *gradient_calls;
  PyObject *linear, *layer_norm, *embedding, *torch_layer_norm, *torch_embedding;
  NodeNames nodes;
} names;

struct Lane {
  PyObject_HEAD
  std::unordered_map<PyObject*, Parameter>* parameters;  // keys are kept alive by the list
  PyObject* list;
  std::vector<PyObject*>* dense;  // parameters that take a dense leaf
  std::shared_ptr<Calls>* calls;
  // Of the forward that runs:
  std::shared_ptr<Forward>* forward;
  std::vector<Rows>* rows;
  std::vector<std::string>* kinds;
  PyObject *by_id, *leaves, *dense_leaves, *occurrences, *known;
  bool is_paused;
  bool is_shared;
};

PyTypeObject* lane_type = nullptr;  // kept for the life of the process

void refuse() {
  pybind11::gil_scoped_acquire gil;
  THPObjectPtr done(PyObject_CallNoArgs(names.refuse));
  python_error error;
  error.persist();
  throw std::move(error);
}

PyObject* slow(PyObject* mode, PyObject* func, PyObject* types, PyObject* args, PyObject* kwargs) {
  return PyObject_CallFunctionObjArgs(names.slow, mode, func, types, args,
                                      kwargs ? kwargs : Py_None, nullptr);
}

bool is_tensor(PyObject* value) { return THPVariable_Check(value); }

// 1: value is a root; 0: it is not; -1: an error.
int is_root(const Lane* lane, PyObject* value) {
  THPObjectPtr id(PyLong_FromVoidPtr(value));
  return id ? PyDict_Contains(lane->by_id, id.get()) : -1;
}

// Whether a root, or a view of one, is among values: then Python looks closer.
int meets_root(const Lane* lane, PyObject* value) {
  if (is_tensor(value)) {
    const int found = is_root(lane, value);
    if (found != 0) return found;
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (!tensor.is_view()) return 0;
    THPObjectPtr base(THPVariable_Wrap(tensor._base()));
    return base ? is_root(lane, base.get()) : -1;
  }
  const bool is_list = PyList_Check(value);
  if (!is_list && !PyTuple_Check(value)) return 0;
  if (Py_EnterRecursiveCall(" while looking for parameters")) return -1;  // a list that holds itself
  const auto leave = c10::make_scope_exit([] { Py_LeaveRecursiveCall(); });
  int found = 0;
  for (Py_ssize_t i = 0; found == 0 && i < Py_SIZE(value); ++i) {
    PyObject* item = is_list ? PyList_GET_ITEM(value, i) : PyTuple_GET_ITEM(value, i);
    found = meets_root(lane, THPObjectPtr(Py_NewRef(item)));  // code of Python may change the list
  }
  return found;
}

bool sees_every_op() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

// The mode of the lane itself is off while it is asked: what is on the stack are others.
bool is_plain_context() {
  return !at::autocast::is_autocast_enabled(at::kCPU) && !sees_every_op() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
         !at::SavedTensorDefaultHooks::get_hooks(true).has_value();
}

// Not where `p.data = ...` has put other values in the place of those that were prepared.
Parameter* parameter_of(const Lane* lane, PyObject* value) {
  const auto found = lane->parameters->find(value);
  if (found == lane->parameters->end()) return nullptr;
  const Parameter& parameter = found->second;
  if (!parameter.detached.defined() ||
      parameter.detached.const_data_ptr() != parameter.tensor.const_data_ptr())
    return nullptr;
  return &found->second;
}

// Which rows of the forward a tensor [n, ...] holds, or -1 where Python decides.
int kind_of(const Lane* lane, const at::Tensor& tensor, int64_t n) {
  int kind = -1;
  for (size_t i = 0; i < lane->rows->size(); ++i)
    if ((*lane->rows)[i].groups->num_rows() == n) kind = static_cast<int>(i);
  if (kind < 0 || !tensor.requires_grad()) return kind;
  const auto& node = tensor.grad_fn();
  if (!node) return kind;
  const Traced traced = trace(node.get(), n, lane->forward->get(), *lane->rows, names.nodes);
  if (traced.found == Found::kNothing) return kind;
  return traced.found == Found::kRows ? traced.kind : -1;
}

// The site of a further use of a parameter, where it is settled; null: Python decides.
Site* settled_site(const Lane* lane, Parameter& parameter, Op op, int kind,
                         int64_t* occurrence) {
  const auto found = parameter.sites[op].find((*lane->kinds)[kind]);
  if (found == parameter.sites[op].end()) return nullptr;
  Site& site = found->second;
  PyObject* count = PyDict_GetItemWithError(lane->occurrences, site.key.get());
  *occurrence = count ? PyLong_AsLongLong(count) + 1 : 0;
  return !PyErr_Occurred() && *occurrence < site.settled ? &site : nullptr;
}

bool count_use(const Lane* lane, Site& site, int64_t occurrence) {
  THPObjectPtr count(PyLong_FromLongLong(occurrence));
  return count && PyDict_SetItem(lane->occurrences, site.key.get(), count.get()) == 0;
}

// Only what the last forward used densely has one; a parameter of lookups alone does not.
bool has_dense_leaf(const Parameter* parameter) {
  return parameter != nullptr && parameter->entry.get() != nullptr;
}

bool use_dense(const Lane* lane, Parameter& parameter) {
  return PyDict_SetDefault(lane->dense_leaves, parameter.key.get(), parameter.entry.get());
}

// Subclasses, nested tensors and those with tangents have ideas of their own.
bool is_plain(PyObject* value, const at::Tensor& tensor) {
  return THPVariable_CheckExact(value) && tensor.is_cpu() && tensor.layout() == at::kStrided &&
         !tensor.is_nested() && !tensor._fw_grad(0).defined();
}

bool is_ready(const Lane* lane, PyObject* value, const at::Tensor& tensor) {
  return !lane->is_shared && PyDict_GET_SIZE(lane->known) == 0 && is_plain(value, tensor) &&
         is_plain_context();
}

// Lets other threads of Python run where a call takes longer than the change of hands.
class LongCall {
 public:
  explicit LongCall(int64_t work) {
    if (work > kLongCall) released_.emplace();
  }

 private:
  static constexpr int64_t kLongCall = 1 << 20;  // multiplications, or numbers to copy
  std::optional<pybind11::gil_scoped_release> released_;
};

// A layer with a weight and perhaps a bias. Null without an error: Python decides.
PyObject* dense_boundary(Lane* lane, Op op, PyObject* input, PyObject* weight, PyObject* bias,
                         double eps) {
  if (!is_tensor(input)) return nullptr;
  Parameter* w = parameter_of(lane, weight);
  Parameter* b = bias == Py_None ? nullptr : parameter_of(lane, bias);
  if (!has_dense_leaf(w) || w == b) return nullptr;
  if (bias != Py_None && !has_dense_leaf(b)) return nullptr;
  const at::Tensor& rows = THPVariable_Unpack(input);
  if (!is_ready(lane, input, rows) || meets_root(lane, input) != 0) return nullptr;
  if (rows.dim() != 2 || rows.scalar_type() != w->tensor.scalar_type()) return nullptr;
  if (b && b->tensor.scalar_type() != rows.scalar_type()) return nullptr;
  if (w->tensor.dim() != (op == kLinear ? 2 : 1) || rows.size(1) != w->tensor.size(-1))
    return nullptr;
  const int kind = kind_of(lane, rows, rows.size(0));
  if (kind < 0) return nullptr;
  int64_t of_weight = 0, of_bias = 0;
  Site* w_site = settled_site(lane, *w, op, kind, &of_weight);
  Site* b_site = b ? settled_site(lane, *b, op, kind, &of_bias) : nullptr;
  if (w_site == nullptr || (b && b_site == nullptr)) return nullptr;
  const auto& groups = (*lane->rows)[kind].groups;
  at::Tensor out;
  if (op == kLinear) {
    LongCall call(rows.size(0) * w->tensor.numel());
    out = linear(rows, w->detached, b ? std::optional(b->detached) : std::nullopt, w->leaf,
                 b ? b->leaf : at::Tensor(), *lane->forward, groups, kind);
  } else {
    LongCall call(rows.numel());
    out = layer_norm(rows, w->detached, b->detached, eps, w->leaf, b->leaf, *lane->forward, groups,
                     kind);
  }
  if (!use_dense(lane, *w) || !count_use(lane, *w_site, of_weight)) return nullptr;
  if (b && (!use_dense(lane, *b) || !count_use(lane, *b_site, of_bias))) return nullptr;
  return THPVariable_Wrap(std::move(out));
}

// F.linear(rows, weight, bias), as nn.Linear calls it.
PyObject* try_linear(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 3 || (kwargs && PyDict_GET_SIZE(kwargs))) return nullptr;
  return dense_boundary(lane, kLinear, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1),
                        PyTuple_GET_ITEM(args, 2), 0.0);
}

PyObject* keyword(PyObject* kwargs, const char* name) {
  THPObjectPtr key(PyUnicode_InternFromString(name));
  return key ? PyDict_GetItemWithError(kwargs, key.get()) : nullptr;
}

PyObject* norm_boundary(Lane* lane, PyObject* input, PyObject* shape, PyObject* weight,
                        PyObject* bias, PyObject* eps) {
  if (!weight || !bias || bias == Py_None || !eps || !PyFloat_Check(eps)) return nullptr;
  if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) != 1) return nullptr;
  PyObject* width = PyTuple_GET_ITEM(shape, 0);
  if (!PyLong_Check(width) || !is_tensor(weight)) return nullptr;
  if (PyLong_AsLongLong(width) != THPVariable_Unpack(weight).numel()) return nullptr;
  return dense_boundary(lane, kLayerNorm, input, weight, bias, PyFloat_AS_DOUBLE(eps));
}

// F.layer_norm(rows, shape, weight=, bias=, eps=), as it hands itself to modes.
PyObject* try_layer_norm(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 2 || !kwargs || PyDict_GET_SIZE(kwargs) != 3) return nullptr;
  return norm_boundary(lane, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1),
                       keyword(kwargs, "weight"), keyword(kwargs, "bias"), keyword(kwargs, "eps"));
}

// torch.layer_norm(rows, shape, weight, bias, eps)
PyObject* try_torch_layer_norm(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 5 || (kwargs && PyDict_GET_SIZE(kwargs))) return nullptr;
  return norm_boundary(lane, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1),
                       PyTuple_GET_ITEM(args, 2), PyTuple_GET_ITEM(args, 3),
                       PyTuple_GET_ITEM(args, 4));
}

// A lookup whose gradient is dense in the end; padding is an id of Python's, or None.
PyObject* lookup_boundary(Lane* lane, PyObject* input, PyObject* weight, PyObject* padding) {
  Parameter* table = parameter_of(lane, weight);
  if (!is_tensor(input) || table == nullptr || !table->leaf.defined()) return nullptr;
  const at::Tensor& ids = THPVariable_Unpack(input);
  if (!is_ready(lane, input, ids) || meets_root(lane, input) != 0) return nullptr;
  if (ids.scalar_type() != at::kLong || ids.dim() < 1 || ids.dim() > 2) return nullptr;
  if (table->tensor.dim() != 2 || ids.numel() == 0) return nullptr;
  const int kind = kind_of(lane, ids, ids.size(0));
  if (kind < 0) return nullptr;
  if (ids.dim() == 2)  // a second dimension of a batch's size: which one holds the rows?
    for (const Rows& rows : *lane->rows)
      if (rows.groups->num_rows() == ids.size(1)) return nullptr;
  int64_t occurrence = 0;
  Site* site = settled_site(lane, *table, kEmbedding, kind, &occurrence);
  if (site == nullptr) return nullptr;
  int64_t padding_idx = -1;
  if (padding != Py_None) {
    const int64_t items = table->tensor.size(0);
    padding_idx = PyLong_AsLongLong(padding);
    if (PyErr_Occurred() || padding_idx < -items || padding_idx >= items) return nullptr;
    if (padding_idx < 0) padding_idx += items;
  }
  const auto& groups = (*lane->rows)[kind].groups;
  at::Tensor leaf = table->leaf.variable_data().set_requires_grad(true);  // of this use alone
  at::Tensor out;
  {
    LongCall call(ids.numel() * table->tensor.size(1));
    out = embedding(ids, table->detached, padding_idx, leaf, *lane->forward, groups, kind);
  }
  THPObjectPtr wrapped(THPVariable_Wrap(std::move(leaf)));
  if (!wrapped) return nullptr;
  THPObjectPtr done(PyObject_CallMethod(lane->leaves, "adopt_lookup", "OO", table->root.get(),
                                        wrapped.get()));
  if (!done || !count_use(lane, *site, occurrence)) return nullptr;
  return THPVariable_Wrap(std::move(out));
}

// F.embedding(ids, table, padding_idx=, ...), as it hands itself to modes.
PyObject* try_embedding(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 2 || !kwargs || PyDict_GET_SIZE(kwargs) != 5) return nullptr;
  PyObject* padding = keyword(kwargs, "padding_idx");
  if (!padding || keyword(kwargs, "max_norm") != Py_None) return nullptr;
  if (keyword(kwargs, "scale_grad_by_freq") != Py_False || keyword(kwargs, "sparse") != Py_False)
    return nullptr;
  return lookup_boundary(lane, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1), padding);
}

// torch.embedding(table, ids, padding_idx), where ids below 0 are none
PyObject* try_torch_embedding(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 3 || (kwargs && PyDict_GET_SIZE(kwargs))) return nullptr;
  PyObject* padding = PyTuple_GET_ITEM(args, 2);
  if (!PyLong_Check(padding)) return nullptr;
  if (PyLong_AsLongLong(padding) < 0) padding = Py_None;
  return lookup_boundary(lane, PyTuple_GET_ITEM(args, 1), PyTuple_GET_ITEM(args, 0), padding);
}

PyObject* boundary(Lane* lane, PyObject* func, PyObject* args, PyObject* kwargs) {
  if (func == names.linear) return try_linear(lane, args, kwargs);
  if (func == names.layer_norm) return try_layer_norm(lane, args, kwargs);
  if (func == names.torch_layer_norm) return try_torch_layer_norm(lane, args, kwargs);
  if (func == names.embedding) return try_embedding(lane, args, kwargs);
  if (func == names.torch_embedding) return try_torch_embedding(lane, args, kwargs);
  return nullptr;
}

// torch_function(mode, func, types, args=(), kwargs=None)
PyObject* torch_function(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count >= 3 && count <= 5, "__torch_function__: expected 3 to 5 arguments");
  PyObject *mode = given[0], *func = given[1], *types = given[2];
  THPObjectPtr none(PyTuple_New(0));
  PyObject* args = count > 3 ? given[3] : none.get();
  PyObject* kwargs = count > 4 && given[4] != Py_None ? given[4] : nullptr;
  THPObjectPtr held(PyObject_GetAttrString(mode, "lane"));
  if (!held) return nullptr;
  TORCH_CHECK_TYPE(Py_TYPE(held.get()) == lane_type, "__torch_function__: mode.lane is no Lane");
  Lane* lane = reinterpret_cast<Lane*>(held.get());
  if (!PyTuple_Check(args) || (kwargs && !PyDict_Check(kwargs)))
    return slow(mode, func, types, args, kwargs);
  if (func == names.set_shared) {
    if (PyTuple_GET_SIZE(args) > 0) lane->is_shared = PyObject_IsTrue(PyTuple_GET_ITEM(args, 0));
    return slow(mode, func, types, args, kwargs);
  }
  if (lane->is_paused || lane->is_shared || !lane->by_id) return slow(mode, func, types, args, kwargs);
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
    return slow(mode, func, types, args, kwargs);
  }
  PyObject* out = boundary(lane, func, args, kwargs);
  if (out != nullptr || PyErr_Occurred()) return out;
  return slow(mode, func, types, args, kwargs);
  END_HANDLE_TH_ERRORS
}

// The Lane type -----------------------------------------------------------------------------------

void forget(Lane* self) {
  if (self->rows)
    for (Rows& rows : *self->rows) Py_CLEAR(rows.layout);
  if (self->rows) self->rows->clear();
  if (self->kinds) self->kinds->clear();
  if (self->parameters)
    for (auto& entry : *self->parameters) {
      Parameter& parameter = entry.second;
      parameter.tensor.reset();  // held from outside, its hooks would hide from the collector
      parameter.root = nullptr;
      parameter.key = nullptr;
      parameter.entry = nullptr;
      parameter.leaf.reset();
      parameter.detached.reset();
    }
  Py_CLEAR(self->by_id);
  Py_CLEAR(self->leaves);
  Py_CLEAR(self->dense_leaves);
  Py_CLEAR(self->occurrences);
  Py_CLEAR(self->known);
}

// Lane(parameters, dense, sites): sites are (position, op, kind, key, settled).
PyObject* lane_new(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *parameters, *dense, *sites;
  if (!PyArg_ParseTuple(args, "O!O!O!", &PyList_Type, &parameters, &PyList_Type, &dense,
                        &PyList_Type, &sites))
    return nullptr;
  THPObjectPtr object(type->tp_alloc(type, 0));
  if (!object) return nullptr;
  Lane* self = reinterpret_cast<Lane*>(object.get());
  self->parameters = new std::unordered_map<PyObject*, Parameter>;
  self->dense = new std::vector<PyObject*>;
  self->calls = new std::shared_ptr<Calls>(std::make_shared<Calls>());
  self->forward = new std::shared_ptr<Forward>;
  self->rows = new std::vector<Rows>;
  self->kinds = new std::vector<std::string>;
  self->list = PySequence_List(parameters);
  if (!self->list) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dense); ++i) {
    const long position = PyLong_AsLong(PyList_GET_ITEM(dense, i));
    if (PyErr_Occurred()) return nullptr;
    PyObject* value = PyList_GetItem(self->list, position);
    if (!value) return nullptr;
    self->dense->push_back(value);
    self->parameters->try_emplace(value);
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(sites); ++i) {
    long position, op;
    const char* kind;
    PyObject* key;
    long long settled;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(sites, i), "llsOL", &position, &op, &kind, &key,
                          &settled))
      return nullptr;
    PyObject* value = PyList_GetItem(self->list, position);
    if (!value) return nullptr;
    Parameter& parameter = (*self->parameters)[value];
    TORCH_CHECK(op >= 0 && op < kNumOps, "Lane: no such op");
    Site& site = parameter.sites[op][kind];
    Py_INCREF(key);
    site.key = key;
    site.settled = settled;
  }
  return object.release();
  END_HANDLE_TH_ERRORS
}

int lane_traverse(PyObject* object, visitproc visit, void* arg) {
  Lane* self = reinterpret_cast<Lane*>(object);
  Py_VISIT(Py_TYPE(object));
  for (PyObject* held : {self->list, self->by_id, self->leaves, self->dense_leaves,
                         self->occurrences, self->known})
    Py_VISIT(held);
  if (self->rows)
    for (const Rows& rows : *self->rows) Py_VISIT(rows.layout);
  if (!self->parameters) return 0;
  for (const auto& [value, parameter] : *self->parameters) {
    Py_VISIT(parameter.root.get());
    Py_VISIT(parameter.entry.get());  // other members are numbers and names
  }
  return 0;
}

int lane_clear(PyObject* object) {
  Lane* self = reinterpret_cast<Lane*>(object);
  forget(self);
  if (self->parameters) self->parameters->clear();
  if (self->dense) self->dense->clear();
  Py_CLEAR(self->list);
  return 0;
}

void lane_dealloc(PyObject* object) {
  Lane* self = reinterpret_cast<Lane*>(object);
  PyObject_GC_UnTrack(object);
  forget(self);
  delete self->parameters;
  delete self->dense;
  delete self->forward;
  delete self->rows;
  delete self->kinds;
  delete self->calls;
  Py_CLEAR(self->list);
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

bool add_rows(Lane* self, PyObject* kind, PyObject* layout) {
  THPObjectPtr groups(PyObject_GetAttrString(layout, "groups"));
  if (!groups) return false;
  THPObjectPtr ids(PyObject_GetAttrString(groups.get(), "ids"));
  THPObjectPtr offsets(PyObject_GetAttrString(groups.get(), "offsets"));
  THPObjectPtr order(PyObject_GetAttrString(groups.get(), "order"));
  if (!ids || !offsets || !order) return false;
  TORCH_CHECK(PyTuple_Check(offsets.get()), "Lane: offsets are no tuple");
  auto found = std::make_shared<Groups>();
  found->ids = THPVariable_Unpack(ids.get()).contiguous();
  if (order.get() != Py_None) found->order = THPVariable_Unpack(order.get());
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(offsets.get()); ++i)
    found->offsets.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(offsets.get(), i)));
  const char* name = PyUnicode_AsUTF8(kind);
  if (!name || PyErr_Occurred()) return false;
  Py_INCREF(layout);
  self->rows->push_back({std::move(found), layout, groups.get()});
  self->kinds->push_back(name);
  return true;
}

bool is_served(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.layout() == at::kStrided && !tensor.is_conj() &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

// Leaves [S, ...] of stride 0 along S, without memory, and detached tensors: see leaves.py.
bool prepare(Lane* self, Parameter& parameter, PyObject* value, int64_t strata,
             PyObject* prepared, bool is_dense) {
  parameter.tensor = THPVariable_Unpack(value);  // it may have been converted since
  if (!is_served(parameter.tensor)) return true;
  c10::TensorImpl* impl = parameter.tensor.unsafeGetTensorImpl();
  parameter.detached = parameter.tensor.tensor_data();
  std::vector<int64_t> sizes = parameter.tensor.sizes().vec();
  std::vector<int64_t> strides = parameter.tensor.strides().vec();
  sizes.insert(sizes.begin(), strata);
  strides.insert(strides.begin(), 0);
  auto expanded = impl->shallow_copy_and_detach(impl->version_counter(), true);
  expanded->set_sizes_and_strides(sizes, strides);
  parameter.leaf = at::Tensor(std::move(expanded)).set_requires_grad(true);
  THPObjectPtr id(PyLong_FromVoidPtr(value));
  if (!id) return false;
  parameter.root = Py_XNewRef(PyDict_GetItemWithError(self->by_id, id.get()));
  if (!parameter.root) return false;
  THPObjectPtr detached(THPVariable_Wrap(parameter.detached));
  if (!detached || PyObject_SetAttrString(parameter.root, "_detached", detached.get()) != 0)
    return false;
  if (!is_dense) return true;
  THPObjectPtr leaf(THPVariable_Wrap(parameter.leaf));
  parameter.key = PyLong_FromVoidPtr(parameter.root);
  if (!leaf || !parameter.key) return false;
  parameter.entry = PyTuple_Pack(2, parameter.root.get(), leaf.get());
  return parameter.entry && PyDict_SetItem(prepared, parameter.key.get(), leaf.get()) == 0;
}

bool begin(Lane* self, PyObject* args) {
  PyObject *by_id, *leaves, *dense_leaves, *prepared, *occurrences, *known, *rows;
  long long strata;
  if (!PyArg_ParseTuple(args, "O!OO!O!O!O!LO!", &PyDict_Type, &by_id, &leaves, &PyDict_Type,
                        &dense_leaves, &PyDict_Type, &prepared, &PyDict_Type, &occurrences,
                        &PyDict_Type, &known, &strata, &PyList_Type, &rows))
    return false;
  forget(self);
  self->by_id = Py_NewRef(by_id);
  self->leaves = Py_NewRef(leaves);
  self->dense_leaves = Py_NewRef(dense_leaves);
  self->occurrences = Py_NewRef(occurrences);
  self->known = Py_NewRef(known);
  self->is_paused = false;
  self->is_shared = false;
  *self->forward = std::make_shared<Forward>();
  (*self->forward)->calls = *self->calls;
  (*self->forward)->refuse = &refuse;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(rows); ++i) {
    PyObject *kind, *layout;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(rows, i), "OO", &kind, &layout)) return false;
    if (!add_rows(self, kind, layout)) return false;
  }
  if (sees_every_op()) return true;  // nothing is ready: Python makes what is needed
  for (PyObject* value : *self->dense)
    if (!prepare(self, (*self->parameters)[value], value, strata, prepared, true)) return false;
  for (auto& entry : *self->parameters)
    if (!entry.second.leaf.defined() &&
        !prepare(self, entry.second, entry.first, strata, prepared, false))
      return false;
  return true;
}

// begin(by_id, leaves, dense leaves, prepared leaves, occurrences, known, strata, [(kind, layout)])
PyObject* lane_begin(PyObject* object, PyObject* args) {
  HANDLE_TH_ERRORS
  Lane* self = reinterpret_cast<Lane*>(object);
  auto forget_failed = c10::make_scope_exit([self] { forget(self); });
  if (!begin(self, args)) return nullptr;
  forget_failed.release();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* lane_end(PyObject* object, PyObject*) {
  forget(reinterpret_cast<Lane*>(object));
  Py_RETURN_NONE;
}

// expect(): the backward of the last forward is the aggregator's from now on.
PyObject* lane_expect(PyObject* object, PyObject*) {
  Lane* self = reinterpret_cast<Lane*>(object);
  if (*self->forward) (*self->forward)->is_expected = true;
  Py_RETURN_NONE;
}

// pause(whether): Python decides everything for a while; returns whether it did before.
PyObject* lane_pause(PyObject* object, PyObject* value) {
  Lane* self = reinterpret_cast<Lane*>(object);
  const int is_paused = PyObject_IsTrue(value);
  if (is_paused < 0) return nullptr;
  return PyBool_FromLong(std::exchange(self->is_paused, is_paused != 0));
}

// layout_of(node): the layout that a boundary made here notes, or None.
PyObject* lane_layout_of(PyObject* object, PyObject* node) {
  HANDLE_TH_ERRORS
  Lane* self = reinterpret_cast<Lane*>(object);
  if (torch::autograd::THPCppFunction_Check(node)) {
    const auto* found = dynamic_cast<const Boundary*>(
        reinterpret_cast<torch::autograd::THPCppFunction*>(node)->cdata.get());
    if (found && found->forward == *self->forward && !self->rows->empty())
      return Py_NewRef((*self->rows)[found->kind].layout);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// take_calls(): how often the kernels of linear layers and of norms ran since the last time.
PyObject* lane_take_calls(PyObject* object, PyObject*) {
  Calls* calls = reinterpret_cast<Lane*>(object)->calls->get();
  return Py_BuildValue("(LL)", static_cast<long long>(calls->linear.exchange(0)),
                       static_cast<long long>(calls->norm.exchange(0)));
}

PyMethodDef lane_methods[] = {
    {"begin", lane_begin, METH_VARARGS, nullptr},
    {"end", lane_end, METH_NOARGS, nullptr},
    {"expect", lane_expect, METH_NOARGS, nullptr},
    {"pause", lane_pause, METH_O, nullptr},
    {"layout_of", lane_layout_of, METH_O, nullptr},
    {"take_calls", lane_take_calls, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot lane_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(lane_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(lane_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(lane_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(lane_clear)},
    {Py_tp_methods, lane_methods},
    {0, nullptr},
};

PyType_Spec lane_spec = {"pinet_fast._lane.Lane", sizeof(Lane), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, lane_slots};

// The module --------------------------------------------------------------------------------------

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

// configure(slow, set_shared, refuse, gradient calls, functions, names of nodes, names of nodes)
PyObject* configure(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *slow, *set_shared, *refuse, *calls, *same, *readers;
  PyObject *linear, *layer_norm, *embedding, *torch_layer_norm, *torch_embedding;
  if (!PyArg_ParseTuple(args, "OOOO(OOOOO)OO", &slow, &set_shared, &refuse, &calls, &linear,
                        &layer_norm, &embedding, &torch_layer_norm, &torch_embedding, &same,
                        &readers))
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
  if (!read_names(same, names.nodes.same_shape)) return nullptr;
  if (!read_names(readers, names.nodes.readers)) return nullptr;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef torch_function_def = {
    "__torch_function__",
    reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(torch_function)), METH_FASTCALL,
    nullptr};

PyMethodDef module_methods[] = {
    {"configure", configure, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_lane", nullptr, -1, module_methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace pinet

PyMODINIT_FUNC PINET_LANE_INIT() {
  THPObjectPtr module(PyModule_Create(&pinet::module_def));
  if (!module) return nullptr;
  THPObjectPtr type(PyType_FromSpec(&pinet::lane_spec));
  if (!type || PyModule_AddObjectRef(module, "Lane", type) != 0) return nullptr;
  pinet::lane_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type.get()));
  THPObjectPtr function(PyCFunction_New(&pinet::torch_function_def, nullptr));
  if (!function) return nullptr;
  THPObjectPtr method(PyInstanceMethod_New(function));
  if (!method || PyModule_AddObjectRef(module, "torch_function", method) != 0) return nullptr;
  return module.release();
}
