// How attention is cut into pieces of work, from the lengths alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "small_gemm.h"

namespace pinet {

constexpr int64_t kTile = 64;          // queries at a time
constexpr int64_t kKeys = 256;         // keys at a time: tiles of scores and keys stay in L2
constexpr int64_t kChunk = 2 * kKeys;  // queries (forward) or keys (backward) of one piece

// Multiplications that outweigh handing out a piece, some 10 microseconds of them.
constexpr int64_t kPiece = 1 << 19;

// Either users [user, end) with all their heads and rows, or one head and one chunk of one user.
struct Piece {
  int64_t user, end;
  int64_t head, chunk;  // -1: all
  int64_t cost;
};

inline int64_t num_chunks(int64_t length) { return (length + kChunk - 1) / kChunk; }

// Longest pieces first, so that the last ones even out the threads.
inline std::vector<Piece> cut(const int64_t* offsets, int64_t users, int64_t heads, int64_t width,
                              bool by_keys) {
  std::vector<Piece> pieces;
  Piece open{0, 0, -1, -1, 0};
  for (int64_t u = 0; u < users; ++u) {
    const int64_t length = offsets[u + 1] - offsets[u];
    if (length > kChunk) {
      for (int64_t c = 0; c < num_chunks(length); ++c) {
        // Scores below the diagonal, between the queries and the keys of the chunk.
        const int64_t from = c * kChunk, to = std::min(length, from + kChunk);
        const int64_t scores = (to - from) * (by_keys ? length - from : to);
        for (int64_t h = 0; h < heads; ++h) pieces.push_back({u, u + 1, h, c, scores * width});
      }
    }
    if (length > kChunk || open.cost >= kPiece) {
      if (open.end > open.user) pieces.push_back(open);
      open = {u + (length > kChunk), u, -1, -1, 0};
    }
    if (length <= kChunk) {
      open.end = u + 1;
      open.cost += length * (length + kGrain) / 2 * heads * width;
    }
  }
  if (open.end > open.user) pieces.push_back(open);
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
  return pieces;
}

}  // namespace pinet
