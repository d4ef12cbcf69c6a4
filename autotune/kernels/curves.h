// Curves of activations and of the softmax, on vectors.
#pragma once

#include "vectors.h"

namespace autotune {
namespace {

constexpr float kLog2OfE = 1.44269504f;

// 2^x for x <= 0, to 2 ulp: the Taylor series of 2^f for |f| <= 1/2.
inline Floats exp2_negative(Floats x) {
  x = larger(x, spread(-126.0f));
  const Ints whole = __builtin_convertvector(x - 0.5f, Ints);  // truncation rounds a negative number to nearest
  const Floats f = x - __builtin_convertvector(whole, Floats);
  Floats series = spread(1.54035304e-4f);
  series = series * f + 1.33335581e-3f;
  series = series * f + 9.61812911e-3f;
  series = series * f + 5.55041087e-2f;
  series = series * f + 0.240226507f;
  series = series * f + 0.693147181f;
  series = series * f + 1.0f;
  return bits<Floats>(bits<Ints>(series) + (whole << 23));
}

inline Floats sigmoid(Floats x) {
  const Floats size = larger(x, -x), e = exp2_negative(size * -kLog2OfE);
  return (x < 0.0f ? e : spread(1.0f)) / (1.0f + e);
}

inline Floats silu(Floats x) { return x * sigmoid(x); }

// GELU by its tanh: (1 + tanh u) / 2 is the sigmoid of 2u. Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016.
inline Floats gelu(Floats x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }

}  // namespace
}  // namespace autotune
