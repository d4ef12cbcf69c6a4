// y = x W^T + b with the weights stored narrow and all arithmetic in FP32.
//
// Weights come in blocks of 16 output rows. Inside a block the 16 rows lie side by side: the numbers for one input k are
// neighbours, so that one load serves 16 rows, a sum never leaves its lane, and a thread reads one unbroken stream.
//
//   one number per weight   [blocks, K, 16]
//   INT4                    [blocks, K/8, 16] words of 32 bits: input 8i + j of a row is the signed nibble j of its word i
//   scales, zeros           [blocks, K/group, 16]: weight = scale * number + zero
#include "tensors.h"
#include "vectors.h"

#include <algorithm>
#include <vector>

namespace autotune {
namespace {

constexpr int kRows = 16;      // output rows in a block
constexpr int kStep = 8;       // inputs decoded together
constexpr int kMostTokens = 8;  // tokens served by one pass over a block's weights
constexpr int64_t kMostFew = 96;  // beyond, a matrix product over expanded weights is as fast: they meet near 128
constexpr int64_t kAheadBytes = 2048;  // prefetched so far ahead: 1 to 4 KiB are alike, nothing at all is half as fast
constexpr int64_t kLeastTaskBytes = 32 << 10;  // below this a second thread costs more than it saves
constexpr int64_t kPanelFloats = 1 << 18;      // the FP32 panel for many tokens: 1 MiB, it stays in the L2 cache

template <class Number>
struct Plain {
  static constexpr int kLaneBytes = sizeof(Number);
  static constexpr int kStepBytes = kStep * kRows * kLaneBytes;
  template <class Use>
  static inline void decode(const uint8_t* at, Use use) {
    for (int j = 0; j < kStep; ++j) use(j, widen(reinterpret_cast<const Number*>(at) + j * kRows));
  }
};

struct Int4 {
  static constexpr int kLaneBytes = 4;
  static constexpr int kStepBytes = kRows * kLaneBytes;
  template <class Use>
  static inline void decode(const uint8_t* at, Use use) {
    Ints word = load<Ints>(at);
    for (int j = 0; j < kStep; ++j) use(j, nibble(word, 4 * j));
  }
};

struct Weights {
  const uint8_t* numbers;
  Numbers scales, zeros;        // may be absent
  int64_t rows, inputs, group;  // inputs: K, padded to whole groups
  int64_t pad;                  // less than so many inputs are padding
  int64_t block_bytes;
  int64_t groups() const { return inputs / group; }
  int64_t blocks() const { return (rows + kRows - 1) / kRows; }
};

// One to eight tokens: x [K, tokens] transposed, and the sum of x over each group [groups, tokens] where zeros ask for it.
struct Tile {
  int tokens;
  int64_t first;
  const float* x;
  const float* sums;
};

template <class Format, int kTokens>
void multiply(const Weights& w, const Tile& tile, int64_t block, int strip, Floats* out) {
  constexpr int kChains = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;  // independent sums hide the latency of an addition
  const uint8_t* at = w.numbers + block * w.block_bytes + strip * kWidth * Format::kLaneBytes;
  const float* x = tile.x;
  Floats total[kTokens] = {};
  for (int64_t g = 0; g < w.groups(); ++g) {
    Floats part[kChains][kTokens] = {};
    for (int64_t k = 0; k < w.group; k += kStep) {
      if (strip == 0)
        for (int line = 0; line < Format::kStepBytes; line += 64) __builtin_prefetch(at + line + kAheadBytes);
      Format::decode(at, [&](int j, Floats number) __attribute__((always_inline)) {
        for (int t = 0; t < kTokens; ++t) part[j % kChains][t] += number * x[j * kTokens + t];
      });
      at += Format::kStepBytes;
      x += kStep * kTokens;
    }
    for (int c = 1; c < kChains; ++c)
      for (int t = 0; t < kTokens; ++t) part[0][t] += part[c][t];
    const int64_t factor = (block * w.groups() + g) * kRows + strip * kWidth;
    if (w.scales) {
      Floats scale = w.scales.load(factor);
      for (int t = 0; t < kTokens; ++t) total[t] += scale * part[0][t];
    } else {
      for (int t = 0; t < kTokens; ++t) total[t] += part[0][t];
    }
    if (w.zeros) {
      Floats zero = w.zeros.load(factor);
      for (int t = 0; t < kTokens; ++t) total[t] += zero * tile.sums[g * kTokens + t];
    }
  }
  for (int t = 0; t < kTokens; ++t) out[t] = total[t];
}

// The weights of one block as FP32: panel [K, width], this block's 16 columns.
template <class Format>
void expand(const Weights& w, int64_t block, float* panel, int64_t width) {
  for (int strip = 0; strip < kRows / kWidth; ++strip) {
    const uint8_t* at = w.numbers + block * w.block_bytes + strip * kWidth * Format::kLaneBytes;
    float* column = panel + strip * kWidth;
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t factor = (block * w.groups() + g) * kRows + strip * kWidth;
      Floats scale = w.scales ? w.scales.load(factor) : spread(1);
      Floats zero = w.zeros ? w.zeros.load(factor) : spread(0);
      for (int64_t k = 0; k < w.group; k += kStep) {
        Format::decode(at, [&](int j, Floats number) { store(column + j * width, number * scale + zero); });
        at += Format::kStepBytes;
        column += kStep * width;
      }
    }
  }
}

struct Kernel {
  void (*multiply[kMostTokens + 1])(const Weights&, const Tile&, int64_t block, int strip, Floats* out);
  void (*expand)(const Weights&, int64_t block, float* panel, int64_t width);
};

template <class Format>
constexpr Kernel kernel = {{nullptr, multiply<Format, 1>, multiply<Format, 2>, multiply<Format, 3>, multiply<Format, 4>,
                            multiply<Format, 5>, multiply<Format, 6>, multiply<Format, 7>, multiply<Format, 8>},
                           expand<Format>};

// x [M, K] cut into tiles of nearly equal size; a single token that needs no padding is used where it lies.
std::vector<Tile> cut(const float* x, int64_t tokens, int64_t inputs, const Weights& w, std::vector<float>& scratch) {
  const int64_t count = (tokens + kMostTokens - 1) / kMostTokens;
  const bool in_place = tokens == 1 && inputs == w.inputs;
  scratch.assign((in_place ? 0 : tokens * w.inputs) + (w.zeros ? tokens * w.groups() : 0), 0.0f);
  float* free = scratch.data();
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = tokens * i / count, size = tokens * (i + 1) / count - first;
    Tile tile{static_cast<int>(size), first, x, nullptr};
    if (!in_place) {
      for (int64_t t = 0; t < size; ++t)
        for (int64_t k = 0; k < inputs; ++k) free[k * size + t] = x[(first + t) * inputs + k];
      tile.x = free;
      free += size * w.inputs;
    }
    if (w.zeros) {
      for (int64_t k = 0; k < w.inputs; ++k)
        for (int64_t t = 0; t < size; ++t) free[k / w.group * size + t] += tile.x[k * size + t];
      tile.sums = free;
      free += size * w.groups();
    }
    tiles.push_back(tile);
  }
  return tiles;
}

void multiply_few(const Kernel& kernel, const Weights& w, const float* x, int64_t tokens, int64_t inputs,
                  const float* bias, float* y) {
  static thread_local std::vector<float> scratch;
  const std::vector<Tile> tiles = cut(x, tokens, inputs, w, scratch);
  const int64_t grain = std::max<int64_t>(1, kLeastTaskBytes / w.block_bytes);
  torch::stable::parallel_for(0, w.blocks(), grain, [&](int64_t begin, int64_t end) {
    Floats out[kMostTokens];
    for (int64_t block = begin; block < end; ++block)
      for (const Tile& tile : tiles)
        for (int strip = 0; strip < kRows / kWidth; ++strip) {
          kernel.multiply[tile.tokens](w, tile, block, strip, out);
          const int64_t row = block * kRows + strip * kWidth;
          const int64_t here = std::min<int64_t>(kWidth, w.rows - row);
          for (int t = 0; t < tile.tokens; ++t) {
            float* target = y + (tile.first + t) * w.rows + row;
            if (here == kWidth)
              store(target, bias ? out[t] + load<Floats>(bias + row) : out[t]);
            else
              for (int64_t i = 0; i < here; ++i) target[i] = bias ? out[t][i] + bias[row + i] : out[t][i];
          }
        }
  });
}

// Many tokens: expand some blocks to FP32, then let the platform's matrix product do what it is best at.
void multiply_many(const Kernel& kernel, const Weights& w, const Tensor& x, const float* bias, const Tensor& y) {
  static thread_local Tensor panel = empty_floats({kPanelFloats});
  const int64_t tokens = x.size(0), inputs = x.size(1);
  const int64_t width = std::clamp<int64_t>(kPanelFloats / w.inputs / kRows, 1, w.blocks()) * kRows;
  if (width * w.inputs > panel.numel()) panel = empty_floats({width * w.inputs});
  float* columns = floats(panel);
  for (int64_t row = 0; row < w.rows; row += width) {
    const int64_t here = std::min(width, w.rows - row), blocks = (here + kRows - 1) / kRows;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernel.expand(w, row / kRows + i, columns + i * kRows, width);
    });
    multiply_into(x, view(panel, {inputs, here}, width, 0), view(y, {tokens, here}, w.rows, row));
  }
  if (!bias) return;
  torch::stable::parallel_for(0, tokens, 16, [&, out = floats(y)](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t n = 0; n < w.rows; ++n) out[t * w.rows + n] += bias[n];
  });
}

Tensor linear(const Kernel& kernel, const Weights& w, const Tensor& input, const std::optional<Tensor>& bias) {
  const auto sizes = input.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  STD_TORCH_CHECK(!shape.empty() && shape.back() <= w.inputs && shape.back() > w.inputs - std::max<int64_t>(w.pad, 1),
                  "x does not have the number of inputs that the weights were packed for (", w.inputs, " after padding)");
  const int64_t inputs = shape.back(), tokens = input.numel() / inputs;
  shape.back() = w.rows;
  const Tensor x = contiguous_floats(input), y = empty_floats(shape);
  std::optional<Tensor> shift;
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == w.rows, "the bias has ", bias->numel(), " numbers for ", w.rows, " outputs");
    shift = contiguous_floats(*bias);
  }
  const float* added = shift ? floats(*shift) : nullptr;
  if (tokens && tokens <= kMostFew)
    multiply_few(kernel, w, floats(x), tokens, inputs, added, floats(y));
  else if (tokens)
    multiply_many(kernel, w, view(x, {tokens, inputs}, inputs, 0), added, y);
  return as_dtype_of(y, input);
}

Weights packed(const Tensor& numbers, int inputs_per_number, int64_t rows) {
  Weights w{};
  w.numbers = static_cast<const uint8_t*>(numbers.data_ptr());
  w.rows = rows;
  STD_TORCH_CHECK(numbers.is_contiguous() && numbers.dim() == 3 && numbers.size(0) == w.blocks() &&
                      numbers.size(2) == kRows,
                  "packed weights for ", rows, " outputs must be contiguous [", w.blocks(), ", K, 16]");
  w.group = w.inputs = numbers.size(1) * inputs_per_number;
  w.pad = kStep;
  w.block_bytes = numbers.size(1) * kRows * numbers.element_size();
  STD_TORCH_CHECK(w.inputs % kStep == 0, "packed weights need a multiple of 8 inputs, not ", w.inputs);
  return w;
}

Numbers per_group(Weights& w, const Tensor& factors) {
  STD_TORCH_CHECK(factors.is_contiguous() && factors.dim() == 3 && factors.size(0) == w.blocks() &&
                      factors.size(1) > 0 && w.inputs % (factors.size(1) * kStep) == 0 && factors.size(2) == kRows,
                  "scales and zeros must be contiguous [", w.blocks(), ", groups, 16] with groups of a multiple of 8");
  w.group = w.inputs / factors.size(1);
  w.pad = factors.size(1) == 1 ? kStep : w.group;
  return Numbers::of(factors);
}

Tensor linear_f16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t rows) {
  const Weights w = packed(weight, 1, rows);
  switch (weight.scalar_type()) {
    case ScalarType::Half: return linear(kernel<Plain<Half>>, w, x, bias);
    case ScalarType::BFloat16: return linear(kernel<Plain<Brain>>, w, x, bias);
    case ScalarType::Float: return linear(kernel<Plain<float>>, w, x, bias);
    default: STD_TORCH_CHECK(false, "linear_f16 takes weights in FP16, BF16 or FP32");
  }
}

Tensor linear_i8(const Tensor& x, const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& bias,
                 int64_t rows) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "linear_i8 takes INT8 weights");
  Weights w = packed(weight, 1, rows);
  w.scales = per_group(w, scales);
  return linear(kernel<Plain<int8_t>>, w, x, bias);
}

Tensor linear_i4(const Tensor& x, const Tensor& words, const Tensor& scales, const Tensor& zeros,
                 const std::optional<Tensor>& bias, int64_t rows) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int, "linear_i4 takes eight weights in each INT32");
  STD_TORCH_CHECK(scales.dim() == 3 && zeros.dim() == 3 && scales.size(1) == zeros.size(1),
                  "linear_i4 takes as many zeros as scales");
  Weights w = packed(words, kStep, rows);
  w.scales = per_group(w, scales);
  w.zeros = per_group(w, zeros);
  return linear(kernel<Int4>, w, x, bias);
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("linear_f16(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  library.def("linear_i8(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int out_features) -> Tensor");
  library.def("linear_i4(Tensor x, Tensor packed, Tensor scales, Tensor zeros, Tensor? bias, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("linear_f16", TORCH_BOX(&autotune::linear_f16));
  library.impl("linear_i8", TORCH_BOX(&autotune::linear_i8));
  library.impl("linear_i4", TORCH_BOX(&autotune::linear_i4));
}
