// Sums over active entries, and rows of norm 1. `stride`s count floats from row to row.
#include "sums.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

extern "C" {

// out[b] += sum over slots s of bag b of weights[s] * table[rows[s]].
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
    dot_rows(
        rows + b * row_stride, offsets[b], offsets[b + 1], d, [&](long s) { return table + indices[s] * table_stride; },
        [&](long s, float product) { out[s] = product; });
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
