#include "gradients.h"

#include <ATen/ATen.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <vector>

#include "lane.h"
#include "ops.h"

namespace pinet {
namespace {

constexpr int64_t kMaxStrata = 64;  // as in kernels/stratum_solve/_cpp.py

// And nobody's subclass.
bool is_served(PyObject* value) {
  return THPVariable_CheckExact(value) && pinet::is_served(THPVariable_Unpack(value));
}

bool holds_nothing(PyObject* value) {
  if (!THPVariable_CheckExact(value)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  namespace impl = torch::autograd::impl;
  if (impl::get_autograd_meta(tensor) == nullptr) return true;
  return !tensor.grad().defined() && impl::hooks(tensor).empty() &&
         impl::post_acc_grad_hooks(tensor) == nullptr;
}

// holds_nothing(parameters): whether none has a gradient or hooks.
PyObject* list_holds_nothing(PyObject*, PyObject* parameters) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(parameters), "holds_nothing: expected a list");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(parameters); ++i)
    if (!holds_nothing(PyList_GET_ITEM(parameters, i))) Py_RETURN_FALSE;
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// The position of the parameter that a root is; -1: it is derived, or has no single one.
long source_of(PyObject* root) {
  static PyObject* is_parameter = PyUnicode_InternFromString("is_parameter");
  static PyObject* sources = PyUnicode_InternFromString("sources");
  THPObjectPtr is_own(PyObject_GetAttr(root, is_parameter));
  if (!is_own) throw python_error();
  if (is_own.get() != Py_True) return -1;
  THPObjectPtr positions(PyObject_GetAttr(root, sources));
  if (!positions) throw python_error();
  if (!PyTuple_Check(positions.get()) || PyTuple_GET_SIZE(positions.get()) != 1) return -1;
  const long position = PyLong_AsLong(PyTuple_GET_ITEM(positions.get(), 0));
  if (PyErr_Occurred()) throw python_error();
  return position;
}

// One number a stratum: of a tuple of Python's, or ones for None.
std::vector<double> numbers_of(PyObject* values, Py_ssize_t count) {
  std::vector<double> numbers(count, 1.0);
  if (values == Py_None) return numbers;
  TORCH_CHECK_VALUE(PyTuple_Check(values) && PyTuple_GET_SIZE(values) == count,
                    "mean_losses: expected a tuple of one number a stratum");
  for (Py_ssize_t s = 0; s < count; ++s) {
    numbers[s] = PyFloat_AsDouble(PyTuple_GET_ITEM(values, s));
    if (PyErr_Occurred()) throw python_error();
  }
  return numbers;
}

// As `StratumLosses.reduce` has it: sums in float64, row by row; factors rounded to T first.
template <class T>
void reduce_losses(const at::Tensor& losses, const at::Tensor& ids,
                   const std::vector<double>& counts, const std::vector<double>& cotangents,
                   at::Tensor& means, at::Tensor& by_row) {
  const auto strata = static_cast<int64_t>(counts.size());
  std::vector<double> sums(strata, 0.0);
  std::vector<T> inverse(strata), of_row(strata);
  for (int64_t s = 0; s < strata; ++s) {
    inverse[s] = static_cast<T>(1.0 / std::max(counts[s], 1.0));
    of_row[s] = static_cast<T>(cotangents[s]) * inverse[s];
  }
  const T* loss = losses.const_data_ptr<T>();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  T* row = by_row.mutable_data_ptr<T>();
  for (int64_t n = 0; n < losses.numel(); ++n) {
    TORCH_CHECK_INDEX(id[n] >= 0 && id[n] < strata, "mean_losses: a stratum is out of range");
    sums[id[n]] += loss[n];
    row[n] = of_row[id[n]];
  }
  T* mean = means.mutable_data_ptr<T>();
  for (int64_t s = 0; s < strata; ++s) mean[s] = static_cast<T>(sums[s] * inverse[s]);
}

// mean_losses(losses, ids, rows of every stratum, cotangents or None): the means without graph [S],
// and the gradient of the losses [N]; None where Python is to do it.
PyObject* mean_losses(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *losses, *ids, *counts, *cotangents;
  if (!PyArg_ParseTuple(args, "OOO!O", &losses, &ids, &PyTuple_Type, &counts, &cotangents))
    return nullptr;
  if (!is_served(losses) || !THPVariable_CheckExact(ids) || sees_every_op()) Py_RETURN_NONE;
  const at::Tensor& of_rows = THPVariable_Unpack(losses);
  const at::Tensor& strata = THPVariable_Unpack(ids);
  if (of_rows.dim() != 1 || !of_rows.is_contiguous() || !strata.is_cpu() ||
      strata.scalar_type() != at::kLong || !strata.is_contiguous() ||
      strata.sizes() != of_rows.sizes())
    Py_RETURN_NONE;
  const Py_ssize_t count = PyTuple_GET_SIZE(counts);
  const std::vector<double> rows = numbers_of(counts, count), given = numbers_of(cotangents, count);
  at::Tensor means = at::empty({count}, of_rows.options());
  at::Tensor by_row = at::empty(of_rows.sizes(), of_rows.options());
  if (of_rows.scalar_type() == at::kDouble) {
    reduce_losses<double>(of_rows, strata, rows, given, means, by_row);
  } else {
    reduce_losses<float>(of_rows, strata, rows, given, means, by_row);
  }
  THPObjectPtr first(THPVariable_Wrap(std::move(means)));
  THPObjectPtr second(THPVariable_Wrap(std::move(by_row)));
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

// take_gradients(dense leaves, P): takes the gradients of dense leaves, by parameter; None where
// one is sparse, of something derived, or one of two, and then all stay where they are.
PyObject* take_gradients(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject* leaves;
  Py_ssize_t count;
  if (!PyArg_ParseTuple(args, "O!n", &PyDict_Type, &leaves, &count)) return nullptr;
  std::vector<const at::Tensor*> of(count, nullptr);
  PyObject *key, *entry;
  for (Py_ssize_t at = 0; PyDict_Next(leaves, &at, &key, &entry);) {
    TORCH_CHECK_TYPE(PyTuple_Check(entry) && PyTuple_GET_SIZE(entry) == 2 &&
                         THPVariable_Check(PyTuple_GET_ITEM(entry, 1)),
                     "take_gradients: expected (root, leaf)");
    const at::Tensor& leaf = THPVariable_Unpack(PyTuple_GET_ITEM(entry, 1));
    const at::Tensor& grad = leaf.grad();
    if (!grad.defined()) continue;
    const long source = source_of(PyTuple_GET_ITEM(entry, 0));
    if (source < 0 || source >= count || of[source] != nullptr || grad.layout() != at::kStrided)
      Py_RETURN_NONE;
    of[source] = &leaf;
  }
  THPObjectPtr taken(PyList_New(count));
  if (!taken) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = of[i] ? THPVariable_Wrap(of[i]->grad()) : Py_NewRef(Py_None);
    if (!item) return nullptr;
    PyList_SET_ITEM(taken.get(), i, item);
  }
  for (const at::Tensor* leaf : of)
    if (leaf) leaf->mutable_grad() = at::Tensor();
  return taken.release();
  END_HANDLE_TH_ERRORS
}

// reduce(lookups): the sums of gradients of lookups in one table, sparse [S, V, ...] over (stratum,
// item), as the op `stratified_embedding_reduce` gives them: rows, values, touched. None where the
// compiled kernel does not serve, or something is wrong.
PyObject* reduce(PyObject*, PyObject* list) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(list), "reduce: expected a list");
  const Py_ssize_t count = PyList_GET_SIZE(list);
  if (count == 0 || sees_every_op()) Py_RETURN_NONE;
  std::vector<at::Tensor> ids, strata, values;
  int64_t num_strata = 0, num_rows = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = PyList_GET_ITEM(list, i);
    if (!THPVariable_CheckExact(value)) Py_RETURN_NONE;
    const at::Tensor& lookup = THPVariable_Unpack(value);
    if (lookup.layout() != at::kSparse || !lookup.is_cpu() || lookup.sparse_dim() != 2)
      Py_RETURN_NONE;
    if (i > 0 && (lookup.size(0) != num_strata || lookup.size(1) != num_rows)) Py_RETURN_NONE;
    num_strata = lookup.size(0);
    num_rows = lookup.size(1);
    const at::Tensor indices = lookup._indices();
    strata.push_back(indices.select(0, 0));
    ids.push_back(indices.select(0, 1));
    values.push_back(lookup._values());
    const at::ScalarType dtype = values[i].scalar_type();
    if ((dtype != at::kFloat && dtype != at::kDouble) || dtype != values[0].scalar_type() ||
        values[i].sizes().slice(1) != values[0].sizes().slice(1))
      Py_RETURN_NONE;
  }
  torch::jit::Stack found;
  try {
    at::NoGradGuard no_grad;
    pybind11::gil_scoped_release released;
    static const auto op = find("pinet_cpp::stratified_embedding_reduce");
    found = call(op, std::move(ids), std::move(strata), std::move(values), num_strata, num_rows);
  } catch (const std::exception&) {
    Py_RETURN_NONE;  // Python's says which entry is out of range
  }
  THPObjectPtr results(PyTuple_New(3));
  if (!results) return nullptr;
  for (int i = 0; i < 3; ++i) {
    PyObject* item = THPVariable_Wrap(found.at(i).toTensor());
    if (!item) return nullptr;
    PyTuple_SET_ITEM(results.get(), i, item);
  }
  return results.release();
  END_HANDLE_TH_ERRORS
}

// gram(gradients): the Gram of every parameter and of all, as the op `stratum_gram` and a sum over
// parameters give them; None where the compiled kernel does not serve.
PyObject* gram(PyObject*, PyObject* list) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(list), "gram: expected a list");
  const Py_ssize_t count = PyList_GET_SIZE(list);
  if (count == 0 || sees_every_op()) Py_RETURN_NONE;
  std::vector<at::Tensor> gradients;
  gradients.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = PyList_GET_ITEM(list, i);
    if (!is_served(value)) Py_RETURN_NONE;
    gradients.push_back(THPVariable_Unpack(value));
    if (gradients[i].dim() == 0 || gradients[i].size(0) == 0 ||
        gradients[i].size(0) != gradients[0].size(0))
      Py_RETURN_NONE;
  }
  const int64_t strata = gradients[0].size(0);
  at::Tensor grams, whole;
  {
    at::NoGradGuard no_grad;
    pybind11::gil_scoped_release released;
    grams = at::empty({count, strata, strata}, gradients[0].options().dtype(at::kDouble));
    static const auto op = find("pinet_cpp::stratum_gram");
    call(op, std::move(gradients), grams);
    whole = grams.sum(0);
  }
  THPObjectPtr first(THPVariable_Wrap(std::move(grams)));
  THPObjectPtr second(THPVariable_Wrap(std::move(whole)));
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

// Which strata are there, or nothing where Python says what is wrong.
std::optional<std::vector<int64_t>> kept_of(PyObject* present, int64_t strata) {
  std::vector<int64_t> kept;
  if (!PyList_Check(present) || PyList_GET_SIZE(present) != strata) return std::nullopt;
  for (int64_t s = 0; s < strata; ++s) {
    const int is_there = PyObject_IsTrue(PyList_GET_ITEM(present, s));
    if (is_there < 0) throw python_error();
    if (is_there) kept.push_back(s);
  }
  return kept.empty() ? std::nullopt : std::optional(std::move(kept));
}

// solve(gram, rule's number, present): the weights that the op `stratum_solve` gives; None where
// the compiled kernel does not serve, or something is wrong.
PyObject* solve(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *value, *present;
  long long rule;
  if (!PyArg_ParseTuple(args, "OLO", &value, &rule, &present)) return nullptr;
  if (!is_served(value) || sees_every_op()) Py_RETURN_NONE;
  const at::Tensor& gram = THPVariable_Unpack(value);
  const int64_t dim = gram.dim();
  if (gram.scalar_type() != at::kDouble || dim < 2 || dim > 3 || gram.numel() == 0 ||
      gram.size(-1) != gram.size(-2) || gram.size(-1) > kMaxStrata)
    Py_RETURN_NONE;
  const int64_t strata = gram.size(-1);
  auto kept = kept_of(present, strata);
  if (!kept) Py_RETURN_NONE;
  at::NoGradGuard no_grad;
  const at::Tensor out = at::empty(gram.sizes().slice(0, dim - 1), gram.options());
  static const auto op = find("pinet_cpp::stratum_solve");
  call(op, gram.reshape({-1, strata, strata}).contiguous(), static_cast<int64_t>(rule),
       std::move(*kept), 0.5, std::optional<at::Tensor>(), out.view({-1, strata}));
  return THPVariable_Wrap(out);
  END_HANDLE_TH_ERRORS
}

// Whether stratum gradients [S, ...], or [S, U, ...] of some rows, are a parameter's.
bool fits(const at::Tensor& gradient, const at::Tensor& parameter, const at::Tensor* rows) {
  if (gradient.scalar_type() != parameter.scalar_type() || parameter.layout() != at::kStrided ||
      !parameter.is_cpu() || gradient.dim() != parameter.dim() + 1)
    return false;
  for (int64_t d = 0; d < parameter.dim(); ++d) {
    const int64_t size = rows && d == 0 ? rows->numel() : parameter.size(d);
    if (gradient.size(d + 1) != size) return false;
  }
  return !rows || (parameter.dim() > 0 && rows->dim() == 1 && rows->scalar_type() == at::kLong &&
                   rows->is_cpu());
}

// What one call of the op `stratum_combine` takes.
struct Combined {
  std::vector<at::Tensor> parameters, gradients, outs, touched;
  std::vector<int64_t> row_of;

  // False where it is not for the compiled kernel.
  bool add(PyObject* parameter, PyObject* gradient, PyObject* rows) {
    if (!holds_nothing(parameter) || !is_served(gradient)) return false;
    const at::Tensor* own = nullptr;
    if (rows != Py_None) {
      if (!THPVariable_CheckExact(rows)) return false;
      own = &THPVariable_Unpack(rows);
    }
    const at::Tensor& of = THPVariable_Unpack(parameter);
    if (!fits(THPVariable_Unpack(gradient), of, own)) return false;
    parameters.push_back(of);
    gradients.push_back(THPVariable_Unpack(gradient));
    row_of.push_back(own ? static_cast<int64_t>(touched.size()) : -1);
    if (own) touched.push_back(own->contiguous());
    return true;
  }

  void run(const at::Tensor& weights) {
    for (const at::Tensor& parameter : parameters)
      outs.push_back(at::empty(parameter.sizes(), parameter.options()));
    static const auto op = find("pinet_cpp::stratum_combine");
    const at::Tensor by_row = weights.dim() == 1 ? weights.unsqueeze(0) : weights;
    call(op, gradients, by_row.contiguous(), std::optional<at::Tensor>(), outs,
         std::vector<int64_t>(outs.size(), 0), touched, row_of);
  }
};

// write(parameters, gradients, rows, weights): combines the stratum gradients of parameters that
// hold nothing, and returns what their `p.grad` is now; None where Python is to do it.
PyObject* write(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *parameters, *gradients, *rows, *weights;
  if (!PyArg_ParseTuple(args, "O!O!O!O", &PyList_Type, &parameters, &PyList_Type, &gradients,
                        &PyList_Type, &rows, &weights))
    return nullptr;
  const Py_ssize_t count = PyList_GET_SIZE(parameters);
  TORCH_CHECK_VALUE(PyList_GET_SIZE(gradients) == count && PyList_GET_SIZE(rows) == count,
                    "write: expected lists of one length");
  if (count == 0 || sees_every_op() || !is_served(weights)) Py_RETURN_NONE;
  const at::Tensor& factors = THPVariable_Unpack(weights);
  if (factors.scalar_type() != at::kDouble) Py_RETURN_NONE;
  Combined combined;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!combined.add(PyList_GET_ITEM(parameters, i), PyList_GET_ITEM(gradients, i),
                      PyList_GET_ITEM(rows, i)) ||
        combined.gradients[i].size(0) != factors.size(-1))
      Py_RETURN_NONE;
  if (factors.dim() != 1 && (factors.dim() != 2 || factors.size(0) != count)) Py_RETURN_NONE;
  {
    at::NoGradGuard no_grad;
    pybind11::gil_scoped_release released;
    combined.run(factors);
  }
  THPObjectPtr written(PyList_New(count));
  if (!written) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* out = THPVariable_Wrap(combined.outs[i]);
    if (!out) return nullptr;
    PyList_SET_ITEM(written.get(), i, out);
  }
  for (Py_ssize_t i = 0; i < count; ++i) combined.parameters[i].mutable_grad() = combined.outs[i];
  return written.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef gradient_methods[] = {
    {"holds_nothing", list_holds_nothing, METH_O, nullptr},
    {"mean_losses", mean_losses, METH_VARARGS, nullptr},
    {"take_gradients", take_gradients, METH_VARARGS, nullptr},
    {"gram", gram, METH_O, nullptr},
    {"reduce", reduce, METH_O, nullptr},
    {"solve", solve, METH_VARARGS, nullptr},
    {"write", write, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace pinet
