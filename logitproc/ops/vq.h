// Kernel of methods/vq.py.

#pragma once

#include "rows.h"

namespace {

// What the tokens of a code add up to; the last of them, which is alone if it is all of the weight.
struct Shared {
  float sum, weight, last, last_weight;
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
    float top = maximum(x, tokens);  // sums are then no larger than differences of scores
    if (top == -kInfinity) top = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      if (!(x[i] > -kInfinity)) continue;
      Shared& code = shared[mapping[i]];
      code = {code.sum + weights[i] * (x[i] - top), code.weight + weights[i], x[i], weights[i]};
    }
    for (int64_t k = 0; k < codes; ++k) {  // NaN where nothing has weight
      const Shared& code = shared[k];
      const bool alone = code.weight == code.last_weight && code.weight > 0;
      mean[k] = alone ? code.last : code.sum / code.weight + top;
    }
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
