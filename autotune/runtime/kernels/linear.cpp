// Operators for y = x W^T + b over narrow weights. In FP32 arithmetic, one pass over the weights serves few tokens, and a
// matrix product many.
#include "gates.h"
#include "integer.h"
#include "layer.h"

#include <vector>

namespace autotune {
namespace {

constexpr int64_t kMostFew = 96;  // tokens; with more, a matrix product over expanded weights pays (equal near 128)
constexpr int64_t kPanelFloats = 1 << 18;      // the FP32 panel for many tokens; 1 MiB stays in the L2 cache

// The kernel for weights stored as plain numbers.
const Kernel& kernel_of(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return kernel<Plain<Half>>;
    case ScalarType::BFloat16: return kernel<Plain<Bf16>>;
    case ScalarType::Float: return kernel<Plain<float>>;
    default: STD_TORCH_CHECK(false, "linear_f16 takes weights in FP16, BF16 or FP32");
  }
}

void arrange_all(const Weights& w, const float* x, int64_t tokens, int64_t inputs, float* target, float* sums) {
  const Tiles tiles{tokens, target, sums};
  on_threads(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) arrange(w, x, tokens, inputs, i, target, sums);
  });
}

void multiply_tiles(const Kernel& kernel, const Weights& w, const Tiles& tiles, const float* bias, float* y) {
  const int64_t grain = std::max<int64_t>(1, kLeastTaskBytes / w.block_bytes);
  on_threads(0, w.blocks(), grain, [&](int64_t begin, int64_t end) {
    multiply_blocks(kernel, w, tiles, bias, y, begin, end);
  });
}

void multiply_few(const Kernel& kernel, const Weights& w, const float* x, int64_t tokens, int64_t inputs,
                  const float* bias, float* y) {
  static thread_local Scratch<float> scratch;
  const bool copied = !in_place(w, tokens, inputs);
  const int64_t numbers = copied ? tokens * w.inputs : 0;
  float* target = scratch.room(numbers + (w.zeros ? tokens * w.groups() : 0));
  float* sums = w.zeros ? target + numbers : nullptr;
  if (copied) arrange_all(w, x, tokens, inputs, target, sums);
  if (!copied && sums) add_up(w, 1, x, sums);
  multiply_tiles(kernel, w, {tokens, copied ? target : x, sums}, bias, y);
}

// For many tokens: expands some blocks to FP32, then calls the platform's matrix product.
void multiply_many(const Kernel& kernel, const Weights& w, const Tensor& x, const float* bias, const Tensor& y) {
  static thread_local Tensor panel = empty_floats({kPanelFloats});
  const int64_t tokens = x.size(0), inputs = x.size(1);
  const int64_t width = std::clamp<int64_t>(kPanelFloats / w.inputs / kRows, 1, w.blocks()) * kRows;
  if (width * w.inputs > panel.numel()) panel = empty_floats({width * w.inputs});
  float* columns = floats(panel);
  for (int64_t row = 0; row < w.rows; row += width) {
    const int64_t here = std::min(width, w.rows - row), blocks = (here + kRows - 1) / kRows;
    on_threads(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernel.expand(w, row / kRows + i, 0, w.inputs, columns + i * kRows, width);
    });
    autotune::multiply_into(x, view(panel, {inputs, here}, width, 0), view(y, {tokens, here}, w.rows, row));
  }
  if (!bias) return;
  on_threads(0, tokens, 16, [&, out = floats(y)](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t n = 0; n < w.rows; ++n) out[t * w.rows + n] += bias[n];
  });
}

// Digits: of the inputs in integer arithmetic; 0 for FP32.
Tensor linear(const Kernel& kernel, const Weights& w, const Tensor& input, const std::optional<Tensor>& bias,
              MultiplyBlocks in_integers = nullptr, int digits = 0) {
  const auto sizes = input.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  STD_TORCH_CHECK(!shape.empty() && shape.back() > 0 && shape.back() <= w.inputs &&
                      shape.back() > w.inputs - std::max<int64_t>(w.pad, 1),
                  "x does not have the number of inputs that the weights were packed for (", w.inputs, " after padding)");
  const int64_t inputs = shape.back(), tokens = input.numel() / inputs;
  shape.back() = w.rows;
  const Tensor x = contiguous_floats(input), y = empty_floats(shape);
  Given read;
  const float* added = read.bias(bias, w.rows);
  if (tokens && digits)
    multiply_in_integers(in_integers, w, round_all(w, floats(x), tokens, inputs, digits), added, floats(y));
  else if (tokens && tokens <= kMostFew)
    multiply_few(kernel, w, floats(x), tokens, inputs, added, floats(y));
  else if (tokens)
    multiply_many(kernel, w, view(x, {tokens, inputs}, inputs, 0), added, y);
  return as_dtype_of(y, input);
}

Tensor linear_f16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows) {
  const Weights w = packed_weights(weight, rows);
  return linear(kernel_of(weight.scalar_type()), w, x, bias);
}

template <class Format>
Tensor linear_symmetric(const Tensor& x, const Tensor& numbers, const Tensor& scales, const std::optional<Tensor>& bias,
                        int64_t rows, int64_t digits) {
  Weights w = packed_weights(numbers, rows);
  w.scales = factors(w, scales);
  return linear(kernel<Format>, w, x, bias, in_integers(Format::kBits), digits_here(digits, Format::kBits));
}

Tensor linear_i8(const Tensor& x, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                 int64_t rows, int64_t digits) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "linear_i8 takes INT8 weights");
  return linear_symmetric<Plain<int8_t>>(x, weight, scales, bias, rows, digits);
}

Tensor linear_i6(const Tensor& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& bias,
                 int64_t rows, int64_t digits) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Short, "linear_i6 takes eight weights in each three INT16");
  return linear_symmetric<Int6>(x, packed, scales, bias, rows, digits);
}

Tensor linear_i4(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& zeros,
                 const std::optional<Tensor>& bias, int64_t rows, int64_t digits) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int, "linear_i4 takes eight weights in each INT32");
  STD_TORCH_CHECK(scales.dim() == 3 && zeros.dim() == 3 && scales.size(1) == zeros.size(1),
                  "linear_i4 takes as many zeros as scales");
  Weights w = packed_weights(words, rows);
  w.scales = factors(w, scales);
  w.zeros = factors(w, zeros);
  return linear(kernel<Int4>, w, x, bias, in_integers(Int4::kBits), digits_here(digits, Int4::kBits));
}

// Products in FP32 over weights stored as plain numbers.
class InFloats {
 public:
  using Unit = float;
  struct Laid {
    Tensor x;        // [rows, inputs]
    float* arranged;  // the same as tiles, for few rows; else null
    const Weights* w;
    Tiles tiles() const { return {x.size(0), arranged, nullptr}; }
  };
  static constexpr int64_t kRows = kLeastTokens;

  explicit InFloats(int64_t activation) : activation_(activation) {}

  Laid reserve(const Linear& like, int64_t rows, Scratch<float>& scratch) const {
    const Weights& w = like.w.packed;
    return {empty_floats({rows, like.w.inputs}), rows <= kMostFew ? scratch.room(rows * w.inputs) : nullptr, &w};
  }
  static void lay(const Laid& to, int64_t first, int64_t count, const float* rows, int64_t width) {
    std::copy(rows, rows + count * width, floats(to.x) + first * width);
  }
  static void close(const Laid& to) {
    if (to.arranged) arrange_all(*to.w, floats(to.x), to.x.size(0), to.x.size(1), to.arranged, nullptr);
  }
  static bool divides(int64_t rows) { return rows <= kMostFew; }  // the platform's matrix product has threads of its own
  void require(const Linear& linear) const {
    STD_TORCH_CHECK(linear.w.packed.numbers && !linear.w.packed.scales && linear.bits >= 16,
                    "products in FP32 are for packed weights in FP16, BF16 or FP32");
  }
  void multiply(const Laid& x, const Linear& linear, const Tensor& y) const {
    const Kernel& kernel = kernel_of(linear.type);
    if (x.arranged) return multiply_tiles(kernel, linear.w.packed, x.tiles(), linear.bias, floats(y));
    multiply_many(kernel, linear.w.packed, x.x, linear.bias, y);
  }
  void mlp(const Laid& x, const Linear& gate, const Linear& up, const Linear& down, const Tensor& y) const {
    const int64_t rows = x.x.size(0), hidden = gate.w.outputs;
    static thread_local Scratch<float> scratch;
    const Tensor gates = empty_floats({rows, hidden}), ups = empty_floats({rows, hidden});
    multiply(x, gate, gates);
    multiply(x, up, ups);
    const Laid gated = reserve(down, rows, scratch);
    gate_all(floats(gates), floats(ups), rows * hidden, activation_, floats(gated.x));
    close(gated);
    multiply(gated, down, y);
  }

 private:
  int64_t activation_;
};

struct FloatProducts {
  template <class Use>
  static auto with(int64_t, int64_t activation, Use use) {
    curve_of(activation);  // refuses others
    return use(InFloats(activation));
  }
};

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def((std::string("layer_heads_floats") + autotune::kLayerHeads).c_str());
  library.def((std::string("layer_end_floats") + autotune::kLayerEnd).c_str());
  library.def((std::string("layers_floats") + autotune::kLayers).c_str());
  library.def("linear_f16(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  library.def(
      "linear_i8(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int out_features, int digits=2) -> Tensor");
  library.def(
      "linear_i6(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int out_features, int digits=2) -> Tensor");
  library.def(
      "linear_i4(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? bias, int out_features, int digits=2) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("linear_f16", TORCH_BOX(&autotune::linear_f16));
  library.impl("linear_i8", TORCH_BOX(&autotune::linear_i8));
  library.impl("linear_i6", TORCH_BOX(&autotune::linear_i6));
  library.impl("linear_i4", TORCH_BOX(&autotune::linear_i4));
  library.impl("layer_heads_floats", TORCH_BOX(&autotune::layer_heads<autotune::FloatProducts>));
  library.impl("layer_end_floats", TORCH_BOX(&autotune::layer_end<autotune::FloatProducts>));
  library.impl("layers_floats", TORCH_BOX(&autotune::layers<autotune::FloatProducts>));
}
