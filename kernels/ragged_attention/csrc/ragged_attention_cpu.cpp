#include "ragged_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <memory>

#include "attention_rows.h"
#include "attention_work.h"
#include "in_turn.h"
#include "small_gemm.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Attention {
  const T* qkv;
  int64_t row, part, head;  // strides: of events, of queries to keys to values, of heads
  const int64_t* offsets;
  int64_t users, heads, width;
  Dropout dropout;
  T* out;  // [T, H, D]
  T* lse;  // [T, H]

  T scale() const { return T(1) / std::sqrt(static_cast<T>(width)); }
  int64_t out_row() const { return heads * width; }
};

template <class T>
struct Gradients {
  const T* grad;
  int64_t row, head;
  T* qkv;                    // [T, 3, H, D]
  std::vector<T*> partial;   // of every user: gradients of queries by later chunks, or null
};

// Memory of a thread, kept: freed between calls it would go back to the system and fault in again.
template <class T>
T* scratch(int which, int64_t count) {
  struct Buffer {
    std::unique_ptr<T[]> data;
    int64_t size = 0;
  };
  thread_local Buffer buffers[4];
  Buffer& buffer = buffers[which];
  if (buffer.size < count) {
    buffer.data.reset(new T[count]);
    buffer.size = count;
  }
  return buffer.data.get();
}

// Elements between rows of `keys` numbers: whole registers, and no power of two, whose rows would
// share few sets of the cache.
int64_t padded_stride(int64_t keys) { return rounded_up(keys) + kGrain; }

// to[d, j] = from[j, d], columns up to whole registers filled with zeros.
template <class T>
void transpose(const T* from, int64_t row, int64_t keys, int64_t width, T* to, int64_t stride) {
  const int64_t end = rounded_up(keys);
  for (int64_t j = 0; j < keys; j += kGrain) {
    const int64_t n = std::min(kGrain, keys - j);
    for (int64_t d = 0; d < width; ++d)
      for (int64_t i = 0; i < n; ++i) to[d * stride + j + i] = from[(j + i) * row + d];
  }
  for (int64_t d = 0; d < width; ++d) std::fill(to + d * stride + keys, to + d * stride + end, T(0));
}

// Queries [from, to) of one user and head.
template <class T>
void attend(const Attention<T>& a, int64_t user, int64_t head, int64_t from, int64_t to) {
  const int64_t start = a.offsets[user], stride = padded_stride(std::min(to, kKeys));
  const T* q = a.qkv + start * a.row + head * a.head;
  const T *k = q + a.part, *v = k + a.part;
  T* out = a.out + start * a.out_row() + head * a.width;
  T* keys = scratch<T>(0, a.width * stride);
  T* scores = scratch<T>(1, kTile * stride);
  T maximum[kChunk], sum[kChunk];
  for (int64_t k0 = 0; k0 < to; k0 += kKeys) {
    const int64_t n = std::min(kKeys, to - k0);
    transpose(k + k0 * a.row, a.row, n, a.width, keys, stride);
    for (int64_t q0 = std::max(from, k0); q0 < to; q0 += kTile) {
      const int64_t m = std::min(kTile, to - q0), diagonal = q0 - k0;
      const int64_t seen = std::min(n, diagonal + m);
      small_gemm({q + q0 * a.row, a.row, 1, keys, stride, scores, stride, m, rounded_up(seen),
                  a.width, false, Shape::kLeft, diagonal});
      T* rows = out + q0 * a.out_row();
      softmax_tile(Tile<T>{scores, stride, m, seen, diagonal, a.scale(), k0,
                           (start + q0) * a.heads + head, a.heads},
                   a.dropout, k0 == 0, maximum + q0 - from, sum + q0 - from, rows, a.out_row(),
                   a.width);
      small_gemm({scores, stride, 1, v + k0 * a.row, a.row, rows, a.out_row(), m, a.width, seen,
                  k0 != 0, Shape::kLower, diagonal});
    }
  }
  for (int64_t i = from; i < to; ++i) {
    const T inverse = T(1) / sum[i - from];
    for (int64_t d = 0; d < a.width; ++d) out[i * a.out_row() + d] *= inverse;
    a.lse[(start + i) * a.heads + head] = maximum[i - from] + std::log(sum[i - from]);
  }
}

// What keys [from, to) of one user and head give to all gradients.
template <class T>
void attend_backward(const Attention<T>& a, const Gradients<T>& g, int64_t user, int64_t head,
                     int64_t from, int64_t to) {
  const int64_t start = a.offsets[user], length = a.offsets[user + 1] - start;
  const int64_t stride = padded_stride(std::min(to - from, kKeys));
  const T* q = a.qkv + start * a.row + head * a.head;
  const T *k = q + a.part, *v = k + a.part;
  const T* grad = g.grad + start * g.row + head * g.head;
  const T* out = a.out + start * a.out_row() + head * a.width;
  const int64_t row = 3 * a.heads * a.width, part = a.heads * a.width;
  T* grad_q = g.qkv + start * row + head * a.width;
  T *grad_k = grad_q + part, *grad_v = grad_k + part;
  int64_t grad_q_row = row;
  if (from > 0) {  // chunk c of heads [H, length, D] of its own, added up afterwards
    grad_q = g.partial[user] + ((from / kChunk - 1) * a.heads + head) * length * a.width;
    grad_q_row = a.width;
  }
  T* keys = scratch<T>(0, a.width * stride);
  T* scores = scratch<T>(1, kTile * stride);
  T* values = scratch<T>(2, a.width * stride);
  T* slopes = scratch<T>(3, kTile * stride);
  T lse[kTile], delta[kTile];
  for (int64_t k0 = from; k0 < to; k0 += kKeys) {
    const int64_t n = std::min(kKeys, to - k0);
    transpose(k + k0 * a.row, a.row, n, a.width, keys, stride);
    transpose(v + k0 * a.row, a.row, n, a.width, values, stride);
    for (int64_t q0 = k0; q0 < length; q0 += kTile) {
      const int64_t m = std::min(kTile, length - q0), diagonal = q0 - k0;
      const int64_t seen = std::min(n, diagonal + m), old = std::min(n, diagonal);
      const T *queries = q + q0 * a.row, *slope = grad + q0 * g.row;
      small_gemm({queries, a.row, 1, keys, stride, scores, stride, m, rounded_up(seen), a.width,
                  false, Shape::kLeft, diagonal});
      small_gemm({slope, g.row, 1, values, stride, slopes, stride, m, rounded_up(seen), a.width,
                  false, Shape::kLeft, diagonal});
      for (int64_t i = 0; i < m; ++i) {
        lse[i] = a.lse[(start + q0 + i) * a.heads + head];
        T sum = 0;
        for (int64_t d = 0; d < a.width; ++d)
          sum += slope[i * g.row + d] * out[(q0 + i) * a.out_row() + d];
        delta[i] = sum;
      }
      derive_tile(Tile<T>{scores, stride, m, seen, diagonal, a.scale(), k0,
                          (start + q0) * a.heads + head, a.heads},
                  a.dropout, slopes, lse, delta);
      // Keys that earlier queries saw already are added to, the others written.
      const int64_t at = k0 * row;
      small_gemm({scores, 1, stride, slope, g.row, grad_v + at, row, old, a.width, m, true,
                  Shape::kFull, 0});
      small_gemm({scores + old, 1, stride, slope, g.row, grad_v + at + old * row, row, seen - old,
                  a.width, m, false, Shape::kUpper, 0});
      small_gemm({slopes, 1, stride, queries, a.row, grad_k + at, row, old, a.width, m, true,
                  Shape::kFull, 0});
      small_gemm({slopes + old, 1, stride, queries, a.row, grad_k + at + old * row, row, seen - old,
                  a.width, m, false, Shape::kUpper, 0});
      small_gemm({slopes, stride, 1, k + k0 * a.row, a.row, grad_q + q0 * grad_q_row, grad_q_row, m,
                  a.width, seen, k0 > from, Shape::kLower, diagonal});
    }
  }
}

template <class T>
void run_forward(const Attention<T>& a) {
  const auto pieces = cut(a.offsets, a.users, a.heads, a.width, false);
  int64_t cost = 0;
  for (const Piece& piece : pieces) cost += piece.cost;
  in_turn(pieces.size(), cost < kPiece, [&](int64_t i) {
    const Piece& p = pieces[i];
    for (int64_t u = p.user; u < p.end; ++u) {
      const int64_t length = a.offsets[u + 1] - a.offsets[u];
      const int64_t from = std::max<int64_t>(p.chunk, 0) * kChunk;
      for (int64_t h = 0; h < a.heads; ++h)
        if (p.head < 0 || p.head == h) attend(a, u, h, from, std::min(length, from + kChunk));
    }
  });
}

// Adds the chunks of the gradients of queries that do not lie in grad_qkv, in order.
template <class T>
void add_partial(const Attention<T>& a, const Gradients<T>& g, int64_t user, int64_t head) {
  const int64_t start = a.offsets[user], length = a.offsets[user + 1] - start;
  const int64_t row = 3 * a.heads * a.width;
  for (int64_t c = 1; c < num_chunks(length); ++c) {
    const T* from = g.partial[user] + ((c - 1) * a.heads + head) * length * a.width;
    for (int64_t i = c * kChunk; i < length; ++i) {
      T* to = g.qkv + (start + i) * row + head * a.width;
      for (int64_t d = 0; d < a.width; ++d) to[d] += from[i * a.width + d];
    }
  }
}

template <class T>
void run_backward(const Attention<T>& a, Gradients<T> g) {
  const auto pieces = cut(a.offsets, a.users, a.heads, a.width, true);
  int64_t cost = 0, elements = 0;
  for (const Piece& piece : pieces) cost += piece.cost;
  std::vector<int64_t> at(a.users);
  std::vector<int64_t> is_long;
  for (int64_t u = 0; u < a.users; ++u) {
    const int64_t length = a.offsets[u + 1] - a.offsets[u];
    at[u] = elements;
    if (length <= kChunk) continue;
    is_long.push_back(u);
    elements += (num_chunks(length) - 1) * a.heads * length * a.width;
  }
  std::unique_ptr<T[]> partial(elements > 0 ? new T[elements] : nullptr);
  g.partial.assign(a.users, nullptr);
  for (int64_t u : is_long) g.partial[u] = partial.get() + at[u];
  in_turn(pieces.size(), cost < kPiece, [&](int64_t i) {
    const Piece& p = pieces[i];
    for (int64_t u = p.user; u < p.end; ++u) {
      const int64_t length = a.offsets[u + 1] - a.offsets[u];
      const int64_t from = std::max<int64_t>(p.chunk, 0) * kChunk;
      for (int64_t h = 0; h < a.heads; ++h)
        if (p.head < 0 || p.head == h)
          attend_backward(a, g, u, h, from, std::min(length, from + kChunk));
    }
  });
  const int64_t num_long = static_cast<int64_t>(is_long.size()) * a.heads;
  in_turn(num_long, false, [&](int64_t i) {
    add_partial(a, g, is_long[i / a.heads], i % a.heads);
  });
}

bool is_floating(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double;
}

bool has_unit_columns(const Tensor& x) {
  return x.numel() == 0 || x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1;
}

bool is_cube(const Tensor& x, int64_t events, int64_t heads, int64_t width, ScalarType dtype) {
  return x.is_cpu() && x.dim() == 3 && x.size(0) == events && x.size(1) == heads &&
         x.size(2) == width && x.scalar_type() == dtype;
}

void check(const Tensor& qkv, const Tensor& offsets, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 4 && qkv.size(1) == 3 && is_floating(qkv) &&
                      has_unit_columns(qkv),
                  "pinet_cpp::ragged_attention: qkv must be a float32 or float64 CPU tensor "
                  "[T, 3, H, D] with elements of D next to each other");
  const int64_t events = qkv.size(0), heads = qkv.size(2);
  STD_TORCH_CHECK(offsets.is_cpu() && offsets.dim() == 1 && offsets.is_contiguous() &&
                      offsets.numel() >= 1 && offsets.scalar_type() == ScalarType::Long,
                  "pinet_cpp::ragged_attention: offsets must be a contiguous int64 CPU tensor");
  const int64_t* at = offsets.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(at[0] == 0 && at[offsets.numel() - 1] == events &&
                      std::is_sorted(at, at + offsets.numel()),
                  "ragged_attention: offsets: expected ascending numbers from 0 to the number of "
                  "events, ", events, "; accumulate the lengths of the users");
  STD_TORCH_CHECK(is_cube(out, events, heads, qkv.size(3), qkv.scalar_type()) &&
                      out.is_contiguous() && lse.is_cpu() && lse.dim() == 2 &&
                      lse.size(0) == events && lse.size(1) == heads && lse.is_contiguous() &&
                      lse.scalar_type() == qkv.scalar_type(),
                  "pinet_cpp::ragged_attention: out [T, H, D] and lse [T, H] must be contiguous CPU "
                  "tensors of the dtype of qkv");
}

template <class T>
Attention<T> attention(const Tensor& qkv, const Tensor& offsets, double dropout, int64_t seed,
                       const Tensor& out, const Tensor& lse) {
  return {qkv.const_data_ptr<T>(), qkv.stride(0),          qkv.stride(1),
          qkv.stride(2),           offsets.const_data_ptr<int64_t>(),
          offsets.numel() - 1,     qkv.size(2),            qkv.size(3),
          make_dropout(dropout, seed), out.mutable_data_ptr<T>(), lse.mutable_data_ptr<T>()};
}

}  // namespace

void ragged_attention_cpu(Tensor qkv, Tensor offsets, double dropout, int64_t seed, Tensor out,
                          Tensor lse) {
  check(qkv, offsets, out, lse);
  if (qkv.numel() == 0) return;
  if (qkv.scalar_type() == ScalarType::Double) {
    run_forward(attention<double>(qkv, offsets, dropout, seed, out, lse));
  } else {
    run_forward(attention<float>(qkv, offsets, dropout, seed, out, lse));
  }
}

void ragged_attention_backward_cpu(Tensor grad, Tensor qkv, Tensor offsets, double dropout,
                                   int64_t seed, Tensor out, Tensor lse, Tensor grad_qkv) {
  check(qkv, offsets, out, lse);
  const int64_t events = qkv.size(0), heads = qkv.size(2), width = qkv.size(3);
  STD_TORCH_CHECK(is_cube(grad, events, heads, width, qkv.scalar_type()) &&
                      has_unit_columns(grad) && grad_qkv.is_cpu() &&
                      grad_qkv.dim() == 4 && grad_qkv.size(0) == events && grad_qkv.size(1) == 3 &&
                      grad_qkv.size(2) == heads && grad_qkv.size(3) == width &&
                      grad_qkv.is_contiguous() && grad_qkv.scalar_type() == qkv.scalar_type(),
                  "pinet_cpp::ragged_attention_backward: grad [T, H, D], elements of D next to each "
                  "other, and grad_qkv [T, 3, H, D], contiguous, must be CPU tensors of the dtype "
                  "of qkv");
  if (qkv.numel() == 0) return;
  if (qkv.scalar_type() == ScalarType::Double) {
    run_backward(attention<double>(qkv, offsets, dropout, seed, out, lse),
                 Gradients<double>{grad.const_data_ptr<double>(), grad.stride(0), grad.stride(1),
                                   grad_qkv.mutable_data_ptr<double>(), {}});
  } else {
    run_backward(attention<float>(qkv, offsets, dropout, seed, out, lse),
                 Gradients<float>{grad.const_data_ptr<float>(), grad.stride(0), grad.stride(1),
                                  grad_qkv.mutable_data_ptr<float>(), {}});
  }
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("ragged_attention", TORCH_BOX(&pinet::ragged_attention_cpu));
  m.impl("ragged_attention_backward", TORCH_BOX(&pinet::ragged_attention_backward_cpu));
}
