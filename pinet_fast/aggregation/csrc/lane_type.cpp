// The type Lane: what an aggregator keeps between forwards, and what one forward is told.

#include <c10/util/ScopeExit.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <utility>

#include "lane.h"

namespace pinet {

Lane* active = nullptr;

namespace {

void refuse() {
  pybind11::gil_scoped_acquire gil;
  THPObjectPtr done(PyObject_CallNoArgs(names.refuse));
  python_error error;
  error.persist();
  throw std::move(error);
}

// What belongs to a forward that has ended; what was made for parameters stays. So do its rows until
// the next one begins: replays in its backward ask for the layouts of nodes that were made here.
void end(Lane* self) {
  if (active == self) active = nullptr;
  Py_CLEAR(self->mode);
  if (self->untold) {
    for (Site* site : *self->untold) site->is_untold = false;
    self->untold->clear();
  }
  Py_CLEAR(self->by_id);
  Py_CLEAR(self->leaves);
  Py_CLEAR(self->dense_leaves);
  Py_CLEAR(self->occurrences);
  Py_CLEAR(self->known);
}

void forget(Lane* self) {
  end(self);
  if (!self->rows) return;
  for (Rows& rows : *self->rows) Py_CLEAR(rows.layout);
  self->rows->clear();
}

}  // namespace

const char* const kind_names[kNumKinds] = {"users", "events"};

int kind_code(const char* name) {
  for (int code = 0; code < kNumKinds; ++code)
    if (std::strcmp(name, kind_names[code]) == 0) return code;
  return -1;
}

namespace {

// Lane(parameters, sites): sites are (position, op, kind, key, settled).
PyObject* lane_new(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *parameters, *sites;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &parameters, &PyList_Type, &sites))
    return nullptr;
  THPObjectPtr object(type->tp_alloc(type, 0));
  if (!object) return nullptr;
  Lane* self = reinterpret_cast<Lane*>(object.get());
  self->parameters = new std::unordered_map<PyObject*, Parameter>;
  self->calls = new std::shared_ptr<Calls>(std::make_shared<Calls>());
  self->forward = new std::shared_ptr<Forward>;
  self->rows = new std::vector<Rows>;
  self->untold = new std::vector<Site*>;
  self->list = PySequence_List(parameters);
  if (!self->list) return nullptr;
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
    const int code = kind_code(kind);
    if (code < 0) continue;
    Site& site = parameter.sites[op][code];
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
                         self->occurrences, self->known, self->mode})
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
  Py_CLEAR(self->list);
  return 0;
}

void lane_dealloc(PyObject* object) {
  Lane* self = reinterpret_cast<Lane*>(object);
  PyObject_GC_UnTrack(object);
  forget(self);
  delete self->parameters;
  delete self->forward;
  delete self->rows;
  delete self->untold;
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
  const int code = kind_code(name);
  TORCH_CHECK(code >= 0, "Lane: no such kind of rows: ", name);
  Py_INCREF(layout);
  self->rows->push_back({std::move(found), code, layout, groups.get()});
  return true;
}

bool begin(Lane* self, PyObject* args) {
  PyObject *mode, *by_id, *leaves, *dense_leaves, *occurrences, *known, *rows;
  long long strata;
  int has_kernels, keeps_touched;
  if (!PyArg_ParseTuple(args, "OO!OO!O!O!LO!pp", &mode, &PyDict_Type, &by_id, &leaves, &PyDict_Type,
                        &dense_leaves, &PyDict_Type, &occurrences, &PyDict_Type, &known, &strata,
                        &PyList_Type, &rows, &has_kernels, &keeps_touched))
    return false;
  forget(self);
  self->by_id = Py_NewRef(by_id);
  self->leaves = Py_NewRef(leaves);
  self->dense_leaves = Py_NewRef(dense_leaves);
  self->occurrences = Py_NewRef(occurrences);
  self->known = Py_NewRef(known);
  self->mode = Py_NewRef(mode);
  active = self;
  ++self->number;
  ++self->stamp;
  self->strata = strata;
  self->is_paused = false;
  self->is_shared = false;
  *self->forward = std::make_shared<Forward>();
  (*self->forward)->calls = *self->calls;
  (*self->forward)->refuse = &refuse;
  (*self->forward)->has_kernels = has_kernels != 0;
  (*self->forward)->keeps_touched = keeps_touched != 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(rows); ++i) {
    PyObject *kind, *layout;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(rows, i), "OO", &kind, &layout)) return false;
    if (!add_rows(self, kind, layout)) return false;
  }
  drop_replaced(self);
  return true;
}

// begin(mode, by_id, leaves, dense leaves, occurrences, known, strata, [(kind, layout)], whether the
//       compiled kernels serve, whether lookups keep what they touched)
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
  end(reinterpret_cast<Lane*>(object));
  Py_RETURN_NONE;
}

// expect(whether): a backward of the last forward is the aggregator's from now on, or is not.
PyObject* lane_expect(PyObject* object, PyObject* value) {
  Lane* self = reinterpret_cast<Lane*>(object);
  const int is_expected = PyObject_IsTrue(value);
  if (is_expected < 0) return nullptr;
  if (*self->forward) (*self->forward)->is_expected = is_expected != 0;
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

// take_calls(): how often the kernels of linear layers, of norms, of lookups, and of sums and products
// ran since the last time.
PyObject* lane_take_calls(PyObject* object, PyObject*) {
  Calls* calls = reinterpret_cast<Lane*>(object)->calls->get();
  return Py_BuildValue("(LLLL)", static_cast<long long>(calls->linear.exchange(0)),
                       static_cast<long long>(calls->norm.exchange(0)),
                       static_cast<long long>(calls->lookup.exchange(0)),
                       static_cast<long long>(calls->sums.exchange(0)));
}

PyMethodDef lane_methods[] = {
    {"begin", lane_begin, METH_VARARGS, nullptr},
    {"end", lane_end, METH_NOARGS, nullptr},
    {"expect", lane_expect, METH_O, nullptr},
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

}  // namespace

PyTypeObject* make_lane_type() {
  return reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&lane_spec));
}

}  // namespace pinet
