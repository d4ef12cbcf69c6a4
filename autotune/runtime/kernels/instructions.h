// The instructions of a program: how each reads its words, and what each thread computes.
#pragma once

#include <cstring>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "embedding.h"
#include "integer.h"
#include "team.h"
#include "token_rows.h"

namespace autotune {
namespace {

enum Code : int64_t {  // the order of CODES in autotune/runtime/steps/program/instruction.py
  kCopy, kToFloat, kWidenHalf, kWidenBf16, kNarrowHalf, kCopyInt, kCopyBool, kNegative, kInverseRoot, kRoot, kExp, kTanh,
  kSigmoid, kSilu, kRelu, kGelu, kGeluTanh, kCos, kSin, kSquare, kCube, kReciprocal, kNot,
  kAdd, kSubtract, kMultiply, kDivide, kLarger, kSmaller, kAddInt, kSubtractInt, kMultiplyInt,
  kLessInt, kLessEqualInt, kEqualInt, kAnd, kOr,
  kMean, kNormalize, kRms, kRotate, kGateSilu, kGateGeluTanh, kEmbed, kEmbedPacked, kIndexCopy,
  kArrange, kLinear, kRound, kLinearRounded, kDot, kAttend,
};

enum Share : int64_t { kSolo, kShared, kTeam };

struct Reader {
  const int64_t* at;
  const int64_t* bases;

  int64_t next() { return *at++; }
  double number() { double value;
    std::memcpy(&value, at++, sizeof(value));
    return value; }
  char* address() {
    const int64_t base = next(), offset = next();
    return base < 0 ? nullptr : reinterpret_cast<char*>(bases[base]) + offset;
  }
  float* floats() { return reinterpret_cast<float*>(address()); }
  Space space() {
    Space s{next(), {}};
    for (int64_t d = 0; d < s.dims; ++d) s.sizes[d] = next();
    return s;
  }
  Operand operand(const Space& s) {
    Operand o{address(), at};
    at += s.dims;
    return o;
  }
  Numbers factors() {
    const char* data = address();
    return {reinterpret_cast<const uint8_t*>(data), static_cast<ScalarType>(next())};
  }
};

// The rows of a space that one member computes; all rows if it works alone.
struct Part {
  int64_t first, count;
};

Part part_of(const Member& member, int64_t share, int64_t rows) {
  if (share == kSolo) return {0, rows};
  return {member.first(rows), member.last(rows) - member.first(rows)};
}

template <int kOperands>
bool narrow(Reader& in, const Member& member, int64_t share, Space& space, Operand* operands, const int* sizes) {
  space = in.space();
  for (int i = 0; i < kOperands; ++i) operands[i] = in.operand(space);
  const Part part = part_of(member, share, space.sizes[0]);
  for (int i = 0; i < kOperands; ++i) operands[i].at += part.first * operands[i].strides[0] * sizes[i];
  space.sizes[0] = part.count;
  for (int64_t d = 0; d < space.dims; ++d)
    if (!space.sizes[d]) return false;
  return true;
}

template <class Out, class In, class F>
void run_unary(Reader& in, const Member& m, int64_t share, F f) {
  static const int sizes[] = {sizeof(Out), sizeof(In)};
  Space space;
  Operand operands[2];
  if (narrow<2>(in, m, share, space, operands, sizes)) unary<Out, In>(space, operands, f);
}

template <class F>
void run_vectors(Reader& in, const Member& m, int64_t share, F f) {
  static const int sizes[] = {sizeof(float), sizeof(float)};
  Space space;
  Operand operands[2];
  if (narrow<2>(in, m, share, space, operands, sizes)) unary_vectors(space, operands, f);
}

template <class Out, class In, class F>
void run_binary(Reader& in, const Member& m, int64_t share, F f) {
  static const int sizes[] = {sizeof(Out), sizeof(In), sizeof(In)};
  Space space;
  Operand operands[3];
  if (narrow<3>(in, m, share, space, operands, sizes)) binary<Out, In>(space, operands, f);
}

void run_mean(Reader& in, const Member& m, int64_t share) {
  static const int sizes[] = {sizeof(float), sizeof(float)};
  Space space;
  Operand operands[2];  // the mean has stride 0 along the last dimension
  if (!narrow<2>(in, m, share, space, operands, sizes)) return;
  const int64_t stride = operands[1].strides[space.dims - 1];
  each_run<2>(space, operands, sizes, [&](int64_t n, char** at) {
    *reinterpret_cast<float*>(at[0]) = total(reinterpret_cast<const float*>(at[1]), n, stride) / n;
  });
}

void run_normalize(Reader& in, const Member& m, int64_t share) {
  static const int sizes[] = {sizeof(float), sizeof(float)};
  Space space;
  Operand operands[2];
  const bool any = narrow<2>(in, m, share, space, operands, sizes);
  const float *weight = in.floats(), *bias = in.floats();
  const float eps = static_cast<float>(in.number());
  if (any)
    each_run<2>(space, operands, sizes, [&](int64_t n, char** at) {
      normalize(reinterpret_cast<const float*>(at[1]), weight, bias, eps, n, reinterpret_cast<float*>(at[0]));
    });
}

void run_rms(Reader& in, const Member& m, int64_t share) {
  static const int sizes[] = {sizeof(float), sizeof(float)};
  Space space;
  Operand operands[2];
  const bool any = narrow<2>(in, m, share, space, operands, sizes);
  const float* weight = in.floats();
  const float eps = static_cast<float>(in.number());
  if (any)
    each_run<2>(space, operands, sizes, [&](int64_t n, char** at) {
      rms_row(reinterpret_cast<const float*>(at[1]), weight, eps, n, reinterpret_cast<float*>(at[0]));
    });
}

void run_rotate(Reader& in, const Member& m, int64_t share) {
  static const int sizes[] = {sizeof(float), sizeof(float), sizeof(float), sizeof(float)};
  Space space;
  Operand operands[4];
  if (!narrow<4>(in, m, share, space, operands, sizes)) return;
  each_run<4>(space, operands, sizes, [&](int64_t n, char** at) {
    const auto row = [at](int i) { return reinterpret_cast<const float*>(at[i]); };
    rotate(row(1), row(2), row(3), n, reinterpret_cast<float*>(at[0]));
  });
}

template <class F>
void run_gate(Reader& in, const Member& m, int64_t share, F curve) {
  static const int sizes[] = {sizeof(float), sizeof(float), sizeof(float)};
  Space space;
  Operand operands[3];
  if (narrow<3>(in, m, share, space, operands, sizes))
    binary_vectors(space, operands, [curve](Floats gate, Floats up) { return curve(gate) * up; });
}

bool run_embed(Reader& in, const Member& m, int64_t share) {
  const int64_t count = in.next(), rows = in.next(), row_bytes = in.next();
  const int64_t* ids = reinterpret_cast<const int64_t*>(in.address());
  const char* table = in.address();
  char* out = in.address();
  const Part part = part_of(m, share, count);
  for (int64_t i = part.first; i < part.first + part.count; ++i) {
    if (ids[i] < 0 || ids[i] >= rows) return false;
    std::memcpy(out + i * row_bytes, table + ids[i] * row_bytes, row_bytes);
  }
  return true;
}

const LookUp kLookUps[] = {look_up<Plain<float>>,  look_up<Plain<Half>>, look_up<Plain<Bf16>>,
                           look_up<Plain<int8_t>>, look_up<Int4>, look_up<Int6>};  // in the order of FORMATS

bool run_embed_packed(Reader& in, const Member& m, int64_t share) {
  const LookUp use = kLookUps[in.next()];
  const int64_t count = in.next(), rows = in.next();
  Table table{};
  table.inputs = in.next();
  table.groups = in.next();
  table.block_bytes = in.next();
  table.width = in.next();
  const int64_t* ids = reinterpret_cast<const int64_t*>(in.address());
  float* out = in.floats();
  table.numbers = reinterpret_cast<const uint8_t*>(in.address());
  table.scales = in.factors();
  table.zeros = in.factors();
  const Part part = part_of(m, share, count);
  for (int64_t i = part.first; i < part.first + part.count; ++i) {
    if (ids[i] < 0 || ids[i] >= rows) return false;
    use(table, ids[i], out + i * table.width);
  }
  return true;
}

// Copies into one slot that all rows share (a step of 0 between the rows' slots), or into a slot of each row's own.
template <class Number>
bool index_copy(Reader& in, const Member& m, int64_t share) {
  const int64_t limit = in.next(), stride = in.next();
  const int64_t* slots = reinterpret_cast<const int64_t*>(in.address());
  const int64_t step = in.next();
  static const int sizes[] = {sizeof(Number), sizeof(Number)};
  Space space;
  Operand operands[2];
  const int64_t rows = in.at[1];  // the first size of the space, of which `narrow` leaves this member's part
  if (!narrow<2>(in, m, share, space, operands, sizes)) return true;
  const int64_t first = part_of(m, share, rows).first, count = step ? space.sizes[0] : 1;
  if (step) space.sizes[0] = 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = slots[(first + i) * step];
    if (slot < 0 || slot >= limit) return false;
    Operand row[2] = {operands[0], operands[1]};
    row[0].at += (i * operands[0].strides[0] + slot * stride) * int64_t{sizeof(Number)};
    row[1].at += i * operands[1].strides[0] * int64_t{sizeof(Number)};
    unary<Number, Number>(space, row, [](Number a) { return a; });
  }
  return true;
}

bool run_index_copy(Reader& in, const Member& m, int64_t share) {
  return static_cast<ScalarType>(in.next()) == ScalarType::Half ? index_copy<Half>(in, m, share)
                                                                : index_copy<float>(in, m, share);
}

Weights shape_of(Reader& in) {
  Weights w{};
  w.rows = in.next();
  w.inputs = in.next();  // padded
  w.group = in.next();
  return w;
}

void run_arrange(Reader& in, const Member& m) {
  const Weights w = shape_of(in);
  const int64_t inputs = in.next(), tokens = in.next();
  const float* x = in.floats();
  float *target = in.floats(), *sums = in.floats();
  if (!target) {
    if (m.index == 0) add_up(w, 1, x, sums);
    return;
  }
  const int64_t count = Tiles{tokens, nullptr, nullptr}.count();
  for (int64_t i = m.first(count); i < m.last(count); ++i) arrange(w, x, tokens, inputs, i, target, sums);
}

const Kernel* const kKernels[] = {&kernel<Plain<float>>, &kernel<Plain<Half>>, &kernel<Plain<Bf16>>,
                                  &kernel<Plain<int8_t>>, &kernel<Int4>, &kernel<Int6>};  // in the same order

void run_linear(Reader& in, const Member& m) {
  const Kernel& format = *kKernels[in.next()];
  Weights w = shape_of(in);
  w.block_bytes = in.next();
  Tiles tiles{in.next(), nullptr, nullptr};
  tiles.x = in.floats();
  tiles.sums = in.floats();
  const float* bias = in.floats();
  float* y = in.floats();
  w.numbers = reinterpret_cast<const uint8_t*>(in.address());
  w.scales = in.factors();
  w.zeros = in.factors();
  multiply_blocks(format, w, tiles, bias, y, m.first(w.blocks()), m.last(w.blocks()));
}

void run_round(Reader& in, const Member& m) {
  const Weights w = shape_of(in);
  const int digits = static_cast<int>(in.next());
  const int64_t inputs = in.next(), tokens = in.next();
  const float* x = in.floats();
  const Rounded rounded = Rounded::over(in.floats(), w, tokens, digits);
  for (int64_t t = m.first(tokens); t < m.last(tokens); ++t) round_token(rounded, t, x + t * inputs, inputs);
}

// A product in integers. Each thread rounds the inputs of one token itself: that takes less time than to meet.
void run_linear_rounded(Reader& in, const Member& m) {
  const MultiplyBlocks multiply = in_integers(kKernels[in.next()]->bits);
  Weights w = shape_of(in);
  w.block_bytes = in.next();
  const int digits = static_cast<int>(in.next());
  const int64_t inputs = in.next(), tokens = in.next();
  float* x = in.floats();  // of one token as it is, of several rounded
  const float* bias = in.floats();
  float* y = in.floats();
  w.numbers = reinterpret_cast<const uint8_t*>(in.address());
  w.scales = in.factors();
  w.zeros = in.factors();
  static thread_local std::vector<float> own;
  if (tokens == 1) own.resize(Rounded::floats(w, 1, digits));
  const Rounded rounded = Rounded::over(tokens == 1 ? own.data() : x, w, tokens, digits);
  if (tokens == 1) round_token(rounded, 0, x, inputs);
  multiply(w, rounded, bias, y, m.first(w.blocks()), m.last(w.blocks()));
}

// A product with weights in torch's layout, one row after the other.
void run_dot(Reader& in, const Member& m) {
  const int64_t rows = in.next(), inputs = in.next(), tokens = in.next();
  const float *x = in.floats(), *bias = in.floats();
  float* y = in.floats();
  const float* w = in.floats();
  for (int64_t row = m.first(rows); row < m.last(rows); ++row)
    for (int64_t t = 0; t < tokens; ++t) {
      Floats part[4] = {};
      const float *a = w + row * inputs, *b = x + t * inputs;
      int64_t k = 0;
      for (; k + 4 * kWidth <= inputs; k += 4 * kWidth)
        for (int c = 0; c < 4; ++c) part[c] += load<Floats>(a + k + c * kWidth) * load<Floats>(b + k + c * kWidth);
      float dot = sum((part[0] + part[1]) + (part[2] + part[3]));
      for (; k < inputs; ++k) dot += a[k] * b[k];
      y[t * rows + row] = bias ? dot + bias[row] : dot;
    }
}

void run_attend(Reader& in, const Member& m, std::vector<float>& scratch) {
  Problem p{};
  const int64_t batch = in.next(), key_heads = in.next();
  p.heads = in.next();
  p.shared = p.heads / key_heads;
  p.depth = in.next();
  p.length = in.next();
  p.scale = static_cast<float>(in.number());
  const auto type = static_cast<ScalarType>(in.next());
  p.query = in.floats();
  for (Cache* cache : {&p.keys, &p.values}) {
    cache->at = reinterpret_cast<const uint8_t*>(in.address());
    cache->batch = in.next();
    cache->head = in.next();
    cache->slot = in.next();
  }
  p.mask.at = reinterpret_cast<const uint8_t*>(in.address());
  p.mask.additive = in.next();
  p.mask.batch = in.next();
  p.mask.head = in.next();
  float* y = in.floats();
  if (p.mask.at) p.length = reach(p.mask, batch, p.heads, p.length);
  Attention attention{p, batch, key_heads, attend_over(type), nullptr};
  const size_t needed = attention.partial_floats();
  if (m.index == 0) try {
      scratch.resize(needed);
    } catch (const std::bad_alloc&) {  // the others wait: all of them throw together, below
      scratch.clear();
    }
  m.meet();
  if (scratch.size() < needed) throw std::bad_alloc();
  attention.partials = scratch.data();
  attention.work(m.first(attention.tasks()), m.last(attention.tasks()));
  m.meet();
  attention.merge(m.first(batch * p.heads), m.last(batch * p.heads), y);
}

}  // namespace
}  // namespace autotune
