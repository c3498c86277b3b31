// Selection and sparse sums on the CPU, for float32. Plain loops that a compiler turns into vector code for the machine at hand.
//
// Rows of a batch, and features, are shared out among threads and each is computed by one of them in a fixed order: results do not
// depend on the number of threads. Sums may be reassociated; NaN and infinity keep their meaning (no -ffinite-math-only).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <limits>
#include <vector>

namespace {

constexpr long CHUNK = 32;    // entries that are compared at once, before any of them is looked at alone
constexpr long GROUPS = 128;  // of a first block, whose maxima say what the k-th largest entry is at least

struct Entry {
  float key;  // z c, by which entries are compared; while screened, what it is at most
  float z;    // while screened, the width of what key can be: it is at least key - z
  int32_t feature;
};

// NaN before everything, so that it is selected and seen; then by key, and by feature where keys are equal.
inline bool before(const Entry& a, const Entry& b) {
  const bool a_nan = a.key != a.key, b_nan = b.key != b.key;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.key != b.key) return a.key > b.key;
  return a.feature < b.feature;
}

struct Row {
  std::vector<Entry> entries;
  float threshold;
  long most = 0;  // entries, while screened, before those are dropped that cannot be among the largest
};

struct Candidates {
  long k;  // > 0: the k largest of every row; 0: all above a threshold
  std::vector<Row> rows;
};

void keep_largest(Row& row, long k) {
  std::nth_element(row.entries.begin(), row.entries.begin() + (k - 1), row.entries.end(), before);
  row.entries.resize(k);
  row.threshold = row.entries[k - 1].key;
  if (row.threshold != row.threshold) row.threshold = std::numeric_limits<float>::infinity();
}

enum class Than { not_less, not_less_or_equal, greater };  // of what is not a number, the first two hold

template <Than than>
inline bool hit(float key, float t) {
  return than == Than::greater ? key > t : than == Than::not_less ? !(key < t) : !(key <= t);
}

// Of CHUNK keys, one bit each.
template <Than than>
inline uint32_t hits(const float* key, float t) {
#ifdef __AVX512F__
  constexpr int how = than == Than::greater ? _CMP_GT_OQ : than == Than::not_less ? _CMP_NLT_UQ : _CMP_NLE_UQ;
  const __m512 at = _mm512_set1_ps(t);
  const uint32_t high = _mm512_cmp_ps_mask(_mm512_loadu_ps(key + 16), at, how);
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(key), at, how) | (high << 16);
#else
  int any = 0;
  for (long i = 0; i < CHUNK; ++i) any |= hit<than>(key[i], t);
  if (!any) return 0;
  uint32_t mask = 0;
  for (long i = 0; i < CHUNK; ++i) mask |= uint32_t(hit<than>(key[i], t)) << i;
  return mask;
#endif
}

// add(j) for every key that is (see `than`) the threshold, which add may raise.
template <Than than, typename Add>
inline void scan(const float* key, long n, const float& threshold, const Add& add) {
  long j = 0;
  for (; j + CHUNK <= n; j += CHUNK)
    for (uint32_t mask = hits<than>(key + j, threshold); mask != 0; mask &= mask - 1) {
      const long i = j + __builtin_ctz(mask);
      if (hit<than>(key[i], threshold)) add(i);
    }
  for (; j < n; ++j)
    if (hit<than>(key[j], threshold)) add(j);
}

// What the k-th largest of n keys is at least: k of the groups j, j + GROUPS, ... have a maximum as large. -infinity where there are
// too few groups.
float at_least(const float* keys, long n, long k) {
  const float none = -std::numeric_limits<float>::infinity();
  if (k > GROUPS || n < 2 * GROUPS) return none;
  float largest[GROUPS];
  for (long g = 0; g < GROUPS; ++g) largest[g] = keys[g];
  for (long j = GROUPS; j + GROUPS <= n; j += GROUPS)
    for (long g = 0; g < GROUPS; ++g) largest[g] = keys[j + g] > largest[g] ? keys[j + g] : largest[g];
  for (long g = 0; g < GROUPS; ++g)
    if (largest[g] != largest[g]) return none;
  std::nth_element(largest, largest + (k - 1), largest + GROUPS, [](float a, float b) { return a > b; });
  return largest[k - 1];
}

// Drops what cannot be among the k largest: its key is at most less than what k others are at least.
void drop_hopeless(Row& row, long k) {
  if (long(row.entries.size()) <= k) return;
  std::vector<float> least;
  least.reserve(row.entries.size());
  for (const auto& entry : row.entries) least.push_back(entry.key - entry.z);
  std::nth_element(least.begin(), least.begin() + (k - 1), least.end(), [](float a, float b) { return a > b; });
  row.threshold = std::max(row.threshold, least[k - 1]);
  const float t = row.threshold;
  row.entries.erase(std::remove_if(row.entries.begin(), row.entries.end(), [t](const Entry& e) { return e.key < t; }), row.entries.end());
}

// y [d] += sum over the places q = begin .. end - 1 in `order` of weights[s] * rows[tokens[s]], s = order[q].
inline void add_slots(const float* rows, long stride, const int64_t* tokens, const int64_t* order, const float* weights, long begin,
                      long end, long d, float* __restrict y) {
  long q = begin;
  for (; q + 4 <= end; q += 4) {
    const long s0 = order[q], s1 = order[q + 1], s2 = order[q + 2], s3 = order[q + 3];
    const float *x0 = rows + tokens[s0] * stride, *x1 = rows + tokens[s1] * stride;
    const float *x2 = rows + tokens[s2] * stride, *x3 = rows + tokens[s3] * stride;
    const float v0 = weights[s0], v1 = weights[s1], v2 = weights[s2], v3 = weights[s3];
    for (long i = 0; i < d; ++i) y[i] += v0 * x0[i] + v1 * x1[i] + v2 * x2[i] + v3 * x3[i];
  }
  for (; q < end; ++q) {
    const float* x = rows + tokens[order[q]] * stride;
    const float v = weights[order[q]];
    for (long i = 0; i < d; ++i) y[i] += v * x[i];
  }
}

// A gradient of rows of W that was never written down: of row f the sum over the slots s of feature f of weights[s] * rows[tokens[s]],
// and of that, if `tangent`, what is orthogonal to W[f].
struct RowGradient {
  const float* rows;
  long stride;
  const int64_t *tokens, *order, *bounds;
  const float* weights;
  int tangent;

  // Writes row f into g [d]; false: it is 0, and g was not written.
  bool write(long f, const float* w, long d, float* __restrict g) const {
    if (bounds[f] == bounds[f + 1]) return false;
    std::memset(g, 0, sizeof(float) * d);
    add_slots(rows, stride, tokens, order, weights, bounds[f], bounds[f + 1], d, g);
    if (tangent) {
      float along = 0;
      for (long i = 0; i < d; ++i) along += g[i] * w[i];
      for (long i = 0; i < d; ++i) g[i] -= along * w[i];
    }
    return true;
  }
};

}  // namespace

extern "C" {

double row_squares(const RowGradient* gradient, const float* W, long n, long d, int threads) {
  std::vector<double> of_rows(n, 0);  // added up in their order, however many threads there are
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> g(d);
#pragma omp for schedule(dynamic, 64)
    for (long f = 0; f < n; ++f) {
      if (!gradient->write(f, W + f * d, d, g.data())) continue;
      float squares = 0;
      for (long i = 0; i < d; ++i) squares += g[i] * g[i];
      of_rows[f] = squares;
    }
  }
  double total = 0;
  for (double squares : of_rows) total += squares;
  return total;
}

// m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, W <- keep W - rate m / (sqrt(v) by + epsilon), g = *clip * gradient.
void row_adam(const RowGradient* gradient, const float* clip, float* W, float* m, float* v, long n, long d, float keep, float rate,
              float beta1, float beta2, float by, float epsilon, int threads) {
  const float factor = *clip;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(d);
#pragma omp for schedule(dynamic, 64)
    for (long f = 0; f < n; ++f) {
      float *__restrict a = W + f * d, *__restrict b = m + f * d, *__restrict e = v + f * d;
      const float* __restrict g = row.data();
      if (gradient->write(f, a, d, row.data())) {
        for (long i = 0; i < d; ++i) {
          const float gi = factor * g[i];
          b[i] = beta1 * b[i] + (1 - beta1) * gi;
          e[i] = beta2 * e[i] + (1 - beta2) * gi * gi;
          a[i] = keep * a[i] - rate * b[i] / (std::sqrt(e[i]) * by + epsilon);
        }
      } else {
        for (long i = 0; i < d; ++i) {
          b[i] *= beta1;
          e[i] *= beta2;
          a[i] = keep * a[i] - rate * b[i] / (std::sqrt(e[i]) * by + epsilon);
        }
      }
    }
  }
}

// Rows in 8 bits: q = round(x * fold / scale), scale = max |x * fold| / 127; norm = |x * fold|. fold is of columns.
void quantise(const float* x, long stride, long n, long d, const float* fold, int8_t* q, float* scale, float* norm, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < n; ++r) {
    const float* row = x + r * stride;
    int8_t* out = q + r * d;
    int32_t largest = 0;  // as bits, whose order is that of sizes; what is not a number is larger than all
    float squares = 0;
    for (long i = 0; i < d; ++i) {
      const float v = row[i] * fold[i];
      int32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
      squares += v * v;
    }
    float size;
    std::memcpy(&size, &largest, sizeof size);
    scale[r] = size == 0 ? 1 : size / 127;
    norm[r] = std::sqrt(squares);
    if (!(size < std::numeric_limits<float>::infinity())) continue;  // nobody uses rows that are not finite
    const float by = 1 / scale[r];
    for (long i = 0; i < d; ++i) {
      // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
      const float rounded = (row[i] * fold[i] * by + 12582912.0f);
      int32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      out[i] = int8_t(bits);
    }
  }
}

// One block of features in 8 bits: product [rows, n] of quantised rows. With w_scale, w_norm of features, x_scale, x_norm of rows, an
// entry's key is at most (w_scale (x_scale product + q x_norm) + q x_scale w_norm + bias) c, and less than that by at most
// 2 q (w_scale x_norm + x_scale w_norm) c.
void candidates_screen(void* handle, const int32_t* product, long n, long first, const float* bias, const float* c, const float* theta,
                       const float* w_scale, const float* w_norm, const float* x_scale, const float* x_norm, float q, long first_row,
                       long n_rows, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const long k = found.k;
  const float widest_scale = *std::max_element(w_scale, w_scale + n), widest_norm = *std::max_element(w_norm, w_norm + n);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < n_rows; ++r) {
    Row& row = found.rows[first_row + r];
    if (row.most == 0) row.most = std::max(4 * k, k + 64);
    const int32_t* p = product + r * n;
    const float xs = x_scale[first_row + r], xq = q * x_norm[first_row + r], sq = q * xs;
    thread_local std::vector<float> keys;
    keys.resize(n);
    float* key = keys.data();
    for (long j = 0; j < n; ++j) key[j] = w_scale[j] * (xs * float(p[j]) + xq) + sq * w_norm[j] + bias[j];
    if (c != nullptr) {
      for (long j = 0; j < n; ++j) key[j] *= c[j];
    } else if (k > 0 && first == 0 && row.threshold == -std::numeric_limits<float>::infinity()) {
      row.threshold = at_least(key, n, k) - 2 * (widest_scale * xq + sq * widest_norm);
    }
    const auto add = [&](long j) {
      const float width = 2 * (w_scale[j] * xq + sq * w_norm[j]);
      row.entries.push_back({key[j], c == nullptr ? width : width * c[j], int32_t(first + j)});
      if (k > 0 && long(row.entries.size()) >= row.most) {
        drop_hopeless(row, k);
        row.most = std::max(row.most, 2 * long(row.entries.size()));
      }
    };
    if (theta != nullptr) {
      for (long j = 0; j < n; ++j)
        if (!(key[j] < theta[j])) add(j);
      continue;
    }
    scan<Than::not_less>(key, n, row.threshold, add);
  }
}

// Ends screening: keys and z in full precision. bias and c are of all features. Entries stay whose key exceeds `above`, or theta of
// their feature; of rows of which k are asked, all. Returns how many entries there were.
long candidates_rescore(void* handle, const float* x, long x_stride, const float* W, long W_stride, const float* bias, const float* c,
                        const float* theta, float above, long d, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  long n = 0;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) reduction(+ : n)
  for (long r = 0; r < long(found.rows.size()); ++r) {
    Row& row = found.rows[r];
    if (found.k > 0) drop_hopeless(row, found.k);
    n += long(row.entries.size());
    const float* a = x + r * x_stride;
    for (auto& entry : row.entries) {
      const float* w = W + entry.feature * W_stride;
      float sum = 0;
      for (long i = 0; i < d; ++i) sum += a[i] * w[i];
      entry.z = sum + bias[entry.feature];
      entry.key = c == nullptr ? entry.z : entry.z * c[entry.feature];
    }
    if (found.k > 0) continue;
    row.entries.erase(std::remove_if(row.entries.begin(), row.entries.end(),
                                     [&](const Entry& e) { return !(e.key > (theta == nullptr ? above : theta[e.feature])); }),
                      row.entries.end());
  }
  return n;
}

void* candidates_new(long n_rows, long k, float threshold) {
  auto* found = new Candidates{k, std::vector<Row>(n_rows)};
  for (auto& row : found->rows) row.threshold = threshold;
  return found;
}

void candidates_free(void* handle) { delete static_cast<Candidates*>(handle); }

// One block of features: pre [rows, n] without bias, to which it is added. theta, of each feature, goes before the threshold of the row.
void candidates_add(void* handle, float* pre, long n, long first, const float* bias, const float* c, const float* theta, long first_row,
                    long n_rows, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const long k = found.k, most = std::max(4 * k, k + 64);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < n_rows; ++r) {
    Row& row = found.rows[first_row + r];
    float* z = pre + r * n;
    for (long j = 0; j < n; ++j) z[j] += bias[j];
    float* key = z;
    if (c != nullptr) {
      thread_local std::vector<float> keys;
      keys.resize(n);
      key = keys.data();
      for (long j = 0; j < n; ++j) key[j] = z[j] * c[j];
    }
    if (k > 0 && first == 0 && row.threshold == -std::numeric_limits<float>::infinity())
      row.threshold = std::nextafter(at_least(key, n, k), row.threshold);
    const auto add = [&](long j) {
      row.entries.push_back({key[j], z[j], int32_t(first + j)});
      if (k > 0 && long(row.entries.size()) >= most) keep_largest(row, k);
    };
    if (theta != nullptr) {
      for (long j = 0; j < n; j += CHUNK) {
        const long end = std::min(j + CHUNK, n);
        int any = 0;
        for (long i = j; i < end; ++i) any |= key[i] > theta[i];
        if (any)
          for (long i = j; i < end; ++i)
            if (key[i] > theta[i]) add(i);
      }
      continue;
    }
    if (k > 0) {
      scan<Than::not_less_or_equal>(key, n, row.threshold, add);
    } else {
      scan<Than::greater>(key, n, row.threshold, add);
    }
  }
}

// Adds the entries of `part`, whose first feature has the number `base`.
void candidates_append(void* handle, const void* part, long base, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const auto& others = *static_cast<const Candidates*>(part);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < long(found.rows.size()); ++r)
    for (const auto& entry : others.rows[r].entries)
      found.rows[r].entries.push_back({entry.key, entry.z, int32_t(base + entry.feature)});
}

long candidates_count(void* handle) {
  long n = 0;
  for (const auto& row : static_cast<Candidates*>(handle)->rows) n += long(row.entries.size());
  return n;
}

// Of all rows together the n largest; among equal keys those of the first rows, and of the first features. Returns the smallest
// key among them, 0 if there are not so many.
float candidates_keep(void* handle, long n) {
  auto& found = *static_cast<Candidates*>(handle);
  std::vector<float> keys;
  keys.reserve(candidates_count(handle));
  for (const auto& row : found.rows)
    for (const auto& entry : row.entries) keys.push_back(entry.key);
  if (long(keys.size()) < n) return 0;
  std::nth_element(keys.begin(), keys.begin() + (n - 1), keys.end(), [](float a, float b) { return a > b; });
  const float last = keys[n - 1];
  long equal = n;
  for (float key : keys) equal -= key > last;
  for (auto& row : found.rows) {
    auto kept = row.entries.begin();
    for (const auto& entry : row.entries)
      if (entry.key > last || (entry.key == last && equal-- > 0)) *kept++ = entry;
    row.entries.erase(kept, row.entries.end());
  }
  return last;
}

// Finishes: of each row exactly k where k > 0, in the order of their features. offsets [rows + 1].
void candidates_offsets(void* handle, int64_t* offsets, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const long n_rows = long(found.rows.size());
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < n_rows; ++r) {
    Row& row = found.rows[r];
    if (found.k > 0) {
      if (long(row.entries.size()) > found.k) keep_largest(row, found.k);
      std::sort(row.entries.begin(), row.entries.end(), [](const Entry& a, const Entry& b) { return a.feature < b.feature; });
    }
  }
  offsets[0] = 0;
  for (long r = 0; r < n_rows; ++r) offsets[r + 1] = offsets[r] + int64_t(found.rows[r].entries.size());
}

void candidates_take(void* handle, const int64_t* offsets, int64_t* indices, float* values, int threads) {
  const auto& found = *static_cast<Candidates*>(handle);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < long(found.rows.size()); ++r) {
    int64_t slot = offsets[r];
    for (const auto& entry : found.rows[r].entries) {
      indices[slot] = entry.feature;
      values[slot++] = entry.z;
    }
  }
}

// out[b] += sum over slots s of bag b of weights[s] * table[rows[s]]; `stride`s count floats from row to row.
void bag(const float* table, long table_stride, const int64_t* rows, const int64_t* offsets, const float* weights, long n_bags, long d,
         float* out, long out_stride, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (long b = 0; b < n_bags; ++b) {
    float* __restrict y = out + b * out_stride;
    long s = offsets[b];
    const long end = offsets[b + 1];
    for (; s + 4 <= end; s += 4) {
      const float *w0 = table + rows[s] * table_stride, *w1 = table + rows[s + 1] * table_stride;
      const float *w2 = table + rows[s + 2] * table_stride, *w3 = table + rows[s + 3] * table_stride;
      const float f0 = weights[s], f1 = weights[s + 1], f2 = weights[s + 2], f3 = weights[s + 3];
      for (long i = 0; i < d; ++i) y[i] += f0 * w0[i] + f1 * w1[i] + f2 * w2[i] + f3 * w3[i];
    }
    for (; s < end; ++s) {
      const float* w = table + rows[s] * table_stride;
      for (long i = 0; i < d; ++i) y[i] += weights[s] * w[i];
    }
  }
}

// out[s] = rows[b] . table[indices[s]] for the slots s of each row b.
void dots(const float* rows, long row_stride, const float* table, long table_stride, const int64_t* indices, const int64_t* offsets,
          long n_rows, long d, float* out, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (long b = 0; b < n_rows; ++b) {
    const float* x = rows + b * row_stride;
    for (long s = offsets[b]; s < offsets[b + 1]; ++s) {
      const float* w = table + indices[s] * table_stride;
      float sum = 0;
      for (long i = 0; i < d; ++i) sum += x[i] * w[i];
      out[s] = sum;
    }
  }
}

// Slots in the order of their features, stable: order [slot], bounds [feature + 1].
void by_feature(const int64_t* indices, long n_slots, long n_features, int64_t* order, int64_t* bounds) {
  std::fill(bounds, bounds + n_features + 1, 0);
  for (long s = 0; s < n_slots; ++s) ++bounds[indices[s] + 1];
  for (long f = 0; f < n_features; ++f) bounds[f + 1] += bounds[f];
  std::vector<int64_t> next(bounds, bounds + n_features);
  for (long s = 0; s < n_slots; ++s) order[next[indices[s]]++] = s;
}

// out[f] = sum over the slots s of feature f of weights[s] * rows[tokens[s]].
void feature_sums(const float* rows, long row_stride, const int64_t* tokens, const int64_t* order, const int64_t* bounds,
                  const float* weights, long n_features, long d, float* out, int threads) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
  for (long f = 0; f < n_features; ++f) {
    float* __restrict y = out + f * d;
    std::memset(y, 0, sizeof(float) * d);
    add_slots(rows, row_stride, tokens, order, weights, bounds[f], bounds[f + 1], d, y);
  }
}

// g[r] -= (g[r] . w[r]) w[r] for every row.
void project_out(float* g, const float* w, long n, long d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < n; ++r) {
    float* __restrict a = g + r * d;
    const float* b = w + r * d;
    float along = 0;
    for (long i = 0; i < d; ++i) along += a[i] * b[i];
    if (along == 0) continue;
    for (long i = 0; i < d; ++i) a[i] -= along * b[i];
  }
}

// w[r] /= |w[r]| for every row.
void normalise(float* w, long n, long d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < n; ++r) {
    float* a = w + r * d;
    float squares = 0;
    for (long i = 0; i < d; ++i) squares += a[i] * a[i];
    const float norm = std::sqrt(squares);
    for (long i = 0; i < d; ++i) a[i] /= norm;
  }
}

}  // extern "C"
