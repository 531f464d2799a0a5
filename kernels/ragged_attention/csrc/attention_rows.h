// What attention does to a tile of scores, row by row: softmax, its derivative, dropout.
//
// A tile has the scores of `rows` queries and `keys` keys. Query r sees the keys below
// diagonal + r + 1. Rows have `stride` elements between them; beyond what a query sees they are
// filled with zeros for as long as small_gemm reads there.

#pragma once

#include <cstdint>

namespace pinet {

// Which attention weights are kept: a function of the seed, the row and head of the query, and the
// position of the key, so that a backward finds the mask of its forward without having it stored.
struct Dropout {
  uint32_t threshold = 0;  // of 2^32; 0: everything is kept
  double scale = 1.0;      // of what is kept
  int64_t seed = 0;
};

Dropout make_dropout(double rate, int64_t seed);

template <class T>
struct Tile {
  T* scores;
  int64_t stride;
  int64_t rows, keys, diagonal;
  T scale;            // of the scores
  int64_t first_key;  // position of key 0 in its sequence
  int64_t draw;       // number of query 0 among all rows and heads
  int64_t draw_step;  // from one query to the next: heads
};

// Replaces the scores by exp(score - maximum so far), with dropout, for one block of keys after the
// other. `maximum` and `sum` of every query are kept up to date, and rows of `out`, [rows, width]
// with `out_row` elements between, are rescaled to the new maximum. `first`: no block came before.
void softmax_tile(const Tile<float>& tile, const Dropout& dropout, bool first, float* maximum,
                  float* sum, float* out, int64_t out_row, int64_t width);
void softmax_tile(const Tile<double>& tile, const Dropout& dropout, bool first, double* maximum,
                  double* sum, double* out, int64_t out_row, int64_t width);

// Replaces the scores by the attention weights with dropout, and `grads`, their gradients with
// `stride` elements between rows, by the gradients of the scores. `lse`: logarithm of the sum of
// exponentials of every query; `delta`: inner product of its output with the output's gradient.
void derive_tile(const Tile<float>& tile, const Dropout& dropout, float* grads, const float* lse,
                 const float* delta);
void derive_tile(const Tile<double>& tile, const Dropout& dropout, double* grads,
                 const double* lse, const double* delta);

}  // namespace pinet
