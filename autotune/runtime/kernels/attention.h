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

// Reads the rows of a task in order: its keys, its values, then the keys of the task after it. A row is prefetched
// `kAheadSlots` before it is read, so that memory is busy while scores become weights, and nothing is read in vain.
template <class Number>
struct Rows {
  const Number *keys, *values, *next;  // next: null after a thread's last task
  int64_t key_step, value_step, count, next_count;

  const Number* row(int64_t number) const {
    if (number < count) return keys + number * key_step;
    if ((number -= count) < count) return values + number * value_step;
    return next && (number -= count) < next_count ? next + number * key_step : nullptr;
  }
  void prefetch_after(int64_t number, int64_t from, int64_t numbers) const {
    const char* at = reinterpret_cast<const char*>(row(number + kAheadSlots));
    if (!at) return;
    for (int64_t byte = from * int64_t{sizeof(Number)}; byte < (from + numbers) * int64_t{sizeof(Number)}; byte += 64)
      __builtin_prefetch(at + byte, 0, 2);  // into the L2 cache: 1.25 times as fast as into L1, whose misses are few
  }
};

// Computes the scores of up to kWidth slots from the task's slot i on, for all heads of the pass: in the lanes of one
// vector for each head, whose dot products are summed together. A key is read and widened once. `kDepth` is the depth if
// it is known to the compiler, which then keeps the queries in registers, else 0.
template <class Number, int kHeads, int kDepth>
void score(const Problem& p, const float* query, int64_t i, const Rows<Number>& rows, float (*out)[kSpan]) {
  const int64_t depth = kDepth ? kDepth : p.depth, whole = depth / kWidth * kWidth;
  Floats dot[kHeads][kWidth];
  float rest[kHeads][kWidth] = {};
  for (int lane = 0; lane < kWidth; ++lane) {
    const int64_t slot = std::min(i + lane, rows.count - 1);
    const Number* key = rows.keys + slot * rows.key_step;
    rows.prefetch_after(slot, 0, depth);
    Floats part[kHeads] = {};
#pragma GCC unroll 16
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
template <class Number, int kHeads, int kChunks>
void weigh(const float (*weight)[kSpan], int64_t d, const Rows<Number>& rows, const Partial* out) {
  Floats weighted[kHeads][kChunks] = {};
  for (int64_t i = 0; i < rows.count; ++i) {
    const Number* value = rows.values + i * rows.value_step + d;
    rows.prefetch_after(rows.count + i, d, kChunks * kWidth);
    for (int c = 0; c < kChunks; ++c) {
      const Floats v = widen(value + c * kWidth);
      for (int h = 0; h < kHeads; ++h) weighted[h][c] += v * weight[h][i];
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int c = 0; c < kChunks; ++c) store(out[h].weighted + d + c * kWidth, weighted[h][c]);
}

// What a thread computes without a pause: some query heads that share a key head, over the slots [begin, end).
struct Task {
  int64_t batch, first_head, begin, end;
  int heads;
};

struct Admitted {
  int64_t slots;   // of a task: no later one is admitted
  bool all;        // whether the mask admits each of these
};

inline Admitted admitted_of(const Problem& p, const Task& task) {
  const int64_t count = task.end - task.begin;
  const Mask& mask = p.mask;
  if (!mask.at) return {count, true};
  if (mask.additive || (mask.head && task.heads > 1)) return {count, false};
  const uint8_t* row = mask.at + task.batch * mask.batch + task.first_head * mask.head + task.begin;
  int64_t admitted = 0, last = 0;
  for (int64_t i = 0; i < count; ++i) {
    admitted += row[i] != 0;
    last = row[i] ? i + 1 : last;
  }
  return {last, admitted == last};
}

template <class Number, int kHeads, int kDepth>
void attend_over_span(const Problem& p, const Task& task, const Task* next, const Partial* out) {
  constexpr int kChunks = kWidth == 16 ? 4 : 2;  // few enough that the sums of four heads stay in registers
  alignas(64) float weight[kHeads][kSpan];
  const auto start_of = [&](const Cache& c, const Task& t) {
    return reinterpret_cast<const Number*>(c.at) + t.batch * c.batch + t.first_head / p.shared * c.head + t.begin * c.slot;
  };
  const Admitted admits = admitted_of(p, task);
  const int64_t depth = kDepth ? kDepth : p.depth, whole = depth / kWidth * kWidth, count = admits.slots;
  if (!count) {  // for example slots before a sliding window, which are not read
    for (int h = 0; h < kHeads; ++h) {
      *out[h].most = kLow;
      *out[h].total = 0;
      std::fill(out[h].weighted, out[h].weighted + depth, 0.0f);
    }
    return;
  }
  const Rows<Number> rows{start_of(p.keys, task), start_of(p.values, task), next ? start_of(p.keys, *next) : nullptr,
                          p.keys.slot, p.values.slot, count, next ? next->end - next->begin : 0};
  const float* query = p.query + (task.batch * p.heads + task.first_head) * depth;

  for (int64_t i = 0; i < count; i += kWidth) score<Number, kHeads, kDepth>(p, query, i, rows, weight);
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t i = 0; !admits.all && i < count; ++i)
      weight[h][i] += admitted(p.mask, task.batch, task.first_head + h, task.begin + i);
    for (int64_t i = count; i % kWidth; ++i) weight[h][i] = kLow;
    Floats most = spread(kLow), total = {};
    for (int64_t i = 0; i < count; i += kWidth) most = larger(most, load<Floats>(weight[h] + i));
    const float top = largest(most);
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
    weigh<Number, kHeads, kChunks>(weight, d, rows, out);
  for (; d < whole; d += kWidth) weigh<Number, kHeads, 1>(weight, d, rows, out);
  for (; d < depth; ++d)
    for (int h = 0; h < kHeads; ++h) {
      float weighted = 0;
      for (int64_t i = 0; i < count; ++i) weighted += widen_one(rows.values + i * rows.value_step + d) * weight[h][i];
      out[h].weighted[d] = weighted;
    }
}

template <class Number, int kHeads>
void attend(const Problem& p, const Task& task, const Task* next, const Partial* out) {
  switch (p.depth) {
    case 64: return attend_over_span<Number, kHeads, 64>(p, task, next, out);
    case 128: return attend_over_span<Number, kHeads, 128>(p, task, next, out);
    default: return attend_over_span<Number, kHeads, 0>(p, task, next, out);
  }
}

template <class Number>
void attend_some(const Problem& p, const Task& task, const Task* next, const Partial* out) {
  switch (task.heads) {
    case 1: return attend<Number, 1>(p, task, next, out);
    case 2: return attend<Number, 2>(p, task, next, out);
    case 3: return attend<Number, 3>(p, task, next, out);
    default: return attend<Number, 4>(p, task, next, out);
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
  using Run = void (*)(const Problem&, const Task&, const Task* next, const Partial*);

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

  Task task(int64_t i) const {
    const int64_t group = i / spans(), span = i % spans(), pass = group % passes(), key_head = group / passes();
    const int64_t first = key_head * p.shared + p.shared * pass / passes();
    const int64_t last = key_head * p.shared + p.shared * (pass + 1) / passes();
    return {first / p.heads, first % p.heads, span * kSpan, std::min(p.length, (span + 1) * kSpan),
            static_cast<int>(last - first)};
  }

  void work(int64_t begin, int64_t end) const {
    Task here = begin < end ? task(begin) : Task{};
    for (int64_t i = begin; i < end; ++i) {
      const Task next = i + 1 < end ? task(i + 1) : Task{};
      Partial out[kMostPass];
      for (int h = 0; h < here.heads; ++h) out[h] = partial(here.batch * p.heads + here.first_head + h, i % spans());
      run(p, here, i + 1 < end ? &next : nullptr, out);
      here = next;
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
      for (int64_t s = 0; s < spans(); ++s) {
        float& share = *partial(h, s).most;  // from here on
        share = std::exp(share - most);
        total += *partial(h, s).total * share;
      }
      for (int64_t s = 0; s < spans(); ++s) {
        const float share = *partial(h, s).most / total;
        const float* weighted = partial(h, s).weighted;
        for (int64_t d = 0; d < p.depth; ++d) target[d] += share * weighted[d];
      }
    }
  }
};

inline Attention::Run attend_over(ScalarType type) {
  return type == ScalarType::Float ? attend_some<float> : type == ScalarType::Half ? attend_some<Half> : attend_some<Bf16>;
}

}  // namespace
}  // namespace autotune
