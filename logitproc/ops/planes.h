// Kernel of heads/planes.py: scores of 4-bit rows against 16-bit states in integer arithmetic, exact until the sum is
// scaled at the very end.
//
// A group of 128 columns of a row is 64 bytes and four codes, one for each 32 columns. Byte 16 s + k holds columns
// 32 s + k (low nibble) and 32 s + 16 + k (high nibble), as u in 0..15, which stands for (u - 8) * code[s]. A state is
// 256 * high + low with both parts in -128..127. A lane sums up four bytes, 8 columns of one code: at most
// 8 * 8 * 128, which fits in the 16 bits that the product with the code reads, and 2^20 a group after it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace planes {
namespace {

constexpr int64_t kBytes = 64, kCodes = 4, kColumns = 128, kLanes = 16;
constexpr int64_t kChunk = 2 << 20;  // bytes of rows that a thread takes at a time, at most
constexpr int64_t kAhead = 4 << 10;  // bytes by which each stream is asked for ahead

struct alignas(64) Group {  // of a state, in the order of the bytes of a row
  int8_t high[kColumns], low[kColumns];
  int32_t from_high[kLanes], from_low[kLanes];  // what u = hi + 8 adds too much, negative
};

struct Call {
  const uint8_t* plane;          // [V, groups, 64]
  const int8_t* codes;           // [V, groups, 4]
  const float* units;            // [V]
  std::vector<Group> states;     // [batch, groups]
  const float* t;                // [batch]
  const int64_t* rows;           // [n] of the plane, or null for all
  float* out;                    // [batch, n]
  int64_t n, groups, batch, factor, ahead;

  int64_t row(int64_t i) const { return rows ? rows[std::min(i, n - 1)] : std::min(i, n - 1); }
  void set(int64_t i, int64_t b, double sum) const {  // a whole number below 2^53
    out[b * n + i] = float(double(factor) * sum * (double(units[row(i)]) * double(t[b])));
  }
};

std::vector<Group> arrange(const int16_t* states, int64_t groups) {
  std::vector<Group> made(groups);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t j = 0; j < kColumns; ++j) {
      const int64_t byte = j % kBytes, column = 32 * (byte / 16) + 16 * (j / kBytes) + byte % 16;
      const int32_t whole = states[g * kColumns + column], low = int8_t(whole & 255), high = (whole - low) / 256;
      made[g].high[j] = int8_t(high), made[g].low[j] = int8_t(low);
      made[g].from_high[byte / 4] -= 8 * high, made[g].from_low[byte / 4] -= 8 * low;
    }
  }
  return made;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
double total(__m512i high, __m512i low) {
  const auto wide = [](__m512i h, __m512i l, auto half) {
    return _mm512_fmadd_pd(_mm512_set1_pd(256), _mm512_cvtepi32_pd(half(h)), _mm512_cvtepi32_pd(half(l)));
  };
  const auto first = [](__m512i x) { return _mm512_castsi512_si256(x); };
  const auto second = [](__m512i x) { return _mm512_extracti64x4_epi64(x, 1); };
  return _mm512_reduce_add_pd(_mm512_add_pd(wide(high, low, first), wide(high, low, second)));
}

// R rows, `stride` apart, and S states at once: as many streams from memory, and every load serves several products.
template <int R, int S>
void score(const Call& c, int64_t i, int64_t stride, int64_t b) {
  const __m512i mask = _mm512_set1_epi8(15);
  // Code s of four, in the second byte of lanes 4 s to 4 s + 3; a shift then makes it a signed number of 16 bits.
  const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512i place = _mm512_or_si512(_mm512_set1_epi32(int32_t(0x80800080)), _mm512_slli_epi32(lane, 8));
  const uint8_t *plane[R], *next[R];
  const int32_t* codes[R];
  __m512i high[R][S], low[R][S];
  for (int r = 0; r < R; ++r) {
    plane[r] = c.plane + c.row(i + r * stride) * c.groups * kBytes;
    next[r] = c.plane + c.row(i + r * stride + c.ahead) * c.groups * kBytes;
    codes[r] = reinterpret_cast<const int32_t*>(c.codes) + c.row(i + r * stride) * c.groups;
    for (int s = 0; s < S; ++s) high[r][s] = low[r][s] = _mm512_setzero_si512();
  }
  for (int64_t g = 0; g < c.groups; ++g) {
    __m512i u0[R], u1[R], code[R];
    for (int r = 0; r < R; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(next[r] + g * kBytes), _MM_HINT_T0);
      const __m512i packed = _mm512_loadu_si512(plane[r] + g * kBytes);
      u0[r] = _mm512_and_si512(packed, mask), u1[r] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
      code[r] = _mm512_srai_epi16(_mm512_shuffle_epi8(_mm512_set1_epi32(codes[r][g]), place), 8);
    }
    for (int s = 0; s < S; ++s) {
      const Group& h = c.states[(b + s) * c.groups + g];
      const auto add = [&](const int8_t* part, const int32_t* offset, __m512i(&sums)[R][S]) {
        const __m512i first = _mm512_load_si512(part), second = _mm512_load_si512(part + kBytes);
        const __m512i none = _mm512_load_si512(offset);
        for (int r = 0; r < R; ++r) {
          const __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, u0[r], first), u1[r], second);
          sums[r][s] = _mm512_dpwssd_epi32(sums[r][s], dot, code[r]);
        }
      };
      add(h.high, h.from_high, high);
      add(h.low, h.from_low, low);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) c.set(i + r * stride, b + s, total(high[r][s], low[r][s]));
}
#else
template <int R, int S>
void score(const Call& c, int64_t i, int64_t stride, int64_t b) {
  for (int r = 0; r < R; ++r) {
    const int64_t row = c.row(i + r * stride);
    for (int s = 0; s < S; ++s) {
      int64_t high = 0, low = 0;
      for (int64_t g = 0; g < c.groups; ++g) {
        const Group& h = c.states[(b + s) * c.groups + g];
        const uint8_t* at = c.plane + (row * c.groups + g) * kBytes;
        for (int64_t quarter = 0; quarter < kCodes; ++quarter) {
          int32_t dots[2] = {0, 0};
          for (int64_t j = 16 * quarter; j < 16 * quarter + 16; ++j) {
            const int32_t u0 = (at[j] & 15) - 8, u1 = (at[j] >> 4) - 8;
            dots[0] += u0 * h.high[j] + u1 * h.high[j + kBytes];
            dots[1] += u0 * h.low[j] + u1 * h.low[j + kBytes];
          }
          const int32_t code = c.codes[(row * c.groups + g) * kCodes + quarter];
          high += code * dots[0], low += code * dots[1];
        }
      }
      c.set(i + r * stride, b + s, double(256 * high + low));
    }
  }
}
#endif

template <int R, int S>
void sweep(const Call& c, int64_t begin, int64_t end) {
  const int64_t stride = (end - begin) / R;
  for (int64_t i = begin; i < begin + stride; ++i) {
    int64_t b = 0;
    for (; b + S <= c.batch; b += S) score<R, S>(c, i, stride, b);
    for (; b < c.batch; ++b) score<R, 1>(c, i, stride, b);
  }
  for (int64_t i = begin + R * stride; i < end; ++i)
    for (int64_t b = 0; b < c.batch; ++b) score<1, 1>(c, i, 0, b);
}

}  // namespace
}  // namespace planes

extern "C" {

// out [batch, n]; see `Call`
void plane_scores(const uint8_t* plane, const int8_t* codes, const float* units, const int16_t* states,
                  const float* t, const int64_t* rows, float* out, int64_t n, int64_t groups, int64_t batch,
                  int64_t factor, int64_t threads) {
  using namespace planes;
  const int64_t size = groups * kBytes, ahead = (kAhead + size - 1) / size;
  const Call call{plane, codes, units, arrange(states, batch * groups), t, rows, out, n, groups, batch, factor, ahead};
  const int64_t chunk = std::max<int64_t>(16, std::min(kChunk / size, n / (8 * threads)));
  // In chunks, to whoever is free: a thread that has to wait for its core does not hold up the other.
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic) if (n > chunk)
  for (int64_t i = 0; i < n; i += chunk)
    (batch == 1 ? sweep<4, 1> : sweep<3, 2>)(call, i, std::min(n, i + chunk));
}

// Asks Linux to hold these bytes in pages of 2 MiB, which are read faster by half than many small ones.
void hold_in_large_pages(void* data, int64_t bytes, int64_t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1: what is there already; headers may not know it
  const uintptr_t begin = (uintptr_t(data) + kPage - 1) / kPage * kPage, end = (uintptr_t(data) + bytes) / kPage * kPage;
  if (begin >= end) return;
  for (int advice : {MADV_HUGEPAGE, kCollapse}) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#endif
}

}  // extern "C"
