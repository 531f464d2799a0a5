#include "nodes.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "ops.h"

namespace pinet {
namespace {

using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr int64_t kFusedWeight = 1 << 16;  // as in kernels/stratified_linear/_cpp.py
constexpr int64_t kSmallTable = 1024, kLookupsPerRow = 4;  // as in collection.py

// What an op of kernels/ returns, its wanted results in order; Python chooses the backend.
template <class... Args>
variable_list call_op(const c10::OperatorHandle& op, const Wanted& wanted, Args&&... args) {
  const torch::jit::Stack stack = call(op, std::forward<Args>(args)...);
  const std::vector<at::Tensor> found = stack.back().toTensorVector();
  variable_list out(wanted.size());
  size_t next = 0;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) out[i] = found.at(next++);
  return out;
}

bool has_tuned_blas() {
  static const bool is_tuned = call(find("pinet_cpp::cpu_has_tuned_blas")).back().toBool();
  return is_tuned;
}

Edge edge_of(const at::Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor)
                                                    : Edge();
}

// Gradients of these gradients there are none, as torch's `once_differentiable` has it.
variable_list once(variable_list&& grads, const at::Tensor& arrived) {
  if (!at::GradMode::is_enabled() || !arrived.requires_grad()) return std::move(grads);
  for (at::Tensor& grad : grads)
    if (grad.defined()) grad = grad.detach().set_requires_grad(true);
  auto error = c10::make_intrusive<torch::autograd::DelayedError>(
      "trying to differentiate twice a function that was marked with @once_differentiable",
      static_cast<int>(grads.size()));
  return (*error)(std::move(grads));
}

// Zeros where nothing arrived, as functions of Python get them.
at::Tensor arrived(const Boundary& node, const variable_list& grads) {
  return grads[0].defined() ? grads[0] : node.input_metadata(0).zeros_like();
}

// Room for a gradient, where it is wanted.
std::optional<at::Tensor> room(bool is_wanted, at::IntArrayRef sizes, const at::Tensor& like) {
  return is_wanted ? std::optional(at::empty(sizes, like.options())) : std::nullopt;
}

variable_list found(std::initializer_list<std::optional<at::Tensor>> gradients) {
  variable_list out;
  for (const auto& gradient : gradients) out.push_back(gradient.value_or(at::Tensor()));
  return out;
}

template <class T>
at::Tensor attach(at::Tensor out, const c10::intrusive_ptr<T>& node, edge_list&& edges,
                  std::shared_ptr<Forward>&& forward, std::shared_ptr<const Groups>&& groups,
                  int kind) {
  node->forward = std::move(forward);
  node->groups = std::move(groups);
  node->kind = kind;
  node->set_next_edges(std::move(edges));
  torch::autograd::set_history(out, node);
  return out;
}

struct Linear final : Boundary {
  SavedVariable rows, weight;

  std::string name() const override { return "StratifiedLinearBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    rows.reset_data();
    weight.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor grad = arrived(*this, grads);
    check_expected(wants_strata());
    const at::Tensor x = rows.unpack(), w = weight.unpack();
    variable_list out;
    {
      at::NoGradGuard no_grad;
      out = compute(grad, x, w);
    }
    return once(std::move(out), grad);
  }

  variable_list compute(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w) const {
    const Wanted wanted = all_wanted();
    if (!forward->has_kernels) {
      static const auto op = find("pinet::stratified_linear_backward");
      return call_op(op, wanted, grad, x, w, groups->ids, groups->offsets, groups->order, wanted[0],
                     wanted[1], wanted[2], std::string(), std::string("ieee"));
    }
    const int64_t strata = groups->num_strata(), wide = w.size(0), deep = w.size(1);
    const auto for_rows = room(wanted[0], {x.size(0), deep}, x);
    const auto for_weight = room(wanted[1], {strata, wide, deep}, x);
    const auto for_bias = room(wanted[2], {strata, wide}, x);
    const bool is_fused = x.scalar_type() == at::kFloat && strata > 1 &&
                          wide * deep <= kFusedWeight && !has_tuned_blas();
    if (is_fused) {
      static const auto op = find("pinet_cpp::stratified_linear_fused");
      call(op, grad, w, x, groups->offsets, groups->order, for_rows, for_weight, for_bias);
    } else {
      static const auto op = find("pinet_cpp::stratified_linear_backward");
      at::Tensor sorted_grad = grad, sorted_rows = x;
      if (groups->order && for_weight) {
        sorted_grad = grad.index_select(0, *groups->order);
        sorted_rows = x.index_select(0, *groups->order);
      }
      call(op, grad, w, sorted_grad, sorted_rows, groups->offsets, groups->ids, for_rows,
           for_weight, for_bias);
    }
    ++forward->calls->linear;
    return found({for_rows, for_weight, for_bias});
  }
};

struct LayerNorm final : Boundary {
  SavedVariable rows, mean, rstd, weight;

  std::string name() const override { return "StratifiedLayerNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&rows, &mean, &rstd, &weight}) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor grad = arrived(*this, grads);
    check_expected(wants_strata());
    const at::Tensor x = rows.unpack(), w = weight.unpack();
    const at::Tensor m = mean.unpack(), r = rstd.unpack();
    variable_list out;
    {
      at::NoGradGuard no_grad;
      out = compute(grad, x, m.flatten(), r.flatten(), w.contiguous());
    }
    return once(std::move(out), grad);
  }

  variable_list compute(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& m,
                        const at::Tensor& r, const at::Tensor& w) const {
    const Wanted wanted = all_wanted();
    const int64_t strata = groups->num_strata(), deep = w.size(0);
    if (!forward->has_kernels) {
      static const auto op = find("pinet::stratified_norm_backward");
      return call_op(op, wanted, grad, x, m, r, w, groups->ids, strata, wanted[0], wanted[1],
                     wanted[2], std::string(), groups->sorted_offsets());
    }
    const auto for_rows = room(wanted[0], {x.size(0), deep}, x);
    const auto for_weight = room(wanted[1], {strata, deep}, x);
    const auto for_bias = room(wanted[2], {strata, deep}, x);
    static const auto op = find("pinet_cpp::stratified_norm_backward");
    call(op, grad, x, m, r, w, groups->ids, strata, for_rows, for_weight, for_bias);
    ++forward->calls->norm;
    return found({for_rows, for_weight, for_bias});
  }
};

struct Embedding final : Boundary {
  SavedVariable ids;
  std::vector<int64_t> shape;  // of the leaf
  int64_t padding_idx = -1;

  std::string name() const override { return "StratifiedEmbeddingBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    ids.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor grad = arrived(*this, grads);
    check_expected(task_should_compute_output(0));
    const at::Tensor looked_up = ids.unpack();
    at::Tensor out;
    {
      at::NoGradGuard no_grad;
      at::Tensor strata = groups->ids;
      if (looked_up.dim() > 1)
        strata = strata.unsqueeze(1).expand_as(looked_up).reshape(-1);
      const at::Tensor flat = looked_up.reshape(-1);
      at::Tensor values = grad.reshape({flat.size(0), shape[2]});
      if (padding_idx >= 0) {
        const at::Tensor is_padding = flat.eq(padding_idx);
        if (is_padding.any().item<bool>())
          values = values.masked_fill(is_padding.unsqueeze(1), 0.0);
      }
      const bool is_small = !forward->keeps_touched && shape[1] <= kSmallTable &&
                            kLookupsPerRow * shape[1] <= flat.size(0);
      out = is_small ? dense(flat, strata, values)
                     : at::_sparse_coo_tensor_unsafe(at::stack({strata, flat}), values, shape,
                                                     values.options().layout(at::kSparse));
    }
    return once({out}, grad);
  }

  // As `collection.dense_lookup`.
  at::Tensor dense(const at::Tensor& flat, const at::Tensor& strata,
                   const at::Tensor& values) const {
    const at::Tensor out = at::zeros(shape, values.options());
    const std::vector<at::Tensor> ids{flat}, of{strata}, grads{values};
    if (!forward->has_kernels) {
      static const auto op = find("pinet::stratified_embedding_add");
      call(op, out, ids, of, grads, std::string());
      return out;
    }
    static const auto op = find("pinet_cpp::stratified_embedding_add");
    call(op, out, ids, of, grads);
    ++forward->calls->lookup;
    return out;
  }
};

struct Broadcast final : Boundary {
  SavedVariable rows, parameter;  // of a product
  std::vector<int64_t> repeated;  // dimensions
  std::vector<int64_t> shape;     // of the leaf
  bool multiplies = false;

  std::string name() const override { return "StratifiedBroadcastBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    rows.reset_data();
    parameter.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor grad = arrived(*this, grads);
    check_expected(task_should_compute_output(1));
    const at::Tensor x = rows.unpack(), p = parameter.unpack();
    variable_list out;
    {
      at::NoGradGuard no_grad;
      out = compute(grad, x, p);
    }
    return once(std::move(out), grad);
  }

  variable_list compute(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& p) const {
    variable_list out(2);
    if (task_should_compute_output(0)) out[0] = multiplies ? grad * p : grad;
    out[1] = sums(multiplies ? grad * x : grad);  // wanted or not, as in Python: kernels are counted
    return out;
  }

  // As `broadcast._strata_to`.
  at::Tensor sums(const at::Tensor& values) const {
    const at::Tensor of_rows = repeated.empty() ? values : values.sum(repeated, true);
    const at::Tensor flat =
        of_rows.dim() == 2 ? of_rows : of_rows.reshape({values.size(0), -1});
    if (!forward->has_kernels) {
      static const auto op = find("pinet::stratum_sums");
      const auto stack = call(op, flat, groups->ids, shape[0], std::string());
      return stack.back().toTensor().view(shape);
    }
    const at::Tensor out = at::empty(shape, values.options());
    static const auto op = find("pinet_cpp::stratum_sums");
    call(op, flat, groups->ids, out.view({shape[0], flat.size(1)}));
    ++forward->calls->sums;
    return out;
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& rows, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const at::Tensor& weight_leaf,
                  const at::Tensor& bias_leaf, std::shared_ptr<Forward> forward,
                  std::shared_ptr<const Groups> groups, int kind) {
  at::Tensor out;
  {
    at::NoGradGuard no_grad;
    out = at::linear(rows, weight, bias);
  }
  auto node = c10::make_intrusive<Linear>();
  node->rows = SavedVariable(rows, false);
  node->weight = SavedVariable(weight, false);
  return attach(std::move(out), node, {edge_of(rows), edge_of(weight_leaf), edge_of(bias_leaf)},
                std::move(forward), std::move(groups), kind);
}

at::Tensor layer_norm(const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& bias,
                      double eps, const at::Tensor& weight_leaf, const at::Tensor& bias_leaf,
                      std::shared_ptr<Forward> forward,
                      std::shared_ptr<const Groups> groups, int kind) {
  at::Tensor out, mean, rstd;
  {
    at::NoGradGuard no_grad;
    std::tie(out, mean, rstd) = at::native_layer_norm(rows, weight.sizes(), weight, bias, eps);
  }
  auto node = c10::make_intrusive<LayerNorm>();
  node->rows = SavedVariable(rows, false);
  node->mean = SavedVariable(mean, false);
  node->rstd = SavedVariable(rstd, false);
  node->weight = SavedVariable(weight, false);
  return attach(std::move(out), node, {edge_of(rows), edge_of(weight_leaf), edge_of(bias_leaf)},
                std::move(forward), std::move(groups), kind);
}

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table, int64_t padding_idx,
                     const at::Tensor& leaf, std::shared_ptr<Forward> forward,
                     std::shared_ptr<const Groups> groups, int kind) {
  at::Tensor out;
  {
    at::NoGradGuard no_grad;
    out = at::embedding(table, ids);
  }
  auto node = c10::make_intrusive<Embedding>();
  node->ids = SavedVariable(ids, false);
  node->shape = leaf.sizes().vec();
  node->padding_idx = padding_idx;
  return attach(std::move(out), node, {edge_of(leaf)}, std::move(forward), std::move(groups), kind);
}

at::Tensor broadcast(const at::Tensor& rows, const at::Tensor& parameter, bool multiplies,
                     bool is_first, const std::vector<int64_t>& repeated, const at::Tensor& leaf,
                     std::shared_ptr<Forward> forward,
                     std::shared_ptr<const Groups> groups, int kind) {
  at::Tensor out;
  {
    at::NoGradGuard no_grad;
    const at::Tensor &left = is_first ? parameter : rows, &right = is_first ? rows : parameter;
    out = multiplies ? left * right : left + right;
  }
  auto node = c10::make_intrusive<Broadcast>();
  if (multiplies) {
    node->rows = SavedVariable(rows, false);
    node->parameter = SavedVariable(parameter, false);
  }
  node->repeated = repeated;
  node->shape = leaf.sizes().vec();
  node->multiplies = multiplies;
  return attach(std::move(out), node, {edge_of(rows), edge_of(leaf)}, std::move(forward),
                std::move(groups), kind);
}

}  // namespace pinet
