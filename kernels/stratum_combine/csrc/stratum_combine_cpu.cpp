#include "stratum_combine.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "simd.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kUnroll = 4;  // registers of sums: enough to hide the latency of a product

// One parameter: sources with a weight other than 0, and where their sum goes.
struct Sum {
  std::vector<const void*> sources;
  std::vector<double> weights;
  void* out;
  bool has_rows;
  const int64_t* rows;  // null also where there are rows, but none was touched
  int64_t num_touched;
  int64_t num_rows;  // without rows: elements, each a row of one
  int64_t width;     // elements of a row
  bool accumulate;
  bool is_double;
};

template <class V, class T, int kVectors, bool kAdd>
PINET_INLINE void add_vectors(const Sum& sum, int64_t from, T* out) {
  constexpr int64_t kLanes = sizeof(V) / sizeof(T);
  V acc[kVectors] = {};
  for (size_t s = 0; s < sum.sources.size(); ++s) {
    const T* source = static_cast<const T*>(sum.sources[s]) + from;
    const T weight = static_cast<T>(sum.weights[s]);
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      V x;
      std::memcpy(&x, source + v * kLanes, sizeof(x));
      acc[v] += x * weight;
    }
  }
  PINET_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    if (kAdd) {
      V old;
      std::memcpy(&old, out + v * kLanes, sizeof(old));
      acc[v] += old;
    }
    std::memcpy(out + v * kLanes, &acc[v], sizeof(V));
  }
}

// `n` elements of every source from element `from` on.
template <class Isa, class T, bool kAdd>
PINET_INLINE void add_span(const Sum& sum, int64_t from, int64_t n, T* out) {
  using L = Lanes<T, Isa::kBytes>;
  int64_t at = 0;
  for (; at + kUnroll * L::kCount <= n; at += kUnroll * L::kCount)
    add_vectors<typename L::Vec, T, kUnroll, kAdd>(sum, from + at, out + at);
  for (; at + L::kCount <= n; at += L::kCount)
    add_vectors<typename L::Vec, T, 1, kAdd>(sum, from + at, out + at);
  for (; at < n; ++at) add_vectors<T, T, 1, kAdd>(sum, from + at, out + at);
}

template <class Isa, class T>
PINET_INLINE void write_span(const Sum& sum, int64_t from, int64_t n, T* out) {
  if (sum.accumulate) {
    add_span<Isa, T, true>(sum, from, n, out);
  } else {
    add_span<Isa, T, false>(sum, from, n, out);
  }
}

// Rows [from, to) of the output.
template <class Isa, class T>
PINET_INLINE void run_task(const Sum& sum, int64_t from, int64_t to) {
  T* out = static_cast<T*>(sum.out);
  const int64_t width = sum.width;
  if (!sum.has_rows) {
    write_span<Isa, T>(sum, from * width, (to - from) * width, out + from * width);
    return;
  }
  const int64_t* end = sum.rows + sum.num_touched;
  const int64_t* row = std::lower_bound(sum.rows, end, from);
  for (; from < to; ++row) {
    const int64_t next = row < end ? std::min(*row, to) : to;
    if (!sum.accumulate) std::fill(out + from * width, out + next * width, T(0));
    if (next < to) write_span<Isa, T>(sum, (row - sum.rows) * width, width, out + next * width);
    from = next + 1;
  }
}

template <class Isa>
PINET_INLINE void run_typed(const Sum& sum, int64_t from, int64_t to) {
  if (sum.is_double) {
    run_task<Isa, double>(sum, from, to);
  } else {
    run_task<Isa, float>(sum, from, to);
  }
}

PINET_FOR_EACH_ISA(run, run_typed, (const Sum& sum, int64_t from, int64_t to), (sum, from, to))

// Whether the strides, ascending, are the products of the sizes that go with smaller ones.
bool is_dense(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t found = 0; found < x.dim(); ++found)
    for (int64_t d = 0; d < x.dim(); ++d)
      if (x.size(d) != 1 && x.stride(d) == expected) expected *= x.size(d);
  return expected == x.numel();
}

bool has_layout_of(const Tensor& grad, const Tensor& out) {
  for (int64_t d = 0; d < out.dim(); ++d)
    if (out.size(d) != 1 && grad.stride(d + 1) != out.stride(d)) return false;
  return true;
}

bool has_contiguous_slices(const Tensor& grad) {
  int64_t expected = 1;
  for (int64_t d = grad.dim() - 1; d > 0; --d) {
    if (grad.size(d) != 1 && grad.stride(d) != expected) return false;
    expected *= grad.size(d);
  }
  return true;
}

bool is_index(const Tensor& rows, int64_t num_rows) {
  if (!rows.is_cpu() || rows.dim() != 1 || !rows.is_contiguous() ||
      rows.scalar_type() != ScalarType::Long)
    return false;
  const int64_t* row = rows.const_data_ptr<int64_t>();
  int64_t least = 0;
  for (int64_t u = 0; u < rows.numel(); ++u) {
    if (row[u] < least || row[u] >= num_rows) return false;
    least = row[u] + 1;
  }
  return true;
}

bool has_shape_of(const Tensor& grad, const Tensor& out, const Tensor* rows) {
  if (grad.dim() != out.dim() + 1) return false;
  for (int64_t d = 0; d < out.dim(); ++d)
    if (grad.size(d + 1) != (d == 0 && rows != nullptr ? rows->numel() : out.size(d))) return false;
  return true;
}

// Threads take tasks as they come: no two write the same element.
void run_tasks(const std::vector<Sum>& sums, int64_t elements_read) {
  struct Task {
    const Sum* sum;
    int64_t from, to;
  };
  std::vector<Task> tasks;
  for (const Sum& sum : sums) {
    const int64_t step = std::max<int64_t>(kCombineElements / std::max<int64_t>(sum.width, 1), 1);
    for (int64_t from = 0; from < sum.num_rows && sum.width > 0; from += step)
      tasks.push_back({&sum, from, std::min(from + step, sum.num_rows)});
  }
  std::atomic<size_t> next{0};
  auto work = [&](int64_t, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) {
      run(*tasks[i].sum, tasks[i].from, tasks[i].to);
    }
  };
  if (tasks.size() < 2 || elements_read < kCombineSerial) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, work);
  }
}

}  // namespace

void stratum_combine_cpu(std::vector<Tensor> grads, Tensor weights, std::optional<Tensor> scale,
                         std::vector<Tensor> outs, std::vector<int64_t> accumulate,
                         std::vector<Tensor> rows, std::vector<int64_t> row_of) {
  const size_t count = grads.size();
  STD_TORCH_CHECK(outs.size() == count && accumulate.size() == count && row_of.size() == count,
                  "pinet_cpp::stratum_combine: one output and one choice a gradient expected");
  STD_TORCH_CHECK(weights.is_cpu() && weights.dim() == 2 && weights.is_contiguous() &&
                      weights.scalar_type() == ScalarType::Double &&
                      (weights.size(0) == 1 || weights.size(0) == static_cast<int64_t>(count)),
                  "pinet_cpp::stratum_combine: weights must be a contiguous float64 CPU tensor "
                  "[P, S] or [1, S]");
  STD_TORCH_CHECK(!scale || (scale->is_cpu() && scale->numel() == 1 &&
                             scale->scalar_type() == ScalarType::Double),
                  "pinet_cpp::stratum_combine: scale must be one float64 on the CPU");
  const int64_t strata = weights.size(1);
  const double factor = scale ? *scale->const_data_ptr<double>() : 1.0;
  std::vector<Sum> sums(count);
  std::vector<Tensor> targets = outs;
  int64_t elements_read = 0;
  for (size_t p = 0; p < count; ++p) {
    Tensor& grad = grads[p];
    const ScalarType dtype = grad.scalar_type();
    STD_TORCH_CHECK(row_of[p] < static_cast<int64_t>(rows.size()) &&
                        (row_of[p] < 0 || outs[p].dim() > 0),
                    "pinet_cpp::stratum_combine: row_of[", p, "] is out of range");
    const Tensor* touched = row_of[p] < 0 ? nullptr : &rows[row_of[p]];
    STD_TORCH_CHECK(grad.is_cpu() && outs[p].is_cpu() && grad.dim() >= 1 &&
                        grad.size(0) == strata && outs[p].scalar_type() == dtype &&
                        (dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                        has_shape_of(grad, outs[p], touched),
                    "pinet_cpp::stratum_combine: grads[", p,
                    "] must be a float32 or float64 CPU tensor [S, ...] that fits its output");
    STD_TORCH_CHECK(touched == nullptr || is_index(*touched, outs[p].size(0)),
                    "stratum_combine: rows[", p, "]: expected ascending, distinct rows of outs[", p,
                    "]; sort them and add up repeated ones");
    const bool in_place = touched == nullptr && has_layout_of(grad, outs[p]) && is_dense(outs[p]);
    if (!in_place) {
      if (!has_contiguous_slices(grad)) grad = torch::stable::contiguous(grad);
      if (!outs[p].is_contiguous()) targets[p] = torch::stable::contiguous(outs[p]);
    }
    const int64_t columns = strata > 0 ? grad.numel() / strata : 0;
    Sum& sum = sums[p];
    sum.out = targets[p].mutable_data_ptr();
    sum.has_rows = touched != nullptr;
    sum.rows = touched != nullptr ? touched->const_data_ptr<int64_t>() : nullptr;
    sum.num_touched = touched != nullptr ? touched->numel() : 0;
    sum.num_rows = touched != nullptr ? outs[p].size(0) : outs[p].numel();
    sum.width = touched != nullptr && sum.num_rows > 0 ? outs[p].numel() / sum.num_rows : 1;
    sum.accumulate = accumulate[p] != 0;
    sum.is_double = dtype == ScalarType::Double;
    const double* weight =
        weights.const_data_ptr<double>() + (weights.size(0) == 1 ? 0 : p) * strata;
    const char* data = static_cast<const char*>(grad.const_data_ptr());
    const int64_t stride = grad.stride(0) * (sum.is_double ? 8 : 4);
    for (int64_t s = 0; s < strata; ++s) {
      const double w = weight[s] == 0.0 ? 0.0 : weight[s] * factor;
      if (w == 0.0) continue;
      sum.sources.push_back(data + s * stride);
      sum.weights.push_back(w);
      elements_read += columns;
    }
    elements_read += outs[p].numel();
    // Adding nothing: leave the output alone, whatever it holds.
    if (sum.accumulate && sum.sources.empty()) sum.width = 0;
  }
  run_tasks(sums, elements_read);
  for (size_t p = 0; p < count; ++p)
    if (targets[p].get() != outs[p].get()) torch::stable::copy_(outs[p], targets[p]);
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratum_combine", TORCH_BOX(&pinet::stratum_combine_cpu));
}
