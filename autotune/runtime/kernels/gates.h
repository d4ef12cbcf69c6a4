// Gated products of whole prompts.
#pragma once

#include "curves.h"
#include "token_rows.h"

namespace autotune {
namespace {

// activation(gate) * up, number by number, on all threads.
inline void gate_all(const float* gate, const float* up, int64_t count, int64_t activation, float* y) {
  const Curve curve = curve_of(activation);
  for_rows((count + kWidth - 1) / kWidth, kWidth, [=](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kWidth, count), whole = last / kWidth * kWidth;
    int64_t k = begin * kWidth;
    if (activation)
      for (; k < whole; k += kWidth) store(y + k, gelu(load<Floats>(gate + k)) * load<Floats>(up + k));
    else
      for (; k < whole; k += kWidth) store(y + k, silu(load<Floats>(gate + k)) * load<Floats>(up + k));
    for (; k < last; ++k) y[k] = curve(spread(gate[k]))[0] * up[k];
  });
}

}  // namespace
}  // namespace autotune
