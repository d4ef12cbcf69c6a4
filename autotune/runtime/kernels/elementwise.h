// Loops over strided tensors of up to kMostDims dimensions, and the functions applied to each element.
#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace autotune {

constexpr int kMostDims = 5;

struct Operand {
  char* at;
  const int64_t* strides;  // in elements
};

struct Space {
  int64_t dims;
  int64_t sizes[kMostDims];
};

// Calls use(n, operand pointers) for every innermost run of the space.
template <int kOperands, class Use>
void each_run(const Space& space, const Operand* operands, const int* sizes, Use use) {
  char* at[kOperands];
  for (int i = 0; i < kOperands; ++i) at[i] = operands[i].at;
  const int64_t last = space.dims - 1, n = space.sizes[last];
  int64_t index[kMostDims] = {};
  for (;;) {
    use(n, at);
    int64_t d = last - 1;
    for (; d >= 0; --d) {
      const bool wraps = ++index[d] == space.sizes[d];
      for (int i = 0; i < kOperands; ++i)
        at[i] += operands[i].strides[d] * sizes[i] * (wraps ? 1 - space.sizes[d] : 1);
      if (!wraps) break;
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

template <class Out, class In, class F>
void unary(const Space& space, const Operand* operands, F f) {
  static const int sizes[] = {sizeof(Out), sizeof(In)};
  const int64_t last = space.dims - 1, so = operands[0].strides[last], sa = operands[1].strides[last];
  each_run<2>(space, operands, sizes, [&](int64_t n, char** at) {
    Out* __restrict o = reinterpret_cast<Out*>(at[0]);
    const In* a = reinterpret_cast<const In*>(at[1]);
    if (so == 1 && sa == 1)
      for (int64_t i = 0; i < n; ++i) o[i] = f(a[i]);
    else
      for (int64_t i = 0; i < n; ++i) o[i * so] = f(a[i * sa]);
  });
}

template <class Out, class In, class F>
void binary(const Space& space, const Operand* operands, F f) {
  static const int sizes[] = {sizeof(Out), sizeof(In), sizeof(In)};
  const int64_t last = space.dims - 1, so = operands[0].strides[last];
  const int64_t sa = operands[1].strides[last], sb = operands[2].strides[last];
  each_run<3>(space, operands, sizes, [&](int64_t n, char** at) {
    Out* __restrict o = reinterpret_cast<Out*>(at[0]);
    const In* a = reinterpret_cast<const In*>(at[1]);
    const In* b = reinterpret_cast<const In*>(at[2]);
    if (so == 1 && sa == 1 && sb == 1)
      for (int64_t i = 0; i < n; ++i) o[i] = f(a[i], b[i]);
    else if (so == 1 && sa == 1 && sb == 0)
      for (int64_t i = 0; i < n; ++i) o[i] = f(a[i], b[0]);
    else if (so == 1 && sa == 0 && sb == 1)
      for (int64_t i = 0; i < n; ++i) o[i] = f(a[0], b[i]);
    else
      for (int64_t i = 0; i < n; ++i) o[i * so] = f(a[i * sa], b[i * sb]);
  });
}

// Like `unary`, but for functions of whole vectors.
template <class F>
void unary_vectors(const Space& space, const Operand* operands, F f) {
  static const int sizes[] = {sizeof(float), sizeof(float)};
  const int64_t last = space.dims - 1, so = operands[0].strides[last], sa = operands[1].strides[last];
  each_run<2>(space, operands, sizes, [&](int64_t n, char** at) {
    float* o = reinterpret_cast<float*>(at[0]);
    const float* a = reinterpret_cast<const float*>(at[1]);
    int64_t i = 0;
    if (so == 1 && sa == 1)
      for (; i + kWidth <= n; i += kWidth) store(o + i, f(load<Floats>(a + i)));
    for (; i < n; i += kWidth) {
      Floats some = {};
      const int64_t here = n - i < kWidth ? n - i : kWidth;
      for (int64_t j = 0; j < here; ++j) some[j] = a[(i + j) * sa];
      some = f(some);
      for (int64_t j = 0; j < here; ++j) o[(i + j) * so] = some[j];
    }
  });
}

// The same for functions of two.
template <class F>
void binary_vectors(const Space& space, const Operand* operands, F f) {
  static const int sizes[] = {sizeof(float), sizeof(float), sizeof(float)};
  const int64_t last = space.dims - 1;
  const int64_t so = operands[0].strides[last], sa = operands[1].strides[last], sb = operands[2].strides[last];
  each_run<3>(space, operands, sizes, [&](int64_t n, char** at) {
    float* o = reinterpret_cast<float*>(at[0]);
    const float *a = reinterpret_cast<const float*>(at[1]), *b = reinterpret_cast<const float*>(at[2]);
    int64_t i = 0;
    if (so == 1 && sa == 1 && sb == 1)
      for (; i + kWidth <= n; i += kWidth) store(o + i, f(load<Floats>(a + i), load<Floats>(b + i)));
    for (; i < n; i += kWidth) {
      Floats one = {}, two = {};
      const int64_t here = n - i < kWidth ? n - i : kWidth;
      for (int64_t j = 0; j < here; ++j) {
        one[j] = a[(i + j) * sa];
        two[j] = b[(i + j) * sb];
      }
      one = f(one, two);
      for (int64_t j = 0; j < here; ++j) o[(i + j) * so] = one[j];
    }
  });
}

inline Floats magnitude(Floats x) { return x < 0.0f ? -x : x; }

inline Floats sigmoid(Floats x) {  // uses e^-|x|, which cannot overflow
  const Floats e = exp_negative(-magnitude(x));
  return (x < 0.0f ? e : spread(1.0f)) / (1.0f + e);
}

inline Floats hyperbolic_tangent(Floats x) {
  const Floats e = exp_negative(-2.0f * magnitude(x)), t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

inline Floats silu(Floats x) { return x * sigmoid(x); }

inline Floats gelu_tanh(Floats x) {  // x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as torch's approximate="tanh"
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
}

inline float total(const float* a, int64_t n, int64_t stride) {
  float sum_of = 0;
  int64_t i = 0;
  if (stride == 1) {
    Floats part[2] = {};
    for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
      part[0] += load<Floats>(a + i);
      part[1] += load<Floats>(a + i + kWidth);
    }
    sum_of = sum(part[0] + part[1]);
  }
  for (; i < n; ++i) sum_of += a[i * stride];
  return sum_of;
}

// (a - mean) / sqrt(variance + eps) * weight + bias for one row.
inline void normalize(const float* a, const float* weight, const float* bias, float eps, int64_t n, float* out) {
  const float mean = total(a, n, 1) / n;
  Floats squares = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Floats d = load<Floats>(a + i) - mean;
    squares += d * d;
  }
  float variance = sum(squares);
  for (; i < n; ++i) variance += (a[i] - mean) * (a[i] - mean);
  const float scale = 1 / std::sqrt(variance / n + eps);
  for (i = 0; i < n; ++i) out[i] = (a[i] - mean) * scale * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
}

}  // namespace autotune
