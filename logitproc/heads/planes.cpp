// Scores of 4-bit rows against 16-bit states, in exact integer arithmetic within each group of 128 columns.
//
// A group of a row is 64 bytes: byte j holds columns j (low nibble) and j + 64 (high nibble), as u in 0..15. A weight is
// (2 * unit * u - offset) * scale / 2. A state is t * (256 * high + low) with both parts in -128..127. Each of the 16
// lanes sums 8 columns in int32, which is exact; lanes are scaled and added up in float32.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBytes = 64, kColumns = 128, kLanes = 16;

float from_bfloat16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

struct Call {
  const uint8_t* plane;       // [V, groups, 64]
  const uint16_t* scales;     // [V, groups] bfloat16
  const int8_t *high, *low;   // [batch, groups, 128]
  const int32_t* lanes;       // [batch, groups, 16]: offset times the sum of the columns that a lane adds up
  const float* t;             // [batch]
  const int64_t* rows;        // [batch, n] of the plane, or null for all
  float* out;                 // [batch, n]
  int64_t n, groups, batch;
  int32_t unit;
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// R rows at once: as many streams from memory, and the state is loaded once for all of them.
template <int R>
void score(const Call& c, const int64_t* rows, int64_t b, float* out) {
  const __m512i mask = _mm512_set1_epi8(15);
  const int shift = c.unit == 16 ? 5 : 1;  // times 2 * unit
  const int8_t *high = c.high + b * c.groups * kColumns, *low = c.low + b * c.groups * kColumns;
  const int32_t* lanes = c.lanes + b * c.groups * kLanes;
  __m512 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < c.groups; ++g) {
    const __m512i h0 = _mm512_loadu_si512(high + g * kColumns), h1 = _mm512_loadu_si512(high + g * kColumns + 64);
    const __m512i l0 = _mm512_loadu_si512(low + g * kColumns), l1 = _mm512_loadu_si512(low + g * kColumns + 64);
    const __m512i offset = _mm512_loadu_si512(lanes + g * kLanes), zero = _mm512_setzero_si512();
    for (int r = 0; r < R; ++r) {
      const uint8_t* at = c.plane + (rows[r] * c.groups + g) * kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(at + 1024), _MM_HINT_T0);
      const __m512i packed = _mm512_loadu_si512(at);
      const __m512i first = _mm512_and_si512(packed, mask);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
      const __m512i h = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, first, h0), second, h1);
      const __m512i l = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, first, l0), second, l1);
      __m512i dot = _mm512_slli_epi32(_mm512_add_epi32(_mm512_slli_epi32(h, 8), l), shift);
      dot = _mm512_sub_epi32(dot, offset);
      const float scale = from_bfloat16(c.scales[rows[r] * c.groups + g]);
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale), sum[r]);
    }
  }
  for (int r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(sum[r]) * (c.t[b] * 0.5f);
}
#else
template <int R>
void score(const Call& c, const int64_t* rows, int64_t b, float* out) {
  for (int r = 0; r < R; ++r) {
    float sum[kLanes] = {0};
    for (int64_t g = 0; g < c.groups; ++g) {
      const int64_t at = b * c.groups + g;
      const uint8_t* row = c.plane + (rows[r] * c.groups + g) * kBytes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        int32_t dot = 0;
        for (int64_t j = 4 * lane; j < 4 * lane + 4; ++j) {
          const int8_t *high = c.high + at * kColumns + j, *low = c.low + at * kColumns + j;
          dot += (row[j] & 15) * (256 * high[0] + low[0]) + (row[j] >> 4) * (256 * high[64] + low[64]);
        }
        const float scale = from_bfloat16(c.scales[rows[r] * c.groups + g]);
        sum[lane] += float(2 * c.unit * dot - c.lanes[at * kLanes + lane]) * scale;
      }
    }
    float total = 0;
    for (float lane : sum) total += lane;
    out[r] = total * (c.t[b] * 0.5f);
  }
}
#endif

template <int R>
void step(const Call& c, int64_t i) {
  for (int64_t b = 0; b < c.batch; ++b) {
    int64_t rows[R];
    for (int r = 0; r < R; ++r) rows[r] = c.rows ? c.rows[b * c.n + i + r] : i + r;
    score<R>(c, rows, b, c.out + b * c.n + i);
  }
}

void run(const Call& c, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) step<4>(c, i);
  for (; i < end; ++i) step<1>(c, i);
}

}  // namespace

extern "C" void plane_scores(const uint8_t* plane, const uint16_t* scales, const int8_t* high, const int8_t* low,
                             const int32_t* lanes, const float* t, const int64_t* rows, float* out, int64_t n,
                             int64_t groups, int64_t batch, int32_t unit, int32_t threads) {
  const Call call{plane, scales, high, low, lanes, t, rows, out, n, groups, batch, unit};
  std::vector<std::thread> others;
  for (int32_t i = 1; i < threads; ++i)
    others.emplace_back([&call, i, n, threads] { run(call, n * i / threads, n * (i + 1) / threads); });
  run(call, 0, n / threads);
  for (auto& thread : others) thread.join();
}
