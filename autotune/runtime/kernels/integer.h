// The product x W^T + b with narrow weights in integer arithmetic, for processors with VNNI.
//
// VNNI adds to each lane of INT32 the products of four unsigned and four signed bytes: four inputs of one output. Weights
// are made unsigned by an offset, which is taken off again by the sum of the inputs. Inputs are rounded, in spans of 32 or
// 8, to whole multiples of a step: with two digits in base 256, 32639 steps make up the span's largest number, and the
// result is as exact as with inputs of 16 bits; with one digit, 127 steps. Sums within a span are exact, and spans are
// added up in FP32 one after the other, so that a token's result is the same, to the bit, whoever is computed with it.
#pragma once

#include <vector>

#include "linear.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define AUTOTUNE_VNNI 1
#endif

namespace autotune {
namespace {

inline bool has_integers() {
#if defined(AUTOTUNE_VNNI)
  return true;
#else
  return false;
#endif
}

constexpr int kSpans[] = {32, 8};
inline int64_t span_of(int64_t group) { return group % kSpans[0] ? kSpans[1] : kSpans[0]; }

constexpr int64_t kLeastTokens = 8;  // with fewer to round, a further thread does not pay
constexpr int kTogether = 32;  // tokens served by one pass over a block's weights

// Rounded inputs, of 32 tokens after 32 others. The same span of all of them is one stretch of memory. The bytes of a
// span are its high digits, then its low ones; within eight inputs, the even ones come first, as four bits of INT4's
// words do.
struct Rounded {
  int digits;       // 2 or 1
  int64_t tokens;
  int64_t width;    // K
  int64_t span;     // inputs that share a step
  int8_t* bytes;    // [tokens / 32, spans, 32, span * digits]
  float* steps;     // [tokens / 32, spans, 32]
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
};

#if defined(AUTOTUNE_VNNI)

constexpr float kTiny = 1e-30f;  // a span of smaller numbers counts as zeros: its step has no reciprocal

// Rounds token t, x [inputs], which zeros fill up to K.
inline void round_token(const Rounded& to, int64_t t, const float* x, int64_t inputs) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const float most = to.digits == 2 ? 32639.0f : 127.0f;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const int parts = to.span == kSpans[0] ? 2 : 1;
  for (int64_t s = 0; s < to.spans(); ++s) {
    __m512 v[2];
    __m512i largest = _mm512_setzero_si512();
    for (int p = 0; p < parts; ++p) {
      const int64_t k = s * to.span + p * 16;
      const int64_t here = std::clamp<int64_t>(std::min(inputs, (s + 1) * to.span) - k, 0, 16);
      v[p] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << here) - 1), x + k);
      largest = _mm512_max_epu32(largest, _mm512_and_si512(bits<__m512i>(v[p]), magnitude));  // NaN is the largest
    }
    const float most_here = bits<float>(_mm512_reduce_max_epu32(largest));
    const float step = most_here < kTiny ? 0.0f : most_here / most;
    const __m512 rate = _mm512_set1_ps(step == 0.0f ? 0.0f : most / most_here);
    const int64_t index = to.index(t / kTogether * kTogether, s, t % kTogether);
    int8_t* bytes = to.bytes + index * to.span * to.digits;
    const auto keep = [&](__m512i digits, int64_t at) {
      const __m128i ordered = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(digits), order);
      std::memcpy(bytes + at, &ordered, parts == 2 ? 16 : 8);
    };
    __m512i sum = _mm512_setzero_si512();
    for (int p = 0; p < parts; ++p) {
      __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(v[p], rate));
      sum = _mm512_add_epi32(sum, number);
      if (to.digits == 2) {
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
        keep(high, p * 16);
        number = _mm512_sub_epi32(number, _mm512_slli_epi32(high, 8));
      }
      keep(number, (to.digits - 1) * to.span + p * 16);
    }
    const int32_t count = _mm512_reduce_add_epi32(sum);
    to.steps[index] = step;
    to.sums[index] = step * static_cast<float>(count);
    to.counts[index] = -count;
  }
}

// Weights for eight inputs of a block as unsigned bytes, four inputs a lane: first the even ones, then the odd ones.
template <class Format>
struct Bytes;

template <>
struct Bytes<Plain<int8_t>> {
  static constexpr int kOffsetBits = 7;  // 128 is added
  static constexpr bool kZeros = false;
  static inline void decode(const uint8_t* at, __m512i* use) {
    const __m512i low = load<__m512i>(at), high = load<__m512i>(at + 64);
    const __m512i even = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i odd = _mm512_setr_epi32(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
    const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i sign = _mm512_set1_epi8(-128);
    use[0] = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_permutex2var_epi32(low, even, high), lanes), sign);
    use[1] = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_permutex2var_epi32(low, odd, high), lanes), sign);
  }
};

template <>
struct Bytes<Int4> {
  static constexpr int kOffsetBits = 3;  // 8 is added
  static constexpr bool kZeros = true;
  static inline void decode(const uint8_t* at, __m512i* use) {
    const __m512i word = _mm512_xor_si512(load<__m512i>(at), _mm512_set1_epi8(-120));
    const __m512i nibbles = _mm512_set1_epi8(15);
    use[0] = _mm512_and_si512(word, nibbles);
    use[1] = _mm512_and_si512(_mm512_srli_epi32(word, 4), nibbles);
  }
};

// Computes kBlocks blocks for some tokens, one after the other: each word of inputs is read once for all the blocks.
template <class Format, int kDigits, int kSpan, int kBlocks>
void multiply_rounded(const Weights& w, const Rounded& x, int64_t first, int tokens, int64_t block, Floats* total) {
  constexpr int kVectors = kSpan / 4;
  const int64_t spans = x.spans(), per_group = w.group / kSpan;
  const uint8_t* at = w.numbers + block * w.block_bytes;
  const uint8_t* turn = at + w.block_bytes - kAheadBytes;  // what is read next lies behind the other blocks from here on
  std::fill(total, total + tokens * kBlocks, Floats{});
  for (int64_t s = 0; s < spans; ++s) {
    __m512i number[kBlocks][kVectors];
    Floats scale[kBlocks], zero[kBlocks];
    const int64_t ahead = kAheadBytes + (at < turn ? 0 : (kBlocks - 1) * w.block_bytes);
    for (int i = 0; i < kVectors; i += 2, at += Format::kStepBytes)
      for (int b = 0; b < kBlocks; ++b) {
        const uint8_t* from = at + b * w.block_bytes;
        for (int line = 0; line < Format::kStepBytes && !first; line += 64) __builtin_prefetch(from + line + ahead);
        Bytes<Format>::decode(from, number[b] + i);
      }
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t factor = ((block + b) * w.groups() + s / per_group) * kRows;
      scale[b] = w.scales.load(factor);
      if constexpr (Bytes<Format>::kZeros) zero[b] = w.zeros.load(factor);
    }
    const int64_t span_begins = x.index(first, s, 0);
    const auto add = [&](int t, auto count) __attribute__((always_inline)) {
      constexpr int kTokens = count;  // whose chains of sums hide each other's latency
      const int64_t at_span = span_begins + t;
      const int8_t* digits = x.bytes + at_span * kSpan * kDigits;
      __m512i sum[kTokens][kBlocks] = {};
#pragma GCC unroll 2
      for (int d = 0; d < kDigits; ++d) {
        for (int r = 0; r < kTokens; ++r) {
          const __m512i offset = _mm512_slli_epi32(_mm512_set1_epi32(x.counts[at_span + r]), Bytes<Format>::kOffsetBits);
          for (int b = 0; b < kBlocks; ++b) {
            if (d) sum[r][b] = _mm512_slli_epi32(sum[r][b], 8);
            if (d == kDigits - 1) sum[r][b] = _mm512_add_epi32(sum[r][b], offset);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i)
          for (int r = 0; r < kTokens; ++r) {
            const __m512i four = _mm512_set1_epi32(load<int32_t>(digits + (r * kDigits + d) * kSpan + 4 * i));
            for (int b = 0; b < kBlocks; ++b) sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], number[b][i], four);
          }
      }
      for (int r = 0; r < kTokens; ++r)
        for (int b = 0; b < kBlocks; ++b) {
          Floats& here = total[(t + r) * kBlocks + b];
          here += scale[b] * x.steps[at_span + r] * bits<Floats>(_mm512_cvtepi32_ps(sum[r][b]));
          if constexpr (Bytes<Format>::kZeros) here += zero[b] * x.sums[at_span + r];
        }
    };
    int t = 0;
    for (; t + 2 <= tokens; t += 2) add(t, std::integral_constant<int, 2>());
    if (t < tokens) add(t, std::integral_constant<int, 1>());
  }
}

#endif  // AUTOTUNE_VNNI

using MultiplyRounded = void (*)(const Weights&, const Rounded&, int64_t first, int tokens, int64_t block, Floats* total);

// The integer arithmetic of a format by digits, span and blocks at once; null where there is none.
#if defined(AUTOTUNE_VNNI)
template <class Format, int kDigits, int kSpan>
constexpr MultiplyRounded by_blocks[] = {multiply_rounded<Format, kDigits, kSpan, 1>,
                                         multiply_rounded<Format, kDigits, kSpan, 2>};
template <class Format>
MultiplyRounded rounded_kernel(const Rounded& x, bool two) {
  const bool wide = x.span == kSpans[0];
  if (x.digits == 2) return (wide ? by_blocks<Format, 2, kSpans[0]> : by_blocks<Format, 2, kSpans[1]>)[two];
  return (wide ? by_blocks<Format, 1, kSpans[0]> : by_blocks<Format, 1, kSpans[1]>)[two];
}
#else
inline void round_token(const Rounded&, int64_t, const float*, int64_t) {}
template <class Format>
MultiplyRounded rounded_kernel(const Rounded&, bool) {
  return nullptr;
}
#endif

constexpr int kFewest = 6;        // for fewer tokens, memory is the limit, which one stream of weights reads faster

// Computes the blocks [begin, end) of outputs y [tokens, rows] for all tokens.
template <class Format>
void multiply_blocks_rounded(const Weights& w, const Rounded& x, const float* bias, float* y, int64_t begin,
                             int64_t end) {
  Floats out[2 * kTogether];
  for (int64_t block = begin; block < end;) {
    const int together = x.tokens < kFewest ? 1 : std::min<int64_t>(2, end - block);
    const MultiplyRounded multiply = rounded_kernel<Format>(x, together == 2);
    for (int64_t first = 0; first < x.tokens; first += kTogether) {
      const int here = static_cast<int>(x.together(first));
      multiply(w, x, first, here, block, out);
      for (int t = 0; t < here; ++t)
        for (int b = 0; b < together; ++b)
          put(w, (block + b) * kRows, out[t * together + b], bias, y + (first + t) * w.rows);
    }
    block += together;
  }
}

using MultiplyBlocks = void (*)(const Weights&, const Rounded&, const float* bias, float* y, int64_t begin, int64_t end);

// The digits to multiply with: those wanted, or none (FP32) where the processor has no VNNI.
inline int digits_here(int64_t wanted) {
  STD_TORCH_CHECK(wanted >= 0 && wanted <= 2, "digits is 0 (FP32), 1 (inputs of 8 bits) or 2 (of 16 bits), not ", wanted);
  STD_TORCH_CHECK(wanted != 1 || has_integers(), "this processor has no instructions for products in INT8");
  return has_integers() ? static_cast<int>(wanted) : 0;
}

// Rounds x [tokens, inputs] for a layer, in memory that the calling thread keeps from call to call.
inline Rounded round_all(const Weights& w, const float* x, int64_t tokens, int64_t inputs, int digits) {
  static thread_local std::vector<float> scratch;
  if (const size_t needed = Rounded::floats(w, tokens, digits); scratch.size() < needed) scratch.resize(needed);
  const Rounded rounded = Rounded::over(scratch.data(), w, tokens, digits);
  torch::stable::parallel_for(0, tokens, kLeastTokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) round_token(rounded, t, x + t * inputs, inputs);
  });
  return rounded;
}

inline void multiply_in_integers(MultiplyBlocks multiply, const Weights& w, const Rounded& x, const float* bias, float* y) {
  const int64_t grain = std::max<int64_t>(1, kLeastTaskBytes / w.block_bytes / x.tokens);
  torch::stable::parallel_for(0, w.blocks(), grain, [&](int64_t begin, int64_t end) {
    multiply(w, x, bias, y, begin, end);
  });
}

}  // namespace
}  // namespace autotune
