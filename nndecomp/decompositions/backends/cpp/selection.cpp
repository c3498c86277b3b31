#include "entries.h"
#include "product.h"

extern "C" {

void* candidates_new(long n_rows, long k, float threshold) {
  auto* found = new Candidates{k, std::vector<Row>(n_rows)};
  for (auto& row : found->rows) row.threshold = threshold;
  return found;
}

void candidates_free(void* handle) { delete static_cast<Candidates*>(handle); }

// All entries of z = x W^T + bias, whose first feature has the number `base`, compared as z c. theta, of each feature, goes before the
// threshold of the row. `width` features are packed at once, and looked at a tile of tokens at a time, while their z are in the cache.
void candidates_add(void* handle, const float* x, long x_stride, const float* W, long W_stride, long n_features, long d,
                    const float* bias, const float* c, const float* theta, long base, long width, int threads) {
  auto& found = *static_cast<Candidates*>(handle);
  const long n_rows = long(found.rows.size()), n_tiles = (n_rows + TOKENS - 1) / TOKENS;
  width = (width + FEATURES - 1) / FEATURES * FEATURES;
  found.expect(n_features);
  const long n_blocks = (n_features + width - 1) / width;
  const auto panels = [&](long block) {
    return block < n_blocks ? (std::min(width, n_features - block * width) + FEATURES - 1) / FEATURES : 0;
  };
  const Memory<float> tokens(n_tiles * TOKENS * d), even(width * d), odd(width * d);
  const auto pack_panel = [&](long block, long panel) {
    float* packed = (block % 2 ? odd : even).get() + panel * FEATURES * d;
    pack<FEATURES>(W, W_stride, n_features, d, block * width + panel * FEATURES, packed);
  };
#pragma omp parallel num_threads(threads)
  {
    const Memory<float> z(TOKENS * width);
    std::vector<float> keys(c == nullptr ? 0 : width);
#pragma omp for schedule(static) nowait
    for (long t = 0; t < n_tiles; ++t) pack<TOKENS>(x, x_stride, n_rows, d, t * TOKENS, tokens.get() + t * TOKENS * d);
#pragma omp for schedule(static)
    for (long p = 0; p < panels(0); ++p) pack_panel(0, p);
    for (long block = 0; block < n_blocks; ++block) {
      const long first = block * width, n = std::min(width, n_features - first), n_ahead = panels(block + 1);
      const float* packed = (block % 2 ? odd : even).get();
      // The next block is packed among the tiles of this one.
#pragma omp for schedule(dynamic)
      for (long task = 0; task < n_ahead + n_tiles; ++task) {
        if (task < n_ahead) {
          pack_panel(block + 1, task);
          continue;
        }
        const long row = (task - n_ahead) * TOKENS;
        const float* own = tokens.get() + row * d;
        for (long p = 0; p < n; p += FEATURES) tile(own, packed + p * d, d, z.get() + p, width);
        for (long r = row; r < std::min(row + TOKENS, n_rows); ++r)
          look_through(found.rows[r], found.k, z.get() + (r - row) * width, n, base + first, bias + first,
                       c == nullptr ? nullptr : c + first, theta == nullptr ? nullptr : theta + first, keys.data());
      }
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

}  // extern "C"
