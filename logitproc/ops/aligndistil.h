// Kernel of methods/aligndistil.py.

#pragma once

#include "tilt.h"

namespace {

// ln softmax of a score, from the sum over its row
struct LogSoftmax {
  float top, log_total;
  explicit LogSoftmax(const LogSum& sum)
      : top(static_cast<float>(sum.top)), log_total(static_cast<float>(std::log(sum.total))) {}
  float operator()(float x) const { return (x - top) - log_total; }
};

}  // namespace

extern "C" {

// `extrapolated`: plus, minus, anchor, out [rows, width]; coefficient [rows]; a constant of NaN stands for "adaptive",
// tokens more than `implausible` below the anchor's best are forbidden, and a cap of infinity is none.
void extrapolated(const float* plus, const float* minus, const float* anchor, float* out, float* coefficient,
                  int64_t rows, int64_t width, float constant, float r, float eps, float low, float high,
                  float cap, float implausible, float anchor_weight, int64_t threads) {
  const bool capped = cap < kInfinity;
  for_rows(rows, width, threads, capped ? width : 0, [=](int64_t row, float* changes) {
    const float *px = plus + row * width, *mx = minus + row * width, *ax = anchor + row * width;
    float* z = out + row * width;
    LogSum plus_sum, minus_sum, anchor_sum;
    float x[kBlock], y[kBlock];
    int64_t outside = px != ax;  // 0 where plus is the anchor, and all that it allows is inside
    for_blocks(width, [&](int64_t start, int64_t n) {
      int32_t left_out = 0;
#pragma omp simd reduction(+ : left_out)
      for (int64_t i = 0; i < n; ++i) {
        const float p = px[start + i], m = mx[start + i], c = ax[start + i];
        const bool inside = (p > -kInfinity) & (m > -kInfinity) & (c > -kInfinity);
        x[i] = inside ? p : -kInfinity;
        y[i] = inside ? m : -kInfinity;
        left_out += (c > -kInfinity) & !inside;
      }
      plus_sum.add(x, n);
      minus_sum.add(y, n);
      outside += left_out;
    });
    if (outside == 0) anchor_sum = plus_sum;
    else for_blocks(width, [&](int64_t start, int64_t n) { anchor_sum.add(ax + start, n); });
    const LogSoftmax log_p(plus_sum), log_q(minus_sum), log_anchor(anchor_sum);

    float a = constant;
    if (std::isnan(constant)) {
      double variation = 0;
      for_blocks(width, [&](int64_t start, int64_t n) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) {
          const float p = px[start + i], m = mx[start + i];
          const bool inside = (p > -kInfinity) & (m > -kInfinity) & (ax[start + i] > -kInfinity);
          const float apart = std::abs(exponential(log_p(p)) - exponential(log_q(m)));
          sum += inside ? apart : 0.0f;
        }
        variation += sum;
      });
      a = r * static_cast<float>(variation / 2) + eps;
    }
    coefficient[row] = a = std::min(std::max(a, low), high);

    LogSum total;
    for_blocks(width, [&](int64_t start, int64_t n) {
      const float *p = px + start, *m = mx + start, *c = ax + start;
      const LogSoftmax lp = log_p, lq = log_q, lc = log_anchor;  // copies, or they are read again for every token
      const float weight = anchor_weight, slope = a, least = lc.top - implausible;
      float change[kBlock], *to = z + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const bool may = (p[i] > -kInfinity) & (c[i] > -kInfinity) & (c[i] >= least);
        const float ratio = std::min(std::max(lp(p[i]) - lq(m[i]), -1e4f), 1e4f);  // FARTHEST
        const float d = m[i] > -kInfinity ? ratio : 0.0f;
        change[i] = may ? slope * d : 0.0f;
        to[i] = may ? weight * lc(c[i]) : -kInfinity;
      }
      if (capped) {
        std::copy(change, change + n, changes + start);
        return;
      }
      for (int64_t i = 0; i < n; ++i) to[i] += change[i];
      total.add(to, n);
    });
    if (capped) {
      const float s = within_budget(z, changes, width, cap);
      coefficient[row] *= s;
      for_blocks(width, [&](int64_t start, int64_t n) {
        float* to = z + start;
        for (int64_t i = 0; i < n; ++i) to[i] += s * changes[start + i];
        total.add(to, n);
      });
    }
    const bool left = total.total > 0;
    const LogSoftmax log_z(left ? total : anchor_sum);
    const float* from = left ? z : ax;  // a row with nothing left is the anchor
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) z[i] = from[i] > -kInfinity ? log_z(from[i]) : -kInfinity;
  });
}

}  // extern "C"
