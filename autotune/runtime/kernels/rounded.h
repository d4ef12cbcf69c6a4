// Inputs rounded to integers, for products with narrow weights in integer arithmetic.
//
// Inputs are rounded, in spans of 32 or 8, to whole multiples of a step: with two digits in base 256, 32639 steps make up
// the span's largest number, and the result is as exact as with inputs of 16 bits; with one digit, 127 steps. Sums within
// a span are exact, and spans are added up in FP32 one after the other, so that a token's result is the same, to the bit,
// whoever is computed with it.
#pragma once

#include "linear.h"

namespace autotune {

constexpr int kSpans[] = {32, 8};
inline int64_t span_of(int64_t group) { return group % kSpans[0] ? kSpans[1] : kSpans[0]; }

constexpr int kTogether = 64;  // tokens served by one pass over a block's weights
constexpr int kMostSteps[] = {0, 127, 32639};  // by digits: what a span's largest number is rounded to
constexpr float kTiny = 1e-30f;  // a span of smaller numbers counts as zeros: its step has no reciprocal

// Rounded inputs, of 64 tokens after 64 others. The same span of all of them is one stretch of memory. The order within a
// span is the one that the processor's products need.
struct Rounded {
  int digits;       // 2 or 1
  int64_t tokens;
  int64_t width;    // K
  int64_t span;     // inputs that share a step
  int8_t* bytes;    // [tokens / 64, spans, 64, span * digits]
  float* steps;     // [tokens / 64, spans, 64]
  float* sums;      // the same shape: the sums of the inputs as rounded
  int32_t* counts;  // the same in steps, negative
  int64_t spans() const { return width / span; }

  int64_t together(int64_t first) const { return std::min<int64_t>(kTogether, tokens - first); }
  int64_t index(int64_t first, int64_t s, int64_t t) const { return first * spans() + s * together(first) + t; }

  static int64_t floats(const Weights& w, int64_t tokens, int digits) {  // the memory that they need
    return tokens * (w.inputs / span_of(w.group) * 3 + (w.inputs * digits + 3) / 4);
  }
  static Rounded over(float* memory, const Weights& w, int64_t tokens, int digits) {
    Rounded r{digits, tokens, w.inputs, span_of(w.group), nullptr, memory, nullptr, nullptr};
    r.sums = r.steps + tokens * r.spans();
    r.counts = reinterpret_cast<int32_t*>(r.sums + tokens * r.spans());
    r.bytes = reinterpret_cast<int8_t*>(r.counts + tokens * r.spans());
    return r;
  }

  // Keeps what belongs to the span at `index`: `largest` of its numbers makes up `most` steps, `count` is their sum.
  float step(float largest) const { return largest < kTiny ? 0.0f : largest / kMostSteps[digits]; }
  float rate(float largest) const { return largest < kTiny ? 0.0f : kMostSteps[digits] / largest; }
  void keep(int64_t index, float step, int32_t count) const {
    steps[index] = step;
    sums[index] = step * static_cast<float>(count);
    counts[index] = -count;
  }
};

// Computes some tokens' outputs of one or two blocks: [tokens, blocks, strips] vectors.
using MultiplyRounded = void (*)(const Weights&, const Rounded&, int64_t first, int tokens, int64_t block, Floats* total);

}  // namespace autotune
