#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "lookup_plan.h"
#include "simd.h"
#include "stratified_embedding.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kUnroll = 4;          // registers of sums: 64 columns of float32 with AVX-512
constexpr int64_t kLineBytes = 64;  // columns are cut there, so that threads share no line

// Where the sums go; strides in elements.
struct Target {
  void* data;
  int64_t stratum_stride, row_stride;
  int64_t num_strata, width;
  bool is_added;  // to rows of the table, else written to compact rows
  bool is_double;
};

// The sum of `count` entries, kVectors vectors from `offset` bytes into each, 0 if there is none.
template <class T, class V, int kVectors, bool kAdd>
PINET_INLINE void sum_vectors(const char* const* entries, int64_t count, int64_t offset, T* out) {
  V acc[kVectors] = {};
  for (int64_t n = 0; n < count; ++n) {
#if PINET_HAS_VECTORS
    for (int64_t line = 0; line < static_cast<int64_t>(kVectors * sizeof(V)); line += kLineBytes)
      __builtin_prefetch(entries[n + kAhead] + offset + line);
#endif
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      V x;
      std::memcpy(&x, entries[n] + offset + v * sizeof(V), sizeof(V));
      acc[v] += x;
    }
  }
  if constexpr (kAdd) {
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      V held;
      std::memcpy(&held, reinterpret_cast<char*>(out) + v * sizeof(V), sizeof(V));
      acc[v] = held + acc[v];
    }
  }
  std::memcpy(out, acc, sizeof(acc));
}

// What is left when no register of kBytes is filled any more: narrower ones, then single columns.
template <class T, int kBytes, bool kAdd>
PINET_INLINE void sum_rest(const char* const* entries, int64_t count, int64_t from, int64_t to,
                           T* out) {
  if constexpr (kBytes > 16) {
    using L = Lanes<T, kBytes / 2>;
    if (to - from >= L::kCount) {
      sum_vectors<T, typename L::Vec, 1, kAdd>(entries, count, from * sizeof(T), out);
      from += L::kCount;
      out += L::kCount;
    }
    sum_rest<T, kBytes / 2, kAdd>(entries, count, from, to, out);
  } else {
    switch (to - from) {
      case 3: sum_vectors<T, T, 3, kAdd>(entries, count, from * sizeof(T), out); break;
      case 2: sum_vectors<T, T, 2, kAdd>(entries, count, from * sizeof(T), out); break;
      case 1: sum_vectors<T, T, 1, kAdd>(entries, count, from * sizeof(T), out); break;
      default: break;
    }
  }
}

// Columns [from, to) of the sum of `count` entries into `out`, which is the row's column `from`.
template <class Isa, class T, bool kAdd>
PINET_INLINE void sum_cell(const char* const* entries, int64_t count, int64_t from, int64_t to,
                           T* out) {
  using L = Lanes<T, Isa::kBytes>;
  using Vec = typename L::Vec;
  constexpr int64_t kLanes = L::kCount;
  for (; from + kUnroll * kLanes <= to; from += kUnroll * kLanes, out += kUnroll * kLanes)
    sum_vectors<T, Vec, kUnroll, kAdd>(entries, count, from * sizeof(T), out);
  const int64_t vectors = (to - from) / kLanes;
  switch (vectors) {
    case 3: sum_vectors<T, Vec, 3, kAdd>(entries, count, from * sizeof(T), out); break;
    case 2: sum_vectors<T, Vec, 2, kAdd>(entries, count, from * sizeof(T), out); break;
    case 1: sum_vectors<T, Vec, 1, kAdd>(entries, count, from * sizeof(T), out); break;
    default: break;
  }
  from += vectors * kLanes;
  sum_rest<T, Isa::kBytes, kAdd>(entries, count, from, to, out + vectors * kLanes);
}

struct Task {
  int64_t from, to;                // rows
  int64_t from_column, to_column;  // elements
};

template <class Isa, class T>
PINET_INLINE void run_task(const LookupPlan& plan, const Target& target, const Task& task) {
  const int64_t* starts = plan.starts.get() + task.from * target.num_strata;
  for (int64_t u = task.from; u < task.to; ++u) {
    const int64_t row = target.is_added ? plan.rows[u] : u;
    T* out = static_cast<T*>(target.data) + row * target.row_stride + task.from_column;
    for (int64_t s = 0; s < target.num_strata; ++s, ++starts, out += target.stratum_stride) {
      const char* const* entries = plan.order.get() + starts[0];
      const int64_t count = starts[1] - starts[0];
      if (!target.is_added) {
        sum_cell<Isa, T, false>(entries, count, task.from_column, task.to_column, out);
      } else if (count > 0) {
        sum_cell<Isa, T, true>(entries, count, task.from_column, task.to_column, out);
      }
    }
  }
}

template <class Isa>
PINET_INLINE void run_typed(const LookupPlan& plan, const Target& target, const Task& task) {
  if (target.is_double) {
    run_task<Isa, double>(plan, target, task);
  } else {
    run_task<Isa, float>(plan, target, task);
  }
}

PINET_FOR_EACH_ISA(run, run_typed, (const LookupPlan& plan, const Target& target, const Task& task),
                   (plan, target, task))

// Equal shares of what is read and written; a row with more than one share is cut by columns.
std::vector<Task> make_tasks(const LookupPlan& plan, const Target& target) {
  std::vector<Task> tasks;
  const int64_t num_rows = static_cast<int64_t>(plan.rows.size());
  const int64_t width = target.width;
  if (width == 0) return tasks;
  const int64_t* starts = plan.starts.get();
  const int64_t share = std::max<int64_t>(kEmbeddingElements / width, 1);  // entries and cells
  const int64_t line = kLineBytes / (target.is_double ? 8 : 4);
  auto weight = [&](int64_t from, int64_t to) {
    return starts[to * target.num_strata] - starts[from * target.num_strata] +
           (to - from) * target.num_strata;
  };
  int64_t from = 0;
  for (int64_t u = 0; u < num_rows; ++u) {
    const int64_t own = weight(u, u + 1);
    if (own > share && width > line) {
      if (from < u) tasks.push_back({from, u, 0, width});
      const int64_t pieces = std::min((own + share - 1) / share, (width + line - 1) / line);
      const int64_t columns = ((width + pieces - 1) / pieces + line - 1) / line * line;
      for (int64_t column = 0; column < width; column += columns)
        tasks.push_back({u, u + 1, column, std::min(column + columns, width)});
      from = u + 1;
    } else if (weight(from, u + 1) >= share) {
      tasks.push_back({from, u + 1, 0, width});
      from = u + 1;
    }
  }
  if (from < num_rows) tasks.push_back({from, num_rows, 0, width});
  return tasks;
}

// Threads take tasks as they come: no two write the same element.
void run_tasks(const LookupPlan& plan, const Target& target) {
  const std::vector<Task> tasks = make_tasks(plan, target);
  std::atomic<size_t> next{0};
  auto work = [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) {
      run(plan, target, tasks[i]);
    }
  };
  const int64_t num_cells = static_cast<int64_t>(plan.rows.size()) * target.num_strata;
  if (tasks.size() < 2 || (plan.num_entries + num_cells) * target.width < kEmbeddingSerial) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, work);
  }
}

// Whether dimensions `from` and later are contiguous among themselves.
bool has_contiguous_rows(const Tensor& x, int64_t from) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= from; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

bool is_index(const Tensor& x, int64_t count) {
  return x.is_cpu() && x.dim() == 1 && x.size(0) == count && x.scalar_type() == ScalarType::Long;
}

// Makes the rows of `grads` contiguous where they are not; the tensors own what the lists point to.
std::vector<LookupList> make_lists(const std::vector<Tensor>& ids,
                                   const std::vector<Tensor>& strata, std::vector<Tensor>& grads,
                                   const Tensor& like, int64_t row_from) {
  STD_TORCH_CHECK(ids.size() == grads.size() && strata.size() == grads.size(),
                  "pinet_cpp::stratified_embedding: as many ids, strata and grads expected");
  const ScalarType dtype = like.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "pinet_cpp::stratified_embedding: float32 or float64 expected");
  std::vector<LookupList> lists;
  for (size_t k = 0; k < grads.size(); ++k) {
    Tensor& grad = grads[k];
    bool fits = grad.is_cpu() && grad.scalar_type() == dtype && grad.dim() >= 1 &&
                grad.dim() - 1 == like.dim() - row_from && is_index(ids[k], grad.size(0)) &&
                is_index(strata[k], grad.size(0));
    for (int64_t d = 1; fits && d < grad.dim(); ++d)
      fits = grad.size(d) == like.size(d - 1 + row_from);
    STD_TORCH_CHECK(fits, "pinet_cpp::stratified_embedding: grads[", k,
                    "] must be a CPU tensor [N, ...] of the dtype and row shape of the result, "
                    "ids and strata int64 [N]");
    if (!has_contiguous_rows(grad, 1)) grad = torch::stable::contiguous(grad);
    lists.push_back({ids[k].const_data_ptr<int64_t>(), strata[k].const_data_ptr<int64_t>(),
                     ids[k].stride(0), strata[k].stride(0),
                     static_cast<const char*>(grad.const_data_ptr()),
                     grad.stride(0) * (dtype == ScalarType::Double ? 8 : 4), grad.size(0)});
  }
  return lists;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> stratified_embedding_reduce_cpu(std::vector<Tensor> ids,
                                                                   std::vector<Tensor> strata,
                                                                   std::vector<Tensor> grads,
                                                                   int64_t num_strata,
                                                                   int64_t num_rows) {
  STD_TORCH_CHECK(!grads.empty() && grads[0].dim() >= 1 && num_strata >= 1 && num_rows >= 0,
                  "pinet_cpp::stratified_embedding_reduce: a gradient [N, ...] expected");
  const Tensor like = grads[0];
  const std::vector<LookupList> lists = make_lists(ids, strata, grads, like, 1);
  const LookupPlan plan = make_plan(lists, num_strata, num_rows);

  const int64_t num_touched = static_cast<int64_t>(plan.rows.size());
  std::vector<int64_t> shape{num_strata, num_touched};
  int64_t width = 1;
  for (int64_t d = 1; d < like.dim(); ++d) {
    shape.push_back(like.size(d));
    width *= like.size(d);
  }
  Tensor rows = torch::stable::new_empty(like, {num_touched}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(like, shape);
  Tensor touched = torch::stable::new_empty(like, {num_strata, num_touched}, ScalarType::Bool);
  std::copy(plan.rows.begin(), plan.rows.end(), rows.mutable_data_ptr<int64_t>());
  bool* is_touched = touched.mutable_data_ptr<bool>();
  const int64_t* starts = plan.starts.get();
  for (int64_t u = 0; u < num_touched; ++u)
    for (int64_t s = 0; s < num_strata; ++s, ++starts)
      is_touched[s * num_touched + u] = starts[1] > starts[0];
  run_tasks(plan,
            {values.mutable_data_ptr(), num_touched * width, width, num_strata, width, false,
             like.scalar_type() == ScalarType::Double});
  return {rows, values, touched};
}

void stratified_embedding_add_cpu(Tensor dense, std::vector<Tensor> ids, std::vector<Tensor> strata,
                                  std::vector<Tensor> grads) {
  STD_TORCH_CHECK(dense.is_cpu() && dense.dim() >= 2,
                  "pinet_cpp::stratified_embedding_add: dense must be a CPU tensor [S, V, ...]");
  const std::vector<LookupList> lists = make_lists(ids, strata, grads, dense, 2);
  const LookupPlan plan = make_plan(lists, dense.size(0), dense.size(1));
  Tensor target = has_contiguous_rows(dense, 2) ? dense : torch::stable::contiguous(dense);
  int64_t width = 1;
  for (int64_t d = 2; d < dense.dim(); ++d) width *= dense.size(d);
  run_tasks(plan,
            {target.mutable_data_ptr(), target.stride(0), target.stride(1), dense.size(0), width,
             true, dense.scalar_type() == ScalarType::Double});
  if (target.get() != dense.get()) torch::stable::copy_(dense, target);
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratified_embedding_reduce", TORCH_BOX(&pinet::stratified_embedding_reduce_cpu));
  m.impl("stratified_embedding_add", TORCH_BOX(&pinet::stratified_embedding_add_cpu));
}
