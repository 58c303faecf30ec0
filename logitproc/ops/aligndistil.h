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
  for_rows(rows, width, threads, width, [=](int64_t row, float* scratch) {
    const float *px = plus + row * width, *mx = minus + row * width, *ax = anchor + row * width;
    float* z = out + row * width;
    const auto all_allow = [=](int64_t i) {
      return (px[i] > -kInfinity) & (mx[i] > -kInfinity) & (ax[i] > -kInfinity);
    };
    float plus_top = -kInfinity, minus_top = -kInfinity;
    int64_t rest = 0;  // tokens of the anchor that the others forbid
#pragma omp simd reduction(max : plus_top, minus_top) reduction(+ : rest)
    for (int64_t i = 0; i < width; ++i) {
      const bool inside = all_allow(i);
      plus_top = inside && px[i] > plus_top ? px[i] : plus_top;
      minus_top = inside && mx[i] > minus_top ? mx[i] : minus_top;
      rest += (ax[i] > -kInfinity) & !inside;
    }
    float *plus_exp = z, *minus_exp = scratch;  // overwritten later
    LogSum plus_sum{plus_top}, minus_sum{minus_top}, anchor_sum;
    for_blocks(width, [&](int64_t start, int64_t n) {
      float p_sum = 0, q_sum = 0;
#pragma omp simd reduction(+ : p_sum, q_sum)
      for (int64_t i = start; i < start + n; ++i) {
        const bool inside = all_allow(i);
        p_sum += plus_exp[i] = inside ? exponential(px[i] - plus_top) : 0.0f;
        q_sum += minus_exp[i] = inside ? exponential(mx[i] - minus_top) : 0.0f;
      }
      plus_sum.total += p_sum;
      minus_sum.total += q_sum;
    });
    if (px == ax && rest == 0) anchor_sum = plus_sum;
    else for_blocks(width, [&](int64_t start, int64_t n) { anchor_sum.add(ax + start, n); });
    const LogSoftmax log_p(plus_sum), log_q(minus_sum), log_anchor(anchor_sum);

    float a = constant;
    if (std::isnan(constant)) {
      const float p_part = plus_sum.total > 0 ? 1 / plus_sum.total : 0;
      const float q_part = minus_sum.total > 0 ? 1 / minus_sum.total : 0;
      double variation = 0;
      for_blocks(width, [&](int64_t start, int64_t n) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < start + n; ++i) sum += std::abs(plus_exp[i] * p_part - minus_exp[i] * q_part);
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
        std::copy(change, change + n, scratch + start);
        return;
      }
      for (int64_t i = 0; i < n; ++i) to[i] += change[i];
      total.add(to, n);
    });
    if (capped) {
      const float s = within_budget(z, scratch, width, cap);
      coefficient[row] *= s;
      for_blocks(width, [&](int64_t start, int64_t n) {
        float* to = z + start;
        for (int64_t i = 0; i < n; ++i) to[i] += s * scratch[start + i];
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
