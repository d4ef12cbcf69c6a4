// y = x W^T + b for many rows of x, in BF16 arithmetic with FP32 sums, over weights of any storage.
#include "matmul.h"

namespace autotune {
namespace {

template <class Engine>
void linear(const float* x, int64_t rows, const Matrix& w, const float* bias, float* y) {
  static thread_local Scratch<typename Engine::Unit> scratch;
  multiply_into<Engine>(lay_all<Engine>(scratch, x, rows, w.inputs), w, bias, y);
}

Tensor linear_brain(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scales,
                    const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, int64_t outputs,
                    int64_t parts) {
  const auto sizes = input.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  STD_TORCH_CHECK(!shape.empty() && shape.back() > 0, "x must be [..., K]");
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts is 1 or 2, not ", parts);
  const int64_t inputs = shape.back(), rows = input.numel() / inputs;
  const Matrix w = Matrix::of(weight, scales, zeros, outputs, inputs);
  shape.back() = outputs;
  const Tensor x = contiguous_floats(input), y = empty_floats(shape);
  std::optional<Tensor> shift;
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == outputs, "the bias has ", bias->numel(), " numbers for ", outputs, " outputs");
    shift = contiguous_floats(*bias);
  }
  if (rows) {
    const float* added = shift ? floats(*shift) : nullptr;
#if defined(AUTOTUNE_BRAINS)
    (parts == 1 ? linear<Brains<1>> : linear<Brains<2>>)(floats(x), rows, w, added, floats(y));
#else
    STD_TORCH_CHECK(false, "this processor has no instructions for products in BF16");
    (void)added;
#endif
  }
  return as_dtype_of(y, input);
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("brain_unit() -> int");
  library.def(
      "linear_brain(Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor? bias, int out_features, int parts) -> "
      "Tensor");
}

namespace {
int64_t brain_unit() { return autotune::brain_unit(); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autotune, CompositeExplicitAutograd, library) { library.impl("brain_unit", TORCH_BOX(&brain_unit)); }

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) { library.impl("linear_brain", TORCH_BOX(&autotune::linear_brain)); }
