#include "stratum_sums.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "row_chunks.h"
#include "simd.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kUnroll = 4;  // registers of columns, twice: enough to hide the latency of a sum

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  int64_t width;
};

// Adds `n` rows in kVectors registers of columns from `at` on; even and odd rows apart.
template <class L, class T, int kVectors>
PINET_INLINE void add_columns(const Matrix<T>& x, const int64_t* rows, int64_t n, int64_t at,
                              double* sums) {
  typename L::Vec even[kVectors] = {}, odd[kVectors] = {};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    const T* first = x.data + rows[i] * x.stride + at;
    const T* second = x.data + rows[i + 1] * x.stride + at;
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      typename L::Vec a, b;
      std::memcpy(&a, first + v * L::kCount, sizeof(a));
      std::memcpy(&b, second + v * L::kCount, sizeof(b));
      even[v] += a;
      odd[v] += b;
    }
  }
  for (; i < n; ++i) {
    const T* last = x.data + rows[i] * x.stride + at;
    PINET_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      typename L::Vec a;
      std::memcpy(&a, last + v * L::kCount, sizeof(a));
      even[v] += a;
    }
  }
  PINET_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    even[v] += odd[v];
    add_lanes<L, T>(sums + at + v * L::kCount, even[v]);
  }
}

template <class T, int kBytes>
PINET_INLINE void add_from(const Matrix<T>& x, const int64_t* rows, int64_t n, int64_t at,
                           double* sums) {
  using L = Lanes<T, kBytes>;
  for (; at + kUnroll * L::kCount <= x.width; at += kUnroll * L::kCount)
    add_columns<L, T, kUnroll>(x, rows, n, at, sums);
  for (; at + L::kCount <= x.width; at += L::kCount)
    add_columns<L, T, 1>(x, rows, n, at, sums);
  if constexpr (kBytes > 16) {
    add_from<T, kBytes / 2>(x, rows, n, at, sums);
  } else {
    for (; at < x.width; ++at) add_columns<OneLane<T>, T, 1>(x, rows, n, at, sums);
  }
}

template <class Isa, class T>
PINET_INLINE void add_block(const Matrix<T>& x, const int64_t* rows, int64_t n, double* sums) {
  add_from<T, Isa::kBytes>(x, rows, n, 0, sums);
}

PINET_FOR_EACH_ISA(add, add_block,
                   (const Matrix<float>& x, const int64_t* rows, int64_t n, double* sums),
                   (x, rows, n, sums))
PINET_FOR_EACH_ISA(add, add_block,
                   (const Matrix<double>& x, const int64_t* rows, int64_t n, double* sums),
                   (x, rows, n, sums))

void check_range(bool in_range, int64_t strata) {
  STD_TORCH_CHECK(in_range, "stratum_sums: ids: expected strata in 0..", strata - 1,
                  ", got others; mend the ids or num_strata");
}

// Wide rows: threads take columns, and all rows of them. Chunks of rows would have as many sums as
// numbers, or more.
template <class T>
void run_by_columns(const Matrix<T>& x, const int64_t* id, int64_t num_rows, int64_t strata,
                    T* out) {
  RowsByStratum order;
  check_range(order.sort(id, 0, num_rows, strata), strata);
  const int64_t count = (x.width + kSumsColumns - 1) / kSumsColumns;
  in_turn(count, num_rows * x.width < kSumsSerial, [&](int64_t i) {
    const int64_t first = i * kSumsColumns, n = std::min(kSumsColumns, x.width - first);
    const Matrix<T> part{x.data + first, x.stride, n};
    std::vector<double> sums(strata * n);
    order.for_each_block(id, kSumsBlock, [&](int64_t s, const int64_t* block, int64_t m) {
      add(part, block, m, sums.data() + s * n);
    });
    for (int64_t s = 0; s < strata; ++s)
      for (int64_t c = 0; c < n; ++c) out[s * x.width + first + c] = static_cast<T>(sums[s * n + c]);
  });
}

template <class T>
void run_typed(const Tensor& rows, const Tensor& ids, Tensor& out) {
  const int64_t num_rows = rows.size(0), width = rows.size(1), strata = out.size(0);
  const Matrix<T> matrix{rows.const_data_ptr<T>(), rows.stride(0), width};
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const RowChunks chunks(num_rows, width);
  const bool is_wide = width >= kSumsWide || (width > kSumsColumns && chunks.step() < kSumsBlock);
  if (is_wide && chunks.count() > 1) {
    run_by_columns(matrix, id, num_rows, strata, out.mutable_data_ptr<T>());
    return;
  }
  ChunkSums sums(chunks.count(), strata, width);
  std::atomic<bool> in_range{true};
  chunks.run(num_rows * width < kSumsSerial, [&](int64_t chunk, int64_t from, int64_t to) {
    RowsByStratum order;
    if (!order.sort(id, from, to, strata)) {
      in_range = false;
      return;
    }
    order.for_each_block(id, kSumsBlock, [&](int64_t s, const int64_t* block, int64_t n) {
      add(matrix, block, n, sums.open(chunk, s));
    });
  });
  check_range(in_range, strata);
  sums.write(0, width, out.mutable_data_ptr<T>());
}

}  // namespace

void stratum_sums_cpu(Tensor rows, Tensor ids, Tensor out) {
  const ScalarType dtype = rows.scalar_type();
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 2 &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Double) &&
                      is_ids(ids, rows.size(0)),
                  "pinet_cpp::stratum_sums: expected rows [N, D], float32 or float64, and "
                  "contiguous int64 ids [N] on the CPU");
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.size(1) == rows.size(1) &&
                      out.is_contiguous() && out.scalar_type() == dtype,
                  "pinet_cpp::stratum_sums: out must be a contiguous CPU tensor [S, D] of the "
                  "dtype of rows");
  rows = with_contiguous_rows(rows);
  if (dtype == ScalarType::Double) {
    run_typed<double>(rows, ids, out);
  } else {
    run_typed<float>(rows, ids, out);
  }
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratum_sums", TORCH_BOX(&pinet::stratum_sums_cpu));
}
