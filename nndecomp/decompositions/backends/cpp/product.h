// Products of two matrices with rows side by side in d: tile [token, feature] = sum over i of x[token, i] * W[feature, i].
//
// Both are packed so that what one step of the sum needs lies together; the sums of a tile stay in registers to their end. Each is
// added up over i in order, whatever tile it falls into: results depend on the two rows alone.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr long LANES = 16, TOKENS = 14;
#elif defined(__AVX__)
constexpr long LANES = 8, TOKENS = 6;
#else
constexpr long LANES = 4, TOKENS = 6;
#endif
constexpr long FEATURES = 2 * LANES;  // of a tile

// Memory for n numbers, aligned for Lanes. What is in it is nobody's.
template <typename Number>
class Memory {
 public:
  explicit Memory(long n) : memory(std::aligned_alloc(64, (sizeof(Number) * n + 63) / 64 * 64), std::free) {}
  Number* get() const { return static_cast<Number*>(memory.get()); }

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
#pragma GCC unroll 16
  for (long t = 0; t < TOKENS; ++t) std::memcpy(out + t * stride, sum[t], sizeof sum[t]);
}

// The same of whole numbers in 8 bits, four steps of the sum at a time: x from 0 to 255, W from -128 to 127.
constexpr long BYTES = 4;

// Rows first .. first + WIDTH - 1 of q [n, d], zeros where there are none, plus `shift`, as packed [ceil(d / BYTES), WIDTH, BYTES].
template <long WIDTH>
inline void pack(const int8_t* q, long n, long d, long first, int shift, int8_t* __restrict packed) {
  const long steps = (d + BYTES - 1) / BYTES, there = std::min(WIDTH, n - first);
  std::memset(packed, 0, steps * WIDTH * BYTES);
  for (long r = 0; r < there; ++r) {
    const int8_t* row = q + (first + r) * d;
    for (long s = 0; s < d / BYTES; ++s) {
      int32_t four;
      std::memcpy(&four, row + s * BYTES, BYTES);
      four ^= shift;
      std::memcpy(packed + (s * WIDTH + r) * BYTES, &four, BYTES);
    }
    for (long i = d / BYTES * BYTES; i < d; ++i) packed[((steps - 1) * WIDTH + r) * BYTES + i % BYTES] = int8_t(row[i] ^ (shift & 0xff));
  }
}

inline void tile(const uint8_t* x, const int8_t* W, long steps, int32_t* out, long stride) {
#ifdef __AVX512VNNI__
  typedef int32_t Ints __attribute__((vector_size(64)));
  Ints sum[TOKENS][2] = {};
  for (long s = 0; s < steps; ++s, x += TOKENS * BYTES, W += FEATURES * BYTES) {
    const __m512i low = _mm512_load_si512(W), high = _mm512_load_si512(W + LANES * BYTES);
#pragma GCC unroll 16
    for (long t = 0; t < TOKENS; ++t) {
      int32_t four;
      std::memcpy(&four, x + t * BYTES, BYTES);
      const __m512i own = _mm512_set1_epi32(four);
      sum[t][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sum[t][0], own, low);
      sum[t][1] = (Ints)_mm512_dpbusd_epi32((__m512i)sum[t][1], own, high);
    }
  }
#pragma GCC unroll 16
  for (long t = 0; t < TOKENS; ++t) std::memcpy(out + t * stride, sum[t], sizeof sum[t]);
#else
  for (long t = 0; t < TOKENS; ++t) std::memset(out + t * stride, 0, sizeof(int32_t) * FEATURES);
  for (long s = 0; s < steps; ++s, x += TOKENS * BYTES, W += FEATURES * BYTES)
    for (long t = 0; t < TOKENS; ++t)
      for (long f = 0; f < FEATURES; ++f)
        for (long i = 0; i < BYTES; ++i) out[t * stride + f] += int32_t(x[t * BYTES + i]) * int32_t(W[f * BYTES + i]);
#endif
}
