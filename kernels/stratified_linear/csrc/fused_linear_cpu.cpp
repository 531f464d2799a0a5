#include "fused_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "simd.h"
#include "small_gemm.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Wanted = std::optional<Tensor>;

constexpr int64_t kRows = 96;          // of a block: two operands of 64 columns fill the first cache
constexpr int64_t kPieces = 16;        // about as many for all threads together
constexpr int64_t kLeastPiece = 384;   // rows that outweigh adding the sums of one more piece
constexpr int64_t kSerial = 1 << 18;   // multiplications that do not outweigh waking a thread

// A matrix [N, width], and where a block of it is copied to.
struct Operand {
  const float* data;
  int64_t row, column, width;

  // Rows [from, from + n) of the order, as columns next to each other; `step` is between rows.
  const float* block(const int64_t* order, int64_t from, int64_t n, float* copy,
                     int64_t* step) const {
    if (order == nullptr && (column == 1 || width == 1)) {
      *step = row;
      return data + from * row;
    }
    for (int64_t r = 0; r < n; ++r) {
      const float* x = data + (order == nullptr ? from + r : order[from + r]) * row;
      float* to = copy + r * width;
      if (column == 1) {
        std::memcpy(to, x, width * sizeof(float));
      } else {
        for (int64_t c = 0; c < width; ++c) to[c] = x[c * column];
      }
    }
    *step = width;
    return copy;
  }
};

// Adds `n` rows to float64 sums.
template <class L>
PINET_INLINE int64_t add_columns(const float* x, int64_t step, int64_t n, int64_t at,
                                 int64_t width, double* sums) {
  for (; at + L::kCount <= width; at += L::kCount) {
    typename L::Vec sum = {};
    for (int64_t r = 0; r < n; ++r) {
      typename L::Vec y;
      std::memcpy(&y, x + r * step + at, sizeof(y));
      sum += y;
    }
    L::add(sums + at, sum);
  }
  return at;
}

template <class Isa>
PINET_INLINE void add_rows(const float* x, int64_t step, int64_t n, int64_t width, double* sums) {
  const int64_t at = add_columns<Lanes<float, Isa::kBytes>>(x, step, n, 0, width, sums);
  add_columns<OneLane<float>>(x, step, n, at, width, sums);
}

PINET_FOR_EACH_ISA(add_to_bias, add_rows,
                   (const float* x, int64_t step, int64_t n, int64_t width, double* sums),
                   (x, step, n, width, sums))

struct Piece {
  int64_t stratum, from, to;
  bool is_first;  // of its stratum: writes to the result itself
};

std::vector<Piece> pieces_of(const std::vector<int64_t>& offsets) {
  const int64_t height =
      std::max(kLeastPiece, (offsets.back() / kPieces + kRows - 1) / kRows * kRows);
  std::vector<Piece> pieces;
  for (size_t s = 0; s + 1 < offsets.size(); ++s) {
    for (int64_t from = offsets[s]; from < offsets[s + 1]; from += height) {
      pieces.push_back({static_cast<int64_t>(s), from, std::min(from + height, offsets[s + 1]),
                        from == offsets[s]});
    }
  }
  return pieces;
}

struct Layer {
  Operand grad, rows;
  const float* weight;     // contiguous; null where grad_rows is
  const int64_t* order;    // null where rows are sorted
  float* grad_rows;        // each may be null
  float* grad_weight;
  float* grad_bias;
  int64_t wide, deep;
};

// Sums of one piece: in the result for the first of a stratum, else apart.
struct Sums {
  float* weight;
  double* bias;
};

void run_piece(const Layer& layer, const Piece& piece, const Sums& sums) {
  const int64_t wide = layer.wide, deep = layer.deep;
  std::unique_ptr<float[]> copies(new float[kRows * (wide + 2 * deep)]);
  float* const grad_copy = copies.get();
  float* const rows_copy = grad_copy + kRows * wide;
  float* const out_copy = rows_copy + kRows * deep;
  for (int64_t from = piece.from; from < piece.to; from += kRows) {
    const int64_t n = std::min(kRows, piece.to - from);
    int64_t grad_step, rows_step;
    const float* grad = layer.grad.block(layer.order, from, n, grad_copy, &grad_step);
    if (layer.grad_rows != nullptr) {
      float* out = layer.order == nullptr ? layer.grad_rows + from * deep : out_copy;
      small_gemm(Gemm<float>{grad, grad_step, 1, layer.weight, deep, out, deep, n, deep, wide,
                             false, Shape::kFull, 0});
      for (int64_t r = 0; layer.order != nullptr && r < n; ++r)
        std::memcpy(layer.grad_rows + layer.order[from + r] * deep, out + r * deep,
                    deep * sizeof(float));
    }
    if (layer.grad_weight != nullptr) {
      const float* rows = layer.rows.block(layer.order, from, n, rows_copy, &rows_step);
      small_gemm(Gemm<float>{grad, 1, grad_step, rows, rows_step, sums.weight, deep, wide, deep, n,
                             from != piece.from, Shape::kFull, 0});
    }
    if (layer.grad_bias != nullptr) add_to_bias(grad, grad_step, n, wide, sums.bias);
  }
}

void run_all(const Layer& layer, const std::vector<int64_t>& offsets) {
  const int64_t strata = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t size = layer.wide * layer.deep;
  const std::vector<Piece> pieces = pieces_of(offsets);
  const int64_t count = static_cast<int64_t>(pieces.size());
  std::unique_ptr<float[]> weights(new float[layer.grad_weight != nullptr ? count * size : 0]);
  std::vector<double> biases(layer.grad_bias != nullptr ? count * layer.wide : 0);
  std::atomic<int64_t> next{0};
  auto take = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) {
      const Piece& piece = pieces[i];
      float* weight = nullptr;
      if (layer.grad_weight != nullptr)
        weight = piece.is_first ? layer.grad_weight + piece.stratum * size : &weights[i * size];
      run_piece(layer, piece,
                {weight, layer.grad_bias != nullptr ? &biases[i * layer.wide] : nullptr});
    }
  };
  if (count < 2 || offsets.back() * size < kSerial) {
    take(0, 1);
  } else {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, take);
  }
  for (int64_t i = 0; layer.grad_weight != nullptr && i < count; ++i) {
    if (pieces[i].is_first) continue;
    float* out = layer.grad_weight + pieces[i].stratum * size;
    const float* more = &weights[i * size];
    for (int64_t k = 0; k < size; ++k) out[k] += more[k];
  }
  for (int64_t s = 0; s < strata; ++s) {
    if (layer.grad_weight != nullptr && offsets[s] == offsets[s + 1])
      std::fill_n(layer.grad_weight + s * size, size, 0.0f);
    if (layer.grad_bias == nullptr) continue;
    std::vector<double> total(layer.wide);
    for (int64_t i = 0; i < count; ++i) {
      if (pieces[i].stratum != s) continue;
      for (int64_t c = 0; c < layer.wide; ++c) total[c] += biases[i * layer.wide + c];
    }
    for (int64_t c = 0; c < layer.wide; ++c)
      layer.grad_bias[s * layer.wide + c] = static_cast<float>(total[c]);
  }
}

bool is_matrix(const Tensor& x) {
  return x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::Float;
}

bool is_output(const Wanted& x, std::vector<int64_t> sizes) {
  if (!x) return true;
  if (!x->is_cpu() || !x->is_contiguous() || x->scalar_type() != ScalarType::Float ||
      x->dim() != static_cast<int64_t>(sizes.size()))
    return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (x->size(d) != sizes[d]) return false;
  return true;
}

// Whether every number is a row, each once is the caller's word.
bool is_order(const Wanted& order, int64_t count) {
  if (!order) return true;
  if (!order->is_cpu() || order->dim() != 1 || !order->is_contiguous() ||
      order->numel() != count || order->scalar_type() != ScalarType::Long)
    return false;
  const int64_t* rows = order->const_data_ptr<int64_t>();
  return std::all_of(rows, rows + count, [&](int64_t r) { return r >= 0 && r < count; });
}

Operand operand(const Tensor& x) {
  return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.size(1)};
}

float* pointer(Wanted& x) { return x ? x->mutable_data_ptr<float>() : nullptr; }

}  // namespace

bool cpu_has_tuned_blas() {
#if PINET_HAS_X86_CHOICE
  return isa_level() < 1 || __builtin_cpu_is("intel");
#else
  return true;
#endif
}

void stratified_linear_fused_cpu(Tensor grad, Wanted weight, Tensor rows,
                                 std::vector<int64_t> row_offsets, Wanted order, Wanted grad_rows,
                                 Wanted grad_weight, Wanted grad_bias) {
  STD_TORCH_CHECK(is_matrix(grad) && is_matrix(rows) && rows.size(0) == grad.size(0) &&
                      weight.has_value() >= grad_rows.has_value() &&
                      (!weight || (is_matrix(*weight) && weight->size(0) == grad.size(1) &&
                                   weight->size(1) == rows.size(1))),
                  "pinet_cpp::stratified_linear_fused: expected grad [N, D_out], weight "
                  "[D_out, D_in] and rows [N, D_in] on the CPU, all float32");
  const int64_t count = grad.size(0), wide = grad.size(1), deep = rows.size(1);
  STD_TORCH_CHECK(row_offsets.size() >= 2 && row_offsets.front() == 0 &&
                      row_offsets.back() == count &&
                      std::is_sorted(row_offsets.begin(), row_offsets.end()) &&
                      is_order(order, count),
                  "pinet_cpp::stratified_linear_fused: row_offsets must ascend from 0 to ", count,
                  ", and order hold the rows by stratum");
  const int64_t strata = static_cast<int64_t>(row_offsets.size()) - 1;
  STD_TORCH_CHECK(is_output(grad_rows, {count, deep}) &&
                      is_output(grad_weight, {strata, wide, deep}) &&
                      is_output(grad_bias, {strata, wide}),
                  "pinet_cpp::stratified_linear_fused: outputs must be contiguous float32 CPU "
                  "tensors of the sizes of the contract");
  if (weight) weight = torch::stable::contiguous(*weight);
  run_all({operand(grad), operand(rows), grad_rows ? weight->const_data_ptr<float>() : nullptr,
           order ? order->const_data_ptr<int64_t>() : nullptr, pointer(grad_rows),
           pointer(grad_weight), pointer(grad_bias), wide, deep},
          row_offsets);
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratified_linear_fused", TORCH_BOX(&pinet::stratified_linear_fused_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CompositeExplicitAutograd, m) {
  m.impl("cpu_has_tuned_blas", TORCH_BOX(&pinet::cpu_has_tuned_blas));
}
