// Kernels of history.py.

#pragma once

#include <utility>

#include "rows.h"

namespace {

constexpr int64_t kMaxOrder = 8;

// NGramTable
struct Table {
  const float* base;
  const int64_t* symbols;
  const int64_t* keys;
  const int64_t* start;
  const int64_t* ids;
  const float* values;
  const float* trust;  // null: 1 everywhere
  int64_t vocabulary, contexts, order, bos;
};

// One table after one text: weight * (base + the values of the entries of the contexts found).
struct Match {
  const Table* table;
  float weight;
  int64_t found[kMaxOrder];  // the context of each order from 2 on

  // visit(ids, values, how many) for each context
  template <typename Visit>
  void for_contexts(Visit visit) const {
    for (int64_t n = 0; n + 1 < table->order; ++n) {
      const int64_t begin = table->start[found[n]], end = table->start[found[n] + 1];
      visit(table->ids + begin, table->values + begin, end - begin);
    }
  }

  void add_entries(float* out) const {
    for_contexts([&](const int64_t* ids, const float* values, int64_t count) {
      for (int64_t i = 0; i < count; ++i) out[ids[i]] += weight * values[i];
    });
  }
};

int64_t symbol(const Table& table, const int64_t* token) {
  const int64_t v = table.vocabulary;
  return table.symbols[*token < 0 ? v + 1 : std::min(*token, v)];
}

// The contexts that a text ends with; `end` is one past its last token, order - 1 tokens precede it.
Match match(const Table& table, const int64_t* end, float factor) {
  Match result{&table, factor, {}};
  int64_t parent = -1, longest = table.contexts + 1;
  for (int64_t n = 1; n < table.order; ++n) {
    int64_t newest = symbol(table, end - n);
    if (table.bos && end[-n] < 0) {  // before the first token, unless that is the start of a text itself
      const bool starts = n == 1 || (end[-n + 1] >= 0 && symbol(table, end - n + 1) != table.vocabulary);
      if (starts) newest = table.vocabulary;
    }
    const int64_t key = parent * (table.vocabulary + 2) + newest;
    const int64_t* at = std::lower_bound(table.keys, table.keys + table.contexts, key);
    parent = *at == key ? at - table.keys : table.contexts;
    if (parent < table.contexts) longest = parent;
    result.found[n - 1] = parent;
  }
  if (table.trust) result.weight *= table.trust[longest];
  return result;
}

constexpr int64_t kLong = 4096;  // scores that stay in the first cache
constexpr int64_t kShort = 64;   // scores of which often none is plausible

// Of tokens that may be biased. A row is the spans and the gaps between them, which keep their scores.
struct Span {
  int64_t begin, end;
};

// The bias of token begin + i without the entries.
template <int tables>
struct Base {
  const float *first, *second;
  float weight, other;

  explicit Base(const Match* match, int64_t begin = 0)
      : first(match[0].table->base + begin), second(match[tables - 1].table->base + begin), weight(match[0].weight),
        other(match[tables - 1].weight) {}

  float operator()(int64_t i) const { return tables == 1 ? weight * first[i] : weight * first[i] + other * second[i]; }
};

// The largest of x; writes x + shift.
float copy_maximum(const float* x, float* out, int64_t n, float shift) {
  float top = -kInfinity;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) {
    top = x[i] > top ? x[i] : top;
    out[i] = x[i] + shift;
  }
  return top;
}

// The tokens of a row that are biased: scores, of which the largest is 0, and biases.
struct Inside {
  float *x, *bias;
  int64_t n;

  // of exp(y - top) and of exp(y - top) x
  struct Sums {
    float top, total, first;
    float log_total() const { return top + std::log(total); }
    float mean() const { return first / total; }
  };

  // y(i): the logarithm of a weight
  template <typename Weight>
  Sums sums_of(Weight y) const {
    float top = -kInfinity, total = 0, first = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) top = y(i) > top ? y(i) : top;
#pragma omp simd reduction(+ : total, first)
    for (int64_t i = 0; i < n; ++i) {
      const float e = exponential(y(i) - top);
      total += e;
      first += e * x[i];
    }
    return {top, total, first};
  }

  Sums before() const {
    return sums_of([this](int64_t i) { return x[i]; });
  }

  Sums sums(float cold) const {
    return sums_of([this, cold](int64_t i) { return x[i] * cold + bias[i]; });
  }

  // The largest T in (0, 1) at which the mean of x under exp(x / T + bias) is no smaller than `least`.
  float temperature(float least) const {
    float low = 1e-6f, high = 1;
    for (int step = 0; step < 20; ++step) {
      const float middle = (low + high) / 2;
      (sums(1 / middle).mean() >= least ? low : high) = middle;
    }
    return low;
  }
};

// One row of scores x, to be written to out. `tables`: how many matches there are.
template <int tables>
struct Row {
  const Match* match;
  const Span* spans;
  int64_t count, width;
  const float* x;
  float* out;

  // visit(its scores, how many, the first) for pieces of the spans
  template <int64_t piece, typename Visit>
  void for_pieces(Visit visit) const {
    for (int64_t s = 0; s < count; ++s)
      for (int64_t begin = spans[s].begin; begin < spans[s].end; begin += piece)
        visit(x + begin, std::min(piece, spans[s].end - begin), begin);
  }

  // visit(begin, end) for every gap
  template <typename Visit>
  void for_gaps(Visit visit) const {
    for (int64_t s = 0; s <= count; ++s) visit(s ? spans[s - 1].end : 0, s < count ? spans[s].begin : width);
  }

  void copy_gaps() const {
    for_gaps([&](int64_t begin, int64_t end) { std::copy(x + begin, x + end, out + begin); });
  }

  // The scores and the bias less `shift`.
  void add(float shift) const {
    copy_gaps();
    for_pieces<kLong>([&](const float* x, int64_t n, int64_t begin) {
      const Base<tables> base(match, begin);
      float* y = out + begin;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = x[i] + (base(i) - shift);
    });
    for (int t = 0; t < tables; ++t) match[t].add_entries(out);
  }

  // The mean of the bias under softmax(x) over the spans.
  float mean() const {
    float top = std::numeric_limits<float>::lowest();  // a row may hold nothing but -inf
    for_pieces<kLong>([&](const float* x, int64_t n, int64_t) { top = std::max(top, maximum(x, n)); });
    double mass = 0, total = 0;
    for_pieces<kLong>([&, top](const float* x, int64_t n, int64_t begin) {
      const Base<tables> base(match, begin);
      float m = 0, t = 0;
#pragma omp simd reduction(+ : m, t)
      for (int64_t i = 0; i < n; ++i) {
        const float e = exponential(x[i] - top);
        m += e;
        t += e * base(i);
      }
      mass += m;
      total += t;
    });
    for (int k = 0; k < tables; ++k)
      match[k].for_contexts([&](const int64_t* ids, const float* values, int64_t n) {
        float t = 0;
#pragma omp simd reduction(+ : t)
        for (int64_t i = 0; i < n; ++i) t += exponential(x[ids[i]] - top) * values[i];
        total += match[k].weight * t;
      });
    return mass > 0 ? total / mass : 0;
  }

  // Only tokens with x - (largest of the row) > limit are biased, and so that the sum of their probabilities stays; the
  // others keep their scores, or are forbidden. `nats`: see `affordable_temperature` of history.py.
  void add_inside(float limit, float nats, bool drop) const {
    static thread_local std::vector<float> largest;  // of each piece
    static thread_local std::vector<int32_t> list;   // the tokens inside
    static thread_local std::vector<float> scratch;  // and what is known of them
    largest.clear();
    list.resize(width + 1);
    copy_gaps();
    float top = std::numeric_limits<float>::lowest();
    for_gaps([&](int64_t begin, int64_t end) { top = std::max(top, maximum(x + begin, end - begin)); });
    for_pieces<kShort>([&](const float* x, int64_t n, int64_t begin) {
      largest.push_back(copy_maximum(x, out + begin, n, drop ? -kInfinity : 0.0f));
      top = std::max(top, largest.back());
    });
    const float* high = largest.data();
    int64_t n = 0;
    for_pieces<kShort>([&](const float* x, int64_t count, int64_t begin) {
      if (!(*high++ - top > limit)) return;
      for (int64_t part = 0; part < count; part += 16) {
        const int64_t end = std::min<int64_t>(part + 16, count);
        if (!(maximum(x + part, end - part) - top > limit)) continue;
        for (int64_t i = part; i < end; ++i) {
          list[n] = static_cast<int32_t>(begin + i);
          n += x[i] - top > limit;
        }
      }
    });
    if (!n) return;
    const int32_t* ids = list.data();
    const Base<tables> base(match);
    for (int64_t i = 0; i < n; ++i) out[ids[i]] = base(ids[i]);  // the bias, to begin with
    for (int k = 0; k < tables; ++k)
      match[k].for_contexts([&](const int64_t* ids, const float* values, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
          if (x[ids[i]] - top > limit) out[ids[i]] += match[k].weight * values[i];
      });
    scratch.resize(2 * n);
    const Inside inside{scratch.data(), scratch.data() + n, n};
    float most = -kInfinity;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, x[ids[i]]);
    for (int64_t i = 0; i < n; ++i) {
      inside.x[i] = x[ids[i]] - most;
      inside.bias[i] = out[ids[i]];
    }
    float cold = 1;  // 1 / T
    const auto before = inside.before();
    auto after = inside.sums(cold);
    if (const float least = before.mean() - nats; after.mean() < least) {
      cold = 1 / inside.temperature(least);
      after = inside.sums(cold);
    }
    const float shift = after.log_total() - before.log_total() - most;
    for (int64_t i = 0; i < n; ++i) out[ids[i]] = inside.x[i] * cold + inside.bias[i] - shift;
  }
};

// NGramBias
struct Bias {
  const Table* tables;  // one or two
  const Span* spans;
  int64_t two, count;  // whether there is a second table; how many spans
};

enum Rule : int64_t { kPlain, kCentred, kInside };

template <int tables>
void process(const Row<tables>& row, Rule rule, float limit, float nats, bool drop) {
  if (rule == kInside)
    row.add_inside(limit, nats, drop);
  else
    row.add(rule == kCentred ? row.mean() : 0.0f);
}

}  // namespace

extern "C" {

// tokens [rows, reach], a row every `stride`. factor [rows] or null.
void add_ngrams(const float* scores, const int64_t* tokens, int64_t stride, const float* factor, const Bias* bias,
                int64_t rule, float limit, float nats, int64_t drop, float* out, int64_t reach, int64_t rows,
                int64_t width, int64_t threads) {
  const Table* tables = bias->tables;
  const Span* spans = bias->spans;
  const int64_t two = bias->two, count = bias->count;
  for_rows(rows, width, threads, [=](int64_t row) {
    const int64_t* end = tokens + row * stride + reach;
    const float weight = factor ? factor[row] : 1.0f;
    const Match found[2] = {match(tables[0], end, weight), match(tables[two], end, weight)};
    const float* x = scores + row * width;
    float* y = out + row * width;
    if (two)
      process(Row<2>{found, spans, count, width, x, y}, Rule(rule), limit, nats, drop);
    else
      process(Row<1>{found, spans, count, width, x, y}, Rule(rule), limit, nats, drop);
  });
}

// In place. tokens [rows, columns], of which the last `generated` [rows] count.
void loop_guard(const int64_t* tokens, const int64_t* generated, float strength, float base, int64_t length, float cap,
                int64_t longest, float* scores, int64_t columns, int64_t rows, int64_t width, int64_t threads) {
  for_rows(rows, width, threads, [=](int64_t row) {
    const int64_t* end = tokens + (row + 1) * columns;
    const int64_t* begin = end - std::clamp<int64_t>(generated[row], 0, columns);
    std::vector<std::pair<int64_t, int64_t>> found;  // a token that would continue a repetition, and of how many tokens
    for (const int64_t* next = begin + 1; next < end; ++next) {
      int64_t n = 0;
      while (n < longest && next - n > begin && next[-n - 1] >= 0 && next[-n - 1] == end[-n - 1]) ++n;
      if (n >= length && *next >= 0 && *next < width) found.emplace_back(*next, n);
    }
    std::sort(found.begin(), found.end());
    for (size_t i = 0; i < found.size(); ++i) {
      const auto [id, n] = found[i];
      if (i + 1 < found.size() && found[i + 1].first == id) continue;  // the longest comes last
      scores[row * width + id] -= std::min(cap, strength * std::pow(base, float(n - length)));
    }
  });
}

// Of methods/suppression.py. tokens [rows, columns >= longest], a row every `stride`, of which the last `generated` [rows]
// count; random [start + 2], powers [longest], keys [contexts + 1], span [contexts + 1, 2], nats [longest - length + 1].
void lower_phrases(const float* scores, const int64_t* tokens, int64_t stride, const int64_t* generated,
                   const uint64_t* random, const uint64_t* powers, const bool* breaks, const int64_t* keys,
                   const int64_t* span, const int64_t* ids, const float* nats, int64_t start, int64_t contexts,
                   int64_t length, int64_t longest, int64_t anchor, float* out, int64_t columns, int64_t rows,
                   int64_t width, int64_t threads) {
  for_rows(rows, width, threads, [=](int64_t row) {
    const float* x = scores + row * width;
    float* y = out + row * width;
    std::copy(x, x + width, y);
    const int64_t* end = tokens + row * stride + columns;
    uint64_t hash = 0;
    for (int64_t n = 1; n <= longest; ++n) {  // the last n symbols of the text
      const bool own = n <= generated[row];
      if (!own && !(anchor && n == generated[row] + 1)) break;
      const int64_t symbol = own ? end[-n] : start;
      if (symbol < 0 || (own && symbol >= start) || breaks[symbol]) break;
      hash += random[symbol] * powers[n - 1];
      if (n < length) continue;
      const int64_t key = static_cast<int64_t>(hash);
      const int64_t* at = std::lower_bound(keys, keys + contexts, key);
      if (*at != key) continue;
      const int64_t* context = span + 2 * (at - keys);
      for (int64_t i = context[0]; i < context[0] + context[1]; ++i) y[ids[i]] = x[ids[i]] - nats[n - length];
    }
  });
}

}  // extern "C"
