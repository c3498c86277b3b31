// Sums over active entries.
#pragma once
#include <cstdint>

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

// to(s, row(s) . x) for s = begin .. end - 1, four rows at a time.
template <typename Row, typename To>
inline void dot_rows(const float* x, long begin, long end, long d, const Row& row, const To& to) {
  long s = begin;
  for (; s + 4 <= end; s += 4) {
    const float *w0 = row(s), *w1 = row(s + 1), *w2 = row(s + 2), *w3 = row(s + 3);
    float y0 = 0, y1 = 0, y2 = 0, y3 = 0;
    for (long i = 0; i < d; ++i) {
      y0 += x[i] * w0[i];
      y1 += x[i] * w1[i];
      y2 += x[i] * w2[i];
      y3 += x[i] * w3[i];
    }
    to(s, y0);
    to(s + 1, y1);
    to(s + 2, y2);
    to(s + 3, y3);
  }
  for (; s < end; ++s) {
    const float* w = row(s);
    float y = 0;
    for (long i = 0; i < d; ++i) y += x[i] * w[i];
    to(s, y);
  }
}
