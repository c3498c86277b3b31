// Products in 8 bits, which say what an entry is at most, and in float32 what is left.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "entries.h"

extern "C" {

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

}  // extern "C"
