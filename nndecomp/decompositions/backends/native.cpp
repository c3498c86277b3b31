// Selection and sparse sums on the CPU, for float32. Plain loops that a compiler turns into vector code for the machine at hand.
//
// Rows of a batch, and features, are shared out among threads and each is computed by one of them in a fixed order: results do not
// depend on the number of threads. Sums may be reassociated; NaN and infinity keep their meaning (no -ffinite-math-only).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr long CHUNK = 32;  // entries that are compared at once, before any of them is looked at alone

struct Entry {
  float key;  // z c, by which entries are compared
  float z;
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

}  // namespace

extern "C" {

void* candidates_new(long n_rows, long k, float threshold) {
  auto* found = new Candidates{k, std::vector<Row>(n_rows)};
  for (auto& row : found->rows) row.threshold = threshold;
  return found;
}

void candidates_free(void* handle) { delete static_cast<Candidates*>(handle); }

// One block of features: pre [rows, n] without bias. theta, of each feature, goes before the threshold of the row.
void candidates_add(void* handle, const float* pre, long n, long first, const float* bias, const float* c, const float* theta,
                    long first_row, long n_rows, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const long k = found.k, most = std::max(4 * k, k + 64);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long r = 0; r < n_rows; ++r) {
    Row& row = found.rows[first_row + r];
    const float* p = pre + r * n;
    float z[CHUNK], key[CHUNK];
    for (long j = 0; j < n; j += CHUNK) {
      const long m = std::min(CHUNK, n - j);
      int hit = 0;
      if (m == CHUNK && c == nullptr && theta == nullptr) {
        const float t = row.threshold;
        for (long i = 0; i < CHUNK; ++i) key[i] = p[j + i] + bias[j + i];
        if (k > 0) {
          for (long i = 0; i < CHUNK; ++i) hit |= !(key[i] <= t);
        } else {
          for (long i = 0; i < CHUNK; ++i) hit |= key[i] > t;
        }
        if (!hit) continue;
        std::memcpy(z, key, sizeof z);
      } else {
        for (long i = 0; i < m; ++i) {
          z[i] = p[j + i] + bias[j + i];
          key[i] = c == nullptr ? z[i] : z[i] * c[j + i];
          const float t = theta == nullptr ? row.threshold : theta[j + i];
          hit |= k > 0 ? !(key[i] <= t) : key[i] > t;
        }
        if (!hit) continue;
      }
      for (long i = 0; i < m; ++i) {
        const float t = theta == nullptr ? row.threshold : theta[j + i];
        if (k > 0 ? !(key[i] <= t) : key[i] > t) {
          row.entries.push_back({key[i], z[i], int32_t(first + j + i)});
          if (k > 0 && long(row.entries.size()) >= most) keep_largest(row, k);
        }
      }
    }
  }
}

// The rows that have fewer than k entries, because their threshold was too high. rows [n_rows].
long candidates_short(void* handle, int64_t* rows) {
  const auto& found = *static_cast<Candidates*>(handle);
  long n = 0;
  for (long r = 0; r < long(found.rows.size()); ++r)
    if (long(found.rows[r].entries.size()) < found.k) rows[n++] = r;
  return n;
}

// Puts the entries of `from` in the place of some rows.
void candidates_replace(void* handle, void* from, const int64_t* rows) {
  auto& found = *static_cast<Candidates*>(handle);
  auto& others = *static_cast<Candidates*>(from);
  for (long r = 0; r < long(others.rows.size()); ++r) std::swap(found.rows[rows[r]], others.rows[r]);
}

// After candidates_offsets: the smallest key of each row, of which all but this share of the rows have a larger one.
float candidates_threshold(void* handle, float share) {
  const auto& found = *static_cast<Candidates*>(handle);
  std::vector<float> smallest;
  for (const auto& row : found.rows) {
    float least = std::numeric_limits<float>::infinity();
    for (const auto& entry : row.entries) least = std::min(least, entry.key);
    smallest.push_back(least);
  }
  const long rank = std::min(long(share * smallest.size()), long(smallest.size()) - 1);
  std::nth_element(smallest.begin(), smallest.begin() + rank, smallest.end());
  return smallest[rank];
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
    long q = bounds[f];
    const long end = bounds[f + 1];
    for (; q + 4 <= end; q += 4) {
      const long s0 = order[q], s1 = order[q + 1], s2 = order[q + 2], s3 = order[q + 3];
      const float *x0 = rows + tokens[s0] * row_stride, *x1 = rows + tokens[s1] * row_stride;
      const float *x2 = rows + tokens[s2] * row_stride, *x3 = rows + tokens[s3] * row_stride;
      const float v0 = weights[s0], v1 = weights[s1], v2 = weights[s2], v3 = weights[s3];
      for (long i = 0; i < d; ++i) y[i] += v0 * x0[i] + v1 * x1[i] + v2 * x2[i] + v3 * x3[i];
    }
    for (; q < end; ++q) {
      const long s = order[q];
      const float* x = rows + tokens[s] * row_stride;
      for (long i = 0; i < d; ++i) y[i] += weights[s] * x[i];
    }
  }
}

}  // extern "C"
