#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "simd.h"
#include "stratum_gram.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTile = 4;       // rows of a register tile: 4 x 4 accumulators fit 32 registers
constexpr int kMaxLanes = 16;  // slots per pair in the float64 sums of a task

// One slice per stratum, contiguous inside.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
};

template <class Isa, class T, int kRows, int kCols, bool kTriangle>
PINET_INLINE void multiply_add(const T* const* left, const T* const* right, int64_t at,
                               typename Lanes<T, Isa::kBytes>::Vec (&acc)[kRows][kCols]) {
  typename Lanes<T, Isa::kBytes>::Vec x[kRows], y[kCols];
  PINET_UNROLL
  for (int i = 0; i < kRows; ++i) std::memcpy(&x[i], left[i] + at, sizeof(x[i]));
  PINET_UNROLL
  for (int j = 0; j < kCols; ++j) std::memcpy(&y[j], right[j] + at, sizeof(y[j]));
  PINET_UNROLL
  for (int i = 0; i < kRows; ++i) {
    PINET_UNROLL
    for (int j = kTriangle ? i : 0; j < kCols; ++j) acc[i][j] += x[i] * y[j];
  }
}

// Adds <row a + i, row b + j> over `n` columns to the lanes of pair (a + i, b + j).
// kTriangle: a == b, and only j >= i.
template <class Isa, class T, int kRows, int kCols, bool kTriangle>
PINET_INLINE void add_tile(const Rows<T>& rows, int64_t a, int64_t b, int64_t from, int64_t n,
                           double* sums) {
  using L = Lanes<T, Isa::kBytes>;
  typename L::Vec acc[kRows][kCols] = {};
  const T* left[kRows];
  const T* right[kCols];
  PINET_UNROLL
  for (int i = 0; i < kRows; ++i) left[i] = rows.data + (a + i) * rows.stride + from;
  PINET_UNROLL
  for (int j = 0; j < kCols; ++j) right[j] = rows.data + (b + j) * rows.stride + from;

  const int64_t whole = n - n % L::kCount;
  for (int64_t at = 0; at < whole; at += L::kCount)
    multiply_add<Isa, T, kRows, kCols, kTriangle>(left, right, at, acc);
  if (whole < n) {
    T padded[kRows + kCols][L::kCount] = {};
    const T* left_end[kRows];
    const T* right_end[kCols];
    for (int i = 0; i < kRows; ++i)
      left_end[i] = static_cast<const T*>(
          std::memcpy(padded[i], left[i] + whole, (n - whole) * sizeof(T)));
    for (int j = 0; j < kCols; ++j)
      right_end[j] = static_cast<const T*>(
          std::memcpy(padded[kRows + j], right[j] + whole, (n - whole) * sizeof(T)));
    multiply_add<Isa, T, kRows, kCols, kTriangle>(left_end, right_end, 0, acc);
  }
  PINET_UNROLL
  for (int i = 0; i < kRows; ++i) {
    PINET_UNROLL
    for (int j = kTriangle ? i : 0; j < kCols; ++j)
      L::add(sums + ((a + i) * rows.count + b + j) * kMaxLanes, acc[i][j]);
  }
}

// Where there are 16 registers, 4 x 4 accumulators would spill: two columns at a time.
template <class Isa, class T, int kCols>
PINET_INLINE void add_rectangle(const Rows<T>& rows, int64_t a, int64_t b, int64_t from, int64_t n,
                                double* sums) {
  constexpr int kAtOnce = Isa::kRegisters >= 32 ? 4 : 2;
  if constexpr (kCols <= kAtOnce) {
    add_tile<Isa, T, kTile, kCols, false>(rows, a, b, from, n, sums);
  } else {
    add_tile<Isa, T, kTile, kAtOnce, false>(rows, a, b, from, n, sums);
    add_tile<Isa, T, kTile, kCols - kAtOnce, false>(rows, a, b + kAtOnce, from, n, sums);
  }
}

template <class Isa, class T>
PINET_INLINE void add_run(const Rows<T>& rows, int64_t from, int64_t n, double* sums) {
  for (int64_t b = 0; b < rows.count; b += kTile) {
    switch (std::min<int64_t>(kTile, rows.count - b)) {
      case 1: add_tile<Isa, T, 1, 1, true>(rows, b, b, from, n, sums); break;
      case 2: add_tile<Isa, T, 2, 2, true>(rows, b, b, from, n, sums); break;
      case 3: add_tile<Isa, T, 3, 3, true>(rows, b, b, from, n, sums); break;
      default: add_tile<Isa, T, 4, 4, true>(rows, b, b, from, n, sums); break;
    }
    for (int64_t a = 0; a < b; a += kTile) {
      switch (std::min<int64_t>(kTile, rows.count - b)) {
        case 1: add_rectangle<Isa, T, 1>(rows, a, b, from, n, sums); break;
        case 2: add_rectangle<Isa, T, 2>(rows, a, b, from, n, sums); break;
        case 3: add_rectangle<Isa, T, 3>(rows, a, b, from, n, sums); break;
        default: add_rectangle<Isa, T, 4>(rows, a, b, from, n, sums); break;
      }
    }
  }
}

template <class Isa, class T>
PINET_INLINE void add_task(const Rows<T>& rows, int64_t from, int64_t to, double* sums) {
  constexpr int64_t kRun = kRunBytes / sizeof(T);
  for (; from < to; from += kRun)
    add_run<Isa, T>(rows, from, std::min(kRun, to - from), sums);
}

PINET_FOR_EACH_ISA(add_task_float, add_task,
                   (const Rows<float>& rows, int64_t from, int64_t to, double* sums),
                   (rows, from, to, sums))
PINET_FOR_EACH_ISA(add_task_double, add_task,
                   (const Rows<double>& rows, int64_t from, int64_t to, double* sums),
                   (rows, from, to, sums))

struct Parameter {
  const void* data;
  int64_t stride;
  int64_t columns;
  bool is_double;
};

struct Task {
  int64_t parameter;
  int64_t from;
};

bool has_contiguous_slices(const Tensor& grad) {
  int64_t expected = 1;
  for (int64_t d = grad.dim() - 1; d > 0; --d) {
    if (grad.size(d) != 1 && grad.stride(d) != expected) return false;
    expected *= grad.size(d);
  }
  return true;
}

// Runs one task and reduces its lanes, in lane order, to slots [S, S]: upper triangle only.
void run_task(const Parameter& parameter, int64_t strata, int64_t from, double* lanes,
              double* slots) {
  std::fill(lanes, lanes + strata * strata * kMaxLanes, 0.0);
  const int64_t to = std::min(from + kTaskColumns, parameter.columns);
  if (parameter.is_double) {
    add_task_double({static_cast<const double*>(parameter.data), parameter.stride, strata}, from,
                    to, lanes);
  } else {
    add_task_float({static_cast<const float*>(parameter.data), parameter.stride, strata}, from, to,
                   lanes);
  }
  for (int64_t s = 0; s < strata; ++s) {
    for (int64_t t = s; t < strata; ++t) {
      const double* pair = lanes + (s * strata + t) * kMaxLanes;
      double sum = 0.0;
      for (int lane = 0; lane < kMaxLanes; ++lane) sum += pair[lane];
      slots[s * strata + t] = sum;
    }
  }
}

// Threads take tasks as they come; each task has its own slots, so the order does not show.
void run_tasks(const std::vector<Parameter>& parameters, const std::vector<Task>& tasks,
               int64_t strata, bool serial, double* slots) {
  std::atomic<size_t> next{0};
  auto work = [&](int64_t, int64_t) {
    std::unique_ptr<double[]> lanes(new double[strata * strata * kMaxLanes]);
    for (size_t i = next++; i < tasks.size(); i = next++)
      run_task(parameters[tasks[i].parameter], strata, tasks[i].from, lanes.get(),
               slots + i * strata * strata);
  };
  if (serial) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, work);
  }
}

void add_slots(const std::vector<Task>& tasks, int64_t strata, const double* slots, double* out) {
  for (size_t i = 0; i < tasks.size(); ++i) {
    double* gram = out + tasks[i].parameter * strata * strata;
    for (int64_t s = 0; s < strata; ++s)
      for (int64_t t = s; t < strata; ++t)
        gram[s * strata + t] += slots[(i * strata + s) * strata + t];
  }
}

}  // namespace

void stratum_gram_cpu(std::vector<Tensor> grads, Tensor out) {
  const int64_t count = static_cast<int64_t>(grads.size());
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == count && out.size(1) == out.size(2) &&
                      out.is_contiguous() && out.is_cpu() &&
                      out.scalar_type() == ScalarType::Double,
                  "pinet_cpp::stratum_gram: out must be a contiguous float64 CPU tensor [P, S, S]");
  const int64_t strata = out.size(1);
  std::vector<Parameter> parameters;
  std::vector<Task> tasks;
  int64_t columns_in_all = 0;
  for (int64_t p = 0; p < count; ++p) {
    Tensor& grad = grads[p];
    const ScalarType dtype = grad.scalar_type();
    STD_TORCH_CHECK(grad.is_cpu() && grad.dim() >= 1 && grad.size(0) == strata &&
                        (dtype == ScalarType::Float || dtype == ScalarType::Double),
                    "pinet_cpp::stratum_gram: grads[", p,
                    "] must be a float32 or float64 CPU tensor [S, ...] with the S of out");
    if (!has_contiguous_slices(grad)) grad = torch::stable::contiguous(grad);
    const int64_t columns = grad.numel() / std::max<int64_t>(strata, 1);
    parameters.push_back(
        {grad.const_data_ptr(), grad.stride(0), columns, dtype == ScalarType::Double});
    for (int64_t from = 0; from < columns; from += kTaskColumns) tasks.push_back({p, from});
    columns_in_all += columns;
  }
  const bool serial =
      tasks.size() < 2 || columns_in_all * strata * (strata + 1) / 2 < kSerialProducts;
  std::unique_ptr<double[]> slots(new double[tasks.size() * strata * strata]);
  run_tasks(parameters, tasks, strata, serial, slots.get());

  double* gram = out.mutable_data_ptr<double>();
  std::fill(gram, gram + count * strata * strata, 0.0);
  add_slots(tasks, strata, slots.get(), gram);
  for (int64_t p = 0; p < count; ++p, gram += strata * strata)
    for (int64_t s = 0; s < strata; ++s)
      for (int64_t t = 0; t < s; ++t) gram[s * strata + t] = gram[t * strata + s];
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratum_gram", TORCH_BOX(&pinet::stratum_gram_cpu));
}
