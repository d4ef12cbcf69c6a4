// The operators between the matrix products of prefill. Each makes one pass over memory, on all threads.
#include "curves.h"
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace autotune {
namespace {

constexpr int64_t kLeastTask = 16 << 10;  // numbers per thread; with fewer, a further thread does not pay

template <class Use>  // use(begin, end) on rows of `width` numbers
void for_rows(int64_t rows, int64_t width, Use use) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kLeastTask / std::max<int64_t>(1, width)), use);
}

std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// x / sqrt(mean(x^2) + eps) * weight over the last dimension.
Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(input.dim() > 0 && weight.dim() == 1 && weight.size(0) == input.size(input.dim() - 1) && weight.size(0) > 0,
                  "the weight must have one number for each of x's last dimension");
  const Tensor x = contiguous_floats(input), scale = contiguous_floats(weight), y = empty_floats(sizes_of(input));
  const int64_t width = weight.size(0), whole = width / kWidth * kWidth;
  for_rows(input.numel() / width, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *from = floats(x) + i * width, *w = floats(scale);
      float* to = floats(y) + i * width;
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
      const float factor = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
      for (k = 0; k < whole; k += kWidth) store(to + k, load<Floats>(from + k) * factor * load<Floats>(w + k));
      for (; k < width; ++k) to[k] = from[k] * factor * w[k];
    }
  });
  return as_dtype_of(y, input);
}

// activation(gate) * up, number by number.
Tensor gate_up(const Tensor& gates, const Tensor& ups, int64_t activation) {
  STD_TORCH_CHECK(sizes_of(gates) == sizes_of(ups), "gate and up must have one shape");
  const Curve curve = curve_of(activation);
  const Tensor gate = contiguous_floats(gates), up = contiguous_floats(ups), y = empty_floats(sizes_of(gates));
  const int64_t count = gate.numel();
  for_rows((count + kWidth - 1) / kWidth, kWidth, [&](int64_t begin, int64_t end) {
    const float *g = floats(gate), *u = floats(up);
    const int64_t last = std::min(end * kWidth, count), whole = last / kWidth * kWidth;
    int64_t k = begin * kWidth;
    if (activation)
      for (; k < whole; k += kWidth) store(floats(y) + k, gelu(load<Floats>(g + k)) * load<Floats>(u + k));
    else
      for (; k < whole; k += kWidth) store(floats(y) + k, silu(load<Floats>(g + k)) * load<Floats>(u + k));
    for (; k < last; ++k) floats(y)[k] = curve(spread(g[k]))[0] * u[k];
  });
  return as_dtype_of(y, gates);
}

// Rotates the numbers of one head and one token: number i of the first half is paired with number i of the second.
inline void rotate(const float* from, const float* cosine, const float* sine, int64_t depth, float* to) {
  const int64_t half = depth / 2, whole = half / kWidth * kWidth;
  int64_t d = 0;
  for (; d < whole; d += kWidth) {
    const Floats a = load<Floats>(from + d), b = load<Floats>(from + half + d);
    store(to + d, a * load<Floats>(cosine + d) - b * load<Floats>(sine + d));
    store(to + half + d, b * load<Floats>(cosine + half + d) + a * load<Floats>(sine + half + d));
  }
  for (; d < half; ++d) {
    to[d] = from[d] * cosine[d] - from[half + d] * sine[d];
    to[half + d] = from[half + d] * cosine[half + d] + from[d] * sine[half + d];
  }
}

Tensor empty_by_token(int64_t batch, int64_t heads, int64_t tokens, int64_t depth) {  // [B, H, Q, D] laid out as [B, Q, H, D]
  const int64_t sizes[] = {batch, heads, tokens, depth}, strides[] = {tokens * heads * depth, depth, heads * depth, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor rotated(const Tensor& t, const Tensor& cosines, const Tensor& sines) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float && t.size(3) % 2 == 0 && t.size(3) > 0 &&
                      t.stride(3) == 1,
                  "expected FP32 [B, H, Q, D], D even and contiguous");
  present(t);
  const int64_t batch = t.size(0), heads = t.size(1), tokens = t.size(2), depth = t.size(3);
  STD_TORCH_CHECK(cosines.dim() == 3 && (cosines.size(0) == 1 || cosines.size(0) == batch) && cosines.size(1) == tokens &&
                      cosines.size(2) == depth && sizes_of(cosines) == sizes_of(sines),
                  "cosines and sines must be [B or 1, Q, D]");
  const Tensor cosine = contiguous_floats(cosines), sine = contiguous_floats(sines);
  const Tensor y = empty_by_token(batch, heads, tokens, depth);
  const int64_t shared = cosines.size(0) == 1 ? 0 : tokens * depth;
  for_rows(batch * tokens, heads * depth, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, token = i % tokens, angle = b * shared + token * depth;
      for (int64_t h = 0; h < heads; ++h)
        rotate(floats(t) + b * t.stride(0) + h * t.stride(1) + token * t.stride(2), floats(cosine) + angle,
               floats(sine) + angle, depth, floats(y) + (i * heads + h) * depth);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cosines, const Tensor& sines) {
  return {rotated(q, cosines, sines), rotated(k, cosines, sines)};
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("gate_up(Tensor gate, Tensor up, int activation) -> Tensor");
  library.def("rotary(Tensor q, Tensor k, Tensor cosines, Tensor sines) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&autotune::rms_norm));
  library.impl("gate_up", TORCH_BOX(&autotune::gate_up));
  library.impl("rotary", TORCH_BOX(&autotune::rotary));
}
