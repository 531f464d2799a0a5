// Rows in chunks, the rows of a chunk by stratum, and the sums of all chunks.
//
// Chunks depend on the shape alone and are summed in order, so no bit depends on threads.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "in_turn.h"

namespace pinet {

// Elements of a chunk: a hundredth of a millisecond of work, which outweighs handing it out. Where
// there are few chunks, half of it, lest a thread has one more than another.
constexpr int64_t kChunkElements = 16384;
constexpr int64_t kFewChunks = 8;

// Every chunk may have sums for every stratum: this bounds their memory.
constexpr int64_t kMaxChunks = 128;

class RowChunks {
 public:
  RowChunks(int64_t num_rows, int64_t width)
      : num_rows_(num_rows),
        step_(std::max({elements(num_rows * width) / std::max<int64_t>(width, 1), int64_t(1),
                        (num_rows + kMaxChunks - 1) / kMaxChunks})) {}

  int64_t count() const { return (num_rows_ + step_ - 1) / step_; }
  int64_t step() const { return step_; }

  // Calls work(chunk, from, to) for every chunk; threads take chunks as they come.
  template <class Work>
  void run(bool serial, const Work& work) const {
    in_turn(count(), serial, [&](int64_t i) {
      work(i, i * step_, std::min((i + 1) * step_, num_rows_));
    });
  }

 private:
  static int64_t elements(int64_t all) {
    return all < kFewChunks * kChunkElements ? kChunkElements / 2 : kChunkElements;
  }

  int64_t num_rows_;
  int64_t step_;
};

// Float64 sums of `width` columns for every chunk and stratum; strata absent from a chunk have none.
class ChunkSums {
 public:
  ChunkSums(int64_t chunks, int64_t strata, int64_t width)
      : chunks_(chunks),
        strata_(strata),
        width_(width),
        sums_(new double[chunks * strata * width]),
        is_open_(chunks * strata) {}

  // The sums of a stratum in a chunk, zeros at first. A chunk belongs to one thread.
  double* open(int64_t chunk, int64_t stratum) {
    const int64_t slot = chunk * strata_ + stratum;
    double* sums = sums_.get() + slot * width_;
    if (!is_open_[slot]) std::fill(sums, sums + width_, 0.0);
    is_open_[slot] = 1;
    return sums;
  }

  // Writes the sums of `n` columns from column `first` on, [S, n].
  template <class T>
  void write(int64_t first, int64_t n, T* out) const {
    std::vector<double> total(n);
    for (int64_t s = 0; s < strata_; ++s, out += n) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t slot = s; slot < chunks_ * strata_; slot += strata_) {
        if (!is_open_[slot]) continue;
        const double* sums = sums_.get() + slot * width_ + first;
        for (int64_t c = 0; c < n; ++c) total[c] += sums[c];
      }
      for (int64_t c = 0; c < n; ++c) out[c] = static_cast<T>(total[c]);
    }
  }

 private:
  int64_t chunks_, strata_, width_;
  std::unique_ptr<double[]> sums_;
  std::vector<char> is_open_;  // not bool, whose neighbours two threads could not write
};

// Rows [from, to) in the order of their strata, those of a stratum ascending.
class RowsByStratum {
 public:
  // False where an id is not in [0, strata): then the rows must not be used.
  bool sort(const int64_t* ids, int64_t from, int64_t to, int64_t strata) {
    const int64_t n = to - from;
    rows_.resize(n);
    if (std::is_sorted(ids + from, ids + to)) {
      for (int64_t i = 0; i < n; ++i) rows_[i] = from + i;
      return n == 0 || (ids[from] >= 0 && ids[to - 1] < strata);
    }
    for (int64_t r = from; r < to; ++r)
      if (ids[r] < 0 || ids[r] >= strata) return false;
    starts_.assign(strata + 1, 0);
    for (int64_t r = from; r < to; ++r) ++starts_[ids[r] + 1];
    for (int64_t s = 0; s < strata; ++s) starts_[s + 1] += starts_[s];
    for (int64_t r = from; r < to; ++r) rows_[starts_[ids[r]]++] = r;
    return true;
  }

  // Calls work(stratum, rows, n) for blocks of at most `most` rows of one stratum.
  template <class Work>
  void for_each_block(const int64_t* ids, int64_t most, const Work& work) const {
    const int64_t end = static_cast<int64_t>(rows_.size());
    for (int64_t at = 0; at < end;) {
      const int64_t stratum = ids[rows_[at]];
      int64_t n = std::min(most, end - at);
      while (ids[rows_[at + n - 1]] != stratum) --n;  // strata ascend: the last row tells
      work(stratum, rows_.data() + at, n);
      at += n;
    }
  }

 private:
  std::vector<int64_t> rows_, starts_;
};

inline bool is_ids(const torch::stable::Tensor& ids, int64_t num_rows) {
  return ids.is_cpu() && ids.dim() == 1 && ids.is_contiguous() && ids.numel() == num_rows &&
         ids.scalar_type() == torch::headeronly::ScalarType::Long;
}

// `x` [N, D] with its columns next to each other, whatever the distance between rows.
inline torch::stable::Tensor with_contiguous_rows(const torch::stable::Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace pinet
