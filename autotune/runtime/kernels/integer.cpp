// Products in integers, and a gated feed-forward block of them: down(activation(gate(x)) * up(x)).
#include "integer.h"

#include "layer.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "vnni.h"
#elif defined(__AVX2__) && !defined(__AVX512F__)
#include "avx2.h"
#else
namespace autotune {
namespace {
constexpr int least_digits_of(int) { return 0; }
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

// The kernel for weights of so many bits, and so many blocks at once.
MultiplyRounded kernel_for(int bits, const Rounded& x, int blocks) {
  switch (bits) {
    case 4: return rounded_kernel<Int4>(x, blocks == 2);
    case 6: return rounded_kernel<Int6>(x, blocks == 2);
    default: return rounded_kernel<Plain<int8_t>>(x, blocks == 2);
  }
}

// Calls use(first, tokens, block, blocks) for parts of the blocks [begin, end) and of the tokens, in an order in which
// weights stay near.
template <class Use>
void for_parts(const Rounded& x, int64_t block_bytes, int64_t begin, int64_t end, Use use) {
  const int64_t most = x.tokens < kFewest ? 1 : kMostBlocks;
  const int64_t near = std::max(most, kNearBytes / block_bytes / most * most);
  for (int64_t from = begin; from < end; from += near)
    for (int64_t first = 0; first < x.tokens; first += kTogether)
      for (int64_t block = from; block < std::min(end, from + near); block += most)
        use(first, static_cast<int>(x.together(first)), block, static_cast<int>(std::min(most, end - block)));
}

// Computes the blocks [begin, end) of outputs y [tokens, rows] for all tokens.
template <int kBits>
void multiply_blocks_rounded(const Weights& w, const Rounded& x, const float* bias, float* y, int64_t begin,
                             int64_t end) {
  Floats out[kTogether * kMostBlocks * kStrips];
  for_parts(x, w.block_bytes, begin, end, [&](int64_t first, int tokens, int64_t block, int blocks) {
    kernel_for(kBits, x, blocks)(w, x, first, tokens, block, out);
    for (int t = 0; t < tokens; ++t)
      for (int v = 0; v < blocks * kStrips; ++v)
        put(w, block * kRows + v * kWidth, out[t * blocks * kStrips + v], bias, y + (first + t) * w.rows);
  });
}

// One factor of a gated product.
struct Factor {
  Weights w;
  int bits;
  const float* bias;

  Floats biased(Floats v, int64_t row) const {  // the outputs from `row` on, as many as there are
    if (!bias) return v;
    if (row + kWidth <= w.rows) return v + load<Floats>(bias + row);
    for (int64_t j = 0; row + j < w.rows; ++j) v[j] += bias[row + j];
    return v;
  }
};

// Computes the blocks [begin, end) of activation(gate(x)) * up(x), y [tokens, rows], for all tokens.
void multiply_gated(const Factor& gate, const Factor& up, Curve activation, const Rounded& x, float* y, int64_t begin,
                    int64_t end) {
  Floats one[kTogether * kMostBlocks * kStrips], two[kTogether * kMostBlocks * kStrips];
  for_parts(x, gate.w.block_bytes + up.w.block_bytes, begin, end, [&](int64_t first, int tokens, int64_t block, int blocks) {
    kernel_for(gate.bits, x, blocks)(gate.w, x, first, tokens, block, one);
    kernel_for(up.bits, x, blocks)(up.w, x, first, tokens, block, two);
    for (int t = 0; t < tokens; ++t)
      for (int v = 0; v < blocks * kStrips; ++v) {
        const int64_t row = block * kRows + v * kWidth, at = t * blocks * kStrips + v;
        const Floats gated = activation(gate.biased(one[at], row)) * up.biased(two[at], row);
        put(gate.w, row, gated, nullptr, y + (first + t) * gate.w.rows);
      }
  });
}

}  // namespace

int least_digits(int bits) { return least_digits_of(bits); }

void round_token(const Rounded& to, int64_t t, const float* x, int64_t inputs) { round(to, t, x, inputs); }

MultiplyBlocks in_integers(int bits) {
  return bits == 4 ? multiply_blocks_rounded<4> : bits == 6 ? multiply_blocks_rounded<6> : multiply_blocks_rounded<8>;
}

namespace {

// Products in integers, of inputs with so many digits.
class InIntegers {
 public:
  using Unit = float;
  using Laid = Rounded;
  static constexpr int64_t kRows = kLeastTokens;

  InIntegers(int64_t digits, Curve activation) : digits_(static_cast<int>(digits)), activation_(activation) {}

  Rounded reserve(const Linear& like, int64_t rows, Scratch<float>& scratch) const {
    const Weights& w = like.w.packed;
    return Rounded::over(scratch.room(Rounded::floats(w, rows, digits_)), w, rows, digits_);
  }
  static void lay(const Rounded& to, int64_t first, int64_t count, const float* rows, int64_t width) {
    for (int64_t i = 0; i < count; ++i) round_token(to, first + i, rows + i * width, width);
  }
  static void close(const Rounded&) {}
  static bool divides(int64_t) { return true; }
  void require(const Linear& linear) const {
    const Weights& w = linear.w.packed;
    STD_TORCH_CHECK(w.numbers && linear.bits <= 8, "products in integers are for INT8, INT6 and INT4 weights");
    STD_TORCH_CHECK(w.scales && (w.zeros || linear.bits != 4),
                    "INT8 and INT6 weights need scales, INT4 weights scales and zeros");
    STD_TORCH_CHECK(digits_here(digits_, linear.bits), "this processor has no instructions for products in integers");
  }
  Factor factor(const Rounded& x, const Linear& linear) const {
    const Weights& w = linear.w.packed;
    STD_TORCH_CHECK(w.inputs == x.width && span_of(w.group) == x.span,
                    "gate and up must round their inputs alike, and so must queries, keys and values");
    return {w, linear.bits, linear.bias};
  }
  void multiply(const Rounded& x, const Linear& linear, const Tensor& y) const {
    const Factor f = factor(x, linear);
    multiply_in_integers(in_integers(f.bits), f.w, x, f.bias, floats(y));
  }
  void mlp(const Rounded& x, const Linear& gate, const Linear& up, const Linear& down, const Tensor& y) const {
    const Factor first = factor(x, gate), second = factor(x, up);
    const int64_t hidden = gate.w.outputs;
    static thread_local Scratch<float> scratch;
    float* gated = scratch.room(x.tokens * hidden);
    on_threads(0, first.w.blocks(), 1, [&](int64_t begin, int64_t end) {
      multiply_gated(first, second, activation_, x, gated, begin, end);
    });
    multiply(round_all(down.w.packed, gated, x.tokens, hidden, digits_), down, y);
  }

 private:
  int digits_;
  Curve activation_;
};

Tensor linear_mlp_rounded(const Tensor& input, const Parts& gate, const Parts& up, const Parts& down,
                          const Maybe& gate_bias, const Maybe& up_bias, const Maybe& down_bias, int64_t hidden,
                          int64_t outputs, int64_t activation, int64_t digits) {
  const InIntegers kind(digits, curve_of(activation));
  const Tensor y = empty_floats(shape_of(input, outputs)), x = contiguous_floats(input);
  const int64_t inputs = input.size(input.dim() - 1), tokens = input.numel() / inputs;
  Given read;
  const Linear first = read.linear(gate, gate_bias, hidden, inputs), second = read.linear(up, up_bias, hidden, inputs),
               third = read.linear(down, down_bias, outputs, hidden);
  for (const Linear* each : {&first, &second, &third}) kind.require(*each);
  if (!tokens) return as_dtype_of(y, input);
  const Rounded rounded = round_all(first.w.packed, floats(x), tokens, inputs, static_cast<int>(digits));
  kind.mlp(rounded, first, second, third, y);
  return as_dtype_of(y, input);
}

struct Integers {
  template <class Use>
  static auto with(int64_t digits, int64_t activation, Use use) {
    return use(InIntegers(digits, curve_of(activation)));
  }
};

int64_t fewest(int64_t bits) { return least_digits(static_cast<int>(bits)); }

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("least_digits(int bits) -> int");
  library.def(
      "linear_mlp_rounded(Tensor x, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor? gate_bias, Tensor? up_bias, "
      "Tensor? down_bias, int hidden, int out_features, int activation, int digits) -> Tensor");
  library.def((std::string("layer_heads_rounded") + autotune::kLayerHeads).c_str());
  library.def((std::string("layer_end_rounded") + autotune::kLayerEnd).c_str());
  library.def((std::string("layers_rounded") + autotune::kLayers).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CompositeExplicitAutograd, library) {
  library.impl("least_digits", TORCH_BOX(&autotune::fewest));
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("linear_mlp_rounded", TORCH_BOX(&autotune::linear_mlp_rounded));
  library.impl("layer_heads_rounded", TORCH_BOX(&autotune::layer_heads<autotune::Integers>));
  library.impl("layer_end_rounded", TORCH_BOX(&autotune::layer_end<autotune::Integers>));
  library.impl("layers_rounded", TORCH_BOX(&autotune::layers<autotune::Integers>));
}
