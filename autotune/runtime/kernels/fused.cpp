// The operators between the matrix products of prefill. Each makes one pass over memory, on all threads.
#include "gates.h"

#include <tuple>

namespace autotune {
namespace {

std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// x / sqrt(mean(x^2) + eps) * weight over the last dimension.
Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(input.dim() > 0 && weight.dim() == 1 && weight.size(0) == input.size(input.dim() - 1) && weight.size(0) > 0,
                  "the weight must have one number for each of x's last dimension");
  const Tensor x = contiguous_floats(input), scale = contiguous_floats(weight), y = empty_floats(sizes_of(input));
  const int64_t width = weight.size(0);
  for_rows(input.numel() / width, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      rms_row(floats(x) + i * width, floats(scale), static_cast<float>(eps), width, floats(y) + i * width);
    }
  });
  return as_dtype_of(y, input);
}

// activation(gate) * up, number by number.
Tensor gate_up(const Tensor& gates, const Tensor& ups, int64_t activation) {
  STD_TORCH_CHECK(sizes_of(gates) == sizes_of(ups), "gate and up must have one shape");
  const Tensor gate = contiguous_floats(gates), up = contiguous_floats(ups), y = empty_floats(sizes_of(gates));
  gate_all(floats(gate), floats(up), gate.numel(), activation, floats(y));
  return as_dtype_of(y, gates);
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
