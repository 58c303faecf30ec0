// How far apart two distributions are: `divergences` in reference.py. All in float64.

#pragma once

#include "rows.h"

namespace {

constexpr double kLn2 = 0.693147180559945309;

// exp(x), relative error below 1e-15; 0 below -708.7, where float64 has no normal number left. For x at most 700.
inline double exponential(double x) {
  x = std::max(x, -709.1);
  const double shifted = x * 1.44269504088896341 + 6755399441055744.0;  // n = x / ln 2, rounded, in the lowest bits
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 0.693147180369123816) - n * 1.90821492927058770e-10;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int64_t>(static_cast<uint64_t>(bits + 1023) << 52);  // 2^n; 0 for n = -1023
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// artanh(s) / s = 1 + s^2 / 3 + s^4 / 5 + ..., from the term 1 / k on, for s up to 1/3
template <int k = 1>
inline double artanh(double ss) {
  if constexpr (k > 35) return 0;
  else return 1.0 / k + ss * artanh<k + 2>(ss);
}

// What a token adds to JS, in nats: p, q > 0 or one of them 0, d = ln(q / p).
//
// JS is the sum of (p + q) / 2 times f(d), f(d) = d tanh(d / 2) / 2 - ln cosh(d / 2) >= 0, so nothing cancels between
// tokens. Near 0 f is taken from its series; elsewhere (p + q) f = (p + q) ln(2 max / (p + q)) - |d| min, the logarithm
// being 2 artanh s with s = (max - min) / (3 max + min) in [0, 1/3].
inline double jensen_shannon(double p, double q, double d) {
  const double most = p > q ? p : q, least = p > q ? q : p, dd = d * d;
  double near = 31.0 / 1612800;
  near = near * dd - 17.0 / 92160;
  near = near * dd + 1.0 / 576;
  near = near * dd - 1.0 / 64;
  near = (near * dd + 1.0 / 8) * dd;
  const double s = (most - least) / (3 * most + least);
  const double both = (p + q) * 2 * s * artanh(s * s) - std::abs(d) * least;
  const double far = least == 0 ? most * kLn2 : both;  // d may be infinite
  return 0.5 * (std::abs(d) < 0.0625 ? (p + q) * near : far);
}

// ln softmax of a row, and its first most probable token
struct Distribution {
  int64_t best;
  double top, log_total;

  Distribution(const float* x, int64_t width) {
    const float high = maximum(x, width);
    best = std::find(x, x + width, high) - x;
    if (best == width) best = 0;  // nothing but NaN
    top = high;
    double total = 0;
    for_blocks(width, [&total, x, high](int64_t start, int64_t n) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < start + n; ++i) sum += exponential(double(x[i]) - high);
      total += sum;
    });
    log_total = std::log(total);
  }
};

}  // namespace

extern "C" {

// base, processed [rows, width] -> sums [4, rows] (JS in nats, KL(q || p), KL(p || q), total variation), best [2, rows]
void divergences(const float* base, const float* processed, double* sums, int64_t* best, int64_t rows, int64_t width,
                 int64_t threads) {
  for_rows(rows, width, threads, [=](int64_t row) {
    const Distribution one(base + row * width, width), other(processed + row * width, width);
    double js = 0, kl = 0, reverse_kl = 0, tv = 0;
    for_blocks(width, [&](int64_t start, int64_t n) {
      const float *x = base + row * width, *y = processed + row * width;
      const double x_top = one.top, y_top = other.top, x_log = one.log_total, y_log = other.log_total;
      double j = 0, k = 0, r = 0, t = 0;
#pragma omp simd reduction(+ : j, k, r, t)
      for (int64_t i = start; i < start + n; ++i) {
        const double log_p = (x[i] - x_top) - x_log, log_q = (y[i] - y_top) - y_log, d = log_q - log_p;
        const double p = exponential(log_p), q = exponential(log_q);
        // A sum of terms that are chosen first is vectorised, one that chooses its terms is not.
        const double near = jensen_shannon(p, q, d), forward = q * d, backward = -p * d;
        const double term = p + q == 0 ? 0 : near, of_q = q == 0 ? 0 : forward, of_p = p == 0 ? 0 : backward;
        j += term;
        k += of_q;
        r += of_p;
        t += std::abs(p - q);
      }
      js += j;
      kl += k;
      reverse_kl += r;
      tv += t;
    });
    sums[row] = js;
    sums[rows + row] = kl;
    sums[2 * rows + row] = reverse_kl;
    sums[3 * rows + row] = tv / 2;
    best[row] = one.best;
    best[rows + row] = other.best;
  });
}

}  // extern "C"
