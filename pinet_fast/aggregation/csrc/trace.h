// Row provenance, as `provenance.py` reads it off the autograd graph, for rows in dimension 0.

#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/python_headers.h>

#include <string>
#include <unordered_set>
#include <vector>

#include "nodes.h"

namespace pinet {

// Rows of one kind of this forward.
struct Rows {
  std::shared_ptr<const Groups> groups;
  int kind = 0;                       // users or events: see `kind_names`
  PyObject* layout = nullptr;         // RowLayout(0, kind, groups), owned
  PyObject* python_groups = nullptr;  // its groups, borrowed from it
};

// Nodes by their names: those whose inputs have the rows of their output, and those that move them.
struct NodeNames {
  std::unordered_set<std::string> same_shape;
  std::unordered_set<std::string> readers;
};

enum class Found { kNothing, kRows, kUndecided };

struct Traced {
  Found found;
  int kind;
};

// What the graph behind `node` says of rows [n, ...]; undecided where Python has to look.
Traced trace(torch::autograd::Node* node, int64_t n, const Forward* forward,
             const std::vector<Rows>& rows, const NodeNames& names);

}  // namespace pinet
