// stratum_sums: the sum of the rows of every stratum.
//
//     out[s, c] = sum_{n: ids[n] = s} rows[n, c]
//
// rows  [N, D] float32 or float64, any strides; copied first where columns are not neighbours.
// ids   [N] int64, contiguous, in [0, S), in any order.
// out   [S, D] of the dtype of `rows`, contiguous; every element is written. Zero where a stratum is
//       empty.
//
// Numerics. At most 32 rows of a stratum are summed in the dtype of `rows`, all above in float64, and
// rounded once. A NaN or an infinity reaches the column of its stratum and nothing else.
//
// Determinism. See csrc/row_chunks.h: the same bits for any number of threads. The order of rows
// inside a chunk is that of their strata, so sorting rows stably changes no more than where chunks end.
// Where rows are wide, as for sums of whole windows [L * D], threads take columns instead, by the shape
// alone too: from 16384 columns on, and from 513 where chunks would be shorter than 32 rows.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pinet {

constexpr int64_t kSumsBlock = 32;

// Columns that a thread takes where rows are wide: sums of 8 strata stay in the second cache.
constexpr int64_t kSumsColumns = 512;
constexpr int64_t kSumsWide = 16384;

// Elements under which waking other threads costs more than it saves.
constexpr int64_t kSumsSerial = 1 << 18;

void stratum_sums_cpu(torch::stable::Tensor rows, torch::stable::Tensor ids,
                      torch::stable::Tensor out);

}  // namespace pinet
