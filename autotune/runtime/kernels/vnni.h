// Products in integers with VNNI: four unsigned bytes of weights by four signed bytes of inputs in each lane.
//
// Weights are made unsigned by an offset, which is taken off again by the sum of the inputs. Inputs of 16 bits are two
// digits in base 256. The bytes of a span are its high digits, then its low ones; within eight inputs, the even ones come
// first, as four bits of INT4's words do.
#pragma once

#include "rounded.h"

namespace autotune {
namespace {

constexpr int least_digits_of(int) { return 1; }
constexpr int kMostBlocks = 2;  // computed at once

// Rounds token t, x [inputs], which zeros fill up to K.
void round(const Rounded& to, int64_t t, const float* x, int64_t inputs) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
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
    const __m512 rate = _mm512_set1_ps(to.rate(most_here));
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
    to.keep(index, to.step(most_here), _mm512_reduce_add_epi32(sum));
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

template <>
struct Bytes<Int6> {
  static constexpr int kOffsetBits = 5;  // 32 is added
  static constexpr bool kZeros = false;
  static inline void decode(const uint8_t* at, __m512i* use) {
    const __m512i half = load<__m512i>(at), byte = _mm512_cvtepu8_epi16(load<__m256i>(at + Int6::kWordBytes));
    const __m512i upper = _mm512_set1_epi16(0x3f00), sign = _mm512_set1_epi8(32);
    const __m512i second = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(half, 2), _mm512_set1_epi16(0x3c)),
                                           _mm512_and_si512(byte, _mm512_set1_epi16(3)));
    const __m512i even = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(half, 2), upper), _mm512_srli_epi16(byte, 2));
    const __m512i odd = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(half, 4), upper), second);
    use[0] = _mm512_xor_si512(even, sign);
    use[1] = _mm512_xor_si512(odd, sign);
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

template <class Format, int kDigits, int kSpan>
constexpr MultiplyRounded by_blocks[] = {multiply_rounded<Format, kDigits, kSpan, 1>,
                                         multiply_rounded<Format, kDigits, kSpan, 2>};

template <class Format>
MultiplyRounded rounded_kernel(const Rounded& x, bool two) {
  const bool wide = x.span == kSpans[0];
  if (x.digits == 2) return (wide ? by_blocks<Format, 2, kSpans[0]> : by_blocks<Format, 2, kSpans[1]>)[two];
  return (wide ? by_blocks<Format, 1, kSpans[0]> : by_blocks<Format, 1, kSpans[1]>)[two];
}

}  // namespace
}  // namespace autotune
