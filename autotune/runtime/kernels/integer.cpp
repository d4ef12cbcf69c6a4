// Products in integers, and a gated feed-forward block of them: down(activation(gate(x)) * up(x)).
#include "integer.h"

#include "curves.h"
#include "matmul.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "vnni.h"
#elif defined(__AVX2__) && !defined(__AVX512F__)
#include "avx2.h"
#else
namespace autotune {
namespace {
constexpr int least_digits_of(bool) { return 0; }
constexpr int kMostBlocks = 1;
void round(const Rounded&, int64_t, const float*, int64_t) {}
template <class Format>
MultiplyRounded rounded_kernel(const Rounded&, bool) {
  return nullptr;
}
}  // namespace
}  // namespace autotune
#endif

namespace autotune {
namespace {

constexpr int kFewest = 6;  // for fewer tokens, memory is the limit, which one stream of weights reads faster
constexpr int64_t kNearBytes = 128 << 10;  // weights that stay in the L2 cache while all tokens use them

// Computes the blocks [begin, end) of outputs y [tokens, rows] for all tokens.
template <class Format>
void multiply_blocks_rounded(const Weights& w, const Rounded& x, const float* bias, float* y, int64_t begin,
                             int64_t end) {
  Floats out[kTogether * kMostBlocks * kStrips];
  const int64_t most = x.tokens < kFewest ? 1 : kMostBlocks;
  const int64_t near = std::max(most, kNearBytes / w.block_bytes / most * most);
  for (int64_t from = begin; from < end; from += near)
    for (int64_t first = 0; first < x.tokens; first += kTogether) {
      const int here = static_cast<int>(x.together(first));
      for (int64_t block = from; block < std::min(end, from + near); block += most) {
        const int64_t together = std::min(most, end - block);
        rounded_kernel<Format>(x, together == 2)(w, x, first, here, block, out);
        for (int t = 0; t < here; ++t)
          for (int v = 0; v < together * kStrips; ++v)
            put(w, block * kRows + v * kWidth, out[t * together * kStrips + v], bias, y + (first + t) * w.rows);
      }
    }
}

}  // namespace

int least_digits(bool words) { return least_digits_of(words); }

void round_token(const Rounded& to, int64_t t, const float* x, int64_t inputs) { round(to, t, x, inputs); }

MultiplyBlocks in_integers(bool words) {
  return words ? multiply_blocks_rounded<Int4> : multiply_blocks_rounded<Plain<int8_t>>;
}

namespace {

MultiplyBlocks products(const Tensor& numbers, const Weights& w, int64_t digits) {
  const bool words = numbers.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(words || numbers.scalar_type() == ScalarType::Char, "products in integers are for INT8 and INT4 weights");
  STD_TORCH_CHECK(w.scales && (w.zeros || !words), "INT8 weights need scales, and INT4 weights scales and zeros");
  STD_TORCH_CHECK(digits_here(digits, words), "this processor has no instructions for products in integers");
  return in_integers(words);
}

Tensor linear_mlp_rounded(const Tensor& input, const std::vector<Tensor>& gate, const std::vector<Tensor>& up,
                          const std::vector<Tensor>& down, const std::optional<Tensor>& gate_bias,
                          const std::optional<Tensor>& up_bias, const std::optional<Tensor>& down_bias, int64_t hidden,
                          int64_t outputs, int64_t activation, int64_t digits) {
  const Curve activate = curve_of(activation);
  const Tensor y = empty_floats(shape_of(input, outputs)), x = contiguous_floats(input);
  const int64_t inputs = input.size(input.dim() - 1), tokens = input.numel() / inputs;
  const Weights first = stored(gate, hidden, inputs).packed, second = stored(up, hidden, inputs).packed,
                third = stored(down, outputs, hidden).packed;
  const MultiplyBlocks one = products(gate[0], first, digits), two = products(up[0], second, digits),
                       three = products(down[0], third, digits);
  STD_TORCH_CHECK(first.inputs == second.inputs && span_of(first.group) == span_of(second.group),
                  "gate and up must round their inputs alike");
  const Bias a(gate_bias, hidden), b(up_bias, hidden), c(down_bias, outputs);
  if (!tokens) return as_dtype_of(y, input);
  static thread_local Scratch<float> scratch;
  float* gated = scratch.room(2 * tokens * hidden);
  float* other = gated + tokens * hidden;
  const Rounded rounded = round_all(first, floats(x), tokens, inputs, digits);
  torch::stable::parallel_for(0, first.blocks(), 1, [&](int64_t begin, int64_t end) {
    one(first, rounded, a.at, gated, begin, end);
    two(second, rounded, b.at, other, begin, end);
    const int64_t from = begin * kRows, until = std::min(end * kRows, hidden);
    for (int64_t t = 0; t < tokens; ++t) {
      float *g = gated + t * hidden, *u = other + t * hidden;
      int64_t k = from;
      for (; k + kWidth <= until; k += kWidth) store(g + k, activate(load<Floats>(g + k)) * load<Floats>(u + k));
      for (; k < until; ++k) g[k] = activate(spread(g[k]))[0] * u[k];
    }
  });
  multiply_in_integers(three, third, round_all(third, gated, tokens, hidden, digits), c.at, floats(y));
  return as_dtype_of(y, input);
}

int64_t fewest(int64_t bits) { return least_digits(bits == 4); }

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("least_digits(int bits) -> int");
  library.def(
      "linear_mlp_rounded(Tensor x, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor? gate_bias, Tensor? up_bias, "
      "Tensor? down_bias, int hidden, int out_features, int activation, int digits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CompositeExplicitAutograd, library) {
  library.impl("least_digits", TORCH_BOX(&autotune::fewest));
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("linear_mlp_rounded", TORCH_BOX(&autotune::linear_mlp_rounded));
}
