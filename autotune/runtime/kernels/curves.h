// Functions for activations and the softmax, on vectors.
#pragma once

#include "tensors.h"

namespace autotune {
namespace {

constexpr float kLog2OfE = 1.44269504f;
constexpr float kMost = 126.0f;  // largest |x| of exp2_bounded; 2^-126 is the smallest normal number

// 2^x for |x| <= 126, to 2 ulp: 2^whole 2^f, with the Taylor series of 2^f for |f| <= 1/2.
inline Floats exp2_bounded(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23; a sum with it has no bits for a fraction
  const Floats whole = (x + kRound) - kRound, f = x - whole;
  Floats series = spread(1.54035304e-4f);
  series = series * f + 1.33335581e-3f;
  series = series * f + 9.61812911e-3f;
  series = series * f + 5.55041087e-2f;
  series = series * f + 0.240226507f;
  series = series * f + 0.693147181f;
  series = series * f + 1.0f;
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_scalef_ps(bits<__m512>(series), bits<__m512>(whole)));
#else
  return bits<Floats>(bits<Ints>(series) + (__builtin_convertvector(whole, Ints) << 23));
#endif
}

inline Floats exp2_negative(Floats x) { return exp2_bounded(larger(x, spread(-kMost))); }

inline Floats inverse(Floats x) {
#if defined(__AVX512F__)  // an estimate to 14 bits and one Newton step take a third of the time of a division
  const Floats guess = bits<Floats>(_mm512_rcp14_ps(bits<__m512>(x)));
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

inline Floats sigmoid(Floats x) {
  const Floats power = -larger(-larger(x * -kLog2OfE, spread(-kMost)), spread(-kMost));
  return inverse(1.0f + exp2_bounded(power));
}

inline Floats silu(Floats x) { return x * sigmoid(x); }

// GELU in its tanh form: (1 + tanh u) / 2 is the sigmoid of 2u.
// Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016.
inline Floats gelu(Floats x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

using Curve = Floats (*)(Floats);

constexpr int64_t kSilu = 0;

// Activation 0 is SiLU, 1 is GELU in its tanh form.
inline Curve curve_of(int64_t activation) {
  STD_TORCH_CHECK(activation == 0 || activation == 1, "activation is 0 (SiLU) or 1 (GELU by tanh), not ", activation);
  return activation ? gelu : silu;
}

}  // namespace
}  // namespace autotune
