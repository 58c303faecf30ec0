// Kernels of methods/fusion.py.

#pragma once

#include <tuple>

#include "tilt.h"

namespace {

constexpr float kForbidden = -1e30f;  // a score that is not above it, or NaN, is a mask
constexpr float kDead = 1e-6f;        // nats

inline bool allowed(float x) { return x > kForbidden; }

// The first of the tokens that x likes best among those that x and all others allow; -1 without any.
int64_t first_choice(const float* x, const std::vector<const float*>& others, int64_t width) {
  const auto allow = [&](int64_t i) {
    return std::all_of(others.begin(), others.end(), [=](const float* y) { return allowed(y[i]); });
  };
  float best = -kInfinity;
  int64_t first = 0;
  for_blocks(width, [&](int64_t start, int64_t n) {
    const float high = maximum(x + start, n);
    if (high > best) {
      best = high;
      first = start;
    }
  });
  if (!allowed(best)) return -1;
  first = std::find(x + first, x + width, best) - x;
  if (allow(first)) return first;
  first = -1;
  best = kForbidden;
  for (int64_t i = 0; i < width; ++i)
    if (x[i] > best && allow(i)) best = x[first = i];
  return first;
}

// A component of a mixture: x + a d, d = y - base less a constant where all three allow a token, else 0.
struct Component {
  const float *x, *base, *y;
  float a, reference;
  bool upscaled;  // x is the expert and y the host, both must allow a token; else y, the expert, unless a is 0

  void read(int64_t start, int64_t n, float* to) const {
    const float *px = x + start, *pb = base + start, *py = y + start;
    const float slope = a, less = reference;
    const bool x_free = !upscaled, y_free = !upscaled && a == 0;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const bool has_x = allowed(px[i]), has_y = allowed(py[i]);
      const float d = has_x & has_y & allowed(pb[i]) ? (py[i] - pb[i]) - less : 0.0f;
      to[i] = (has_x | x_free) & (has_y | y_free) ? px[i] + slope * d : -kInfinity;
    }
  }
};

// One row of `candidates`, and the sum of exp over each.
struct Mixture {
  std::vector<Component> components;
  std::vector<LogSum> sums;

  Mixture(const float* host, const float* base, const float* const* experts, int64_t row, int64_t width, int64_t count,
          const float* alpha, int64_t alphas, const float* beta, int64_t betas) {
    const float *h = host + row * width, *b = base + row * width;
    const Component own{h, b, h, 0, 0, false};
    components.push_back(own);
    for (const bool upscaled : {true, false})
      for (int64_t t = 0; t < count && (upscaled ? betas : alphas); ++t) {
        const float* e = experts[t] + row * width;
        const float *x = upscaled ? e : h, *y = upscaled ? h : e;
        const int64_t first = first_choice(x, {b, y}, width);
        const float reference = first < 0 ? 0 : y[first] - b[first];
        bool left = first >= 0;
        for (int64_t i = 0; upscaled && !left && i < width; ++i) left = allowed(h[i]) && allowed(e[i]);
        for (int64_t k = 0; k < (upscaled ? betas : alphas); ++k)
          components.push_back(left ? Component{x, b, y, upscaled ? beta[k] : alpha[k], reference, upscaled} : own);
      }
    sums.resize(components.size());
    float scores[kBlock];
    for_blocks(width, [&](int64_t start, int64_t n) {
      for (size_t j = 0; j < components.size(); ++j) {
        components[j].read(start, n, scores);
        sums[j].add(scores, n);
      }
    });
  }
};

// d_t of each expert where all models allow a token, 0 elsewhere and at the host's first choice, and the moments of all
// d under each model, renormalised there; models: the base and the experts.
struct Shifts {
  const std::vector<const float*>& models;
  int64_t first;
  JointMoments own;  // of the host
  std::vector<JointMoments> moments;

  // Writes ln w of the host to log_w [width] and the d_t to d [experts, width].
  Shifts(const float* host, const std::vector<const float*>& models, int64_t width, float* log_w, float* d)
      : models(models), first(std::max<int64_t>(0, first_choice(host, models, width))), own(models.size() - 1, true),
        moments(models.size(), JointMoments(models.size() - 1, false)) {
    const float top = host[first];
    for_blocks(width, [&](int64_t start, int64_t n) {
      float *w = log_w + start, x[kBlock];
      std::copy(host + start, host + start + n, w);
      for (const float* model : models) {
        const float* y = model + start;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) w[i] = allowed(w[i]) && allowed(y[i]) ? w[i] : -kInfinity;
      }
      for (size_t t = 1; t < models.size(); ++t) {
        const float *y = models[t] + start, *b = models[0] + start, reference = models[t][first] - models[0][first];
        float* dt = d + (t - 1) * width + start;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) dt[i] = w[i] > -kInfinity ? (y[i] - b[i]) - reference : 0.0f;
      }
      for (size_t t = 0; t < models.size(); ++t) {
        const float* y = models[t] + start;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) x[i] = w[i] > -kInfinity ? y[i] : -kInfinity;
        moments[t].add(x, d + start, width, n);
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) w[i] -= top;
      own.add(w, d + start, width, n);
    });
  }

  // ln of what a model gives the first choice
  double log_q(size_t model) const { return models[model][first] - moments[model].log_z(); }
};

}  // namespace

extern "C" {

// host, base, expert, out [rows, width]; alpha, kl, reverse_kl [rows]; beyond, dead bool [rows]. target is R, F or J; with
// points > 0 alpha is the best of first_point / 10, (first_point + 1) / 10, ... instead.
void fuse_one(const float* host, const float* base, const float* expert, float* out, float* alpha, float* kl,
              float* reverse_kl, bool* beyond, bool* dead, int64_t rows, int64_t width, int64_t first_point,
              int64_t points, int64_t target, float low, float high, int64_t steps, int64_t threads) {
  for_rows(rows, width, threads, width, [=](int64_t row, float* d) {
    const float *h = host + row * width, *b = base + row * width, *e = expert + row * width;
    float* z = out + row * width;  // ln w of the host, until the fused scores are written
    const int64_t first = std::max<int64_t>(0, first_choice(h, {b, e}, width));
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
      const Tilt tilt(z, d, width, own);
      const double nats = target == 'R' ? kl[row] : target == 'F' ? reverse_kl[row] : positive(change);
      if (points) a = tilt.grid(kl[row], reverse_kl[row], first_point, points);
      else std::tie(a, beyond[row]) = tilt.root(static_cast<char>(target), nats, high, steps);
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

// host, base, experts [count][rows, width], out [rows, width]; weights, alpha, kl, reverse_kl, dead bool [rows, count];
// beyond bool [rows]; bounds [count, 2]
void fuse_match(const float* host, const float* base, const float* const* experts, const float* weights,
                const float* bounds, float* out, float* alpha, float* kl, float* reverse_kl, bool* beyond,
                bool* dead, int64_t rows, int64_t width, int64_t count, bool shift, float ridge, float centre,
                int64_t steps, int64_t threads) {
  for_rows(rows, width, threads, count * width, [=](int64_t row, float* d) {
    const float* h = host + row * width;
    float *z = out + row * width, *a = alpha + row * count;  // z: ln w of the host, until the fused scores are written
    std::vector<const float*> models{base + row * width};
    for (int64_t t = 0; t < count; ++t) models.push_back(experts[t] + row * width);
    const Shifts s(h, models, width, z, d);
    std::vector<double> goal(count);
    bool* still = dead + row * count;
    for (int64_t t = 0; t < count; ++t) {
      const double ratio = s.log_q(0) - s.log_q(1 + t);  // of the expert to the base, where d is 0
      const double mean = s.moments[1 + t].mean(t), base_mean = s.moments[0].mean(t);
      kl[row * count + t] = static_cast<float>(positive(mean - ratio));
      reverse_kl[row * count + t] = static_cast<float>(positive(ratio - base_mean));
      still[t] = !(mean - base_mean >= kDead && s.own.covariance(t, t) > 0);  // true for NaN: no common token
      for (int64_t u = 0; u < count; ++u) goal[t] += weights[row * count + u] * s.moments[1 + u].mean(t);
      if (shift) goal[t] += s.own.mean(t) - base_mean;
    }
    beyond[row] = false;
    std::fill(a, a + count, 0.0f);
    if (!std::all_of(still, still + count, [](bool is) { return is; })) {
      const auto found = Tilts{z, d, width, count}.match(s.own, goal, bounds, ridge, centre, steps);
      for (int64_t t = 0; t < count; ++t) a[t] = still[t] ? 0 : found[t];
    }
    std::copy(h, h + width, z);
    for (int64_t t = 0; t < count; ++t) {
      const float *e = models[1 + t], *dt = d + t * width, slope = a[t];
      if (slope == 0) continue;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) z[i] = allowed(e[i]) ? z[i] + slope * dt[i] : -kInfinity;
    }
  });
}

// host, base, experts [count][rows, width]; log_weights [rows, 1 + count (alphas + betas)] -> out [rows, width]
void mixture(const float* host, const float* base, const float* const* experts, const float* alpha, const float* beta,
             const float* log_weights, float* out, int64_t rows, int64_t width, int64_t count, int64_t alphas,
             int64_t betas, int64_t threads) {
  const int64_t parts = 1 + count * (alphas + betas);
  for_rows(rows, width, threads, parts * kBlock, [=](int64_t row, float* scratch) {
    const Mixture m(host, base, experts, row, width, count, alpha, alphas, beta, betas);
    const float* w = log_weights + row * parts;
    double top = *std::max_element(w, w + parts), sum = 0;
    for (int64_t j = 0; j < parts; ++j) sum += std::exp(w[j] - top);
    const double log_sum = top + std::log(sum);
    float* z = out + row * width;
    for_blocks(width, [&](int64_t start, int64_t n) {
      float best[kBlock], total[kBlock];
      std::fill(best, best + n, -kInfinity);
      std::fill(total, total + n, 0.0f);
      for (int64_t j = 0; j < parts; ++j) {
        float* x = scratch + j * kBlock;
        m.components[j].read(start, n, x);
        const float highest = static_cast<float>(m.sums[j].top);
        const float weight = static_cast<float>(w[j] - log_sum - std::log(m.sums[j].total));
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) best[i] = std::max(best[i], x[i] = (x[i] - highest) + weight);
      }
      for (int64_t j = 0; j < parts; ++j) {
        const float* x = scratch + j * kBlock;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) total[i] += exponential(x[i] - best[i]);
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) z[start + i] = best[i] > -kInfinity ? best[i] + logarithm(total[i]) : -kInfinity;
    });
  });
}

// What each component gave a token: token [rows] -> out [rows, 1 + count (alphas + betas)], ln
void log_likelihoods(const float* host, const float* base, const float* const* experts, const float* alpha,
                     const float* beta, const int64_t* token, float* out, int64_t rows, int64_t width, int64_t count,
                     int64_t alphas, int64_t betas, int64_t threads) {
  const int64_t parts = 1 + count * (alphas + betas);
  for_rows(rows, width, threads, [=](int64_t row) {
    const Mixture m(host, base, experts, row, width, count, alpha, alphas, beta, betas);
    for (int64_t j = 0; j < parts; ++j) {
      float score;
      m.components[j].read(token[row], 1, &score);
      const double found = (score - m.sums[j].top) - std::log(m.sums[j].total);
      out[row * parts + j] = std::isnan(found) ? 0 : static_cast<float>(found);  // a row without a token
    }
  });
}

}  // extern "C"
