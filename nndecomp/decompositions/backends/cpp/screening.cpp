// Products in 8 bits, which say what an entry is at most and at least, and in float32 those of entries that may be selected.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "entries.h"
#include "product.h"
#include "sums.h"

namespace {

constexpr float ROUNDING = 1.0f / (1 << 20);  // of a key, in float32: more than what its few sums can be wrong by

struct Group {
  const float* W;
  long stride;
  const float *bias, *c;
  long d;

  // Exact z, and key, of a row's entries from `begin` on.
  void rescore(Row& row, long begin, const float* x) const {
    dot_rows(
        x, begin, long(row.entries.size()), d, [&](long s) { return W + row.entries[s].feature * stride; },
        [&](long s, float product) {
          Entry& entry = row.entries[s];
          entry.z = product + bias[entry.feature];
          entry.key = c == nullptr ? entry.z : entry.z * c[entry.feature];
        });
  }
};

inline float least(const Entry& entry) { return entry.key - entry.z; }

inline void drop_below(std::vector<Entry>& entries, float t) {
  entries.erase(std::remove_if(entries.begin(), entries.end(), [t](const Entry& e) { return e.key < t; }), entries.end());
}

// Drops what is below `sure`, and leaves what is not. What may be either is returned.
std::vector<Entry> set_aside(std::vector<Entry>& entries, float sure) {
  drop_below(entries, sure);
  const auto end = std::stable_partition(entries.begin(), entries.end(), [sure](const Entry& e) { return !(least(e) < sure); });
  std::vector<Entry> others(end, entries.end());
  entries.erase(end, entries.end());
  return others;
}

float smallest_key(const std::vector<Entry>& entries) {
  float smallest = std::numeric_limits<float>::infinity();
  for (const auto& entry : entries) smallest = std::min(smallest, entry.key);
  return smallest;
}

// The n-th largest of what entries are at least; -infinity if there are no more than n.
float nth_least(std::vector<float>& values, long n) {
  if (long(values.size()) <= n) return -std::numeric_limits<float>::infinity();
  std::nth_element(values.begin(), values.begin() + (n - 1), values.end(), [](float a, float b) { return a > b; });
  return values[n - 1];
}

// Those that are surely as large as any k first, then what they leave possible.
void rescore_largest(Row& row, long k, const Group& group, const float* x) {
  thread_local std::vector<float> values;
  values.clear();
  for (const auto& entry : row.entries) values.push_back(least(entry));
  auto others = set_aside(row.entries, nth_least(values, k));
  const long n_sure = long(row.entries.size());
  group.rescore(row, 0, x);
  drop_below(others, n_sure < k ? -std::numeric_limits<float>::infinity() : smallest_key(row.entries));
  row.entries.insert(row.entries.end(), others.begin(), others.end());
  group.rescore(row, n_sure, x);
}

// The same of n of all rows together, and nothing that does not exceed `above`.
void rescore_largest(std::vector<Row>& rows, long n, float above, const Group& group, const float* x, long x_stride, int threads) {
  std::vector<float> values;
  for (const auto& row : rows)
    for (const auto& entry : row.entries) values.push_back(least(entry));
  const float sure = nth_least(values, n);
  const long n_rows = long(rows.size());
  std::vector<std::vector<Entry>> others(n_rows);
  float smallest = std::numeric_limits<float>::infinity();
  long n_sure = 0;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) reduction(min : smallest) reduction(+ : n_sure)
  for (long r = 0; r < n_rows; ++r) {
    others[r] = set_aside(rows[r].entries, sure);
    n_sure += long(rows[r].entries.size());
    group.rescore(rows[r], 0, x + r * x_stride);
    smallest = std::min(smallest, smallest_key(rows[r].entries));
  }
  if (n_sure < n) smallest = -std::numeric_limits<float>::infinity();
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (long r = 0; r < n_rows; ++r) {
    auto& entries = rows[r].entries;
    const long begin = long(entries.size());
    drop_below(others[r], smallest);
    entries.insert(entries.end(), others[r].begin(), others[r].end());
    group.rescore(rows[r], begin, x + r * x_stride);
    entries.erase(std::remove_if(entries.begin(), entries.end(), [above](const Entry& e) { return !(e.key > above); }), entries.end());
  }
}

}  // namespace

extern "C" {

// Whether products in 8 bits are faster here than those in float32.
int screening_pays() {
#ifdef __AVX512VNNI__
  return 1;
#else
  return 0;
#endif
}

// Rows in 8 bits: q = round(x * fold / scale), scale = max |x * fold| / 127; norm = |x * fold|, error = |x * fold - q * scale|. fold is
// of columns.
void quantise(const float* x, long stride, long n, long d, const float* fold, int8_t* q, float* scale, float* norm, float* error,
              int threads) {
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
    error[r] = 0;
    if (!(size < std::numeric_limits<float>::infinity())) continue;  // nobody uses rows that are not finite
    const float by = 1 / scale[r], step = scale[r];
    squares = 0;
    for (long i = 0; i < d; ++i) {
      // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
      const float v = row[i] * fold[i];
      const float rounded = v * by + 12582912.0f;
      int32_t bits;
      std::memcpy(&bits, &rounded, sizeof bits);
      out[i] = int8_t(bits);
      const float off = v - step * float(int8_t(bits));
      squares += off * off;
    }
    error[r] = std::sqrt(squares);
  }
}

// Entries of z = x W^T + bias that may be selected: by products of rows in 8 bits, z c is x_scale W_scale (x q . W q) + bias, wrong by at
// most x_a W_a + x_b W_b, times c. Returns how many there are; -1 if they are more than `many`, and not all there.
long candidates_screen(void* handle, const int8_t* x, const float* x_scale, const float* x_a, const float* x_b, const int8_t* W,
                       const float* W_scale, const float* W_a, const float* W_b, long n_features, long d, const float* bias,
                       const float* c, const float* theta, long width, long many, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const long k = found.k, n_rows = long(found.rows.size()), n_tiles = (n_rows + TOKENS - 1) / TOKENS;
  const long steps = (d + BYTES - 1) / BYTES;
  width = (width + FEATURES - 1) / FEATURES * FEATURES;
  const long n_blocks = (n_features + width - 1) / width;
  found.expect(n_features);
  const auto panels = [&](long block) {
    return block < n_blocks ? (std::min(width, n_features - block * width) + FEATURES - 1) / FEATURES : 0;
  };
  const Memory<int8_t> tokens(n_tiles * TOKENS * steps * BYTES), even(width * steps * BYTES), odd(width * steps * BYTES);
  std::vector<int32_t> shifts(n_blocks * width);  // what 128 more in every entry of x adds
  const auto pack_panel = [&](long block, long panel) {
    const long first = block * width + panel * FEATURES;
    pack<FEATURES>(W, n_features, d, first, 0, (block % 2 ? odd : even).get() + panel * FEATURES * steps * BYTES);
    for (long f = first; f < std::min(first + FEATURES, n_features); ++f) {
      int32_t sum = 0;
      for (long i = 0; i < d; ++i) sum += W[f * d + i];
      shifts[f] = 128 * sum;
    }
  };
  long n_found = 0;
#pragma omp parallel num_threads(threads)
  {
    const Memory<int32_t> product(TOKENS * width);
    std::vector<float> most(width), least(width);
#pragma omp for schedule(static) nowait
    for (long t = 0; t < n_tiles; ++t)
      pack<TOKENS>(x, n_rows, d, t * TOKENS, int(0x80808080u), tokens.get() + t * TOKENS * steps * BYTES);
#pragma omp for schedule(static)
    for (long p = 0; p < panels(0); ++p) pack_panel(0, p);
    for (long block = 0; block < n_blocks && n_found >= 0; ++block) {
      const long first = block * width, n = std::min(width, n_features - first), n_ahead = panels(block + 1);
      const int8_t* packed = (block % 2 ? odd : even).get();
      const int32_t* shift = shifts.data() + first;
      const float *ws = W_scale + first, *wa = W_a + first, *wb = W_b + first, *b = bias + first;
#pragma omp for schedule(dynamic)
      for (long task = 0; task < n_ahead + n_tiles; ++task) {
        if (task < n_ahead) {
          pack_panel(block + 1, task);
          continue;
        }
        const long begin = (task - n_ahead) * TOKENS;
        const auto* own = reinterpret_cast<const uint8_t*>(tokens.get() + begin * steps * BYTES);
        for (long p = 0; p < n; p += FEATURES) tile(own, packed + p * steps * BYTES, steps, product.get() + p, width);
        for (long r = begin; r < std::min(begin + TOKENS, n_rows); ++r) {
          Row& row = found.rows[r];
          const int32_t* __restrict sum = product.get() + (r - begin) * width;
          const float xs = x_scale[r], xa = x_a[r], xb = x_b[r];
          float *__restrict high = most.data(), *__restrict low = least.data();
          for (long j = 0; j < n; ++j) {
            const float z = float(sum[j] - shift[j]) * (xs * ws[j]) + b[j];
            const float off = xa * wa[j] + xb * wb[j] + ROUNDING * std::fabs(z);
            high[j] = z + off;
            low[j] = z - off;
          }
          if (c != nullptr)
            for (long j = 0; j < n; ++j) high[j] *= c[first + j], low[j] *= c[first + j];
          if (k > 0) raise(row, k, low, n, first);
          if (row.most == 0) row.most = std::max(8 * k, k + 64);
          const auto add = [&](long j) {
            row.entries.push_back({high[j], high[j] - low[j], int32_t(first + j)});
            if (k > 0 && long(row.entries.size()) >= row.most) {
              drop_hopeless(row);
              row.most = std::max(row.most, 2 * long(row.entries.size()));
            }
          };
          if (theta != nullptr) {
            for (long j = 0; j < n; ++j)
              if (!(high[j] < theta[first + j])) add(j);
          } else {
            scan<Than::not_less>(high, n, row.threshold, add);
          }
        }
      }
#pragma omp single
      {
        n_found = 0;
        for (const auto& row : found.rows) n_found += long(row.entries.size());
        if (n_found > 2 * many) n_found = -1;  // as many again may be dropped in the end
      }
    }
  }
  if (n_found < 0) return -1;
  n_found = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : n_found)
  for (long r = 0; r < n_rows; ++r) {
    Row& row = found.rows[r];
    if (k > 0) drop_hopeless(row);
    n_found += long(row.entries.size());
  }
  return n_found > many ? -1 : n_found;
}

// Ends screening: keys and z in full precision. bias and c are of all features. Where k of each row, or n of all rows together (0: not),
// are asked for, at least those stay, of the n those that exceed `above`; otherwise entries whose key exceeds theta of their feature.
void candidates_rescore(void* handle, long n, float above, const float* x, long x_stride, const float* W, long W_stride, const float* bias,
                        const float* c, const float* theta, long d, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const Group group{W, W_stride, bias, c, d};
  if (n > 0) {
    rescore_largest(found.rows, n, above, group, x, x_stride, threads);
    return;
  }
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (long r = 0; r < long(found.rows.size()); ++r) {
    Row& row = found.rows[r];
    if (found.k > 0) {
      rescore_largest(row, found.k, group, x + r * x_stride);
      continue;
    }
    group.rescore(row, 0, x + r * x_stride);
    row.entries.erase(
        std::remove_if(row.entries.begin(), row.entries.end(), [&](const Entry& e) { return !(e.key > theta[e.feature]); }),
        row.entries.end());
  }
}

}  // extern "C"
