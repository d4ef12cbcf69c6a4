// The product x W^T + b with narrow weights and all arithmetic in FP32.
//
// Weights are stored in blocks of 16 output rows. Inside a block, the 16 numbers for one input k are neighbours. So one
// load serves 16 rows, a sum never leaves its lane, and a thread reads one contiguous stream.
//
//   one number per weight   [blocks, K, 16]
//   INT4                    [blocks, K/8, 16] words of 32 bits: input 8i + j of a row is the signed nibble j of its word i
//   INT6                    [blocks, K/8, 16] words of 32 bits, and after each 16 of them as many of 16: see Int6
//   scales, zeros           [blocks, K/group, 16]: weight = scale * number + zero
#pragma once

#include <algorithm>
#include <type_traits>

#include "tensors.h"

namespace autotune {

constexpr int kRows = 16;      // output rows in a block
constexpr int kStrips = kRows / kWidth;  // vectors that a block's outputs take
constexpr int64_t kLeastTaskBytes = 32 << 10;  // with fewer bytes, a further thread does not pay
constexpr int kStep = 8;       // inputs decoded together
constexpr int kMostTokens = 8;  // tokens served by one pass over a block's weights
constexpr int64_t kAheadBytes = 2048;  // prefetch distance; 1 to 4 KiB are equally fast, no prefetch is half as fast

template <class Number>
struct Plain {
  static constexpr int kBits = 8 * sizeof(Number);
  static constexpr int kStepBytes = kStep * kRows * kBits / 8;
  static inline Floats number(const uint8_t* at, int strip, int j) {  // of input j of eight, for a strip's rows
    return widen(reinterpret_cast<const Number*>(at) + j * kRows + strip * kWidth);
  }
};

struct Int4 {
  static constexpr int kBits = 4;
  static constexpr int kStepBytes = kStep * kRows * kBits / 8;
  static inline Floats number(const uint8_t* at, int strip, int j) {
    return nibble(load<Ints>(at + strip * kWidth * 4), 4 * j);
  }
};

// Four inputs of a row take a half of its word and a byte, where shifts bring most of them into place:
//
//   half   number 2 (six bits), number 3 (six), number 1's upper four
//   byte   number 0 (six), number 1's lower two
struct Int6 {
  static constexpr int kBits = 6;
  static constexpr int kStepBytes = kStep * kRows * kBits / 8;
  static constexpr int kWordBytes = 4 * kRows;  // of a step, in front of its bytes
  static inline Floats number(const uint8_t* at, int strip, int j) {
    const Ints word = load<Ints>(at + strip * kWidth * 4) << (j < 4 ? 16 : 0);  // the half is the upper one
    const Ints byte = upper(reinterpret_cast<const uint16_t*>(at + kWordBytes) + strip * kWidth) << (j < 4 ? 8 : 0);
    switch (j % 4) {
      case 0: return __builtin_convertvector(byte >> 26, Floats);
      case 1: return __builtin_convertvector((word << 12) >> 28 << 2 | (byte >> 24 & 3), Floats);
      case 2: return __builtin_convertvector(word >> 26, Floats);
      default: return __builtin_convertvector((word << 6) >> 26, Floats);
    }
  }
};

// The bits of a packed weight, by the dtype that its numbers are stored in.
inline int bits_of(ScalarType type) {
  switch (type) {
    case ScalarType::Int: return Int4::kBits;
    case ScalarType::Short: return Int6::kBits;
    case ScalarType::Char: return 8;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 16;
    case ScalarType::Float: return 32;
    default: STD_TORCH_CHECK(false, "packed weights are INT4 in INT32, INT6 in INT16, INT8, FP16, BF16 or FP32");
  }
}

// The inputs, with padding, of packed numbers [blocks, length, 16].
inline int64_t inputs_of(const Tensor& numbers) {
  const int64_t bytes = numbers.size(1) * static_cast<int64_t>(numbers.element_size());
  const int64_t step_bytes = bits_of(numbers.scalar_type());  // bits of a weight, and bytes of eight
  STD_TORCH_CHECK(bytes > 0 && bytes % step_bytes == 0, "packed weights need a multiple of 8 inputs");
  return bytes / step_bytes * kStep;
}

struct Weights {
  const uint8_t* numbers;
  Numbers scales, zeros;        // may be absent
  int64_t rows, inputs, group;  // inputs: K, padded to whole groups
  int64_t pad;                  // fewer than this many inputs are padding
  int64_t block_bytes;
  int64_t groups() const { return inputs / group; }
  int64_t blocks() const { return (rows + kRows - 1) / kRows; }
};

// One to eight tokens: x [K, tokens] transposed, and the sums of x over each group [groups, tokens], which zeros need.
struct Tile {
  int tokens;
  int64_t first;
  const float* x;
  const float* sums;
  const uint8_t* next = nullptr;  // weights that are used after these, or null
  int64_t next_bytes = 0;         // how many of them to fetch in each step of a pass
};

// All tokens of a product, cut into tiles of nearly equal size, one after the other.
struct Tiles {
  int64_t tokens;
  const float* x;     // [tokens * K]
  const float* sums;  // [tokens * groups], or null
  int64_t count() const { return (tokens + kMostTokens - 1) / kMostTokens; }
  int64_t first(int64_t i) const { return tokens * i / count(); }
  Tile tile(const Weights& w, int64_t i) const {
    const int64_t at = first(i);
    return {static_cast<int>(first(i + 1) - at), at, x + at * w.inputs, sums ? sums + at * w.groups() : nullptr};
  }
};

// Whether x can be used without a copy: it is one token, without padding.
inline bool in_place(const Weights& w, int64_t tokens, int64_t inputs) { return tokens == 1 && inputs == w.inputs; }

inline void add_up(const Weights& w, int tokens, const float* x, float* sums) {
  std::fill(sums, sums + w.groups() * tokens, 0.0f);
  for (int64_t k = 0; k < w.inputs; ++k)
    for (int t = 0; t < tokens; ++t) sums[k / w.group * tokens + t] += x[k * tokens + t];
}

// Lays out tile i of x [tokens, inputs] in `target` [tokens * K], and its sums in `sums` if that is not null.
inline void arrange(const Weights& w, const float* x, int64_t tokens, int64_t inputs, int64_t i, float* target,
                    float* sums) {
  const Tiles tiles{tokens, target, sums};
  const Tile tile = tiles.tile(w, i);
  float* out = target + tile.first * w.inputs;
  for (int t = 0; t < tile.tokens; ++t)
    for (int64_t k = 0; k < inputs; ++k) out[k * tile.tokens + t] = x[(tile.first + t) * inputs + k];
  std::fill(out + inputs * tile.tokens, out + w.inputs * tile.tokens, 0.0f);
  if (sums) add_up(w, tile.tokens, out, sums + tile.first * w.groups());
}

// A group's sum is made of sums over every kChains-th input, which are independent: they hide an addition's latency.
// Their number does not depend on the number of tokens, so a token's result is the same, to the bit, whoever is computed
// with it.
constexpr int kChains = kWidth == 16 ? 2 : 4;
constexpr int kMostSums = kWidth == 8 ? 8 : 16;  // that stay in registers beside what else is needed
constexpr int at_once(int sums) {  // chains, if each adds up so many sums
  return kChains * sums <= kMostSums ? kChains : std::max(1, kMostSums / sums / 2 * 2);
}

// A block's strips are computed side by side: so one load of an input serves them all, and the memory does not rest while
// a second strip reads what the first has left in the cache. Of many tokens, as many at once as have room in registers.
constexpr int kAbreast = std::min(kMostTokens, kMostSums / kStrips);

constexpr int passes(int tokens) { return kChains / at_once(kStrips * std::min(tokens, kAbreast)); }

// Adds a group's products for kCount of a tile's tokens, from token kFirst on, to sum.
template <class Format, int kTokens, int kFirst, int kCount>
inline __attribute__((always_inline)) void add_group(const uint8_t* at, const float* x, int64_t group, Tile& tile,
                                                     Floats (*sum)[kTokens]) {
  constexpr int kAtOnce = at_once(kStrips * kCount);  // chains in one pass over a group, whose weights stay in the L1 cache
  const auto pass = [&](auto chain) __attribute__((always_inline)) {
    Floats part[kStrips][kAtOnce][kCount] = {};
    const uint8_t* from = at;
    const float* input = x + kFirst;
    for (int64_t k = 0; k < group; k += kStep) {
      if (kFirst == 0 && tile.next) {
        __builtin_prefetch(tile.next);
        tile.next += tile.next_bytes;
      } else if (kFirst == 0 && chain == 0) {
        for (int line = 0; line < Format::kStepBytes; line += 64) __builtin_prefetch(from + line + kAheadBytes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) {
        const int c = j % kChains - chain;
        if (c < 0 || c >= kAtOnce) continue;
        Floats number[kStrips];
        for (int s = 0; s < kStrips; ++s) number[s] = Format::number(from, s, j);
#pragma GCC unroll 8
        for (int t = 0; t < kCount; ++t)
          for (int s = 0; s < kStrips; ++s) part[s][c][t] += number[s] * input[j * kTokens + t];
      }
      from += Format::kStepBytes;
      input += kStep * kTokens;
    }
    for (int s = 0; s < kStrips; ++s)
      for (int c = 0; c < kAtOnce; ++c)
        for (int t = 0; t < kCount; ++t) sum[s][kFirst + t] += part[s][c][t];
  };
  pass(std::integral_constant<int, 0>());
  if constexpr (kAtOnce < 2) pass(std::integral_constant<int, 1>());
  if constexpr (kAtOnce < kChains && kChains > 2) pass(std::integral_constant<int, 2>());
  if constexpr (kAtOnce < 2 && kChains > 2) pass(std::integral_constant<int, 3>());
}

// Computes one block for a tile's tokens: [strips, tokens] vectors.
template <class Format, int kTokens>
void multiply(const Weights& w, Tile tile, int64_t block, Floats* out) {
  constexpr int kCount = std::min(kTokens, kAbreast);
  const uint8_t* at = w.numbers + block * w.block_bytes;
  const float* x = tile.x;
  Floats total[kStrips][kTokens] = {};
  const int64_t groups = w.groups();
  for (int64_t g = 0; g < groups; ++g) {
    Floats sum[kStrips][kTokens] = {};
    add_group<Format, kTokens, 0, kCount>(at, x, w.group, tile, sum);
    if constexpr (kCount < kTokens) add_group<Format, kTokens, kCount, kTokens - kCount>(at, x, w.group, tile, sum);
    at += w.group / kStep * Format::kStepBytes;
    x += w.group * kTokens;
    for (int s = 0; s < kStrips; ++s) {
      const int64_t factor = (block * groups + g) * kRows + s * kWidth;
      if (w.scales) {
        Floats scale = w.scales.load(factor);
        for (int t = 0; t < kTokens; ++t) total[s][t] += scale * sum[s][t];
      } else {
        for (int t = 0; t < kTokens; ++t) total[s][t] += sum[s][t];
      }
      if (w.zeros) {
        Floats zero = w.zeros.load(factor);
        for (int t = 0; t < kTokens; ++t) total[s][t] += zero * tile.sums[g * kTokens + t];
      }
    }
  }
  for (int s = 0; s < kStrips; ++s)
    for (int t = 0; t < kTokens; ++t) out[s * kTokens + t] = total[s][t];
}

// Expands the weights of one block for the inputs [first, last) to FP32, into 16 columns of a panel [last - first, width].
// `first` and `last` are multiples of 8.
template <class Format>
void expand(const Weights& w, int64_t block, int64_t first, int64_t last, float* panel, int64_t width) {
  for (int strip = 0; strip < kStrips; ++strip) {
    const uint8_t* at = w.numbers + block * w.block_bytes + first / kStep * Format::kStepBytes;
    float* column = panel + strip * kWidth;
    for (int64_t k = first; k < last;) {
      const int64_t group = k / w.group, end = std::min(last, (group + 1) * w.group);
      const int64_t factor = (block * w.groups() + group) * kRows + strip * kWidth;
      Floats scale = w.scales ? w.scales.load(factor) : spread(1);
      Floats zero = w.zeros ? w.zeros.load(factor) : spread(0);
      for (; k < end; k += kStep, at += Format::kStepBytes, column += kStep * width) {
        for (int line = 0; line < Format::kStepBytes && !strip; line += 64) __builtin_prefetch(at + line + kAheadBytes);
#pragma GCC unroll 8
        for (int j = 0; j < kStep; ++j) store(column + j * width, Format::number(at, strip, j) * scale + zero);
      }
    }
  }
}

using Expand = void (*)(const Weights&, int64_t block, int64_t first, int64_t last, float* panel, int64_t width);

struct Kernel {
  int bits;  // of a weight
  void (*multiply[kMostTokens + 1])(const Weights&, Tile tile, int64_t block, Floats* out);
  Expand expand;
};

template <class Format>
constexpr Kernel kernel = {Format::kBits,
                           {nullptr, multiply<Format, 1>, multiply<Format, 2>, multiply<Format, 3>, multiply<Format, 4>,
                            multiply<Format, 5>, multiply<Format, 6>, multiply<Format, 7>, multiply<Format, 8>},
                           expand<Format>};

// Writes the outputs from `row` on of one token, y [rows], as many as there are.
inline void put(const Weights& w, int64_t row, Floats out, const float* bias, float* y) {
  const int64_t here = std::min<int64_t>(kWidth, w.rows - row);
  if (here == kWidth)
    store(y + row, bias ? out + load<Floats>(bias + row) : out);
  else
    for (int64_t j = 0; j < here; ++j) y[row + j] = bias ? out[j] + bias[row + j] : out[j];
}

// Computes the blocks [begin, end) of outputs y [tokens, rows] for all tokens.
inline void multiply_blocks(const Kernel& kernel, const Weights& w, const Tiles& tiles, const float* bias, float* y,
                            int64_t begin, int64_t end) {
  Floats out[kMostTokens * kStrips];
  const int64_t later = tiles.count() - 1;  // tiles after the first, while which the next block's weights are fetched
  for (int64_t block = begin; block < end; ++block)
    for (int64_t i = 0; i < tiles.count(); ++i) {
      Tile tile = tiles.tile(w, i);
      if (i && block + 1 < end) {
        tile.next = w.numbers + (block + 1) * w.block_bytes + (i - 1) * w.block_bytes / later;
        tile.next_bytes = w.block_bytes / later / (w.inputs / kStep * passes(tile.tokens));
      }
      kernel.multiply[tile.tokens](w, tile, block, out);
      for (int s = 0; s < kStrips; ++s)
        for (int t = 0; t < tile.tokens; ++t)
          put(w, block * kRows + s * kWidth, out[s * tile.tokens + t], bias, y + (tile.first + t) * w.rows);
    }
}

}  // namespace autotune
