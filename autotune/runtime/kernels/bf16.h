// BF16 products with FP32 sums, in AMX tiles or else with AVX512-BF16. Other processors get no code from this file.
//
//   Bf16Parts<1>   every number is rounded to BF16
//   Bf16Parts<2>   every number is split into two BF16 numbers, x = high + low. The product low x low is left out,
//                  which gives an error of about 2^-16. Source: Henry, Tang and Heinecke, "Leveraging the bfloat16
//                  artificial intelligence datatype for higher-precision computations", ARITH 2019.
//
//   chunk of A   [2 halves][parts][16 rows][32]
//   chunk of B   [2 halves][parts][16 pairs][16 columns][2]; a pair is the numbers 2i and 2i + 1 of a column
#pragma once

#include "blocks.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define AUTOTUNE_BF16 1
#endif
#if defined(AUTOTUNE_BF16) && defined(__AMX_BF16__) && defined(__linux__)
#define AUTOTUNE_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace autotune {
namespace {

#if defined(AUTOTUNE_TILES)
// Asks Linux for the tile registers. A process must ask once before it uses them.
inline bool has_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  return granted;
}
#else
inline bool has_tiles() { return false; }
#endif

// The unit that multiplies BF16 matrices here: 2 is AMX tiles, 1 is AVX512-BF16, 0 is none.
inline int bf16_unit() {
#if defined(AUTOTUNE_BF16)
  return has_tiles() ? 2 : 1;
#else
  return 0;
#endif
}

// Encloses a thread's products: it configures the tile registers once and releases them at the end.
class Session {
 public:
#if defined(AUTOTUNE_TILES)
  explicit Session(bool bf16) : open_(bf16 && has_tiles()) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    if (open_) _tile_loadconfig(&shape);
  }
  ~Session() {
    if (open_) _tile_release();
  }

 private:
  bool open_;
#else
  explicit Session(bool) {}
#endif
  Session(const Session&) = delete;
};

#if defined(AUTOTUNE_BF16)

inline __m512i narrow(Floats low, Floats high) {  // 32 BF16 numbers, those of the first vector first
  return bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(high), bits<__m512>(low)));
}

inline Floats rest(Floats v) {  // v minus v rounded to BF16
  const __m256bh high = _mm512_cvtneps_pbh(bits<__m512>(v));
  return v - widen(reinterpret_cast<const Bf16*>(&high));
}

inline void transpose(__m512i (&row)[kHalf]) {  // 16 x 16 words of 32 bits
  __m512i t[kHalf];
  for (int i = 0; i < kHalf; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < kHalf; i += 4)
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < kHalf; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    row[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    row[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

template <int kParts>
struct Bf16Parts {
  using Unit = uint16_t;
  static constexpr bool kBf16 = true;
  static constexpr int64_t kTileUnits = kHalf * kSide;
  static constexpr int64_t kPanelUnits = 2 * kParts * kTileUnits;
  static constexpr int64_t kAhead = 256;  // prefetch distance in numbers of a row

  static void put(Unit* panel, int row, int64_t k, Floats v) {
    Unit* at = panel + k / kSide * kPanelUnits + row / kHalf * kParts * kTileUnits + row % kHalf * kSide + k % kSide;
    for (int part = 0; part < kParts; ++part, at += kTileUnits) {
      const __m256bh narrow = _mm512_cvtneps_pbh(bits<__m512>(v));
      std::memcpy(at, &narrow, sizeof(narrow));
      if (part + 1 < kParts) v = rest(v);
    }
  }

  static void fill_rows(Unit* chunk, int half, const float* at, int64_t stride) {
    alignas(64) static constexpr uint16_t kPairs[kSide] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = load<__m512i>(kPairs);
    Unit* tile = chunk + half * kParts * kTileUnits;
    for (int i = 0; i < kHalf; ++i, at += 2 * stride) {
      Floats even = load<Floats>(at), odd = load<Floats>(at + stride);
      for (int part = 0; part < kParts; ++part) {
        const __m512i both = _mm512_permutexvar_epi16(pairs, narrow(even, odd));
        std::memcpy(tile + part * kTileUnits + i * kSide, &both, sizeof(both));
        if (part + 1 < kParts) even = rest(even), odd = rest(odd);
      }
    }
  }

  static void fill_columns(Unit* chunk, int half, const float* at, int64_t stride) {
    Unit* tile = chunk + half * kParts * kTileUnits;
    for (int part = 0; part < kParts; ++part) {  // one part at a time: two do not fit into the registers
      __m512i row[kHalf];
      for (int n = 0; n < kHalf; ++n) {
        for (int line = 0; line < 2 && !part; ++line) __builtin_prefetch(at + n * stride + kAhead + line * kHalf);
        const Floats low = load<Floats>(at + n * stride), high = load<Floats>(at + n * stride + kHalf);
        row[n] = part ? narrow(rest(low), rest(high)) : narrow(low, high);
      }
      transpose(row);
      std::memcpy(tile + part * kTileUnits, row, sizeof(row));
    }
  }

  static void multiply(const Unit* a, const Unit* b, int64_t chunks, int rows, const float* start, int64_t start_stride,
                       float* c, int64_t stride) {
#if defined(AUTOTUNE_TILES)
    if (has_tiles() && rows % kHalf == 0)
      return rows > kHalf ? multiply_tiles<2>(a, b, chunks, start, start_stride, c, stride)
                          : multiply_tiles<1>(a, b, chunks, start, start_stride, c, stride);
#endif
    constexpr int kTogether = 8;
    for (int row = 0; row < rows; row += kTogether) {
      const int count = std::min(kTogether, rows - row);
      const Unit* from = a + row / kHalf * kParts * kTileUnits + row % kHalf * kSide;
      if (count == kTogether)
        multiply_rows<kTogether>(from, b, chunks, start + row * start_stride, start_stride, c + row * stride, stride);
      else
        for (int r = 0; r < count; ++r)
          multiply_rows<1>(from + r * kSide, b, chunks, start + (row + r) * start_stride, start_stride,
                           c + (row + r) * stride, stride);
    }
  }

 private:
  template <int kCount>
  static void multiply_rows(const Unit* a, const Unit* b, int64_t chunks, const float* start, int64_t start_stride,
                            float* c, int64_t stride) {
    __m512 total[kCount][2];
    for (int r = 0; r < kCount; ++r)
      for (int half = 0; half < 2; ++half) total[r][half] = _mm512_loadu_ps(start + r * start_stride + half * kHalf);
    const auto add = [&](int a_part, int b_part) __attribute__((always_inline)) {
      for (int i = 0; i < kHalf; ++i)
        for (int half = 0; half < 2; ++half) {
          const auto column = load<__m512bh>(b + (half * kParts + b_part) * kTileUnits + i * kSide);
          for (int r = 0; r < kCount; ++r) {
            const int pair = load<int>(a + a_part * kTileUnits + r * kSide + 2 * i);
            total[r][half] = _mm512_dpbf16_ps(total[r][half], bits<__m512bh>(_mm512_set1_epi32(pair)), column);
          }
        }
    };
    for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kPanelUnits, b += kPanelUnits) {
      if (kParts > 1) add(1, 0), add(0, 1);
      add(0, 0);
    }
    for (int r = 0; r < kCount; ++r)
      for (int half = 0; half < 2; ++half) _mm512_storeu_ps(c + r * stride + half * kHalf, total[r][half]);
  }

#if defined(AUTOTUNE_TILES)
  // Tile registers: 0 to 3 hold the sums, 4 and 5 the halves of A, 6 and 7 the halves of B.
  template <int kHalves>
  static void multiply_tiles(const Unit* a, const Unit* b, int64_t chunks, const float* start, int64_t start_stride,
                             float* c, int64_t stride) {
    constexpr int64_t kNumber = sizeof(float), kLine = 64;
    _tile_loadd(0, start, start_stride * kNumber);
    _tile_loadd(1, start + kHalf, start_stride * kNumber);
    if (kHalves > 1) {
      _tile_loadd(2, start + kHalf * start_stride, start_stride * kNumber);
      _tile_loadd(3, start + kHalf * start_stride + kHalf, start_stride * kNumber);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kPanelUnits, b += kPanelUnits) {
      if (kParts > 1) {  // low x high, then high x high, then high x low, so that each change loads only one side
        _tile_loadd(4, a + kTileUnits, kLine);
        _tile_loadd(6, b, kLine);
        _tile_loadd(7, b + kParts * kTileUnits, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (kHalves > 1) {
          _tile_loadd(5, a + (kParts + 1) * kTileUnits, kLine);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_loadd(4, a, kLine);
      if (kParts == 1) {
        _tile_loadd(6, b, kLine);
        _tile_loadd(7, b + kTileUnits, kLine);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (kHalves > 1) {
        _tile_loadd(5, a + kParts * kTileUnits, kLine);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      if (kParts > 1) {
        _tile_loadd(6, b + kTileUnits, kLine);
        _tile_loadd(7, b + (kParts + 1) * kTileUnits, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (kHalves > 1) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, c, stride * kNumber);
    _tile_stored(1, c + kHalf, stride * kNumber);
    if (kHalves > 1) {
      _tile_stored(2, c + kHalf * stride, stride * kNumber);
      _tile_stored(3, c + kHalf * stride + kHalf, stride * kNumber);
    }
  }
#endif
};

#endif  // AUTOTUNE_BF16

}  // namespace
}  // namespace autotune
