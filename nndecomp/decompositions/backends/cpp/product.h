// Products of two matrices with rows side by side in d: tile [token, feature] = sum over i of x[token, i] * W[feature, i].
//
// Both are packed so that what one step of the sum needs lies together; the sums of a tile stay in registers to their end. Each is
// added up over i in order, whatever tile it falls into: results depend on the two rows alone.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
constexpr long LANES = 16, TOKENS = 14;
#elif defined(__AVX__)
constexpr long LANES = 8, TOKENS = 6;
#else
constexpr long LANES = 4, TOKENS = 6;
#endif
constexpr long FEATURES = 2 * LANES;  // of a tile

// Memory for n floats, aligned for Lanes. What is in it is nobody's.
class Floats {
 public:
  explicit Floats(long n) : memory(std::aligned_alloc(64, (sizeof(float) * n + 63) / 64 * 64), std::free) {}
  float* get() const { return static_cast<float*>(memory.get()); }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory;
};

typedef float Lanes __attribute__((vector_size(4 * LANES)));

// Rows first .. first + WIDTH - 1 of `rows` [n, d], zeros where there are none, as packed [d, WIDTH].
template <long WIDTH>
inline void pack(const float* rows, long stride, long n, long d, long first, float* __restrict packed) {
  const long there = std::min(WIDTH, n - first);
  if (there < WIDTH) std::memset(packed, 0, sizeof(float) * d * WIDTH);
  constexpr long LINE = 16;  // floats that are read together
  for (long from = 0; from < d; from += LINE) {
    const long to = std::min(from + LINE, d);
    for (long r = 0; r < there; ++r) {
      const float* row = rows + (first + r) * stride;
      for (long i = from; i < to; ++i) packed[i * WIDTH + r] = row[i];
    }
  }
}

// out [TOKENS, FEATURES], `stride` floats from row to row, from packed x [d, TOKENS] and W [d, FEATURES], which is aligned.
inline void tile(const float* x, const float* W, long d, float* out, long stride) {
  Lanes sum[TOKENS][2] = {};
  for (long i = 0; i < d; ++i, x += TOKENS, W += FEATURES) {
    const Lanes low = *reinterpret_cast<const Lanes*>(W), high = *reinterpret_cast<const Lanes*>(W + LANES);
#pragma GCC unroll 16
    for (long t = 0; t < TOKENS; ++t) {
      sum[t][0] += x[t] * low;
      sum[t][1] += x[t] * high;
    }
  }
  for (long t = 0; t < TOKENS; ++t) std::memcpy(out + t * stride, sum[t], sizeof sum[t]);
}
