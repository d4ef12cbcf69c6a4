// y = x W^T + b for many rows of x, in BF16 arithmetic with FP32 sums, over weights of any storage. And a gated
// feed-forward block, down(activation(gate(x)) * up(x)), whose hidden numbers are written in the layout of the next
// product. And a decoder layer of such products.
#include "layer.h"
#include "singles.h"

namespace autotune {
namespace {

// Products in BF16.
template <class Engine>
class InPanels {
 public:
  using Unit = typename Engine::Unit;
  using Laid = Panels<Engine>;
  static constexpr int64_t kRows = kSide;

  explicit InPanels(Curve activation) : activation_(activation) {}

  Laid reserve(const Linear& like, int64_t rows, Scratch<Unit>& scratch) const {
    return autotune::reserve<Engine>(scratch, rows, like.w.inputs);
  }
  static void lay(const Laid& to, int64_t first, int64_t count, const float* rows, int64_t width) {
    lay_rows<Engine>(to.panel(first / kSide), rows, width, static_cast<int>(count), width, 1.0f);
  }
  static void close(const Laid&) {}
  static bool divides(int64_t) { return true; }
  void require(const Linear&) const {}  // it multiplies all
  void multiply(const Laid& x, const Linear& linear, const Tensor& y) const {
    multiply_into<Engine>(x, linear.w, linear.bias, floats(y));
  }

  // A panel consists of 16 columns of gate and the same columns of up, so that one thread has both factors.
  void mlp(const Laid& x, const Linear& gate, const Linear& up, const Linear& down, const Tensor& y) const {
    static thread_local Scratch<Unit> inner;
    static thread_local Scratch<float> starts;
    const Laid hidden = autotune::reserve<Engine>(inner, x.rows, gate.w.outputs);
    const int64_t columns = 2 * hidden.chunks;
    float* start = starts.room(columns * kSide);
    std::fill(start, start + columns * kSide, 0.0f);
    for (int64_t n = 0; n < gate.w.outputs; ++n) {
      float* at = start + n / kHalf * kSide + n % kHalf;
      if (gate.bias) at[0] = gate.bias[n];
      if (up.bias) at[kHalf] = up.bias[n];
    }
    multiply_all<Engine>(
        x, columns,
        [&](int64_t n, Unit* panel) {
          gate.w.template lay<Engine>(panel, 0, n * kHalf);
          up.w.template lay<Engine>(panel, 1, n * kHalf);
        },
        [=](int64_t n) { return start + n * kSide; },
        [&](int64_t m, int64_t n, const Unit* from, const Unit* panel, const float* first) {
          const int whole = x.rows_of(m) > kHalf ? kSide : kHalf;
          alignas(64) float block[kSide * kSide];
          Engine::multiply(from, panel, x.chunks, whole, first, 0, block, kSide);
          for (int r = 0; r < whole; ++r)
            for (int k = 0; k < kHalf; k += kWidth) {
              const float* at = block + r * kSide + k;
              Engine::put(hidden.panel(m), r, n * kHalf + k, activation_(load<Floats>(at)) * load<Floats>(at + kHalf));
            }
        });
    multiply(hidden, down, y);
  }

 private:
  Curve activation_;
};

template <class Engine>
void linear(const float* x, int64_t rows, const Matrix& w, const float* bias, float* y) {
  static thread_local Scratch<typename Engine::Unit> scratch;
  const Panels<Engine> laid = reserve<Engine>(scratch, rows, w.inputs);
  lay_all<InPanels<Engine>>(laid, x, rows, w.inputs);
  multiply_into<Engine>(laid, w, bias, y);
}

// Products in so many BF16 parts.
struct Bf16Products {
  template <class Use>
  static auto with(int64_t parts, int64_t activation, Use use) {
    const Curve curve = curve_of(activation);
    STD_TORCH_CHECK(parts == 1 || parts == 2, "parts is 1 or 2, not ", parts);
#if defined(AUTOTUNE_BF16)
    return parts == 1 ? use(InPanels<Bf16Parts<1>>(curve)) : use(InPanels<Bf16Parts<2>>(curve));
#else
    STD_TORCH_CHECK(false, "this processor has no instructions for products in BF16");
    return use(InPanels<Singles>(curve));  // for its type
#endif
  }
};

Tensor linear_bf16(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scales,
                    const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, int64_t outputs,
                    int64_t parts) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts is 1 or 2, not ", parts);
  const Tensor y = empty_floats(shape_of(input, outputs)), x = contiguous_floats(input);
  const int64_t inputs = input.size(input.dim() - 1), rows = input.numel() / inputs;
  const Matrix w = Matrix::of(weight, scales, zeros, outputs, inputs);
  Given read;
  const float* added = read.bias(bias, outputs);
#if defined(AUTOTUNE_BF16)
  if (rows) (parts == 1 ? linear<Bf16Parts<1>> : linear<Bf16Parts<2>>)(floats(x), rows, w, added, floats(y));
#else
  STD_TORCH_CHECK(!rows, "this processor has no instructions for products in BF16");
#endif
  return as_dtype_of(y, input);
}

Tensor linear_mlp(const Tensor& input, const std::vector<Tensor>& gate, const std::vector<Tensor>& up,
                  const std::vector<Tensor>& down, const std::optional<Tensor>& gate_bias,
                  const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias, int64_t hidden,
                  int64_t outputs, int64_t activation, int64_t parts) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts is 1 or 2, not ", parts);
  curve_of(activation);  // refuses others
  const Tensor y = empty_floats(shape_of(input, outputs)), x = contiguous_floats(input);
  const int64_t inputs = input.size(input.dim() - 1), rows = input.numel() / inputs;
  Given read;
  const Linear first = read.linear(gate, gate_bias, hidden, inputs), second = read.linear(up, up_bias, hidden, inputs),
               third = read.linear(down, down_bias, outputs, hidden);
  if (!rows) return as_dtype_of(y, input);
  Bf16Products::with(parts, activation, [&](const auto& kind) {
    using Kind = std::decay_t<decltype(kind)>;
    static thread_local Scratch<typename Kind::Unit> scratch;
    const auto laid = kind.reserve(first, rows, scratch);
    lay_all<Kind>(laid, floats(x), rows, inputs);
    kind.mlp(laid, first, second, third, y);
  });
  return as_dtype_of(y, input);
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("bf16_unit() -> int");
  library.def(
      "linear_bf16(Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor? bias, int out_features, int parts) -> "
      "Tensor");
  library.def(
      "linear_mlp(Tensor x, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor? gate_bias, Tensor? up_bias, "
      "Tensor? down_bias, int hidden, int out_features, int activation, int parts) -> Tensor");
  library.def((std::string("layer_heads") + autotune::kLayerHeads).c_str());
  library.def((std::string("layer_end") + autotune::kLayerEnd).c_str());
  library.def((std::string("layers") + autotune::kLayers).c_str());
}

namespace {
int64_t bf16_unit() { return autotune::bf16_unit(); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autotune, CompositeExplicitAutograd, library) { library.impl("bf16_unit", TORCH_BOX(&bf16_unit)); }

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("linear_bf16", TORCH_BOX(&autotune::linear_bf16));
  library.impl("linear_mlp", TORCH_BOX(&autotune::linear_mlp));
  library.impl("layer_heads", TORCH_BOX(&autotune::layer_heads<autotune::Bf16Products>));
  library.impl("layer_end", TORCH_BOX(&autotune::layer_end<autotune::Bf16Products>));
  library.impl("layers", TORCH_BOX(&autotune::layers<autotune::Bf16Products>));
}
