// What the kernels share: rows are shared out among threads; a row is worked on by one thread from beginning to end, so
// that it stays in that core's cache and does not depend on the rows beside it.
//
// Loops over a row are written so that the compiler vectorises them (-O3 -march=native -fopenmp-simd). Sums are kept
// in float32 in as many lanes as a vector has, as torch keeps them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kGrain = 1 << 15;  // scores; waking a thread costs as much as working on so many
constexpr int64_t kBlock = 2048;     // scores of a row that a few loops share while they are in the nearest cache

// exp(x), relative error below 2e-7; 0 below -87.68, where float32 has no normal number left; inf above 88.37.
inline float exponential(float x) {
  x = std::min(std::max(x, -88.0f), 89.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // x - n ln 2, ln 2 in two parts
  float p = 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;  // 2^n; 0 for n = -127, inf for n = 128
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// ln x of a normal x > 0, relative error below 2e-7 (polynomial of the Cephes library)
inline float logarithm(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t n = (bits - 0x3f3504f3) >> 23;  // x = 2^n m, m from sqrt(1/2) to sqrt(2)
  bits -= n * (1 << 23);
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float f = m - 1.0f, e = static_cast<float>(n);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return e * 0.693145752f + (f + (f * f * (f * p - 0.5f) + e * 1.42860677e-6f));
}

// work(row, scratch) for every row, on `threads` threads, which have a scratch each, or on one where there is little to
// do. These are the threads that torch itself uses: both ask the same OpenMP library for as many.
template <typename Work>
void for_rows(int64_t rows, int64_t width, int64_t threads, int64_t scratch, Work work) {
#pragma omp parallel num_threads(static_cast<int>(threads)) if (rows > 1 && rows * width >= kGrain)
  {
    const std::unique_ptr<float[]> own(new float[scratch]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) work(row, own.get());
  }
}

template <typename Work>
void for_rows(int64_t rows, int64_t width, int64_t threads, Work work) {
  for_rows(rows, width, threads, 0, [=](int64_t row, float*) { work(row); });
}

// work(start, n) for the blocks of a row
template <typename Work>
void for_blocks(int64_t width, Work work) {
  for (int64_t start = 0; start < width; start += kBlock) work(start, std::min(kBlock, width - start));
}

// NaN is passed over.
inline float maximum(const float* x, int64_t n) {
  float top = -kInfinity;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// sum of exp(x - top)
inline float sum_of_exp(const float* x, int64_t n, float top) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += exponential(x[i] - top);
  return sum;
}

// logsumexp of a row, block by block: sums in float32 within a block and in float64 from block to block
struct LogSum {
  double top = -std::numeric_limits<double>::infinity(), total = 0;

  void add(const float* x, int64_t n) {
    const float high = maximum(x, n);
    if (!(high > -kInfinity)) return;  // a block may be forbidden
    if (high > top) {
      total *= std::exp(top - high);
      top = high;
    }
    total += std::exp(high - top) * sum_of_exp(x, n, high);
  }
};

}  // namespace
