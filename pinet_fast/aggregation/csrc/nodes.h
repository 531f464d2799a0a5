// Boundaries as nodes of the autograd graph: the same as those of `boundary.py`, `lookups.py` and
// `broadcast.py`, whose docstrings are their specification, for rows [N, ...] on a CPU.

#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace pinet {

// The rows of one kind, grouped by stratum: `strata_index.RowGroups`.
struct Groups {
  at::Tensor ids;
  std::vector<int64_t> offsets;  // S + 1
  std::optional<at::Tensor> order;

  int64_t num_rows() const { return offsets.back(); }
  // Where the strata of sorted rows start.
  std::optional<std::vector<int64_t>> sorted_offsets() const {
    return order ? std::nullopt : std::optional(offsets);
  }
  int64_t num_strata() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

// How often kernels ran, for the registry of the ops.
struct Calls {
  std::atomic<int64_t> linear{0};
  std::atomic<int64_t> norm{0};
  std::atomic<int64_t> lookup{0};
  std::atomic<int64_t> sums{0};
};

// One forward inside `stratify`: nodes of another one say nothing about its rows.
struct Forward {
  std::shared_ptr<Calls> calls;
  void (*refuse)() = nullptr;            // throws: this backward is not the aggregator's
  bool has_kernels = true;               // the compiled ones serve; else the ops choose a backend
  bool keeps_touched = true;             // every lookup's gradient says which rows it touched
  std::atomic<bool> is_expected{false};  // it is
};

// Whether the gradients of rows, weight and bias are wanted.
using Wanted = std::array<bool, 3>;

struct Boundary : torch::autograd::Node {
  std::shared_ptr<Forward> forward;
  std::shared_ptr<const Groups> groups;
  int kind = 0;  // which groups of the forward

  Wanted all_wanted() const {
    return {task_should_compute_output(0), task_should_compute_output(1),
            task_should_compute_output(2)};
  }

  bool wants_strata() const {
    return task_should_compute_output(1) || task_should_compute_output(2);
  }

  // Only the aggregator's backward may leave gradients in virtual leaves.
  void check_expected(bool reaches_leaves) const {
    if (reaches_leaves && !forward->is_expected) forward->refuse();
  }
};

// y = x W^T + b; returns y with its history.
at::Tensor linear(const at::Tensor& rows, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const at::Tensor& weight_leaf,
                  const at::Tensor& bias_leaf, std::shared_ptr<Forward> forward,
                  std::shared_ptr<const Groups> groups, int kind);

// LayerNorm over the last dimension.
at::Tensor layer_norm(const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& bias,
                      double eps, const at::Tensor& weight_leaf, const at::Tensor& bias_leaf,
                      std::shared_ptr<Forward> forward,
                      std::shared_ptr<const Groups> groups, int kind);

// E[ids] for ids [N] or [N, K]; `padding_idx` is in 0..V-1, or -1 for none.
at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table, int64_t padding_idx,
                     const at::Tensor& leaf, std::shared_ptr<Forward> forward,
                     std::shared_ptr<const Groups> groups, int kind);

// rows + parameter, or rows * parameter, which is repeated along dimension 0 and some others.
// `is_first`: the parameter stands on the left.
at::Tensor broadcast(const at::Tensor& rows, const at::Tensor& parameter, bool multiplies,
                     bool is_first, const std::vector<int64_t>& repeated, const at::Tensor& leaf,
                     std::shared_ptr<Forward> forward,
                     std::shared_ptr<const Groups> groups, int kind);

}  // namespace pinet
