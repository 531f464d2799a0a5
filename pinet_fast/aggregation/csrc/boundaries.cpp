// Boundaries of layers, sums and products: which calls are decided, and their nodes.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "lane.h"

namespace pinet {
namespace {

// Not THPVariable_Check, which asks the metaclass about everything that is none: 0.3 us for a tuple of
// arguments.
bool is_tensor(PyObject* value) {
  return THPVariable_CheckExact(value) ||
         PyType_IsSubtype(Py_TYPE(value), reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// 1: value is a root; 0: it is not; -1: an error.
int is_root(const Lane* lane, PyObject* value) {
  THPObjectPtr id(PyLong_FromVoidPtr(value));
  return id ? PyDict_Contains(lane->by_id, id.get()) : -1;
}

}  // namespace

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
    found = meets_root(lane, THPObjectPtr(Py_NewRef(item)));  // a finalizer may change the list
  }
  return found;
}

bool sees_every_op() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer);
}

namespace {

// Modes of others hold more of the stack than the lane's.
bool is_plain_context(const Lane* lane) {
  return !at::autocast::is_autocast_enabled(at::kCPU) && !sees_every_op() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == lane->depth &&
         !at::SavedTensorDefaultHooks::get_hooks(true).has_value();
}

bool is_row_count(const Lane* lane, int64_t size) {
  for (const Rows& rows : *lane->rows)
    if (rows.groups->num_rows() == size) return true;
  return false;
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
Site* settled_site(const Lane* lane, Parameter& parameter, Op op, int kind) {
  Site& site = parameter.sites[op][(*lane->rows)[kind].kind];
  if (!site.key) return nullptr;
  if (site.stamp != lane->stamp) {
    PyObject* count = PyDict_GET_SIZE(lane->occurrences)
                          ? PyDict_GetItemWithError(lane->occurrences, site.key.get())
                          : nullptr;
    site.seen = count ? PyLong_AsLongLong(count) + 1 : 0;
    if (PyErr_Occurred()) return nullptr;
    site.stamp = lane->stamp;
  }
  return site.seen < site.settled ? &site : nullptr;
}

void count_use(Lane* lane, Site& site) {
  ++site.seen;
  if (!site.is_untold) lane->untold->push_back(&site);
  site.is_untold = true;
}

// Subclasses, nested tensors and those with tangents have ideas of their own.
bool is_plain(PyObject* value, const at::Tensor& tensor) {
  return THPVariable_CheckExact(value) && tensor.is_cpu() && tensor.layout() == at::kStrided &&
         !tensor.is_nested() && !tensor._fw_grad(0).defined();
}

bool is_ready(const Lane* lane, PyObject* value, const at::Tensor& tensor) {
  return !lane->is_shared && PyDict_GET_SIZE(lane->known) == 0 && is_plain(value, tensor) &&
         is_plain_context(lane);
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
  if (!is_tensor(input) || weight == bias) return nullptr;
  const at::Tensor& rows = THPVariable_Unpack(input);
  if (!is_ready(lane, input, rows) || meets_root(lane, input) != 0) return nullptr;
  Parameter* w = parameter_of(lane, weight, true);
  if (w == nullptr) return nullptr;
  Parameter* b = bias == Py_None ? nullptr : parameter_of(lane, bias, true);
  if (bias != Py_None && b == nullptr) return nullptr;
  if (rows.dim() != 2 || rows.scalar_type() != w->detached.scalar_type()) return nullptr;
  if (b && b->detached.scalar_type() != rows.scalar_type()) return nullptr;
  if (w->detached.dim() != (op == kLinear ? 2 : 1) || rows.size(1) != w->detached.size(-1))
    return nullptr;
  const int kind = kind_of(lane, rows, rows.size(0));
  if (kind < 0) return nullptr;
  Site* w_site = settled_site(lane, *w, op, kind);
  Site* b_site = b ? settled_site(lane, *b, op, kind) : nullptr;
  if (w_site == nullptr || (b && b_site == nullptr)) return nullptr;
  const auto& groups = (*lane->rows)[kind].groups;
  at::Tensor out;
  if (op == kLinear) {
    LongCall call(rows.size(0) * w->detached.numel());
    out = linear(rows, w->detached, b ? std::optional(b->detached) : std::nullopt, w->leaf,
                 b ? b->leaf : at::Tensor(), *lane->forward, groups, kind);
  } else {
    LongCall call(rows.numel());
    out = layer_norm(rows, w->detached, b->detached, eps, w->leaf, b->leaf, *lane->forward, groups,
                     kind);
  }
  if (!use_dense(lane, *w) || (b && !use_dense(lane, *b))) return nullptr;
  count_use(lane, *w_site);
  if (b) count_use(lane, *b_site);
  return THPVariable_Wrap(std::move(out));
}

// F.linear(rows, weight, bias), as nn.Linear calls it.
PyObject* try_linear(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 3 || (kwargs && PyDict_GET_SIZE(kwargs))) return nullptr;
  return linear_boundary(lane, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1),
                         PyTuple_GET_ITEM(args, 2));
}

PyObject* keyword(PyObject* kwargs, const char* name) {
  THPObjectPtr key(PyUnicode_InternFromString(name));
  return key ? PyDict_GetItemWithError(kwargs, key.get()) : nullptr;
}

}  // namespace

PyObject* linear_boundary(Lane* lane, PyObject* input, PyObject* weight, PyObject* bias) {
  return dense_boundary(lane, kLinear, input, weight, bias, 0.0);
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

namespace {

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
PyObject* padded_boundary(Lane* lane, PyObject* input, PyObject* weight, PyObject* padding) {
  if (!is_tensor(input)) return nullptr;
  const at::Tensor& ids = THPVariable_Unpack(input);
  if (!is_ready(lane, input, ids) || meets_root(lane, input) != 0) return nullptr;
  Parameter* table = parameter_of(lane, weight, false);
  if (table == nullptr) return nullptr;
  if (ids.scalar_type() != at::kLong || ids.dim() < 1 || ids.dim() > 2) return nullptr;
  if (table->detached.dim() != 2 || ids.numel() == 0) return nullptr;
  const int kind = kind_of(lane, ids, ids.size(0));
  if (kind < 0) return nullptr;
  if (ids.dim() == 2)  // a second dimension of a batch's size: which one holds the rows?
    if (is_row_count(lane, ids.size(1))) return nullptr;
  Site* site = settled_site(lane, *table, kEmbedding, kind);
  if (site == nullptr) return nullptr;
  int64_t padding_idx = -1;
  if (padding != Py_None) {
    const int64_t items = table->detached.size(0);
    padding_idx = PyLong_AsLongLong(padding);
    if (PyErr_Occurred() || padding_idx < -items || padding_idx >= items) return nullptr;
    if (padding_idx < 0) padding_idx += items;
  }
  const auto& groups = (*lane->rows)[kind].groups;
  at::Tensor leaf = table->leaf.variable_data().set_requires_grad(true);  // of this use alone
  at::Tensor out;
  {
    LongCall call(ids.numel() * table->detached.size(1));
    out = embedding(ids, table->detached, padding_idx, leaf, *lane->forward, groups, kind);
  }
  THPObjectPtr wrapped(THPVariable_Wrap(std::move(leaf)));
  if (!wrapped) return nullptr;
  THPObjectPtr done(PyObject_CallMethod(lane->leaves, "adopt_lookup", "OO", table->root.get(),
                                        wrapped.get()));
  if (!done) return nullptr;
  count_use(lane, *site);
  return THPVariable_Wrap(std::move(out));
}

// F.embedding(ids, table, padding_idx=, ...), as it hands itself to modes.
PyObject* try_embedding(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 2 || !kwargs || PyDict_GET_SIZE(kwargs) != 5) return nullptr;
  PyObject* padding = keyword(kwargs, "padding_idx");
  if (!padding || keyword(kwargs, "max_norm") != Py_None) return nullptr;
  if (keyword(kwargs, "scale_grad_by_freq") != Py_False || keyword(kwargs, "sparse") != Py_False)
    return nullptr;
  return padded_boundary(lane, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1), padding);
}

// torch.embedding(table, ids, padding_idx)
PyObject* try_torch_embedding(Lane* lane, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 3 || (kwargs && PyDict_GET_SIZE(kwargs))) return nullptr;
  return lookup_boundary(lane, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1),
                         PyTuple_GET_ITEM(args, 2));
}

}  // namespace

// A padding below 0 is none.
PyObject* lookup_boundary(Lane* lane, PyObject* table, PyObject* ids, PyObject* padding) {
  if (!PyLong_Check(padding)) return nullptr;
  if (PyLong_AsLongLong(padding) < 0) padding = Py_None;
  return padded_boundary(lane, ids, table, padding);
}

namespace {

// The dimensions of rows [N, ...] that a parameter is repeated along, dimension 0 left out; none at
// all where it is not one for every row alike, or where rows could lie in another dimension too.
std::optional<std::vector<int64_t>> repeated_dims(const Lane* lane, const at::Tensor& parameter,
                                                  const at::Tensor& rows) {
  const int64_t extra = rows.dim() - parameter.dim();
  if (rows.dim() == 0 || extra < 0 || (extra == 0 && parameter.size(0) != 1)) return std::nullopt;
  std::vector<int64_t> repeated;
  for (int64_t dim = 1; dim < rows.dim(); ++dim) {
    const int64_t own = dim < extra ? 1 : parameter.size(dim - extra), size = rows.size(dim);
    if (own == 1 ? is_row_count(lane, size) : own != size) return std::nullopt;
    if (own != size) repeated.push_back(dim);
  }
  return repeated;
}

// rows + parameter or rows * parameter, whichever side is which.
PyObject* try_broadcast(Lane* lane, Op op, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) != 2 || (kwargs && PyDict_GET_SIZE(kwargs))) return nullptr;
  PyObject *input = PyTuple_GET_ITEM(args, 0), *value = PyTuple_GET_ITEM(args, 1);
  const bool is_first = lane->parameters->count(input) != 0;
  if (is_first) std::swap(input, value);
  // A frozen parameter holds no rows, though it may be as long.
  if (Py_TYPE(input) != reinterpret_cast<PyTypeObject*>(THPVariableClass)) return nullptr;
  const at::Tensor& rows = THPVariable_Unpack(input);
  if (!is_ready(lane, input, rows) || meets_root(lane, input) != 0) return nullptr;
  Parameter* parameter = parameter_of(lane, value, true);
  if (parameter == nullptr) return nullptr;
  if (rows.scalar_type() != parameter->detached.scalar_type()) return nullptr;
  if (rows.numel() == 0) return nullptr;
  const auto repeated = repeated_dims(lane, parameter->detached, rows);
  if (!repeated) return nullptr;
  const int kind = kind_of(lane, rows, rows.size(0));
  if (kind < 0) return nullptr;
  Site* site = settled_site(lane, *parameter, op, kind);
  if (site == nullptr) return nullptr;
  at::Tensor out;
  {
    LongCall call(rows.numel());
    out = broadcast(rows, parameter->detached, op == kProduct, is_first, *repeated,
                    parameter->leaf, *lane->forward, (*lane->rows)[kind].groups, kind);
  }
  if (!use_dense(lane, *parameter)) return nullptr;
  count_use(lane, *site);
  return THPVariable_Wrap(std::move(out));
}

bool is_among(PyObject* func, PyObject* functions) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(functions); ++i)
    if (PyTuple_GET_ITEM(functions, i) == func) return true;
  return false;
}

}  // namespace

bool tell_uses(Lane* lane) {
  for (Site* site : *lane->untold) {
    THPObjectPtr latest(PyLong_FromLongLong(site->seen - 1));
    if (!latest || PyDict_SetItem(lane->occurrences, site->key.get(), latest.get()) != 0)
      return false;
    site->is_untold = false;
  }
  lane->untold->clear();
  ++lane->stamp;
  return true;
}

PyObject* boundary(Lane* lane, PyObject* func, PyObject* args, PyObject* kwargs) {
  if (func == names.linear) return try_linear(lane, args, kwargs);
  if (func == names.layer_norm) return try_layer_norm(lane, args, kwargs);
  if (func == names.torch_layer_norm) return try_torch_layer_norm(lane, args, kwargs);
  if (func == names.embedding) return try_embedding(lane, args, kwargs);
  if (func == names.torch_embedding) return try_torch_embedding(lane, args, kwargs);
  if (is_among(func, names.sums)) return try_broadcast(lane, kSum, args, kwargs);
  if (is_among(func, names.products)) return try_broadcast(lane, kProduct, args, kwargs);
  return nullptr;
}

}  // namespace pinet
