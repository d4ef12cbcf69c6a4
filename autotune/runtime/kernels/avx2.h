// Products in integers with AVX2.
//
// Inputs of 16 bits are multiplied in pairs: two weights of 16 bits by two inputs in each lane of 32 bits, twice FP32's
// rate. A pair is inputs j and j + 4 of eight, for all formats: those of INT4's and INT6's words lie in the two lanes of
// 16 bits there. A product of two pairs is at most 2 * 32639 * 128, and a span's sum 16 of these, less than 2^31.
//
// Inputs of 8 bits are multiplied in fours: four weights of INT4 as unsigned bytes, which an offset of 8 makes them, by
// four inputs: first the even ones of eight, then the odd ones. A lane of 16 bits holds a span's sum, eight times two
// products of at most 15 * 127. The products of wider weights would not fit. The offset is made up for in the zeros.
#pragma once

#include "rounded.h"

namespace autotune {
namespace {

constexpr int least_digits_of(int bits) { return bits == 4 ? 1 : 2; }
constexpr int kMostBlocks = 1;  // computed at once
constexpr int kTile = 4;  // tokens whose sums stay in registers

// Keeps a vector in a register, as it is at this point. GCC would load weights again for each token, and add up products
// in the end, out of memory.
inline void stay(__m256i& v) { asm("" : "+x"(v)); }

inline int32_t largest_lane(__m256i v) {  // as unsigned numbers
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0b01001110));
  return _mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0b10110001)));
}

inline int32_t sum_of_lanes(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10110001)));
}

// Rounds token t, x [inputs], which zeros fill up to K.
template <int kSpan>
void round_spans(const Rounded& to, int64_t t, const float* x, int64_t inputs) {
  constexpr int kParts = kSpan / kWidth;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m128i even_first = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
  const int64_t first = t / kTogether * kTogether, spans = to.width / kSpan, together = to.together(first);
  int64_t index = first * spans + t - first;  // as `to.index` has it, without divisions
  for (int64_t s = 0; s < spans; ++s, index += together) {
    const float* from = x + s * kSpan;
    float padded[kSpan] = {};
    if (const int64_t here = inputs - s * kSpan; here < kSpan) {
      std::copy_n(from, std::max<int64_t>(here, 0), padded);
      from = padded;
    }
    __m256 v[kParts];
    __m256i largest = _mm256_setzero_si256();
    for (int p = 0; p < kParts; ++p) {
      v[p] = _mm256_loadu_ps(from + p * kWidth);
      largest = _mm256_max_epu32(largest, _mm256_castps_si256(_mm256_and_ps(v[p], magnitude)));  // NaN is the largest
    }
    const float most = bits<float>(largest_lane(largest));
    const __m256 rate = _mm256_set1_ps(to.rate(most));
    int8_t* bytes = to.bytes + index * kSpan * to.digits;
    __m256i sum = _mm256_setzero_si256();
    for (int p = 0; p < kParts; ++p) {
      const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(v[p], rate));
      sum = _mm256_add_epi32(sum, number);
      const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(number), _mm256_extracti128_si256(number, 1));
      if (to.digits == 2)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + p * 2 * kWidth),
                         _mm_unpacklo_epi16(half, _mm_unpackhi_epi64(half, half)));
      else
        _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + p * kWidth),
                         _mm_shuffle_epi8(_mm_packs_epi16(half, half), even_first));
    }
    to.keep(index, to.step(most), sum_of_lanes(sum));
  }
}

void round(const Rounded& to, int64_t t, const float* x, int64_t inputs) {
  (to.span == kSpans[0] ? round_spans<kSpans[0]> : round_spans<kSpans[1]>)(to, t, x, inputs);
}

// Units of weights that a lane multiplies by as many inputs, several for eight inputs of a block: unit j of its first
// eight rows and of the other eight.
template <class Format, int kDigits>
struct Unit;

// Pairs of 16 bits.
struct Pair {
  static constexpr int kUnits = kStep / 2, kOffset = 0;  // what is added to each weight
  static __m256i add(__m256i sum, __m256i number, __m256i inputs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(number, inputs));
  }
  static __m256i whole(__m256i sum) { return sum; }
};

template <>
struct Unit<Plain<int8_t>, 2> : Pair {
  static constexpr bool kZeros = false;
  static void decode(const uint8_t* at, int j, __m256i* use) {
    const __m128i a = load<__m128i>(at + j * kRows), b = load<__m128i>(at + (j + kUnits) * kRows);
    use[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
    use[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
  }
};

template <>
struct Unit<Int4, 2> : Pair {
  static constexpr bool kZeros = true;
  static void decode(const uint8_t* at, int j, __m256i* use) {
    for (int v = 0; v < kStrips; ++v)
      use[v] = _mm256_srai_epi16(_mm256_slli_epi16(load<__m256i>(at + v * 32), 12 - 4 * j), 12);
  }
};

template <>
struct Unit<Int6, 2> : Pair {
  static constexpr bool kZeros = false;
  static void decode(const uint8_t* at, int j, __m256i* use) {
    for (int v = 0; v < kStrips; ++v) {
      const __m256i half = load<__m256i>(at + v * 32);
      const __m256i byte = _mm256_cvtepi8_epi16(load<__m128i>(at + Int6::kWordBytes + v * 16));
      switch (j) {
        case 0: use[v] = _mm256_srai_epi16(byte, 2); break;
        case 1:
          use[v] = _mm256_or_si256(_mm256_srai_epi16(_mm256_slli_epi16(half, 12), 10),
                                   _mm256_and_si256(byte, _mm256_set1_epi16(3)));
          break;
        case 2: use[v] = _mm256_srai_epi16(half, 10); break;
        default: use[v] = _mm256_srai_epi16(_mm256_slli_epi16(half, 6), 10);
      }
    }
  }
};

// Fours of bytes.
template <>
struct Unit<Int4, 1> {
  static constexpr bool kZeros = true;
  static constexpr int kUnits = kStep / 4, kOffset = 8;
  static void decode(const uint8_t* at, int j, __m256i* use) {
    for (int v = 0; v < kStrips; ++v) {
      const __m256i word = _mm256_xor_si256(load<__m256i>(at + v * 32), _mm256_set1_epi8(-120));
      use[v] = _mm256_and_si256(_mm256_srli_epi32(word, 4 * j), _mm256_set1_epi8(15));
    }
  }
  static __m256i add(__m256i sum, __m256i number, __m256i inputs) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(number, inputs));
  }
  static __m256i whole(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

// One span of a block: its scales and zeros, and of the first token that is computed its inputs and their factors.
struct Slice {
  Floats scale[kStrips], zero[kStrips];
  const int8_t* inputs;  // [tokens, span * digits]
  const float *steps, *sums;
};

// Calls use(0) to use(kCount - 1) with constants. GCC keeps arrays in memory if it sees their loops unrolled too late.
template <int kCount, class Use>
inline __attribute__((always_inline)) void each(Use use) {
  if constexpr (kCount > 0) {
    each<kCount - 1>(use);
    use(std::integral_constant<int, kCount - 1>());
  }
}

// Adds a span's products for kTokens tokens from t on to their totals. Its weights are as stored, or decoded already.
template <class Format, int kDigits, int kSpan, int kTokens, bool kDecoded>
inline __attribute__((always_inline)) void add_tile(const Slice& span, const uint8_t* weights, int64_t t, Floats* total) {
  using U = Unit<Format, kDigits>;
  constexpr int kBytes = kSpan * kDigits;  // of a token's inputs
  __m256i sum[kTokens][kStrips];
  each<kTokens>([&](auto r) { each<kStrips>([&](auto v) { sum[r][v] = _mm256_setzero_si256(); }); });
  const int8_t* inputs = span.inputs + t * kBytes;
  for (int i = 0; i < kSpan; i += kStep) {
    each<U::kUnits>([&](auto j) __attribute__((always_inline)) {
      __m256i number[kStrips];
      if constexpr (!kDecoded) U::decode(weights, j, number);
      each<kStrips>([&](auto v) __attribute__((always_inline)) {
        if constexpr (kDecoded) number[v] = load<__m256i>(weights + (j * kStrips + v) * sizeof(__m256i));
        stay(number[v]);
      });
      each<kTokens>([&](auto r) __attribute__((always_inline)) {
        const __m256i input = _mm256_set1_epi32(load<int32_t>(inputs + r * kBytes + j * 4));
        each<kStrips>([&](auto v) __attribute__((always_inline)) {
          sum[r][v] = U::add(sum[r][v], number[v], input);
          stay(sum[r][v]);
        });
      });
    });
    weights += kDecoded ? U::kUnits * kStrips * sizeof(__m256i) : Format::kStepBytes;
    inputs += kStep * kDigits;
  }
  each<kTokens>([&](auto r) __attribute__((always_inline)) {
    each<kStrips>([&](auto v) __attribute__((always_inline)) {
      Floats& here = total[(t + r) * kStrips + v];
      const __m256i whole = U::whole(sum[r][v]);
      Floats more = here + span.scale[v] * span.steps[t + r] * bits<Floats>(_mm256_cvtepi32_ps(whole));
      if constexpr (U::kZeros) more += span.zero[v] * span.sums[t + r];
      here = more;
    });
  });
}

// The same for all whole tiles of the tokens from t on. Returns the first token that is left. It is not inlined: a tile's
// sums need all registers.
template <class Format, int kDigits, int kSpan, int kTokens, bool kDecoded>
__attribute__((noinline)) int64_t add_tiles(const Slice& span, const uint8_t* weights, int64_t t, int64_t tokens,
                                            Floats* total) {
  for (; t + kTokens <= tokens; t += kTokens)
    add_tile<Format, kDigits, kSpan, kTokens, kDecoded>(span, weights, t, total);
  return t;
}

// Computes one block for some tokens. For more than a tile of them, each span's weights are decoded once, to memory.
template <class Format, int kDigits, int kSpan>
void multiply_rounded(const Weights& w, const Rounded& x, int64_t first, int tokens, int64_t block, Floats* total) {
  using U = Unit<Format, kDigits>;
  constexpr int kBytes = kSpan / kStep * Format::kStepBytes;
  const int64_t spans = x.spans(), per_group = w.group / kSpan, together = x.together(first);
  const uint8_t* at = w.numbers + block * w.block_bytes;
  std::fill(total, total + tokens * kStrips, Floats{});
  int64_t factor = block * w.groups() * kRows, left = 0, index = first * spans;
  Slice span;
  for (int64_t s = 0; s < spans; ++s, at += kBytes, index += together) {
    for (int line = 0; line < kBytes && !first; line += 64) __builtin_prefetch(at + line + kAheadBytes);
    if (!left) {
      for (int v = 0; v < kStrips; ++v) {
        span.scale[v] = w.scales.load(factor + v * kWidth);
        if constexpr (U::kZeros) span.zero[v] = w.zeros.load(factor + v * kWidth) - U::kOffset * span.scale[v];
      }
      factor += kRows;
      left = per_group;
    }
    --left;
    span.inputs = x.bytes + index * kSpan * kDigits;
    span.steps = x.steps + index;
    span.sums = x.sums + index;
    int64_t t = 0;
    if (tokens > kTile) {
      __m256i decoded[kSpan / kStep * U::kUnits][kStrips];
      for (int i = 0; i < kSpan / kStep; ++i)
        each<U::kUnits>([&](auto j) __attribute__((always_inline)) {
          U::decode(at + i * Format::kStepBytes, j, decoded[i * U::kUnits + j]);
        });
      t = add_tiles<Format, kDigits, kSpan, kTile, true>(span, reinterpret_cast<const uint8_t*>(decoded), t, tokens, total);
    }
    switch (tokens - t) {
      case 4: add_tiles<Format, kDigits, kSpan, 4, false>(span, at, t, tokens, total); break;
      case 3: add_tiles<Format, kDigits, kSpan, 3, false>(span, at, t, tokens, total); break;
      case 2: add_tiles<Format, kDigits, kSpan, 2, false>(span, at, t, tokens, total); break;
      case 1: add_tiles<Format, kDigits, kSpan, 1, false>(span, at, t, tokens, total); break;
    }
  }
}

template <class Format>
MultiplyRounded rounded_kernel(const Rounded& x, bool) {
  if constexpr (least_digits_of(Format::kBits) == 1)
    if (x.digits == 1)
      return x.span == kSpans[0] ? multiply_rounded<Format, 1, kSpans[0]> : multiply_rounded<Format, 1, kSpans[1]>;
  return x.span == kSpans[0] ? multiply_rounded<Format, 2, kSpans[0]> : multiply_rounded<Format, 2, kSpans[1]>;
}

}  // namespace
}  // namespace autotune
