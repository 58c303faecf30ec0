// Kernel of heads/vq.py.

#pragma once

#include "rows.h"

namespace {

inline void store(const float* x, float* y, int64_t n) { std::copy(x, x + n, y); }

// bfloat16, rounded to nearest even as torch does it
inline void store(const float* x, uint16_t* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    y[i] = x[i] == x[i] ? uint16_t(rounded) : uint16_t(0x7fc0);
  }
}

// Blocks of tokens are shared among threads: one row is the usual call.
template <typename Out>
void spread_rows(const float* scores, const int32_t* mapping, const float* bias, const float* extra, Out* out,
                 int64_t rows, int64_t books, int64_t codes, int64_t width, int64_t threads) {
  const int64_t blocks = (width + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(static_cast<int>(threads)) if (rows * width >= 2 * kGrain)
  for (int64_t at = 0; at < rows * blocks; ++at) {
    const int64_t row = at / blocks, start = at % blocks * kBlock, n = std::min(kBlock, width - start);
    const float *s = scores + row * codes, *more = extra + row * width + start;
    float y[kBlock];
    for (int64_t book = 0; book < books; ++book) {
      const int32_t* code = mapping + book * width + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {  // NaN for a code that there is not
        const float score = uint32_t(code[i]) < uint32_t(codes) ? s[code[i]] : std::numeric_limits<float>::quiet_NaN();
        y[i] = book ? y[i] + score : score;
      }
    }
    for (int64_t i = 0; extra && i < n; ++i) y[i] += more[i];
    for (int64_t i = 0; bias && i < n; ++i) y[i] += bias[start + i];
    store(y, out + row * width + start, n);
  }
}

}  // namespace

extern "C" {

// scores [rows, codes], mapping [books, width], bias [width] or null, extra [rows, width] or null -> out [rows, width],
// which is bfloat16 if `half`
void spread(const float* scores, const int32_t* mapping, const float* bias, const float* extra, void* out,
            int64_t rows, int64_t books, int64_t codes, int64_t width, int64_t half, int64_t threads) {
  if (half)
    spread_rows(scores, mapping, bias, extra, static_cast<uint16_t*>(out), rows, books, codes, width, threads);
  else
    spread_rows(scores, mapping, bias, extra, static_cast<float*>(out), rows, books, codes, width, threads);
}

}  // extern "C"
