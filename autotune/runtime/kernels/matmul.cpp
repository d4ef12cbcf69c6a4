// y = x W^T + b for many rows of x, in BF16 arithmetic with FP32 sums, over weights of any storage. And a gated
// feed-forward block, down(activation(gate(x)) * up(x)), whose hidden numbers are written in the layout of the next
// product.
#include "curves.h"
#include "matmul.h"

namespace autotune {
namespace {

template <class Engine>
void linear(const float* x, int64_t rows, const Matrix& w, const float* bias, float* y) {
  static thread_local Scratch<typename Engine::Unit> scratch;
  multiply_into<Engine>(lay_all<Engine>(scratch, x, rows, w.inputs), w, bias, y);
}

// A panel consists of 16 columns of gate and the same columns of up, so that one thread has both factors.
template <class Engine, Curve activate>
void mlp(const float* x, int64_t rows, const Matrix& gate, const Matrix& up, const Matrix& down, const float* gate_bias,
         const float* up_bias, const float* down_bias, float* y) {
  using Unit = typename Engine::Unit;
  static thread_local Scratch<Unit> outer, inner;
  static thread_local Scratch<float> starts;
  const Panels<Engine> a = lay_all<Engine>(outer, x, rows, gate.inputs);
  const Panels<Engine> hidden = reserve<Engine>(inner, rows, gate.outputs);
  const int64_t columns = 2 * hidden.chunks;
  float* start = starts.room(columns * kSide);
  std::fill(start, start + columns * kSide, 0.0f);
  for (int64_t n = 0; n < gate.outputs; ++n) {
    float* at = start + n / kHalf * kSide + n % kHalf;
    if (gate_bias) at[0] = gate_bias[n];
    if (up_bias) at[kHalf] = up_bias[n];
  }
  multiply_all<Engine>(
      a, columns,
      [&](int64_t n, Unit* panel) {
        gate.lay<Engine>(panel, 0, n * kHalf);
        up.lay<Engine>(panel, 1, n * kHalf);
      },
      [=](int64_t n) { return start + n * kSide; },
      [&](int64_t m, int64_t n, const Unit* from, const Unit* panel, const float* first) {
        const int whole = a.rows_of(m) > kHalf ? kSide : kHalf;
        alignas(64) float block[kSide * kSide];
        Engine::multiply(from, panel, a.chunks, whole, first, 0, block, kSide);
        for (int r = 0; r < whole; ++r)
          for (int k = 0; k < kHalf; k += kWidth) {
            const float* at = block + r * kSide + k;
            Engine::put(hidden.panel(m), r, n * kHalf + k, activate(load<Floats>(at)) * load<Floats>(at + kHalf));
          }
      });
  multiply_into<Engine>(hidden, down, down_bias, y);
}

Tensor linear_bf16(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scales,
                    const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, int64_t outputs,
                    int64_t parts) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts is 1 or 2, not ", parts);
  const Tensor y = empty_floats(shape_of(input, outputs)), x = contiguous_floats(input);
  const int64_t inputs = input.size(input.dim() - 1), rows = input.numel() / inputs;
  const Matrix w = Matrix::of(weight, scales, zeros, outputs, inputs);
  const Bias added(bias, outputs);
#if defined(AUTOTUNE_BF16)
  if (rows) (parts == 1 ? linear<Bf16Parts<1>> : linear<Bf16Parts<2>>)(floats(x), rows, w, added.at, floats(y));
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
  const Matrix first = stored(gate, hidden, inputs), second = stored(up, hidden, inputs),
               third = stored(down, outputs, hidden);
  const Bias a(gate_bias, hidden), b(up_bias, hidden), c(down_bias, outputs);
#if defined(AUTOTUNE_BF16)
  const auto run = parts == 1 ? (activation ? mlp<Bf16Parts<1>, gelu> : mlp<Bf16Parts<1>, silu>)
                              : (activation ? mlp<Bf16Parts<2>, gelu> : mlp<Bf16Parts<2>, silu>);
  if (rows) run(floats(x), rows, first, second, third, a.at, b.at, c.at, floats(y));
#else
  STD_TORCH_CHECK(!rows, "this processor has no instructions for products in BF16");
#endif
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
}

namespace {
int64_t bf16_unit() { return autotune::bf16_unit(); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autotune, CompositeExplicitAutograd, library) { library.impl("bf16_unit", TORCH_BOX(&bf16_unit)); }

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("linear_bf16", TORCH_BOX(&autotune::linear_bf16));
  library.impl("linear_mlp", TORCH_BOX(&autotune::linear_mlp));
}
