#include "stratified_norm.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "row_chunks.h"
#include "simd.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kTogether = 2;  // rows whose averages are computed at once: memory follows so many

template <class T>
struct Norm {
  const T* grad;
  int64_t grad_stride;
  const T* rows;
  int64_t rows_stride;
  const T* mean;
  const T* rstd;
  const T* weight;
  T* grad_rows;  // null: not wanted
  int64_t width;
};

// Rows of one stratum, and what is known of each.
template <class T>
struct Block {
  const T* grad[kNormBlock];
  const T* rows[kNormBlock];
  T* out[kNormBlock];
  T mean[kNormBlock];
  T rstd[kNormBlock];
  T grad_avg[kNormBlock];     // of g; sums at first
  T product_avg[kNormBlock];  // of g * xhat; sums of g * (x - mean) at first
  int n;
};

// Adds columns [at, to) to the sums of kRows rows from row r on.
template <class L, class T, int kRows>
PINET_INLINE void add_columns_of_rows(Block<T>& block, int r, const T* weight, int64_t at,
                                      int64_t to) {
  typename L::Vec sums[kRows] = {}, products[kRows] = {};
  for (; at < to; at += L::kCount) {
    typename L::Vec w;
    std::memcpy(&w, weight + at, sizeof(w));
    PINET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      typename L::Vec g, x;
      std::memcpy(&g, block.grad[r + i] + at, sizeof(g));
      std::memcpy(&x, block.rows[r + i] + at, sizeof(x));
      g *= w;
      sums[i] += g;
      products[i] += g * (x - block.mean[r + i]);
    }
  }
  PINET_UNROLL
  for (int i = 0; i < kRows; ++i) {
    block.grad_avg[r + i] += sum_lanes<L, T>(sums[i]);
    block.product_avg[r + i] += sum_lanes<L, T>(products[i]);
  }
}

template <class T, int kRows, int kBytes>
PINET_INLINE void add_rows_from(Block<T>& block, int r, const Norm<T>& norm, int64_t at) {
  using L = Lanes<T, kBytes>;
  const int64_t to = norm.width - (norm.width - at) % L::kCount;
  if (at < to) add_columns_of_rows<L, T, kRows>(block, r, norm.weight, at, to);
  if constexpr (kBytes > 16) {
    add_rows_from<T, kRows, kBytes / 2>(block, r, norm, to);
  } else if (to < norm.width) {
    add_columns_of_rows<OneLane<T>, T, kRows>(block, r, norm.weight, to, norm.width);
  }
}

// The averages of every row.
template <class Isa, class T>
PINET_INLINE void average(const Norm<T>& norm, Block<T>& block) {
  int r = 0;
  for (; r + kTogether <= block.n; r += kTogether)
    add_rows_from<T, kTogether, Isa::kBytes>(block, r, norm, 0);
  for (; r < block.n; ++r) add_rows_from<T, 1, Isa::kBytes>(block, r, norm, 0);
  const T count = static_cast<T>(norm.width);
  for (r = 0; r < block.n; ++r) {
    block.grad_avg[r] /= count;
    block.product_avg[r] = block.product_avg[r] * block.rstd[r] / count;
  }
}

// Columns of kVectors registers: gradients of the rows, and their sums by column.
template <class L, class T, int kVectors, bool kRows, bool kSums>
PINET_INLINE void write_columns(const Norm<T>& norm, const Block<T>& block, int64_t at,
                                double* sums) {
  typename L::Vec w[kVectors], for_weight[kVectors] = {}, for_bias[kVectors] = {};
  PINET_UNROLL
  for (int v = 0; v < kVectors; ++v) std::memcpy(&w[v], norm.weight + at + v * L::kCount, sizeof(w[v]));
  for (int r = 0; r < block.n; ++r) {
    const T mean = block.mean[r], rstd = block.rstd[r];
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      typename L::Vec g, x;
      std::memcpy(&g, block.grad[r] + at + v * L::kCount, sizeof(g));
      std::memcpy(&x, block.rows[r] + at + v * L::kCount, sizeof(x));
      x = (x - mean) * rstd;
      if (kSums) {
        for_weight[v] += g * x;
        for_bias[v] += g;
      }
      if (kRows) {
        g = (g * w[v] - block.grad_avg[r] - x * block.product_avg[r]) * rstd;
        std::memcpy(block.out[r] + at + v * L::kCount, &g, sizeof(g));
      }
    }
  }
  PINET_UNROLL
  for (int v = 0; kSums && v < kVectors; ++v) {
    add_lanes<L, T>(sums + at + v * L::kCount, for_weight[v]);
    add_lanes<L, T>(sums + norm.width + at + v * L::kCount, for_bias[v]);
  }
}

template <class T, int kBytes, int kUnroll, bool kRows, bool kSums>
PINET_INLINE void write_from(const Norm<T>& norm, const Block<T>& block, int64_t at,
                             double* sums) {
  using L = Lanes<T, kBytes>;
  for (; at + kUnroll * L::kCount <= norm.width; at += kUnroll * L::kCount)
    write_columns<L, T, kUnroll, kRows, kSums>(norm, block, at, sums);
  for (; at + L::kCount <= norm.width; at += L::kCount)
    write_columns<L, T, 1, kRows, kSums>(norm, block, at, sums);
  if constexpr (kBytes > 16) {
    write_from<T, kBytes / 2, kUnroll, kRows, kSums>(norm, block, at, sums);
  } else {
    for (; at < norm.width; ++at)
      write_columns<OneLane<T>, T, 1, kRows, kSums>(norm, block, at, sums);
  }
}

// `sums`: 2 D sums to add to, of weight and of bias; null where neither is wanted.
template <class Isa, class T>
PINET_INLINE void run_block(const Norm<T>& norm, const int64_t* rows, int64_t n, double* sums) {
  constexpr int kUnroll = Isa::kRegisters >= 32 ? 4 : 2;
  Block<T> block;
  block.n = static_cast<int>(n);
  for (int r = 0; r < block.n; ++r) {
    block.grad[r] = norm.grad + rows[r] * norm.grad_stride;
    block.rows[r] = norm.rows + rows[r] * norm.rows_stride;
    block.out[r] = norm.grad_rows != nullptr ? norm.grad_rows + rows[r] * norm.width : nullptr;
    block.mean[r] = norm.mean[rows[r]];
    block.rstd[r] = norm.rstd[rows[r]];
    block.grad_avg[r] = block.product_avg[r] = T(0);
  }
  if (norm.grad_rows == nullptr) {
    write_from<T, Isa::kBytes, kUnroll, false, true>(norm, block, 0, sums);
    return;
  }
  average<Isa, T>(norm, block);
  if (sums != nullptr) {
    write_from<T, Isa::kBytes, kUnroll, true, true>(norm, block, 0, sums);
  } else {
    write_from<T, Isa::kBytes, kUnroll, true, false>(norm, block, 0, sums);
  }
}

PINET_FOR_EACH_ISA(run, run_block,
                   (const Norm<float>& norm, const int64_t* rows, int64_t n, double* sums),
                   (norm, rows, n, sums))
PINET_FOR_EACH_ISA(run, run_block,
                   (const Norm<double>& norm, const int64_t* rows, int64_t n, double* sums),
                   (norm, rows, n, sums))

using Wanted = std::optional<Tensor>;

template <class T>
void run_typed(Norm<T> norm, const Tensor& ids, int64_t strata, Wanted& grad_weight,
               Wanted& grad_bias) {
  const int64_t num_rows = ids.numel();
  const bool has_sums = grad_weight || grad_bias;
  const int64_t* id = ids.const_data_ptr<int64_t>();
  std::vector<T> ones;
  if (norm.weight == nullptr) {
    ones.assign(norm.width, T(1));
    norm.weight = ones.data();
  }
  const RowChunks chunks(num_rows, norm.width);
  ChunkSums sums(has_sums ? chunks.count() : 0, strata, 2 * norm.width);
  std::atomic<bool> in_range{true};
  chunks.run(num_rows * norm.width < kNormSerial, [&](int64_t chunk, int64_t from, int64_t to) {
    RowsByStratum order;
    if (!order.sort(id, from, to, strata)) {
      in_range = false;
      return;
    }
    order.for_each_block(id, kNormBlock, [&](int64_t s, const int64_t* block, int64_t n) {
      run(norm, block, n, has_sums ? sums.open(chunk, s) : nullptr);
    });
  });
  STD_TORCH_CHECK(in_range, "stratified_norm_backward: ids: expected strata in 0..", strata - 1,
                  ", got others; mend the ids or num_strata");
  if (grad_weight) sums.write(0, norm.width, grad_weight->mutable_data_ptr<T>());
  if (grad_bias) sums.write(norm.width, norm.width, grad_bias->mutable_data_ptr<T>());
}

template <class T>
void run_all(const Tensor& grad, const Tensor& rows, const Tensor& mean, const Tensor& rstd,
             const Wanted& weight, const Tensor& ids, int64_t strata, Wanted& grad_rows,
             Wanted& grad_weight, Wanted& grad_bias) {
  run_typed<T>({grad.const_data_ptr<T>(), grad.stride(0), rows.const_data_ptr<T>(), rows.stride(0),
                mean.const_data_ptr<T>(), rstd.const_data_ptr<T>(),
                weight ? weight->const_data_ptr<T>() : nullptr,
                grad_rows ? grad_rows->mutable_data_ptr<T>() : nullptr, rows.size(1)},
               ids, strata, grad_weight, grad_bias);
}

bool is_vector(const Tensor& x, int64_t size, ScalarType dtype) {
  return x.is_cpu() && x.dim() == 1 && x.numel() == size && x.is_contiguous() &&
         x.scalar_type() == dtype;
}

bool is_output(const Wanted& x, int64_t num_rows, int64_t width, ScalarType dtype) {
  return !x || (x->is_cpu() && x->dim() == 2 && x->size(0) == num_rows && x->size(1) == width &&
                x->is_contiguous() && x->scalar_type() == dtype);
}

}  // namespace

void stratified_norm_backward_cpu(Tensor grad, Tensor rows, Tensor mean, Tensor rstd,
                                  Wanted weight, Tensor ids, int64_t num_strata, Wanted grad_rows,
                                  Wanted grad_weight, Wanted grad_bias) {
  const ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 2 && grad.is_cpu() && grad.dim() == 2 &&
                      grad.size(0) == rows.size(0) && grad.size(1) == rows.size(1) &&
                      grad.scalar_type() == dtype &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Double),
                  "pinet_cpp::stratified_norm_backward: grad and rows must be float32 or float64 "
                  "CPU tensors [N, D] of one dtype");
  const int64_t num_rows = rows.size(0), width = rows.size(1);
  STD_TORCH_CHECK(is_vector(mean, num_rows, dtype) && is_vector(rstd, num_rows, dtype) &&
                      (!weight || is_vector(*weight, width, dtype)) && is_ids(ids, num_rows),
                  "pinet_cpp::stratified_norm_backward: mean, rstd, ids [N] and weight [D] must be "
                  "contiguous CPU tensors, ids int64, the others of the dtype of rows");
  STD_TORCH_CHECK(num_strata >= 0 && is_output(grad_rows, num_rows, width, dtype) &&
                      is_output(grad_weight, num_strata, width, dtype) &&
                      is_output(grad_bias, num_strata, width, dtype),
                  "pinet_cpp::stratified_norm_backward: outputs must be contiguous CPU tensors "
                  "[N, D] and [S, D] of the dtype of rows");
  if (!grad_rows && !grad_weight && !grad_bias) return;
  grad = with_contiguous_rows(grad);
  rows = with_contiguous_rows(rows);
  if (dtype == ScalarType::Double) {
    run_all<double>(grad, rows, mean, rstd, weight, ids, num_strata, grad_rows, grad_weight,
                    grad_bias);
  } else {
    run_all<float>(grad, rows, mean, rstd, weight, ids, num_strata, grad_rows, grad_weight,
                   grad_bias);
  }
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratified_norm_backward", TORCH_BOX(&pinet::stratified_norm_backward_cpu));
}
