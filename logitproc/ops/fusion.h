// Kernels of methods/fusion.py and of the solver in tilt.py.

#pragma once

#include <tuple>
#include <utility>

#include "rows.h"

namespace {

constexpr float kForbidden = -1e30f;  // a score that is not above it, or NaN, is a mask
constexpr float kDead = 1e-6f;        // nats

inline double positive(double x) { return x < 0 ? 0 : x; }  // NaN stays

// Sums of w = exp(x - top), w d and w d^2 over a row, in float32 within a block and in float64 from block to block.
struct Moments {
  double top = -std::numeric_limits<double>::infinity(), total = 0, first = 0, second = 0;

  void add(const float* x, const float* d, int64_t n) {
    const float high = maximum(x, n);
    if (!(high > -kInfinity)) return;  // a block may be forbidden
    float t = 0, f = 0, s = 0;
#pragma omp simd reduction(+ : t, f, s)
    for (int64_t i = 0; i < n; ++i) {
      const float w = exponential(x[i] - high), wd = w * d[i];
      t += w;
      f += wd;
      s += wd * d[i];
    }
    if (high > top) {
      const double less = std::exp(top - high);
      total *= less;
      first *= less;
      second *= less;
      top = high;
    }
    const double less = std::exp(high - top);
    total += less * t;
    first += less * f;
    second += less * s;
  }
  double log_z() const { return top + std::log(total); }
  double mean() const { return first / total; }
  double variance() const { return positive(second / total - mean() * mean()); }
};

inline bool allowed(float x) { return x > kForbidden; }

// The first of the tokens that the host likes best among those that host, base and expert allow; 0 without any.
int64_t first_choice(const float* host, const float* base, const float* expert, int64_t width) {
  int64_t first = std::find(host, host + width, maximum(host, width)) - host;
  if (first < width && allowed(host[first]) && allowed(base[first]) && allowed(expert[first])) return first;
  first = 0;
  float best = kForbidden;
  for (int64_t i = 0; i < width; ++i)
    if (allowed(base[i]) && allowed(expert[i]) && host[i] > best) best = host[first = i];
  return first;
}

// One row of the mode "newton". log_w and d are the host's tilts, [width] each.
struct Newton {
  const float *log_w, *d;
  int64_t width;
  double log_z, mean, variance;  // at a = 0

  // {R, F or J of the tilt a, its derivative}
  std::pair<double, double> divergence(char target, double a) const {
    Moments m;
    float x[kBlock];
    const float slope = static_cast<float>(a);
    for_blocks(width, [&](int64_t start, int64_t n) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] = log_w[start + i] + slope * d[start + i];
      m.add(x, d + start, n);
    });
    const double shift = m.mean() - mean, growth = m.log_z() - log_z;
    if (target == 'R') return {positive(a * m.mean() - growth), a * m.variance()};
    if (target == 'F') return {positive(growth - a * mean), shift};
    return {positive(a * shift), shift + a * m.variance()};
  }

  // `tilt.root`; a is float32 throughout, as the fused scores see it.
  std::pair<float, bool> root(char target, double nats, float high, int64_t steps) const {
    const double goal = std::sqrt(2 * nats);
    const double start = goal / std::sqrt(variance) / (target == 'J' ? std::sqrt(2.0) : 1.0);
    float a = std::isnan(start) ? 0 : static_cast<float>(std::min<double>(start, high));
    double low = 0, upper = std::numeric_limits<double>::infinity();
    for (int64_t step = 0; step < steps; ++step) {
      const auto [f, slope] = divergence(target, a);
      if (a == high && f < nats) return {high, true};
      const double s = std::sqrt(2 * f);
      if (f <= nats) low = a;
      if (f >= nats) upper = a;
      double next = a - (s - goal) * s / slope;
      if (std::isinf(upper)) next = next < high ? next : high;  // NaN too
      const bool inside = next >= low && next <= upper;
      a = static_cast<float>(inside ? next : (low + std::min<double>(upper, high)) / 2);
      if (std::abs(s - goal) <= 3e-4 * goal) return {a, false};
    }
    const bool late = divergence(target, high).first < nats;  // still on its way there
    return {late ? high : a, late};
  }
};

}  // namespace

extern "C" {

// host, base, expert, out [rows, width]; alpha, kl, reverse_kl [rows]; beyond, dead bool [rows]. target is R, F or J.
void newton(const float* host, const float* base, const float* expert, float* out, float* alpha, float* kl,
            float* reverse_kl, bool* beyond, bool* dead, int64_t rows, int64_t width, int64_t target, float low,
            float high, int64_t steps, int64_t threads) {
  for_rows(rows, width, threads, width, [=](int64_t row, float* d) {
    const float *h = host + row * width, *b = base + row * width, *e = expert + row * width;
    float* z = out + row * width;  // ln w of the host, until the fused scores are written
    const int64_t first = first_choice(h, b, e, width);
    const float top = h[first], reference = e[first] - b[first];
    Moments own, small, tuned;
    float x[kBlock], y[kBlock];
    for_blocks(width, [&](int64_t start, int64_t n) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float hi = h[start + i], bi = b[start + i], ei = e[start + i];
        const bool inside = allowed(hi) && allowed(bi) && allowed(ei);
        z[start + i] = inside ? hi - top : -kInfinity;
        d[start + i] = inside ? (ei - bi) - reference : 0.0f;
        x[i] = inside ? bi : -kInfinity;
        y[i] = inside ? ei : -kInfinity;
      }
      own.add(z + start, d + start, n);
      small.add(x, d + start, n);
      tuned.add(y, d + start, n);
    });
    // d is 0 at `first`, where ln q_t - ln q is then less than d by ln E_Q exp d.
    const double ratio = (b[first] - small.log_z()) - (e[first] - tuned.log_z());
    const double change = tuned.mean() - small.mean();
    kl[row] = static_cast<float>(positive(tuned.mean() - ratio));
    reverse_kl[row] = static_cast<float>(positive(ratio - small.mean()));
    dead[row] = !(change >= kDead && own.variance() > 0);  // true for NaN: a row without a common token
    beyond[row] = false;
    float a = 0;
    if (!dead[row]) {
      const double nats = target == 'R' ? kl[row] : target == 'F' ? reverse_kl[row] : positive(change);
      const Newton solver{z, d, width, own.log_z(), own.mean(), own.variance()};
      std::tie(a, beyond[row]) = solver.root(static_cast<char>(target), nats, high, steps);
      a = std::max(a, low);
    }
    alpha[row] = a;
    if (a == 0) {
      std::copy(h, h + width, z);
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) z[i] = allowed(e[i]) ? h[i] + a * d[i] : -kInfinity;
  });
}

}  // extern "C"
