// stratified_embedding: the gradients of lookups in an item table, summed by (stratum, item).
//
//     sums[s, v] = sum of grads[k][n] over lists k, entries n with strata[k][n] = s, ids[k][n] = v
//
// ids      K tensors int64 [N_k], any stride, in [0, V), any order, repeated ones included.
// strata   K tensors int64 [N_k], any stride, in [0, S).
// grads    K tensors [N_k, ...], float32 or float64, all of one dtype and one shape [...] of a row.
//          Rows that are contiguous inside are read in place whatever the distance between them (0
//          for an expanded tensor); others are copied first.
//
// reduce   gives rows [U] int64, the distinct ids, ascending; values [S, U, ...], 0 where a stratum
//          did not touch a row; touched [S, U] bool. All three are new and fully written.
// add      adds the sum of every touched (s, v) to dense [S, V, ...], and leaves all else alone.
//
// Ids and strata are checked before anything is written.
//
// Method. Entries are sorted by (row, stratum) by counting, stably in the order of the lists; every
// sum is then gathered in registers and written once. Counting needs the position of each distinct
// id: by marking V bytes, or where V > 64 N by sorting the ids.
//
// Numerics. Every element is 0 + g_1 + g_2 + ..., in the order of the lists and their entries, in
// the dtype of the gradient; `add` adds that to what `dense` held at last. No products: the bits
// depend neither on threads nor on layout nor on the instruction set. A NaN or an infinity stays in
// its (stratum, item) and its column.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace pinet {

// Elements read and written by a task: some hundredths of a millisecond.
constexpr int64_t kEmbeddingElements = 1 << 14;

// Elements in all under which waking other threads costs more than it saves.
constexpr int64_t kEmbeddingSerial = 1 << 18;

// Rows of the table per entry beyond which ids are sorted instead of marked.
constexpr int64_t kMarkedRowsPerEntry = 64;

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
stratified_embedding_reduce_cpu(std::vector<torch::stable::Tensor> ids,
                                std::vector<torch::stable::Tensor> strata,
                                std::vector<torch::stable::Tensor> grads, int64_t num_strata,
                                int64_t num_rows);

void stratified_embedding_add_cpu(torch::stable::Tensor dense,
                                  std::vector<torch::stable::Tensor> ids,
                                  std::vector<torch::stable::Tensor> strata,
                                  std::vector<torch::stable::Tensor> grads);

}  // namespace pinet
