// Rows of a packed table, as FP32.
#pragma once

#include <algorithm>

#include "linear.h"

namespace autotune {
namespace {

struct Table {
  const uint8_t* numbers;
  Numbers scales, zeros;  // may be absent
  int64_t inputs, groups, block_bytes, width;

  float factor(const Numbers& factors, int64_t i) const {
    switch (factors.type) {
      case ScalarType::Half: return widen_one(reinterpret_cast<const Half*>(factors.at) + i);
      case ScalarType::BFloat16: return widen_one(reinterpret_cast<const Bf16*>(factors.at) + i);
      default: return reinterpret_cast<const float*>(factors.at)[i];
    }
  }
};

template <class Format>
void look_up(const Table& table, int64_t row, float* out) {
  const int64_t block = row / kRows, lane = row % kRows, group = table.inputs / table.groups;
  const uint8_t* numbers = table.numbers + block * table.block_bytes;
  for (int64_t g = 0; g * group < table.width; ++g) {
    const int64_t at = (block * table.groups + g) * kRows + lane, end = std::min((g + 1) * group, table.width);
    const float scale = table.scales ? table.factor(table.scales, at) : 1, zero = table.zeros ? table.factor(table.zeros, at) : 0;
    for (int64_t k = g * group; k < end; k += kStep, numbers += Format::kStepBytes) {
      float step[kStep];
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) step[j] = Format::number(numbers, lane / kWidth, j)[lane % kWidth] * scale + zero;
      std::copy_n(step, std::min<int64_t>(kStep, end - k), out + k);
    }
  }
}

using LookUp = void (*)(const Table&, int64_t row, float* out);

}  // namespace
}  // namespace autotune
