#include "trace.h"

#include <torch/csrc/autograd/python_function.h>

#include <string_view>
#include <typeinfo>
#include <unordered_map>

namespace pinet {
namespace {

using torch::autograd::Node;

constexpr int kMaxNodes = 200;
constexpr int64_t kAnySize = -1;  // behind a view sizes are others: that rows are there is enough

enum class Kind { kBoundary, kPython, kSameShape, kReader, kOther };

class Walk {
 public:
  Walk(const Forward* forward, const std::vector<Rows>& rows, const NodeNames& names)
      : forward_(forward), rows_(rows), names_(names) {}

  Traced follow(Node* node, int64_t n) {
    while (node != nullptr) {
      if (--budget_ < 0) return {Found::kUndecided, 0};
      switch (kind_of(node)) {
        case Kind::kBoundary:
          return of_boundary(static_cast<const Boundary*>(node), n);
        case Kind::kPython:
          return of_python(node, n);
        case Kind::kReader: {
          for (const auto& edge : node->next_edges()) {
            const Traced traced = follow(edge.function.get(), kAnySize);
            if (traced.found != Found::kNothing) return {Found::kUndecided, 0};
          }
          return {Found::kNothing, 0};
        }
        case Kind::kOther:
          return {Found::kNothing, 0};
        case Kind::kSameShape:
          break;
      }
      Node* last = nullptr;
      for (const auto& edge : node->next_edges()) {
        if (!edge.function) continue;
        if (last != nullptr) {
          const Traced traced = follow(last, n);
          if (traced.found != Found::kNothing) return traced;
        }
        last = edge.function.get();
      }
      node = last;
    }
    return {Found::kNothing, 0};
  }

 private:
  Kind kind_of(const Node* node) const {
    static std::unordered_map<const std::type_info*, Kind> known;  // the GIL is held
    const std::type_info& type = typeid(*node);  // more than one for a type is fine
    const auto entry = known.find(&type);
    if (entry != known.end()) return entry->second;
    Kind kind = Kind::kOther;
    if (dynamic_cast<const Boundary*>(node)) {
      kind = Kind::kBoundary;
    } else if (type.name() == std::string_view("N5torch8autograd6PyNodeE")) {  // not exported
      kind = Kind::kPython;
    } else if (names_.same_shape.count(node->name())) {
      kind = Kind::kSameShape;
    } else if (names_.readers.count(node->name())) {
      kind = Kind::kReader;
    }
    return known[&type] = kind;
  }

  Traced fitting(int kind, int64_t n) const {
    if (n != kAnySize && rows_[kind].groups->num_rows() != n) return {Found::kNothing, 0};
    return {Found::kRows, kind};
  }

  Traced of_boundary(const Boundary* node, int64_t n) const {
    if (node->forward.get() != forward_) return {Found::kUndecided, 0};
    return fitting(node->kind, n);
  }

  // A boundary of boundary.py says where its rows are; other functions of Python hide it.
  Traced of_python(const Node* node, int64_t n) const {
    PyObject* object = static_cast<const torch::autograd::PyNode*>(node)->pyobj();
    if (object == nullptr) return {Found::kNothing, 0};
    THPObjectPtr layout(PyObject_GetAttrString(object, "layout"));
    if (!layout) {
      PyErr_Clear();
      return {Found::kNothing, 0};
    }
    if (is_whole(layout.get()))
      for (size_t kind = 0; kind < rows_.size(); ++kind)
        if (PyTuple_GET_ITEM(layout.get(), 2) == rows_[kind].python_groups)
          return fitting(static_cast<int>(kind), n);
    return {Found::kUndecided, 0};
  }

  // A RowLayout of rows in dimension 0 that are not flattened with others.
  static bool is_whole(PyObject* layout) {
    if (!PyTuple_Check(layout) || PyTuple_GET_SIZE(layout) != 5) return false;
    for (const auto& [place, value] : {std::pair{0, 0L}, std::pair{3, 1L}, std::pair{4, 1L}}) {
      PyObject* item = PyTuple_GET_ITEM(layout, place);
      if (!PyLong_Check(item) || PyLong_AsLong(item) != value) return false;
    }
    return true;
  }

  const Forward* forward_;
  const std::vector<Rows>& rows_;
  const NodeNames& names_;
  int budget_ = kMaxNodes;
};

}  // namespace

Traced trace(Node* node, int64_t n, const Forward* forward, const std::vector<Rows>& rows,
             const NodeNames& names) {
  return Walk(forward, rows, names).follow(node, n);
}

}  // namespace pinet
