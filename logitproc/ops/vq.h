// Kernel of methods/vq.py.

#pragma once

#include "rows.h"

namespace {

// What the tokens of a code add up to. In float64, whose quotient gives back the score of a token that is alone.
struct Shared {
  double sum, weight;
};

}  // namespace

extern "C" {

// scores, out [rows, width]; mapping, weights, bias (or null) of the first `tokens`
void share_logits(const float* scores, const int32_t* mapping, const float* weights, const float* bias, float* out,
                  int64_t tokens, int64_t codes, int64_t rows, int64_t width, int64_t threads) {
  for_rows(rows, width, threads, codes, [=](int64_t row, float* mean) {
    const float* x = scores + row * width;
    float* y = out + row * width;
    std::vector<Shared> shared(codes);
    constexpr int64_t few = 512;  // so that their parts stay in the nearest cache beside the codes
    for (int64_t start = 0; start < tokens; start += few) {
      Shared parts[few];
      const int64_t n = std::min(few, tokens - start);
      const float *xs = x + start, *ws = weights + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const bool finite = xs[i] > -kInfinity;
        const double weight = finite ? ws[i] : 0.0f;
        parts[i].sum = weight * (finite ? xs[i] : 0.0f);
        parts[i].weight = weight;
      }
      for (int64_t i = 0; i < n; ++i) {
        Shared& code = shared[mapping[start + i]];
        code = {code.sum + parts[i].sum, code.weight + parts[i].weight};
      }
    }
    for (int64_t k = 0; k < codes; ++k) mean[k] = shared[k].sum / shared[k].weight;  // NaN where nothing has weight
#pragma omp simd
    for (int64_t i = 0; i < tokens; ++i) {
      const float m = mean[mapping[i]];
      y[i] = x[i] > -kInfinity && m == m ? m : x[i];
      if (bias) y[i] += bias[i];
    }
    std::copy(x + tokens, x + width, y + tokens);
  });
}

}  // extern "C"
