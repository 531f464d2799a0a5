#include "lookup_plan.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "simd.h"
#include "stratified_embedding.h"

namespace pinet {
namespace {

// Calls visit(entry, id, stratum, gradient) in the order of the lists.
template <class Visit>
PINET_INLINE void for_each_entry(const std::vector<LookupList>& lists, const Visit& visit) {
  int64_t entry = 0;
  for (const LookupList& list : lists)
    for (int64_t n = 0; n < list.count; ++n)
      visit(entry++, list.ids[n * list.id_stride], list.strata[n * list.stratum_stride],
            list.grads + n * list.grad_bytes);
}

bool is_inside(int64_t x, int64_t bound) {
  return static_cast<uint64_t>(x) < static_cast<uint64_t>(bound);
}

// Both write the distinct ids into `rows` and the cell of every entry, and return whether all ids
// and strata were in range; if not, they stop there.
bool find_cells_by_marks(const std::vector<LookupList>& lists, int64_t num_strata, int64_t num_rows,
                         int64_t* cell, std::vector<int64_t>& rows) {
  constexpr int64_t kWord = sizeof(uint64_t);
  const int64_t padded = (num_rows + kWord - 1) / kWord * kWord;
  std::vector<unsigned char> marks(padded + 1, 0);  // the last one takes ids out of range
  bool is_valid = true;
  for_each_entry(lists, [&](int64_t, int64_t id, int64_t stratum, const char*) {
    const bool is_row = is_inside(id, num_rows);
    is_valid &= is_row && is_inside(stratum, num_strata);
    marks[is_row ? id : padded] = 1;
  });
  if (!is_valid) return false;
  std::unique_ptr<int64_t[]> first_cell(new int64_t[num_rows]);
  for (int64_t from = 0; from < padded; from += kWord) {
    uint64_t word;
    std::memcpy(&word, marks.data() + from, kWord);
    if (word == 0) continue;
    for (int64_t v = from; v < from + kWord; ++v) {
      if (marks[v] == 0) continue;
      first_cell[v] = static_cast<int64_t>(rows.size()) * num_strata;
      rows.push_back(v);
    }
  }
  for_each_entry(lists, [&](int64_t entry, int64_t id, int64_t stratum, const char*) {
    cell[entry] = first_cell[id] + stratum;
  });
  return true;
}

bool find_cells_by_sorting(const std::vector<LookupList>& lists, int64_t num_strata,
                           int64_t num_rows, int64_t num_entries, int64_t* cell,
                           std::vector<int64_t>& rows) {
  std::vector<std::pair<int64_t, int64_t>> entries(num_entries);
  bool is_valid = true;
  for_each_entry(lists, [&](int64_t entry, int64_t id, int64_t stratum, const char*) {
    is_valid &= is_inside(id, num_rows) && is_inside(stratum, num_strata);
    entries[entry] = {id, entry};
    cell[entry] = stratum;
  });
  if (!is_valid) return false;
  std::sort(entries.begin(), entries.end());
  for (const auto& [id, entry] : entries) {
    if (rows.empty() || rows.back() != id) rows.push_back(id);
    cell[entry] += (static_cast<int64_t>(rows.size()) - 1) * num_strata;
  }
  return true;
}

}  // namespace

LookupPlan make_plan(const std::vector<LookupList>& lists, int64_t num_strata, int64_t num_rows) {
  LookupPlan plan;
  for (const LookupList& list : lists) plan.num_entries += list.count;
  const int64_t num_entries = plan.num_entries;
  std::unique_ptr<int64_t[]> cell(new int64_t[num_entries]);
  const bool is_valid =
      num_rows / kMarkedRowsPerEntry > num_entries
          ? find_cells_by_sorting(lists, num_strata, num_rows, num_entries, cell.get(), plan.rows)
          : find_cells_by_marks(lists, num_strata, num_rows, cell.get(), plan.rows);
  STD_TORCH_CHECK(is_valid, "pinet_cpp::stratified_embedding: ids must be in [0, ", num_rows,
                  ") and strata in [0, ", num_strata, ")");
  const int64_t num_cells = static_cast<int64_t>(plan.rows.size()) * num_strata;
  // Counted two cells further on: after the prefix sum starts[c + 1] is the start of c, and after
  // the entries were placed its end.
  plan.starts.reset(new int64_t[num_cells + 2]());
  int64_t* starts = plan.starts.get();
  for (int64_t entry = 0; entry < num_entries; ++entry) ++starts[cell[entry] + 2];
  for (int64_t c = 2, sum = 0; c < num_cells + 2; ++c) starts[c] = sum += starts[c];
  plan.order.reset(new const char*[num_entries + kAhead]);
  const char** order = plan.order.get();
  for_each_entry(lists, [&](int64_t entry, int64_t, int64_t, const char* grad) {
    order[starts[cell[entry] + 1]++] = grad;
  });
  // What is fetched ahead of the last entries.
  std::fill(order + num_entries, order + num_entries + kAhead,
            num_entries > 0 ? order[0] : nullptr);
  return plan;
}

}  // namespace pinet
