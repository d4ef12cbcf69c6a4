// What prefill does with the numbers of one token, row by row, between the matrix products.
#pragma once

#include <algorithm>
#include <cmath>

#include "gang.h"

namespace autotune {
namespace {

constexpr int64_t kLeastTask = 16 << 10;  // numbers per thread; with fewer, a further thread does not pay

template <class Use>  // use(begin, end) on rows of `width` numbers
void for_rows(int64_t rows, int64_t width, Use use) {
  on_threads(0, rows, std::max<int64_t>(1, kLeastTask / std::max<int64_t>(1, width)), use);
}

// x / sqrt(mean(x^2) + eps) * weight for one row.
inline void rms_row(const float* from, const float* weight, float eps, int64_t width, float* to) {
  const int64_t whole = width / kWidth * kWidth;
  Floats part[4] = {};
  int64_t k = 0;
  for (; k + 4 * kWidth <= whole; k += 4 * kWidth)
    for (int c = 0; c < 4; ++c) {
      const Floats v = load<Floats>(from + k + c * kWidth);
      part[c] += v * v;
    }
  for (; k < whole; k += kWidth) part[0] += load<Floats>(from + k) * load<Floats>(from + k);
  float squares = sum((part[0] + part[1]) + (part[2] + part[3]));
  for (; k < width; ++k) squares += from[k] * from[k];
  const float factor = 1.0f / std::sqrt(squares / width + eps);
  for (k = 0; k < whole; k += kWidth) store(to + k, load<Floats>(from + k) * factor * load<Floats>(weight + k));
  for (; k < width; ++k) to[k] = from[k] * factor * weight[k];
}

// Rotates the numbers of one head and one token: number i of the first half is paired with number i of the second.
// `to` may be `from`.
inline void rotate(const float* from, const float* cosine, const float* sine, int64_t depth, float* to) {
  const int64_t half = depth / 2, whole = half / kWidth * kWidth;
  int64_t d = 0;
  for (; d < whole; d += kWidth) {
    const Floats a = load<Floats>(from + d), b = load<Floats>(from + half + d);
    store(to + d, a * load<Floats>(cosine + d) - b * load<Floats>(sine + d));
    store(to + half + d, b * load<Floats>(cosine + half + d) + a * load<Floats>(sine + half + d));
  }
  for (; d < half; ++d) {
    const float a = from[d], b = from[half + d];
    to[d] = a * cosine[d] - b * sine[d];
    to[half + d] = b * cosine[half + d] + a * sine[half + d];
  }
}

inline Tensor empty_by_token(int64_t batch, int64_t heads, int64_t tokens, int64_t depth) {  // [B, H, Q, D] laid out as [B, Q, H, D]
  const int64_t sizes[] = {batch, heads, tokens, depth}, strides[] = {tokens * heads * depth, depth, heads * depth, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor by_layer(const Tensor& t, int64_t layers) {  // [L * B, H, Q, D] -> [L, B, H, Q, D]
  const int64_t batch = t.size(0) / layers;
  const int64_t sizes[] = {layers, batch, t.size(1), t.size(2), t.size(3)};
  const int64_t strides[] = {batch * t.stride(0), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 5, sizes, strides, 0, &handle));
  return Tensor(handle);
}

}  // namespace
}  // namespace autotune
