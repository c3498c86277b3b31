// Gradients made a row at a time, and Adam that needs no more of them.
#include <cmath>
#include <cstring>
#include <vector>

#include "sums.h"

namespace {

// A gradient of rows of W that was never written down: of row f the sum over the slots s of feature f of weights[s] * rows[tokens[s]],
// and of that, if `tangent`, what is orthogonal to W[f].
struct RowGradient {
  const float* rows;
  long stride;
  const int64_t *tokens, *order, *bounds;
  const float* weights;
  int tangent;

  bool active(long f) const { return bounds[f] != bounds[f + 1]; }

  // Writes row f into g [d]; false: it is 0, and g was not written.
  bool write(long f, const float* w, long d, float* __restrict g) const {
    if (!active(f)) return false;
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

// |gradient|^2. written [n, d]: rows are kept there, for row_adam; null: they are not.
double row_squares(const RowGradient* gradient, const float* W, float* written, long n, long d, int threads) {
  std::vector<double> of_rows(n, 0);  // added up in their order, however many threads there are
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(d);
#pragma omp for schedule(dynamic, 64)
    for (long f = 0; f < n; ++f) {
      float* g = written == nullptr ? row.data() : written + f * d;
      if (!gradient->write(f, W + f * d, d, g)) continue;
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
void row_adam(const RowGradient* gradient, const float* written, const float* clip, float* W, float* m, float* v, long n, long d,
              float keep, float rate, double beta1, double beta2, float by, float epsilon, int threads) {
  const float factor = *clip, keep_m = float(beta1), add_m = float(1 - beta1), keep_v = float(beta2), add_v = float(1 - beta2);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(d);
#pragma omp for schedule(dynamic, 64)
    for (long f = 0; f < n; ++f) {
      float *__restrict a = W + f * d, *__restrict b = m + f * d, *__restrict e = v + f * d;
      const bool active = written == nullptr ? gradient->write(f, a, d, row.data()) : gradient->active(f);
      const float* __restrict g = written == nullptr ? row.data() : written + f * d;
      if (active) {
        for (long i = 0; i < d; ++i) {
          const float gi = factor * g[i];
          b[i] = keep_m * b[i] + add_m * gi;
          e[i] = keep_v * e[i] + add_v * gi * gi;
          a[i] = keep * a[i] - rate * b[i] / (std::sqrt(e[i]) * by + epsilon);
        }
      } else {
        for (long i = 0; i < d; ++i) {
          b[i] *= keep_m;
          e[i] *= keep_v;
          a[i] = keep * a[i] - rate * b[i] / (std::sqrt(e[i]) * by + epsilon);
        }
      }
    }
  }
}

}  // extern "C"
