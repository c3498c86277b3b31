// Entries of a batch that may be selected.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr long CHUNK = 32;    // entries that are compared at once, before any of them is looked at alone
constexpr long GROUPS = 128;  // of features, or more: their maxima say what the k-th largest entry is at least

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
  std::vector<float> maxima;  // where k is asked for: of features g, g + G, g + 2 G, ..., what the largest key is at least
  long most = 0;              // entries, while screened, before those are dropped that cannot be among the largest
};

struct Candidates {
  long k;  // > 0: the k largest of every row; 0: all above a threshold
  std::vector<Row> rows;

  // Of how many features, so that maxima can be kept where they help.
  void expect(long n_features) {
    long groups = GROUPS;
    while (groups < 4 * k) groups *= 2;
    if (k == 0 || n_features < 2 * groups) return;
    for (auto& row : rows)
      if (row.maxima.empty()) row.maxima.assign(groups, -std::numeric_limits<float>::infinity());
  }
};

inline void keep_largest(Row& row, long k) {
  std::nth_element(row.entries.begin(), row.entries.begin() + (k - 1), row.entries.end(), before);
  row.entries.resize(k);
  // What comes later and is only as large has features of higher numbers, and loses.
  const float last = row.entries[k - 1].key;
  row.threshold = last == last ? std::nextafter(last, std::numeric_limits<float>::infinity()) : std::numeric_limits<float>::infinity();
}

enum class Than { not_less, greater };  // of what is not a number, the first holds

template <Than than>
inline bool hit(float key, float t) {
  return than == Than::greater ? key > t : !(key < t);
}

// Of CHUNK keys, one bit each.
template <Than than>
inline uint32_t hits(const float* key, float t) {
#ifdef __AVX512F__
  constexpr int how = than == Than::greater ? _CMP_GT_OQ : _CMP_NLT_UQ;
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

// A number from `from` on that k of `values` are not below, and nearly the largest; -infinity while some are that.
inline float at_least(const std::vector<float>& values, long k, float from) {
  const float* v = values.data();
  const long n = long(values.size());
  float low = v[0], high = v[0];
  for (long i = 0; i < n; ++i) {
    low = v[i] < low ? v[i] : low;
    high = v[i] > high ? v[i] : high;
  }
  if (!(low > -std::numeric_limits<float>::infinity() && high < std::numeric_limits<float>::infinity())) return from;
  low = std::max(low, from);
  for (int step = 0; step < 8; ++step) {
    const float middle = 0.5f * low + 0.5f * high;
    int32_t above = 0;
    for (long i = 0; i < n; ++i) above += v[i] >= middle;
    (above >= k ? low : high) = middle;
  }
  return low;
}

// `least` [n] of features first .. first + n - 1: what their keys are at least. Raises the row's threshold by them.
inline void raise(Row& row, long k, const float* least, long n, long first) {
  const long groups = long(row.maxima.size());
  if (groups == 0) return;
  for (long j = 0; j < n;) {
    const long g = (first + j) % groups, length = std::min(groups - g, n - j);
    float* __restrict largest = row.maxima.data() + g;
    const float* own = least + j;
    for (long i = 0; i < length; ++i) largest[i] = own[i] > largest[i] ? own[i] : largest[i];
    j += length;
  }
  row.threshold = at_least(row.maxima, k, row.threshold);
}

// Drops what cannot be among the k largest.
inline void drop_hopeless(Row& row) {
  const float t = row.threshold;
  row.entries.erase(std::remove_if(row.entries.begin(), row.entries.end(), [t](const Entry& e) { return e.key < t; }), row.entries.end());
}

// Entries among z [n] + bias, of features first .. first + n - 1. z is overwritten; keys [n] are those where c is not null.
inline void look_through(Row& row, long k, float* __restrict z, long n, long first, const float* bias, const float* c, const float* theta,
                         float* __restrict keys) {
  for (long j = 0; j < n; ++j) z[j] += bias[j];
  if (c != nullptr)
    for (long j = 0; j < n; ++j) keys[j] = z[j] * c[j];
  const float* key = c == nullptr ? z : keys;
  if (k > 0) raise(row, k, key, n, first);
  const long most = std::max(8 * k, k + 64);
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
  } else if (k > 0) {
    scan<Than::not_less>(key, n, row.threshold, add);
  } else {
    scan<Than::greater>(key, n, row.threshold, add);
  }
}
