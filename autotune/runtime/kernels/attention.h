// Attention of one new token over a preallocated key-value cache. It reads only the filled slots.
//
// The slots are cut into spans (as in flash-decoding), so that all threads have work at batch 1. One pass over a key
// head serves the query heads that share it. Every span keeps its own maximum and sum, which are merged at the end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "tensors.h"

namespace autotune {
namespace {

constexpr int kSpan = 64;         // slots in a span
constexpr int kAheadSlots = 32;   // prefetch distance in slots
constexpr int kMostPass = 4;      // query heads served by one pass over a key head
constexpr float kLow = -std::numeric_limits<float>::infinity();

struct Cache {
  const uint8_t* at;
  int64_t batch, head, slot;  // strides in numbers
};

struct Mask {
  const uint8_t* at = nullptr;
  bool additive = false;  // true: FP32 to add; false: one byte per slot, attend or not
  int64_t batch = 0, head = 0;
};

struct Problem {
  const float* query;  // [B, H, D]
  Cache keys, values;
  Mask mask;
  int64_t heads, shared, depth, length;  // shared: query heads per key head
  float scale;
};

// The result of one head over one span: softmax numerators times values, the sum of the numerators, the largest score.
struct Partial {
  float* weighted;  // [D]
  float *total, *most;
};

inline float admitted(const Mask& mask, int64_t batch, int64_t head, int64_t slot) {
  const int64_t i = batch * mask.batch + head * mask.head + slot;
  if (mask.additive) return reinterpret_cast<const float*>(mask.at)[i];
  return mask.at[i] ? 0.0f : kLow;
}

// Prefetching is safe at any address, even after the last slot.
template <class Number>
inline void prefetch(const Number* at, int64_t count) {
  for (int64_t byte = 0; byte < count * int64_t{sizeof(Number)}; byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(at) + byte);
}

// Computes the scores of up to kWidth slots from begin + i on, for all heads of the pass: in the lanes of one vector for each
// head, whose dot products are summed together. A key is read and widened once.
template <class Number, int kHeads, class Row>
void score(const Problem& p, const float* query, int64_t begin, int64_t end, int64_t i, Row row, float (*out)[kSpan]) {
  const int64_t depth = p.depth, first = begin + i;
  const int64_t whole = depth / kWidth * kWidth;
  Floats dot[kHeads][kWidth];
  float rest[kHeads][kWidth] = {};
  for (int lane = 0; lane < kWidth; ++lane) {
    const Number* key = row(std::min(first + lane, end - 1));
    prefetch(row(first + lane + kAheadSlots), depth);
    Floats part[kHeads] = {};
    for (int64_t d = 0; d < whole; d += kWidth) {
      const Floats k = widen(key + d);
      for (int h = 0; h < kHeads; ++h) part[h] += k * load<Floats>(query + h * depth + d);
    }
    for (int64_t d = whole; d < depth; ++d) {
      const float k = widen_one(key + d);
      for (int h = 0; h < kHeads; ++h) rest[h][lane] += k * query[h * depth + d];
    }
    for (int h = 0; h < kHeads; ++h) dot[h][lane] = part[h];
  }
  for (int h = 0; h < kHeads; ++h) store(out[h] + i, p.scale * (sums(dot[h]) + load<Floats>(rest[h])));
}

// Computes `kChunks` vectors of the weighted sum of values, for all heads of the pass.
template <class Number, int kHeads, int kChunks, class Row>
void weigh(const float (*weight)[kSpan], int64_t d, int64_t begin, int64_t count, Row row, const Partial* out) {
  Floats weighted[kHeads][kChunks] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Number* value = row(begin + i) + d;
    prefetch(row(begin + i + kAheadSlots) + d, kChunks * kWidth);
    for (int c = 0; c < kChunks; ++c) {
      const Floats v = widen(value + c * kWidth);
      for (int h = 0; h < kHeads; ++h) weighted[h][c] += v * weight[h][i];
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int c = 0; c < kChunks; ++c) store(out[h].weighted + d + c * kWidth, weighted[h][c]);
}

enum class Span { kOpen, kClosed, kMixed };  // the mask admits every slot, none, or some

inline Span kind_of(const Mask& mask, int64_t batch, int64_t first_head, int heads, int64_t begin, int64_t count) {
  if (!mask.at) return Span::kOpen;
  if (mask.additive || (mask.head && heads > 1)) return Span::kMixed;
  const uint8_t* row = mask.at + batch * mask.batch + first_head * mask.head + begin;
  int64_t admitted = 0;
  for (int64_t i = 0; i < count; ++i) admitted += row[i] != 0;
  return admitted == count ? Span::kOpen : admitted ? Span::kMixed : Span::kClosed;
}

template <class Number, int kHeads>
void attend(const Problem& p, int64_t batch, int64_t first_head, int64_t begin, int64_t end, const Partial* out) {
  constexpr int kChunks = kWidth == 16 ? 4 : 2;  // few enough that the sums of four heads stay in registers
  alignas(64) float weight[kHeads][kSpan];
  const int64_t key_head = first_head / p.shared;
  const auto row_of = [&](const Cache& c) {
    const Number* start = reinterpret_cast<const Number*>(c.at) + batch * c.batch + key_head * c.head;
    return [start, stride = c.slot](int64_t slot) { return start + slot * stride; };
  };
  const auto key_row = row_of(p.keys), value_row = row_of(p.values);
  const float* query = p.query + (batch * p.heads + first_head) * p.depth;
  const int64_t whole = p.depth / kWidth * kWidth, count = end - begin;
  const Span kind = kind_of(p.mask, batch, first_head % p.heads, kHeads, begin, count);
  if (kind == Span::kClosed) {  // for example slots before a sliding window, which are not read
    for (int h = 0; h < kHeads; ++h) {
      *out[h].most = kLow;
      *out[h].total = 0;
      std::fill(out[h].weighted, out[h].weighted + p.depth, 0.0f);
    }
    return;
  }

  for (int64_t i = 0; i < count; i += kWidth) score<Number, kHeads>(p, query, begin, end, i, key_row, weight);
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t i = 0; kind == Span::kMixed && i < count; ++i) weight[h][i] += admitted(p.mask, batch, first_head + h, begin + i);
    for (int64_t i = count; i % kWidth; ++i) weight[h][i] = kLow;
    Floats most = spread(kLow), total = {};
    for (int64_t i = 0; i < count; i += kWidth) most = larger(most, load<Floats>(weight[h] + i));
    float top = kLow;
    for (int lane = 0; lane < kWidth; ++lane) top = std::max(top, most[lane]);
    const float base = top == kLow ? 0.0f : top;  // 0 if the mask admits nothing in this span
    for (int64_t i = 0; i < count; i += kWidth) {
      const Floats score = load<Floats>(weight[h] + i);
      const Floats e = score > kLow ? exp_negative(score - base) : Floats{};
      store(weight[h] + i, e);
      total += e;
    }
    *out[h].most = top;
    *out[h].total = sum(total);
  }
  int64_t d = 0;
  for (; d + kChunks * kWidth <= whole; d += kChunks * kWidth)
    weigh<Number, kHeads, kChunks>(weight, d, begin, count, value_row, out);
  for (; d < whole; d += kWidth) weigh<Number, kHeads, 1>(weight, d, begin, count, value_row, out);
  for (; d < p.depth; ++d)
    for (int h = 0; h < kHeads; ++h) {
      float weighted = 0;
      for (int64_t i = 0; i < count; ++i) weighted += widen_one(value_row(begin + i) + d) * weight[h][i];
      out[h].weighted[d] = weighted;
    }
}

template <class Number>
void attend_some(const Problem& p, int64_t batch, int64_t head, int64_t begin, int64_t end, int heads, const Partial* out) {
  switch (heads) {
    case 1: return attend<Number, 1>(p, batch, head, begin, end, out);
    case 2: return attend<Number, 2>(p, batch, head, begin, end, out);
    case 3: return attend<Number, 3>(p, batch, head, begin, end, out);
    default: return attend<Number, 4>(p, batch, head, begin, end, out);
  }
}

// The number of slots up to the last one that any head of any sequence may attend to. Later, empty slots are not read.
inline int64_t reach(const Mask& mask, int64_t batch, int64_t heads, int64_t length) {
  constexpr int64_t kSkip = 64;
  static constexpr uint8_t kNone[kSkip] = {};
  int64_t furthest = 0;
  for (int64_t b = 0; b < (mask.batch ? batch : 1); ++b)
    for (int64_t h = 0; h < (mask.head ? heads : 1); ++h) {
      const uint8_t* row = mask.at + b * mask.batch + h * mask.head;
      int64_t slot = length;
      while (!mask.additive && slot - furthest >= kSkip && !std::memcmp(row + slot - kSkip, kNone, kSkip)) slot -= kSkip;
      while (slot > furthest && admitted(mask, b, h, slot - 1) == kLow) --slot;
      furthest = std::max(furthest, slot);
    }
  return furthest;
}

// A problem cut into tasks that any thread can take. Each task is one span of one group of query heads. `merge` joins
// the spans.
struct Attention {
  using Run = void (*)(const Problem&, int64_t, int64_t, int64_t, int64_t, int, const Partial*);

  const Problem& p;
  int64_t batch, key_heads;
  Run run;
  float* partials;  // memory of partial_floats() numbers

  int64_t passes() const { return (p.shared + kMostPass - 1) / kMostPass; }  // passes over one key head
  int64_t spans() const { return std::max<int64_t>(1, (p.length + kSpan - 1) / kSpan); }
  int64_t tasks() const { return batch * key_heads * passes() * spans(); }
  int64_t partial_floats() const { return batch * p.heads * spans() * (p.depth + 2); }

  Partial partial(int64_t head, int64_t span) const {  // head: number in the whole batch
    float* at = partials + (head * spans() + span) * (p.depth + 2);
    return {at + 2, at, at + 1};
  }

  void work(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / spans(), span = i % spans(), pass = group % passes(), key_head = group / passes();
      const int64_t first = key_head * p.shared + p.shared * pass / passes();
      const int64_t last = key_head * p.shared + p.shared * (pass + 1) / passes();
      Partial out[kMostPass];
      for (int64_t h = first; h < last; ++h) out[h - first] = partial(h, span);
      run(p, first / p.heads, first % p.heads, span * kSpan, std::min(p.length, (span + 1) * kSpan),
          static_cast<int>(last - first), out);
    }
  }

  // Merges the heads [begin, end) of the whole batch into y [B, H, D].
  void merge(int64_t begin, int64_t end, float* y) const {
    for (int64_t h = begin; h < end; ++h) {
      float* target = y + h * p.depth;
      float most = kLow, total = 0;
      for (int64_t s = 0; s < spans(); ++s) most = std::max(most, *partial(h, s).most);
      std::fill(target, target + p.depth, 0.0f);
      if (most == kLow) continue;  // no admitted slot gives zeros, as in torch's fused attention
      for (int64_t s = 0; s < spans(); ++s) total += *partial(h, s).total * std::exp(*partial(h, s).most - most);
      for (int64_t s = 0; s < spans(); ++s) {
        const float share = std::exp(*partial(h, s).most - most) / total;
        for (int64_t d = 0; d < p.depth; ++d) target[d] += share * partial(h, s).weighted[d];
      }
    }
  }
};

inline Attention::Run attend_over(ScalarType type) {
  return type == ScalarType::Float ? attend_some<float> : type == ScalarType::Half ? attend_some<Half> : attend_some<Bf16>;
}

}  // namespace
}  // namespace autotune
