// The product x W^T + b with INT8, INT6 or INT4 weights in integer arithmetic, where the processor has it.
//
//   rounded.h  the inputs
//   vnni.h     AVX-512 with VNNI: inputs of 16 bits at 1.4 times FP32's rate, or of 8 bits at twice that
//   avx2.h     AVX2: inputs of 16 bits at 1.4 times FP32's rate, for INT4 also of 8 bits
#pragma once

#include "gang.h"
#include "rounded.h"
#include "scratch.h"

namespace autotune {

// The fewest digits of inputs for which there are products over weights of 8, 6 or 4 bits: 1 or 2; 0 if there are none in
// integers here.
int least_digits(int bits);

// Rounds token t, x [inputs], which zeros fill up to K.
void round_token(const Rounded& to, int64_t t, const float* x, int64_t inputs);

// Computes the blocks [begin, end) of outputs y [tokens, rows] for all tokens.
using MultiplyBlocks = void (*)(const Weights&, const Rounded&, const float* bias, float* y, int64_t begin, int64_t end);

// The products over weights of 8, 6 or 4 bits.
MultiplyBlocks in_integers(int bits);

constexpr int64_t kLeastTokens = 8;  // with fewer to round, a further thread does not pay

// The digits to multiply with: those wanted, or none (FP32) where the processor has no products in integers.
inline int digits_here(int64_t wanted, int bits) {
  STD_TORCH_CHECK(wanted >= 0 && wanted <= 2, "digits is 0 (FP32), 1 (inputs of 8 bits) or 2 (of 16 bits), not ", wanted);
  STD_TORCH_CHECK(wanted != 1 || least_digits(bits) == 1,
                  "this processor has no instructions for products in INT8 over these weights");
  return least_digits(bits) ? static_cast<int>(wanted) : 0;
}

// Rounds x [tokens, inputs] for a layer, in memory that the calling thread keeps from call to call.
inline Rounded round_all(const Weights& w, const float* x, int64_t tokens, int64_t inputs, int digits) {
  static thread_local Scratch<float> scratch;
  const Rounded rounded = Rounded::over(scratch.room(Rounded::floats(w, tokens, digits)), w, tokens, digits);
  on_threads(0, tokens, kLeastTokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) round_token(rounded, t, x + t * inputs, inputs);
  });
  return rounded;
}

inline void multiply_in_integers(MultiplyBlocks multiply, const Weights& w, const Rounded& x, const float* bias, float* y) {
  const int64_t grain = std::max<int64_t>(1, kLeastTaskBytes / w.block_bytes / x.tokens);
  on_threads(0, w.blocks(), grain, [&](int64_t begin, int64_t end) {
    multiply(w, x, bias, y, begin, end);
  });
}

}  // namespace autotune
