// FP32 products on any native vectors. Chunks are stored as [32 rows][32] and [32][32 columns].
#pragma once

#include "blocks.h"

namespace autotune {
namespace {

struct Singles {
  using Unit = float;
  static constexpr bool kBf16 = false;
  static constexpr int64_t kPanelUnits = kSide * kSide;  // numbers of one chunk

  static void put(float* panel, int row, int64_t k, Floats v) {
    store(panel + k / kSide * kPanelUnits + row * kSide + k % kSide, v);
  }

  static void fill_rows(float* chunk, int half, const float* at, int64_t stride) {
    for (int k = 0; k < kSide; ++k) std::memcpy(chunk + k * kSide + half * kHalf, at + k * stride, kHalf * sizeof(float));
  }

  static void fill_columns(float* chunk, int half, const float* at, int64_t stride) {
    for (int k = 0; k < kSide; ++k)
      for (int n = 0; n < kHalf; ++n) chunk[k * kSide + half * kHalf + n] = at[n * stride + k];
  }

  static void multiply(const float* a, const float* b, int64_t chunks, int rows, const float* start, int64_t start_stride,
                       float* c, int64_t stride) {
    constexpr int kVectors = kSide / kWidth, kTogether = kWidth == 16 ? 8 : 3;
    int row = 0;
    for (; row + kTogether <= rows; row += kTogether)
      multiply_rows<kTogether, kVectors>(a + row * kSide, b, chunks, start + row * start_stride, start_stride,
                                         c + row * stride, stride);
    for (; row < rows; ++row)
      multiply_rows<1, kVectors>(a + row * kSide, b, chunks, start + row * start_stride, start_stride, c + row * stride,
                                 stride);
  }

 private:
  template <int kCount, int kVectors>
  static void multiply_rows(const float* a, const float* b, int64_t chunks, const float* start, int64_t start_stride,
                            float* c, int64_t stride) {
    Floats total[kCount][kVectors];
    for (int r = 0; r < kCount; ++r)
      for (int v = 0; v < kVectors; ++v) total[r][v] = load<Floats>(start + r * start_stride + v * kWidth);
    for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kPanelUnits, b += kPanelUnits)
      for (int k = 0; k < kSide; ++k)
        for (int v = 0; v < kVectors; ++v) {
          const Floats column = load<Floats>(b + k * kSide + v * kWidth);
          for (int r = 0; r < kCount; ++r) total[r][v] += column * a[r * kSide + k];
        }
    for (int r = 0; r < kCount; ++r)
      for (int v = 0; v < kVectors; ++v) store(c + r * stride + v * kWidth, total[r][v]);
  }
};

}  // namespace
}  // namespace autotune
