// What a forward has told the lane, and what its parts ask of each other.

#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/python_headers.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "nodes.h"
#include "trace.h"

namespace pinet {

enum Op { kLinear, kLayerNorm, kEmbedding, kNumOps };

// Uses of one parameter by one op, with rows of one kind.
struct Site {
  THPObjectPtr key;      // (sources, op, kind, dim), as the occurrences are counted
  int64_t settled = 0;   // occurrences 0..settled - 1 need no proof
};

// A parameter, and what forwards make for it: kept from one to the next where nobody else has it.
struct Parameter {
  at::Tensor tensor;  // of this forward
  at::Tensor detached, leaf;
  const c10::TensorImpl* made_from = nullptr;  // whose values are detached; it may be gone
  THPObjectPtr root;
  THPObjectPtr key, entry;  // id(root) and (root, leaf), as the leaves keep them
  std::array<Py_ssize_t, 2> held{};  // counts of references to a leaf that nobody uses
  bool is_dense = false;
  // sites[op][kind of the forward's rows]; kinds by name
  std::array<std::unordered_map<std::string, Site>, kNumOps> sites;
};

// What Python has told of itself; kept for the life of the process.
struct Names {
  PyObject *set_shared, *slow, *refuse, *gradient_calls;
  PyObject *linear, *layer_norm, *embedding, *torch_layer_norm, *torch_embedding;
  NodeNames nodes;
};

extern Names names;

struct Lane {
  PyObject_HEAD
  std::unordered_map<PyObject*, Parameter>* parameters;  // keys are kept alive by the list
  PyObject* list;
  std::shared_ptr<Calls>* calls;
  // Of the forward that runs:
  std::shared_ptr<Forward>* forward;
  std::vector<Rows>* rows;
  std::vector<std::string>* kinds;
  PyObject *by_id, *leaves, *dense_leaves, *occurrences, *known;
  bool is_paused;
  bool is_shared;
};

// The type of lanes; a new reference, kept for the life of the process.
PyTypeObject* make_lane_type();

// 1: a root, or a view of one, is among values, so that Python looks closer; 0: none; -1: an error.
int meets_root(const Lane* lane, PyObject* value);

// Whether jit.trace, a transform or a dispatch mode is to see every op: then nothing is made here.
bool sees_every_op();

// The result of a call that is a boundary, made here; null without an error: Python decides.
PyObject* boundary(Lane* lane, PyObject* func, PyObject* args, PyObject* kwargs);

}  // namespace pinet
