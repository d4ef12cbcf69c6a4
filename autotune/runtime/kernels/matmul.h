// Products of many rows with a layer's weights. The weights stay in place and are laid out a few columns at a time.
#pragma once

#include <optional>
#include <utility>

#include "bf16.h"
#include "gang.h"
#include "linear.h"

namespace autotune {
namespace {

constexpr int64_t kGroupBytes = 768 << 10;  // laid-out weights that stay in the L2 cache while all rows use them
constexpr int64_t kLeastRows = 4;           // row blocks; with fewer, laying weights out again does not pay

// The weights of N outputs for K inputs: FP32 numbers with any strides, or the blocks of linear.h.
struct Matrix {
  int64_t outputs, inputs;
  const float* plain = nullptr;
  int64_t input_stride = 0, output_stride = 0;
  Weights packed{};
  Expand expand = nullptr;

  static Matrix of(const Tensor& weight, const std::optional<Tensor>& scales, const std::optional<Tensor>& zeros,
                   int64_t outputs, int64_t inputs);

  // Lays out the outputs from `first` on as one half of a panel of B.
  template <class Engine>
  void lay(typename Engine::Unit* panel, int half, int64_t first) const {
    const int64_t columns = std::max<int64_t>(0, outputs - first);
    if (!expand || !columns)
      return lay_columns<Engine>(panel, half, columns ? plain + first * output_stride : nullptr, input_stride,
                                 output_stride, columns, inputs);
    alignas(64) float chunk[kSide * kRows];  // stays in the L1 cache
    for (int64_t k = 0; k < inputs; k += kSide, panel += Engine::kPanelUnits) {
      const int64_t here = std::min<int64_t>(kSide, inputs - k);
      expand(packed, first / kRows, k, std::min<int64_t>(k + kSide, packed.inputs), chunk, kRows);
      std::fill(chunk + here * kRows, chunk + kSide * kRows, 0.0f);
      Engine::fill_rows(panel, half, chunk, kRows);
    }
  }
};

// Rows laid out as panels of A.
template <class Engine>
struct Panels {
  typename Engine::Unit* at;
  int64_t rows, chunks;

  int64_t count() const { return blocks_of(rows); }
  int64_t units() const { return chunks * Engine::kPanelUnits; }
  typename Engine::Unit* panel(int64_t i) const { return at + i * units(); }
  int rows_of(int64_t i) const { return static_cast<int>(std::min<int64_t>(kSide, rows - i * kSide)); }
};

template <class Engine>
Panels<Engine> reserve(Scratch<typename Engine::Unit>& scratch, int64_t rows, int64_t depth) {
  Panels<Engine> panels{nullptr, rows, blocks_of(depth)};
  panels.at = scratch.room(panels.count() * panels.units());
  return panels;
}

// Combines every row block with every column panel, on all threads. `lay(n, panel)` lays out column panel n.
// `use(m, n, rows, panel, start)` multiplies row block m by it. `start(n)` gives the 32 numbers to which products are
// added.
template <class Engine, class Lay, class Start, class Use>
void multiply_all(const Panels<Engine>& a, int64_t columns, Lay lay, Start start, Use use) {
  using Unit = typename Engine::Unit;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cuts = std::clamp<int64_t>(threads / std::max<int64_t>(columns, 1), 1,
                                           std::max<int64_t>(1, a.count() / kLeastRows));  // parts of the rows
  const int64_t group = std::max<int64_t>(1, kGroupBytes / (a.units() * static_cast<int64_t>(sizeof(Unit))));
  on_threads(0, columns * cuts, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<Unit> scratch;
    Unit* laid = scratch.room(std::min(group, end - begin) * a.units());
    const Session session(Engine::kBf16);
    while (begin < end) {
      const int64_t cut = begin / columns, first = begin % columns;
      const int64_t last = std::min({first + group, columns, first + end - begin});
      for (int64_t n = first; n < last; ++n) lay(n, laid + (n - first) * a.units());
      for (int64_t m = a.count() * cut / cuts; m < a.count() * (cut + 1) / cuts; ++m)
        for (int64_t n = first; n < last; ++n)
          use(m, n, a.panel(m), laid + (n - first) * a.units(), start(n));
      begin += last - first;
    }
  });
}

// y [rows, outputs] = a W^T + bias.
template <class Engine>
void multiply_into(const Panels<Engine>& a, const Matrix& w, const float* bias, float* y) {
  using Unit = typename Engine::Unit;
  const auto lay = [&](int64_t n, Unit* panel) {
    for (int half = 0; half < 2; ++half) w.lay<Engine>(panel, half, n * kSide + half * kHalf);
  };
  const int64_t columns = blocks_of(w.outputs);
  static thread_local Scratch<float> starts;
  float* start = starts.room(columns * kSide);
  std::fill(start, start + columns * kSide, 0.0f);
  if (bias) std::copy(bias, bias + w.outputs, start);
  multiply_all<Engine>(
      a, columns, lay, [=](int64_t n) { return start + n * kSide; },
      [&](int64_t m, int64_t n, const Unit* rows, const Unit* panel, const float* from) {
        const int here = a.rows_of(m), whole = here > kHalf ? kSide : kHalf;
        const int64_t wide = std::min<int64_t>(kSide, w.outputs - n * kSide);
        float* target = y + m * kSide * w.outputs + n * kSide;
        if (here == whole && wide == kSide)
          return Engine::multiply(rows, panel, a.chunks, here, from, 0, target, w.outputs);
        alignas(64) float block[kSide * kSide];
        Engine::multiply(rows, panel, a.chunks, whole, from, 0, block, kSide);
        for (int r = 0; r < here; ++r) std::copy(block + r * kSide, block + r * kSide + wide, target + r * w.outputs);
      });
}

template <class Format>
void set_format(Matrix& m) {
  m.expand = expand<Format>;
}

// Packed weights for `outputs` outputs, without their scales.
inline Weights packed_weights(const Tensor& numbers, int64_t outputs) {
  Weights w{};
  w.numbers = static_cast<const uint8_t*>(present(numbers).data_ptr());
  w.rows = outputs;
  STD_TORCH_CHECK(outputs > 0, "expected weights for one output or more, not ", outputs);
  STD_TORCH_CHECK(numbers.is_contiguous() && numbers.dim() == 3 && numbers.size(0) == w.blocks() && numbers.size(2) == kRows,
                  "packed weights for ", outputs, " outputs must be contiguous [", w.blocks(), ", K, 16]");
  w.group = w.inputs = inputs_of(numbers);
  w.pad = kStep;
  w.block_bytes = numbers.size(1) * kRows * numbers.element_size();
  return w;
}

// Scales or zeros of packed weights, of which they tell the groups.
inline Numbers factors(Weights& w, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous() && t.dim() == 3 && t.size(0) == w.blocks() && t.size(1) > 0 &&
                      w.inputs % (t.size(1) * kStep) == 0 && t.size(2) == kRows,
                  "scales and zeros must be contiguous [", w.blocks(), ", groups, 16] with groups of a multiple of 8");
  w.group = w.inputs / t.size(1);
  w.pad = t.size(1) == 1 ? kStep : w.group;
  return Numbers::of(t);
}

inline Matrix Matrix::of(const Tensor& weight, const std::optional<Tensor>& scales, const std::optional<Tensor>& zeros,
                         int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(outputs > 0 && inputs > 0, "expected a weight with inputs and outputs, not [", outputs, ", ", inputs, "]");
  Matrix m{outputs, inputs};
  present(weight);
  if (weight.dim() == 2) {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.size(0) == outputs && weight.size(1) == inputs &&
                        (weight.stride(0) == 1 || weight.stride(1) == 1),
                    "a plain weight must be FP32 [", outputs, ", ", inputs, "], contiguous in one of them");
    m.plain = floats(weight);
    m.output_stride = weight.stride(0);
    m.input_stride = weight.stride(1);
    return m;
  }
  switch (weight.scalar_type()) {
    case ScalarType::Int: set_format<Int4>(m); break;
    case ScalarType::Short: set_format<Int6>(m); break;
    case ScalarType::Char: set_format<Plain<int8_t>>(m); break;
    case ScalarType::Half: set_format<Plain<Half>>(m); break;
    case ScalarType::BFloat16: set_format<Plain<Bf16>>(m); break;
    default: set_format<Plain<float>>(m);  // `inputs_of` refuses other dtypes
  }
  Weights& w = m.packed = packed_weights(weight, outputs);
  STD_TORCH_CHECK(!scales || !zeros || (scales->dim() == 3 && zeros->dim() == 3 && scales->size(1) == zeros->size(1)),
                  "there must be as many zeros as scales");
  if (scales) w.scales = factors(w, *scales);
  if (zeros) w.zeros = factors(w, *zeros);
  STD_TORCH_CHECK(inputs <= w.inputs && inputs > w.inputs - w.pad,
                  "x does not have the number of inputs that the weights were packed for (", w.inputs, " after padding)");
  return m;
}

inline std::vector<int64_t> shape_of(const Tensor& input, int64_t outputs) {
  const auto sizes = input.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  STD_TORCH_CHECK(!shape.empty() && shape.back() > 0, "x must be [..., K]");
  shape.back() = outputs;
  return shape;
}

// A weight from its numbers, its scales and its zeros.
inline Matrix stored(const std::vector<Tensor>& weight, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(!weight.empty() && weight.size() <= 3, "a weight is its numbers, its scales and its zeros");
  const auto part = [&](size_t i) { return i < weight.size() ? std::optional<Tensor>(weight[i]) : std::nullopt; };
  return Matrix::of(weight[0], part(1), part(2), outputs, inputs);
}

}  // namespace
}  // namespace autotune
