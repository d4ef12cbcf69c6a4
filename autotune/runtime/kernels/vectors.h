// A native vector of FP32 lanes and the widening loads into it: AVX-512, AVX2, NEON, or the compiler's generic vectors.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace autotune {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
inline V load(const void* at) {
  V v;
  std::memcpy(&v, at, sizeof(v));
  return v;
}

inline void store(float* at, Floats v) { std::memcpy(at, &v, sizeof(v)); }

template <class T>
inline Ints widen_ints(const T* at) {  // sign- or zero-extends kWidth integers
  typedef T Narrow __attribute__((vector_size(kWidth * sizeof(T))));
  return __builtin_convertvector(load<Narrow>(at), Ints);
}

inline Floats widen(const float* at) { return load<Floats>(at); }

inline Floats widen(const int8_t* at) {
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(at))));
#elif defined(__AVX2__)
  return bits<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)))));
#else
  return __builtin_convertvector(widen_ints(at), Floats);
#endif
}

struct Half {
  uint16_t raw;
};

struct Bf16 {  // bfloat16
  uint16_t raw;
};

inline Floats widen(const Half* at) {
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_cvtph_ps(load<__m256i>(at)));
#elif defined(__AVX2__) && defined(__F16C__)
  return bits<Floats>(_mm256_cvtph_ps(load<__m128i>(at)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return bits<Floats>(vcvt_f32_f16(bits<float16x4_t>(load<uint16x4_t>(at))));
#else  // shifted bits give the number times 2^-112, which also holds for subnormals, but not for infinities
  Ints half = widen_ints(reinterpret_cast<const uint16_t*>(at));
  Floats magnitude = bits<Floats>((half & 0x7fff) << 13) * 0x1p112f;
  return bits<Floats>(bits<Ints>(magnitude) | ((half & 0x8000) << 16));
#endif
}

inline Ints upper(const uint16_t* at) {  // puts kWidth numbers into the upper halves of lanes
#if defined(__AVX512F__)
  return bits<Ints>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(at)), 16));
#elif defined(__AVX2__)
  return bits<Ints>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(at)), 16));
#else
  return widen_ints(at) << 16;
#endif
}

inline Floats widen(const Bf16* at) { return bits<Floats>(upper(&at->raw)); }

inline Half narrow_one(float x) {  // to the nearest, ties to even
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, 0))};
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return {bits<uint16_t>(static_cast<__fp16>(x))};
#else
  const uint32_t raw = bits<uint32_t>(x), size = raw & 0x7fffffff, sign = raw >> 16 & 0x8000;
  uint32_t half = 0;
  if (size > 0x7f800000) half = 0x7e00;        // NaN
  else if (size >= 0x477ff000) half = 0x7c00;  // 65520 and more round to infinity
  else if (size < 0x38800000) half = bits<uint32_t>(bits<float>(size) + 0.5f) - 0x3f000000;  // 2^-24 is 0.5's last bit
  else half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
#endif
}

template <class Number>
inline float widen_one(const Number* at) {  // for the last numbers of a row that do not fill a vector
  Number padded[kWidth] = {*at};
  return widen(padded)[0];
}

// The signed four-bit number at `bit` of every lane: -8 to 7.
inline Floats nibble(Ints word, int bit) {
#if defined(__AVX512F__)  // the table look-up uses only the lowest four bits
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return bits<Floats>(_mm512_permutexvar_ps(bits<__m512i>(word >> bit), table));
#else
  return __builtin_convertvector((word << (28 - bit)) >> 28, Floats);
#endif
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bits<__m512>(v));
#else
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
#endif
}

inline float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bits<__m512>(v));
#else
  float most = v[0];
  for (int i = 1; i < kWidth; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// Takes one half of every 2 * kSpan lanes: from a into the first half of the result, from b into the second.
template <int kSpan, bool kUpper>
inline Floats fold_half(Floats a, Floats b) {
#if defined(__clang__)
  Floats out;
  for (int l = 0; l < kWidth; ++l) {
    const int at = l % (2 * kSpan);
    out[l] = at < kSpan ? a[l + kUpper * kSpan] : b[l - kSpan + kUpper * kSpan];
  }
  return out;
#else
  Ints pick;
  for (int l = 0; l < kWidth; ++l) {
    const int at = l % (2 * kSpan);
    pick[l] = (at < kSpan ? l : kWidth + l - kSpan) + kUpper * kSpan;
  }
  return __builtin_shuffle(a, b, pick);
#endif
}

// Sums each of kWidth vectors. Lane i of the result is the sum of vector i. Overwrites the vectors.
template <int kSpan = 1>
inline Floats sums(Floats* v) {
  if constexpr (kSpan == kWidth) {
    return v[0];
  } else {
    for (int i = 0; i < kWidth / kSpan; i += 2)
      v[i / 2] = fold_half<kSpan, false>(v[i], v[i + 1]) + fold_half<kSpan, true>(v[i], v[i + 1]);
    return sums<2 * kSpan>(v);
  }
}

inline Floats spread(float value) { return value - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x <= 0 or NaN, to 2 ulp: e^x = 2^n 2^f with |f| <= 1/2, with the Taylor series of 2^f to the seventh power.
inline Floats exp_negative(Floats x) {
  x = larger(spread(-87.0f), x);  // in this order NaN stays NaN
  Floats power = x * 1.44269504f;
  Ints whole = __builtin_convertvector(power - 0.5f, Ints);  // truncation rounds a negative number to nearest
  Floats n = __builtin_convertvector(whole, Floats);
  Floats f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts keeps precision (Cody and Waite)
  Floats series = spread(1.0f / 5040);
  series = series * f + 1.0f / 720;
  series = series * f + 1.0f / 120;
  series = series * f + 1.0f / 24;
  series = series * f + 1.0f / 6;
  series = series * f + 0.5f;
  series = series * f + 1.0f;
  series = series * f + 1.0f;
  return bits<Floats>(bits<Ints>(series) + (whole << 23));
}

}  // namespace autotune
