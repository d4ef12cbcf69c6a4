// Products of 32 x 32 blocks: C = A B. Both operands are laid out for it once and then used many times.
//
//   Bf16Parts<1>, Bf16Parts<2>   in BF16, bf16.h
//   Singles                      in FP32, singles.h
//
// A panel of A is 32 rows and a panel of B is 32 columns. Each covers the whole depth, in chunks of 32. An engine lays
// them out
//
//   put            kWidth numbers of A
//   fill_rows      one half of one chunk of B, from memory in which columns are contiguous
//   fill_columns   the same, from memory in which the depth is contiguous
//
// and multiplies: c [rows, 32] = start + a b. `start` may be c itself, or one row for all rows (a stride of 0).
// All strides are in numbers.
#pragma once

#include <algorithm>
#include <cstring>

#include "scratch.h"
#include "vectors.h"

namespace autotune {
namespace {

constexpr int kSide = 32;  // rows, columns and depth of a block
constexpr int kHalf = 16;

inline int64_t blocks_of(int64_t count) { return (count + kSide - 1) / kSide; }

// Lays out rows of A from at[row * stride + k], times a factor. Zeros fill up the last chunk, and the rows to 32 (or to
// 16, if there are no more).
template <class Engine>
void lay_rows(typename Engine::Unit* panel, const float* at, int64_t stride, int rows, int64_t depth, float factor) {
  const int whole_rows = rows > kHalf ? kSide : kHalf;
  const int64_t whole = depth / kWidth * kWidth, end = blocks_of(depth) * kSide;
  for (int row = 0; row < whole_rows; ++row) {
    const float* from = at + row * stride;
    int64_t k = 0;
    if (row < rows) {
      for (; k < whole; k += kWidth) Engine::put(panel, row, k, load<Floats>(from + k) * factor);
      if (k < depth) {
        Floats last = {};
        std::memcpy(&last, from + k, (depth - k) * sizeof(float));
        Engine::put(panel, row, k, last * factor);
        k += kWidth;
      }
    }
    for (; k < end; k += kWidth) Engine::put(panel, row, k, Floats{});
  }
}

// Lays out one half of a panel of B from at[k * row_stride + column * column_stride], where one of the strides is 1.
// Zeros fill up the columns to 16, and the last chunk.
template <class Engine>
void lay_columns(typename Engine::Unit* panel, int half, const float* at, int64_t row_stride, int64_t column_stride,
                 int64_t columns, int64_t depth) {
  const bool across = column_stride == 1;
  for (int64_t k = 0; k < depth; k += kSide, panel += Engine::kPanelUnits) {
    const int64_t deep = std::min<int64_t>(kSide, depth - k);
    const float* from = at + k * row_stride;
    if (columns >= kHalf && deep == kSide) {
      across ? Engine::fill_rows(panel, half, from, row_stride) : Engine::fill_columns(panel, half, from, column_stride);
      continue;
    }
    alignas(64) float padded[kSide][kHalf] = {};
    for (int64_t i = 0; i < deep; ++i)
      for (int64_t n = 0; n < std::min<int64_t>(kHalf, columns); ++n)
        padded[i][n] = from[i * row_stride + n * column_stride];
    Engine::fill_rows(panel, half, padded[0], kHalf);
  }
}

}  // namespace
}  // namespace autotune
