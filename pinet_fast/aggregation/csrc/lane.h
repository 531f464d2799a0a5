// What a forward has told the lane, and what its parts ask of each other.

#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/python_headers.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <memory>
#include <unordered_map>
#include <vector>

#include "nodes.h"
#include "trace.h"

namespace pinet {

enum Op { kLinear, kLayerNorm, kEmbedding, kSum, kProduct, kNumOps };

// Uses of one parameter by one op, with rows of one kind.
struct Site {
  THPObjectPtr key;      // (sources, op, kind, dim), as the occurrences are counted
  int64_t settled = 0;   // occurrences 0..settled - 1 need no proof
  int64_t seen = 0;      // uses so far, if `stamp` is the lane's
  int64_t stamp = 0;
  bool is_untold = false;  // Python does not know of the latest
};

// Kinds of rows, by their place in `kind_names`.
constexpr int kNumKinds = 2;
extern const char* const kind_names[kNumKinds];

// The place of a kind among them, or -1.
int kind_code(const char* name);

// A parameter, and what the forwards that use it make for it: see parameters.cpp.
struct Parameter {
  at::Tensor detached, leaf;
  THPObjectPtr root;
  THPObjectPtr key, entry;  // id(root) and (root, leaf), as the leaves keep those of dense uses
  const c10::TensorImpl* made_from = nullptr;  // whose values are detached; it may be gone
  int64_t forward = 0;                         // the last forward that it is ready for
  std::array<std::array<Site, kNumKinds>, kNumOps> sites;
};

// What Python has told of itself; kept for the life of the process.
struct Names {
  PyObject *set_shared, *slow, *refuse, *gradient_calls;
  PyObject *linear, *layer_norm, *embedding, *torch_layer_norm, *torch_embedding;
  PyObject *sums, *products;  // tuples: torch.add and its like, torch.mul and its like
  NodeNames nodes;
};

extern Names names;

struct Lane {
  PyObject_HEAD
  std::unordered_map<PyObject*, Parameter>* parameters;  // keys are kept alive by the list
  PyObject* list;
  std::shared_ptr<Calls>* calls;
  // Of the forward that runs:
  int64_t number, strata;
  std::shared_ptr<Forward>* forward;
  std::vector<Rows>* rows;
  std::vector<Site*>* untold;
  int64_t stamp;  // counts the moments at which Python may have counted uses
  PyObject *by_id, *leaves, *dense_leaves, *occurrences, *known;
  PyObject* mode;  // the interception
  int64_t depth;   // modes on torch's stack where boundaries are made: 0, it is off; or itself alone
  bool is_paused;
  bool is_shared;
};

// The lane of the last forward that began and runs still; null where none does.
extern Lane* active;

// Layers of pinet_fast.models ask it at once (direct.cpp); Python's functions go through modes first.
extern PyMethodDef direct_methods[];

// Whether the kernels take a tensor like this: on a CPU, strided, float32 or float64.
bool is_served(const at::Tensor& tensor);

// Lets go of what was made for values that a parameter has no more: a model moved to a GPU, say.
void drop_replaced(Lane* lane);

// The parameter that a value is, ready for a use in this forward; null where it is none, where
// Python decides, and with an error set. A dense use has a leaf that the forward's others share.
Parameter* parameter_of(Lane* lane, PyObject* value, bool is_dense);

// Tells Python of uses made here, before it counts its own: each is the further use of the other's.
bool tell_uses(Lane* lane);

// Notes a dense use of a parameter that is ready for it.
bool use_dense(const Lane* lane, Parameter& parameter);

// The type of lanes; a new reference, kept for the life of the process.
PyTypeObject* make_lane_type();

// 1: a root, or a view of one, is among values, so that Python looks closer; 0: none; -1: an error.
int meets_root(const Lane* lane, PyObject* value);

// What one call becomes where nothing is left to decide; null without an error: Python decides.
PyObject* linear_boundary(Lane* lane, PyObject* input, PyObject* weight, PyObject* bias);
PyObject* norm_boundary(Lane* lane, PyObject* input, PyObject* shape, PyObject* weight,
                        PyObject* bias, PyObject* eps);
PyObject* lookup_boundary(Lane* lane, PyObject* table, PyObject* ids, PyObject* padding);

// Whether jit.trace, a transform or a dispatch mode is to see every op: then nothing is made here.
bool sees_every_op();

// The result of a call that is a boundary, made here; null without an error: Python decides.
PyObject* boundary(Lane* lane, PyObject* func, PyObject* args, PyObject* kwargs);

}  // namespace pinet
