#include "stratum_solve.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "interior_point.h"
#include "small_dense.h"

namespace pinet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kTiny = std::numeric_limits<double>::min();
constexpr double kNoise = 1e-8;        // balanced: smaller norms are rounding, not a direction
constexpr double kNoSum = 1e-10;       // imtlg: a smaller sum cannot scale the weights to one
constexpr double kLeastRadius = 1e-7;  // cagrad: a ball without inside has no solution path
constexpr double kRank = 1e-12;        // eigenvalues below this share of the largest are rounding

// Every rule: `gram` [k, k] may be overwritten, `w` [k] is written.

double largest_square(int k, const double* gram) {
  double largest = gram[0];
  for (int i = 1; i < k; ++i) largest = std::max(largest, gram[i * k + i]);
  return std::max(largest, kTiny);
}

void scale_to_one(int k, double* gram) {
  const double size = largest_square(k, gram);
  for (int i = 0; i < k * k; ++i) gram[i] /= size;
}

void norms_of(int k, const double* gram, double* norm, double* inverse) {
  for (int i = 0; i < k; ++i) {
    norm[i] = std::sqrt(std::max(gram[i * k + i], 0.0));
    inverse[i] = norm[i] > 0 ? 1.0 / std::max(norm[i], kTiny) : 0.0;
  }
}

void agreement(int k, double* gram, double* w) {
  double norm[kMaxStrata], inverse[kMaxStrata];
  bool keep[kMaxStrata], any = false;
  norms_of(k, gram, norm, inverse);
  for (int i = 0; i < k; ++i) {
    keep[i] = sum_of(k, gram + i * k) * inverse[i] > 0;  // the sign of cos(m, g_i)
    any = any || keep[i];
  }
  double largest = -std::numeric_limits<double>::infinity(), total = 0.0;
  for (int i = 0; i < k; ++i) {
    keep[i] = keep[i] || !any;
    w[i] = 0.0;
  }
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j < k; ++j)
      if (keep[j]) w[i] += gram[i * k + j] * inverse[i] * inverse[j];
    if (keep[i]) largest = std::max(largest, w[i]);
  }
  for (int i = 0; i < k; ++i) total += w[i] = keep[i] ? std::exp(w[i] - largest) : 0.0;
  for (int i = 0; i < k; ++i) w[i] /= total;
}

void balanced(int k, double* gram, double* w) {
  double norm[kMaxStrata], inverse[kMaxStrata], sum = 0.0;
  norms_of(k, gram, norm, inverse);
  const double largest = max_of(k, norm);
  const double least = kNoise * std::max(largest, kTiny);
  int count = 0;
  for (int i = 0; i < k; ++i) {
    if (!(norm[i] > least)) continue;
    sum += norm[i];
    ++count;
  }
  const double mean = sum / std::max(count, 1);
  for (int i = 0; i < k; ++i)
    w[i] = norm[i] > least ? mean / std::max(norm[i], kTiny) / count : 0.0;
  if (largest <= 0) std::fill(w, w + k, 1.0 / k);
}

void mgda(int k, double* gram, double* w) {
  if (k != 2) {
    scale_to_one(k, gram);
    minimise(k, gram, w);
    return;
  }
  const double first = gram[0], both = gram[1], second = gram[3];
  const double apart = first + second - 2 * both;  // ||g_0 - g_1||^2
  const bool equal = apart <= std::numeric_limits<double>::epsilon() * (first + second);
  w[0] = equal ? 0.5 : std::min(std::max((second - both) / apart, 0.0), 1.0);
  w[1] = 1.0 - w[0];
}

// keys: [k, k] or null.
void pcgrad(int k, const double* gram, const double* keys, double* w) {
  double inverse[kMaxStrata], root[kMaxStrata], key[kMaxStrata], row[kMaxStrata];
  int order[kMaxStrata];
  for (int i = 0; i < k; ++i) {
    const double square = gram[i * k + i];
    inverse[i] = square > 0 ? 1.0 / std::max(square, kTiny) : 0.0;
    root[i] = std::sqrt(inverse[i]);
  }
  std::fill(w, w + k, 0.0);
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j < k; ++j)
      key[j] = keys != nullptr ? keys[i * k + j] : gram[i * k + j] * root[i] * root[j];
    key[i] = std::numeric_limits<double>::infinity();  // itself last
    // Sorted by insertion, which is stable and allocates nothing; NaN last.
    for (int n = 0; n < k; ++n) {
      int at = n;
      for (; at > 0; --at) {
        const double before = key[order[at - 1]];
        if (!(key[n] < before || (std::isnan(before) && !std::isnan(key[n])))) break;
        order[at] = order[at - 1];
      }
      order[at] = n;
    }
    for (int j = 0; j < k; ++j) row[j] = i == j ? 1.0 : 0.0;
    for (int turn = 0; turn < k - 1; ++turn) {
      const int other = order[turn];
      const double conflict = dot(k, row, gram + other * k);
      if (conflict < 0) row[other] -= conflict * inverse[other];
    }
    for (int j = 0; j < k; ++j) w[j] += row[j];
  }
  for (int j = 0; j < k; ++j) w[j] /= k;
}

// w = A^power 1 for a symmetric A without its null space; returns the least eigenvalue that counts,
// or 0 if there is none. A is destroyed.
double power_of_ones(int k, double* a, bool inverse_root, double* w) {
  double values[kMaxStrata] = {}, vectors[kMaxStrata * kMaxStrata];
  eigen(k, a, values, vectors);
  const double least = kRank * std::max(max_of(k, values), kTiny);
  double smallest = std::numeric_limits<double>::infinity();
  std::fill(w, w + k, 0.0);
  for (int n = 0; n < k; ++n) {
    if (!(values[n] > least)) continue;
    smallest = std::min(smallest, values[n]);
    const double power = inverse_root ? 1.0 / std::sqrt(values[n]) : 1.0 / values[n];
    const double share = sum_of(k, vectors + n * k) * power;
    for (int i = 0; i < k; ++i) w[i] += share * vectors[n * k + i];
  }
  return std::isinf(smallest) ? 0.0 : smallest;
}

void imtlg(int k, double* gram, double* w) {
  double norm[kMaxStrata], inverse[kMaxStrata], total = 0.0, size = 0.0;
  norms_of(k, gram, norm, inverse);
  for (int i = 0; i < k; ++i)
    for (int j = 0; j < k; ++j) gram[i * k + j] = gram[i * k + j] * inverse[i] * inverse[j];
  power_of_ones(k, gram, false, w);
  const double largest = max_of(k, norm);
  for (int i = 0; i < k; ++i) {
    w[i] *= inverse[i] * largest;  // of order one, whatever the loss scale
    total += w[i];
    size += std::fabs(w[i]);
  }
  const bool mean = std::fabs(total) <= kNoSum * size;
  for (int i = 0; i < k; ++i) w[i] = mean ? 1.0 / k : w[i] / total;
}

void aligned_mtl(int k, double* gram, double* w) {
  scale_to_one(k, gram);
  const double smallest = power_of_ones(k, gram, true, w);
  for (int i = 0; i < k; ++i) w[i] = smallest > 0 ? std::sqrt(smallest) * (w[i] / k) : 1.0 / k;
}

void cagrad(int k, double* gram, double c, double* w) {
  double with_mean[kMaxStrata], gain[kMaxStrata] = {};
  if (c > 0) {
    scale_to_one(k, gram);
    for (int i = 0; i < k; ++i) with_mean[i] = sum_of(k, gram + i * k) / k;
    const double square = std::max(sum_of(k, with_mean) / k, 0.0);
    support(k, gram, with_mean, std::max(c * std::sqrt(square), kLeastRadius), gain);
  }
  for (int i = 0; i < k; ++i) w[i] = (1.0 / k + gain[i]) / (1.0 + c);
}

void solve(Rule rule, int k, double* gram, double c, const double* keys, double* w) {
  switch (rule) {
    case Rule::kAgreement: return agreement(k, gram, w);
    case Rule::kBalanced: return balanced(k, gram, w);
    case Rule::kMgda: return mgda(k, gram, w);
    case Rule::kPcgrad: return pcgrad(k, gram, keys, w);
    case Rule::kImtlg: return imtlg(k, gram, w);
    case Rule::kAlignedMtl: return aligned_mtl(k, gram, w);
    case Rule::kCagrad: return cagrad(k, gram, c, w);
  }
}

// Copies rows and columns `kept` of [strata, strata]; returns whether all of it is finite.
bool gather(const double* from, int64_t strata, const std::vector<int64_t>& kept, double* to) {
  bool finite = true;
  for (const int64_t s : kept) {
    for (const int64_t t : kept) {
      *to = from[s * strata + t];
      finite = finite && std::isfinite(*to++);
    }
  }
  return finite;
}

bool is_matrix_batch(const Tensor& x, int64_t dims) {
  return x.is_cpu() && x.dim() == dims && x.is_contiguous() &&
         x.scalar_type() == ScalarType::Double;
}

}  // namespace

void stratum_solve_cpu(Tensor gram, int64_t rule, std::vector<int64_t> kept, double c,
                       std::optional<Tensor> keys, Tensor out) {
  STD_TORCH_CHECK(is_matrix_batch(gram, 3) && is_matrix_batch(out, 2) &&
                      gram.size(1) == gram.size(2) && out.size(0) == gram.size(0) &&
                      out.size(1) == gram.size(1),
                  "pinet_cpp::stratum_solve: gram [P, S, S] and out [P, S] must be contiguous "
                  "float64 CPU tensors");
  const int64_t count = gram.size(0), strata = gram.size(1);
  STD_TORCH_CHECK(!keys || (is_matrix_batch(*keys, 2) && keys->size(0) == strata &&
                            keys->size(1) == strata),
                  "pinet_cpp::stratum_solve: keys must be a contiguous float64 CPU tensor [S, S]");
  const int64_t num_kept = static_cast<int64_t>(kept.size());
  bool ascending = num_kept >= 1 && num_kept <= kMaxStrata;
  for (int64_t i = 0; ascending && i < num_kept; ++i)
    ascending = kept[i] < strata && kept[i] >= (i > 0 ? kept[i - 1] + 1 : 0);
  STD_TORCH_CHECK(ascending, "pinet_cpp::stratum_solve: kept must be 1 to ", kMaxStrata,
                  " ascending strata of the Gram");
  STD_TORCH_CHECK(rule >= 0 && rule <= static_cast<int64_t>(Rule::kCagrad),
                  "pinet_cpp::stratum_solve: no rule has the number ", rule);

  double matrix[kMaxStrata * kMaxStrata], order[kMaxStrata * kMaxStrata], w[kMaxStrata];
  if (keys) gather(keys->const_data_ptr<double>(), strata, kept, order);
  const double* from = gram.const_data_ptr<double>();
  double* to = out.mutable_data_ptr<double>();
  std::fill(to, to + count * strata, 0.0);
  for (int64_t i = 0; i < count; ++i, from += strata * strata, to += strata) {
    if (gather(from, strata, kept, matrix)) {
      solve(static_cast<Rule>(rule), static_cast<int>(num_kept), matrix, c,
            keys ? order : nullptr, w);
    } else {
      std::fill(w, w + num_kept, std::numeric_limits<double>::quiet_NaN());
    }
    for (int64_t j = 0; j < num_kept; ++j) to[kept[j]] = w[j];
  }
}

}  // namespace pinet

STABLE_TORCH_LIBRARY_IMPL(pinet_cpp, CPU, m) {
  m.impl("stratum_solve", TORCH_BOX(&pinet::stratum_solve_cpu));
}
