// tilt.py and `within_budget`, for one row.

#pragma once

#include <utility>

#include "rows.h"

namespace {

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

// Sums of w = exp(x - top), w d_t and, if asked for, w d_t d_u over a row, for `count` directions `stride` apart.
struct JointMoments {
  double top = -std::numeric_limits<double>::infinity(), total = 0;
  std::vector<double> first, second;  // second: the lower triangle, row by row

  JointMoments(int64_t count, bool covariances) : first(count), second(covariances ? count * (count + 1) / 2 : 0) {}

  void add(const float* x, const float* d, int64_t stride, int64_t n) {
    const float high = maximum(x, n);
    if (!(high > -kInfinity)) return;  // a block may be forbidden
    if (high > top) {
      const double less = std::exp(top - high);
      total *= less;
      for (double& sum : first) sum *= less;
      for (double& sum : second) sum *= less;
      top = high;
    }
    const double less = std::exp(high - top);
    float w[kBlock], wd[kBlock], sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += w[i] = exponential(x[i] - high);
    total += less * sum;
    const int64_t count = static_cast<int64_t>(first.size());
    for (int64_t t = 0, pair = 0; t < count; ++t) {
      const float* dt = d + t * stride;
      sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += wd[i] = w[i] * dt[i];
      first[t] += less * sum;
      for (int64_t u = 0; u <= t && !second.empty(); ++u) {
        const float* du = d + u * stride;
        sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += wd[i] * du[i];
        second[pair++] += less * sum;
      }
    }
  }
  double log_z() const { return top + std::log(total); }
  double mean(int64_t t) const { return first[t] / total; }
  double covariance(int64_t t, int64_t u) const {
    return second[std::max(t, u) * (std::max(t, u) + 1) / 2 + std::min(t, u)] / total - mean(t) * mean(u);
  }
};

// P_a ~ exp(log_w + a d), a row of `tilt.Family` with one direction. d is finite.
struct Tilt {
  const float *log_w, *d;
  int64_t width;
  double log_z, mean, variance;  // of P_0

  Tilt(const float* log_w, const float* d, int64_t width, const Moments& at_0)
      : log_w(log_w), d(d), width(width), log_z(at_0.log_z()), mean(at_0.mean()), variance(at_0.variance()) {}

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

  // `tilt.root`: {a in [0, high] with R, F or J = nats, whether it lies beyond high}; a is float32 throughout, as the
  // fused scores see it.
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

  // `tilt.grid`: the first a = k / 10 with the least (R - kl)^2 + (F - reverse_kl)^2, k = first, first + 1, ...
  float grid(double kl, double reverse_kl, int64_t first, int64_t points) const {
    const float excess = std::max(maximum(d, width) - 40.0f, 0.0f);  // so much would overflow; R and F do not see it
    std::vector<double> total(points), sum(points);
    for_blocks(width, [&](int64_t start, int64_t n) {
      float u[kBlock], e[kBlock], ratio[kBlock];
      const float *w = log_w + start, *direction = d + start;
      const float less = excess, slope = static_cast<float>(first) / 10;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        u[i] = direction[i] - less;
        e[i] = exponential(w[i] + slope * u[i]);
        ratio[i] = exponential(u[i] / 10);
      }
      for (int64_t k = 0; k < points; ++k) {
        float t = 0, s = 0;
#pragma omp simd reduction(+ : t, s)
        for (int64_t i = 0; i < n; ++i) {
          t += e[i];
          s += e[i] * u[i];
          e[i] *= ratio[i];
        }
        total[k] += t;
        sum[k] += s;
      }
    });
    int64_t best = 0;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < points; ++k) {
      const double a = static_cast<double>(first + k) / 10, growth = std::log(total[k]) - log_z;
      const double r = a * sum[k] / total[k] - growth - kl, f = growth - a * (mean - excess) - reverse_kl;
      if (r * r + f * f < least) {
        least = r * r + f * f;
        best = k;
      }
    }
    return static_cast<float>(first + best) / 10;
  }
};

// x of A x = b, A [n, n] symmetric and positive definite
inline std::vector<double> solution(std::vector<double> a, std::vector<double> b) {
  const int64_t n = static_cast<int64_t>(b.size());
  for (int64_t k = 0; k < n; ++k)
    for (int64_t i = k + 1; i < n; ++i) {
      const double factor = a[i * n + k] / a[k * n + k];
      for (int64_t j = k; j < n; ++j) a[i * n + j] -= factor * a[k * n + j];
      b[i] -= factor * b[k];
    }
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t j = k + 1; j < n; ++j) b[k] -= a[k * n + j] * b[j];
    b[k] /= a[k * n + k];
  }
  return b;
}

constexpr double kNoise = 1e-5, kNear = 3e-4, kFlat = 1e-8, kLast = 0.03;  // of `tilt.match` in float32

// P_a ~ exp(log_w + a . d), a row of `tilt.Family`; the directions are `width` apart.
struct Tilts {
  const float *log_w, *d;
  int64_t width, count;

  JointMoments moments(const std::vector<float>& a) const {
    JointMoments m(count, true);
    float x[kBlock];
    for_blocks(width, [&](int64_t start, int64_t n) {
      std::copy(log_w + start, log_w + start + n, x);
      for (int64_t t = 0; t < count; ++t) {
        const float* dt = d + t * width + start;
        const float slope = a[t];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x[i] += slope * dt[i];
      }
      m.add(x, d + start, width, n);
    });
    return m;
  }

  // `tilt.match`; at_0 are the moments of P_0, bounds [count, 2]
  std::vector<float> match(const JointMoments& at_0, const std::vector<double>& mean, const float* bounds, double ridge,
                           float centre, int64_t steps) const {
    const auto within = [=](int64_t t, double a) {
      return std::min(std::max(static_cast<float>(a), bounds[2 * t]), bounds[2 * t + 1]);
    };
    std::vector<float> trial(count);
    for (int64_t t = 0; t < count; ++t) trial[t] = within(t, centre);
    std::vector<float> best = trial;
    std::vector<double> step(count);
    double least = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < steps; ++i) {
      const bool at_rest = std::all_of(trial.begin(), trial.end(), [](float a) { return a == 0; });
      const JointMoments m = at_rest ? at_0 : moments(trial);
      double value = m.log_z();
      for (int64_t t = 0; t < count; ++t)
        value += ridge / 2 * (trial[t] - centre) * (trial[t] - centre) - trial[t] * mean[t];
      const bool taken = value <= least + kNoise;
      bool done = false;
      if (taken) {
        best = trial;
        least = value;
        done = newton(m, mean, best, bounds, ridge, centre, step);
      } else {
        for (double& s : step) s /= 4;
      }
      float longest = 0;
      for (int64_t t = 0; t < count; ++t) {
        trial[t] = within(t, best[t] + step[t]);
        longest = std::max(longest, std::abs(trial[t] - best[t]));
      }
      if (done) return longest <= kLast ? trial : best;
    }
    return best;
  }

  // Newton's step from a, as far as it may go; whether it is the last.
  bool newton(const JointMoments& m, const std::vector<double>& mean, const std::vector<float>& a, const float* bounds,
              double ridge, float centre, std::vector<double>& step) const {
    std::vector<double> gradient(count), hessian(count * count);
    std::vector<bool> frozen(count);
    for (int64_t t = 0; t < count; ++t) {
      const double g = m.mean(t) - mean[t] + ridge * (a[t] - centre);
      frozen[t] = (a[t] <= bounds[2 * t] && g > 0) || (a[t] >= bounds[2 * t + 1] && g < 0);
      gradient[t] = frozen[t] ? 0 : g;
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t u = 0; u < count; ++u) hessian[t * count + u] = frozen[t] || frozen[u] ? 0 : m.covariance(t, u);
      hessian[t * count + t] += (frozen[t] ? 1 : 0) + std::max(ridge, 1e-9) + kNoise * m.covariance(t, t);
    }
    step = solution(hessian, gradient);
    double gain = 0, length = 0, fraction = 1;
    for (int64_t t = 0; t < count; ++t) {
      gain += gradient[t] * step[t];
      length = std::max(length, std::abs(step[t]));
      step[t] = -step[t];
      const double room = (bounds[2 * t + (step[t] < 0 ? 0 : 1)] - a[t]) / step[t];
      if (room > 0) fraction = std::min(fraction, room);
    }
    fraction = std::min(fraction, 1 / length);
    for (double& s : step) s *= fraction;
    return length <= kNear || gain <= kFlat;
  }
};

// The largest s in [0, 1] with KL(P_s || P_0) <= nats, for P_s ~ exp(log_w + s d) and finite d; 2e-5 less of nats, so
// that rounding exceeds no budget.
inline float within_budget(const float* log_w, const float* d, int64_t width, double nats) {
  Moments at_0;
  for_blocks(width, [&](int64_t start, int64_t n) { at_0.add(log_w + start, d + start, n); });
  if (!(at_0.total > 0 && nats >= 0)) return 0;
  return Tilt(log_w, d, width, at_0).root('R', nats * (1 - 2e-5), 1.0f, 12).first;
}

}  // namespace

extern "C" {

// scores, bias [rows, width] -> s [rows]
void within_budget(const float* scores, const float* bias, float* s, int64_t rows, int64_t width, float nats,
                   int64_t threads) {
  for_rows(rows, width, threads, 2 * width, [=](int64_t row, float* log_w) {
    const float *x = scores + row * width, *b = bias + row * width;
    float* d = log_w + width;
    const float top = maximum(x, width);
    LogSum all, rest;  // what the bias forbids is forbidden for every s > 0, and costs its share of the budget
    for_blocks(width, [&](int64_t start, int64_t n) {
      float y[kBlock];
      const float *xs = x + start, *bs = b + start;
      float *ws = log_w + start, *ds = d + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const bool stays = bs[i] > -kInfinity;
        y[i] = xs[i] - top;
        ws[i] = stays ? y[i] : -kInfinity;
        ds[i] = stays ? bs[i] : 0.0f;
      }
      all.add(y, n);
      rest.add(ws, n);
    });
    const double left = nats + (rest.top - all.top) + std::log(rest.total / all.total);
    s[row] = within_budget(log_w, d, width, left);
  });
}

}  // extern "C"
