// Scores of 4-bit rows against 16-bit states in integer arithmetic: exact, until the sum is scaled at the very end.
//
// A group of 128 columns of a row is 64 bytes and four codes, one for each 32 columns. Byte 16 s + k holds columns
// 32 s + k (low nibble) and 32 s + 16 + k (high nibble), as u in 0..15, which stands for (u - 8) * code[s]. A state is
// 256 * high + low with both parts in -128..127. A lane sums up four bytes, 8 columns of one code: at most
// 8 * 8 * 128, which fits in the 16 bits that the product with the code reads, and 2^20 a group after it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBytes = 64, kCodes = 4, kColumns = 128, kLanes = 16;
constexpr int64_t kChunk = 512 << 10;  // bytes of rows that a thread takes at a time
constexpr int64_t kAhead = 8 << 10;    // bytes by which reading runs ahead

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
  int64_t n, groups, batch, factor;

  int64_t row(int64_t i) const { return rows ? rows[std::min(i, n - 1)] : std::min(i, n - 1); }
  void set(int64_t row, int64_t i, int64_t b, int64_t high, int64_t low) const {
    const double sum = double(factor * (256 * high + low));
    out[b * n + i] = float(sum * (double(units[row]) * double(t[b])));
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
int64_t total(__m512i lanes) {
  const __m512i first = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes));
  return _mm512_reduce_add_epi64(_mm512_add_epi64(first, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1))));
}

// R rows and S states at once: as many streams from memory, and every load serves several products.
template <int R, int S>
void score(const Call& c, int64_t i, int64_t b, int64_t ahead) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i spread = _mm512_set_epi32(
      0x8080'03'80 | 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  (void)spread;
  const __m512i place = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_set_epi32(0x80800180, 0x80800180, 0x80800180, 0x80800180, 0x80800080, 0x80800080,
                                              0x80800080, 0x80800080)),
      _mm256_set_epi32(0x80800380, 0x80800380, 0x80800380, 0x80800380, 0x80800280, 0x80800280, 0x80800280, 0x80800280),
      1);
  const uint8_t *plane[R], *next[R];
  const int32_t* codes[R];
  __m512i high[R][S], low[R][S];
  for (int r = 0; r < R; ++r) {
    plane[r] = c.plane + c.row(i + r) * c.groups * kBytes;
    next[r] = c.plane + c.row(i + r + ahead) * c.groups * kBytes;
    codes[r] = reinterpret_cast<const int32_t*>(c.codes) + c.row(i + r) * c.groups;
    for (int s = 0; s < S; ++s) high[r][s] = low[r][s] = _mm512_setzero_si512();
  }
  for (int64_t g = 0; g < c.groups; ++g) {
    for (int r = 0; r < R; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(next[r] + g * kBytes), _MM_HINT_T0);
      const __m512i packed = _mm512_loadu_si512(plane[r] + g * kBytes);
      const __m512i u0 = _mm512_and_si512(packed, mask), u1 = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
      const __m512i code = _mm512_srai_epi16(_mm512_shuffle_epi8(_mm512_set1_epi32(codes[r][g]), place), 8);
      for (int s = 0; s < S; ++s) {
        const Group& h = c.states[(b + s) * c.groups + g];
        __m512i dot = _mm512_dpbusd_epi32(_mm512_load_si512(h.from_high), u0, _mm512_load_si512(h.high));
        dot = _mm512_dpbusd_epi32(dot, u1, _mm512_load_si512(h.high + kBytes));
        high[r][s] = _mm512_dpwssd_epi32(high[r][s], dot, code);
        dot = _mm512_dpbusd_epi32(_mm512_load_si512(h.from_low), u0, _mm512_load_si512(h.low));
        dot = _mm512_dpbusd_epi32(dot, u1, _mm512_load_si512(h.low + kBytes));
        low[r][s] = _mm512_dpwssd_epi32(low[r][s], dot, code);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) c.set(c.row(i + r), i + r, b + s, total(high[r][s]), total(low[r][s]));
}
#else
template <int R, int S>
void score(const Call& c, int64_t i, int64_t b, int64_t) {
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      int64_t high = 0, low = 0;
      for (int64_t g = 0; g < c.groups; ++g) {
        const Group& h = c.states[(b + s) * c.groups + g];
        const uint8_t* at = c.plane + (c.row(i + r) * c.groups + g) * kBytes;
        for (int64_t quarter = 0; quarter < kCodes; ++quarter) {
          int32_t dots[2] = {0, 0};
          for (int64_t j = 16 * quarter; j < 16 * quarter + 16; ++j) {
            const int32_t u0 = (at[j] & 15) - 8, u1 = (at[j] >> 4) - 8;
            dots[0] += u0 * h.high[j] + u1 * h.high[j + kBytes];
            dots[1] += u0 * h.low[j] + u1 * h.low[j + kBytes];
          }
          const int32_t code = c.codes[(c.row(i + r) * c.groups + g) * kCodes + quarter];
          high += code * dots[0], low += code * dots[1];
        }
      }
      c.set(c.row(i + r), i + r, b + s, high, low);
    }
  }
}
#endif

void run(const Call& c, int64_t begin, int64_t end, int64_t ahead) {
  int64_t i = begin;
  if (c.batch == 1) {
    for (; i + 4 <= end; i += 4) score<4, 1>(c, i, 0, ahead);
  } else {
    for (; i + 2 <= end; i += 2) {
      int64_t b = 0;
      for (; b + 4 <= c.batch; b += 4) score<2, 4>(c, i, b, ahead);
      for (; b < c.batch; ++b) score<2, 1>(c, i, b, ahead);
    }
  }
  for (; i < end; ++i)
    for (int64_t b = 0; b < c.batch; ++b) score<1, 1>(c, i, b, ahead);
}

}  // namespace

extern "C" void plane_scores(const uint8_t* plane, const int8_t* codes, const float* units, const int16_t* states,
                             const float* t, const int64_t* rows, float* out, int64_t n, int64_t groups, int64_t batch,
                             int32_t factor, int32_t threads) {
  const Call call{plane, codes, units, arrange(states, batch * groups), t, rows, out, n, groups, batch, factor};
  const int64_t size = groups * kBytes, chunk = std::max<int64_t>(1, kChunk / size);
  const int64_t ahead = std::max<int64_t>(4, kAhead / size);
  std::atomic<int64_t> taken{0};
  const auto work = [&] {  // in chunks: a thread that has to wait for its core does not hold up the other
    for (int64_t i; (i = taken.fetch_add(chunk)) < n;) run(call, i, std::min(n, i + chunk), ahead);
  };
  std::vector<std::thread> others;
  for (int32_t i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& thread : others) thread.join();
}
