// The order in which lookups are summed: sorted by (row, stratum), stably.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace pinet {

constexpr int64_t kAhead = 8;  // entries between prefetch and use

// One list of lookups.
struct LookupList {
  const int64_t* ids;
  const int64_t* strata;
  int64_t id_stride, stratum_stride;
  const char* grads;
  int64_t grad_bytes;  // between entries
  int64_t count;
};

// Entries sorted by cell, (row, stratum) with the stratum running fastest.
struct LookupPlan {
  std::vector<int64_t> rows;             // [U], ascending
  std::unique_ptr<int64_t[]> starts;     // [U * S + 1]: of every cell in `order`
  std::unique_ptr<const char*[]> order;  // [N + kAhead]: where the gradient of each entry lies
  int64_t num_entries = 0;
};

// Checks ids and strata; raises where one is out of range.
LookupPlan make_plan(const std::vector<LookupList>& lists, int64_t num_strata, int64_t num_rows);

}  // namespace pinet
