// Runs a recorded decode step: instructions over fixed memory, by one team of threads, with nothing decided on the way.
//
// A program is INT64 words. Every instruction begins with its length, its code, who works on it and whether all meet
// before it; what follows depends on the code. Memory is named by a base (an index into the table of addresses that
// the call brings) and an offset in bytes, so that one program serves any cache of its shape. autotune/program writes it.
#include <chrono>
#include <cstring>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "embedding.h"
#include "linear.h"
#include "team.h"

namespace autotune {
namespace {

enum Code : int64_t {  // the order of CODES in autotune/program/instruction.py
  kCopy, kToFloat, kCopyInt, kCopyBool, kNegative, kInverseRoot, kRoot, kExp, kTanh, kSigmoid, kSilu, kRelu, kGelu,
  kGeluTanh, kCos, kSin, kSquare, kCube, kReciprocal, kNot,
  kAdd, kSubtract, kMultiply, kDivide, kLarger, kSmaller, kAddInt, kSubtractInt, kMultiplyInt,
  kLessInt, kLessEqualInt, kEqualInt, kAnd, kOr,
  kMean, kNormalize, kEmbed, kEmbedPacked, kIndexCopy, kArrange, kLinear, kDot, kAttend,
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

// The rows of a space that are this member's: all of them for whoever works alone.
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

const LookUp kLookUps[] = {look_up<float>, look_up<Half>, look_up<Brain>, look_up<int8_t>, look_up<int32_t>};

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

bool run_index_copy(Reader& in, const Member& m, int64_t share) {
  const int64_t limit = in.next(), stride = in.next();
  const int64_t slot = *reinterpret_cast<const int64_t*>(in.address());
  if (slot < 0 || slot >= limit) return false;
  static const int sizes[] = {sizeof(float), sizeof(float)};
  Space space;
  Operand operands[2];
  if (!narrow<2>(in, m, share, space, operands, sizes)) return true;
  operands[0].at += slot * stride * sizeof(float);
  unary<float, float>(space, operands, [](float a) { return a; });
  return true;
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

const Kernel* const kKernels[] = {&kernel<Plain<float>>, &kernel<Plain<Half>>, &kernel<Plain<Brain>>,
                                  &kernel<Plain<int8_t>>, &kernel<Int4>};  // the order of FORMATS, as of kLookUps

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

// Weights as torch keeps them, one row after the other.
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
  if (m.index == 0) scratch.resize(attention.partial_floats());
  m.meet();
  attention.partials = scratch.data();
  attention.work(m.first(attention.tasks()), m.last(attention.tasks()));
  m.meet();
  attention.merge(m.first(batch * p.heads), m.last(batch * p.heads), y);
}

// False where an index was outside its table.
bool run_instruction(int64_t code, int64_t share, Reader& in, const Member& m, std::vector<float>& scratch) {
  using I = int64_t;
  switch (code) {
    case kCopy: run_unary<float, float>(in, m, share, [](float a) { return a; }); break;
    case kToFloat: run_unary<float, I>(in, m, share, [](I a) { return static_cast<float>(a); }); break;
    case kCopyInt: run_unary<I, I>(in, m, share, [](I a) { return a; }); break;
    case kCopyBool: run_unary<uint8_t, uint8_t>(in, m, share, [](uint8_t a) { return a; }); break;
    case kNegative: run_unary<float, float>(in, m, share, [](float a) { return -a; }); break;
    case kInverseRoot: run_unary<float, float>(in, m, share, [](float a) { return 1 / std::sqrt(a); }); break;
    case kRoot: run_unary<float, float>(in, m, share, [](float a) { return std::sqrt(a); }); break;
    case kExp: run_unary<float, float>(in, m, share, [](float a) { return std::exp(a); }); break;
    case kTanh: run_vectors(in, m, share, hyperbolic_tangent); break;
    case kSigmoid: run_vectors(in, m, share, sigmoid); break;
    case kSilu: run_vectors(in, m, share, silu); break;
    case kRelu: run_unary<float, float>(in, m, share, [](float a) { return a > 0 ? a : 0; }); break;
    case kGelu: run_unary<float, float>(in, m, share, [](float a) { return 0.5f * a * (1 + std::erf(a * 0.70710678f)); }); break;
    case kGeluTanh: run_vectors(in, m, share, gelu_tanh); break;
    case kCos: run_unary<float, float>(in, m, share, [](float a) { return std::cos(a); }); break;
    case kSin: run_unary<float, float>(in, m, share, [](float a) { return std::sin(a); }); break;
    case kSquare: run_unary<float, float>(in, m, share, [](float a) { return a * a; }); break;
    case kCube: run_unary<float, float>(in, m, share, [](float a) { return a * a * a; }); break;
    case kReciprocal: run_unary<float, float>(in, m, share, [](float a) { return 1 / a; }); break;
    case kNot: run_unary<uint8_t, uint8_t>(in, m, share, [](uint8_t a) { return !a; }); break;
    case kAdd: run_binary<float, float>(in, m, share, [](float a, float b) { return a + b; }); break;
    case kSubtract: run_binary<float, float>(in, m, share, [](float a, float b) { return a - b; }); break;
    case kMultiply: run_binary<float, float>(in, m, share, [](float a, float b) { return a * b; }); break;
    case kDivide: run_binary<float, float>(in, m, share, [](float a, float b) { return a / b; }); break;
    case kLarger: run_binary<float, float>(in, m, share, [](float a, float b) { return a > b ? a : b; }); break;
    case kSmaller: run_binary<float, float>(in, m, share, [](float a, float b) { return a < b ? a : b; }); break;
    case kAddInt: run_binary<I, I>(in, m, share, [](I a, I b) { return a + b; }); break;
    case kSubtractInt: run_binary<I, I>(in, m, share, [](I a, I b) { return a - b; }); break;
    case kMultiplyInt: run_binary<I, I>(in, m, share, [](I a, I b) { return a * b; }); break;
    case kLessInt: run_binary<uint8_t, I>(in, m, share, [](I a, I b) { return a < b; }); break;
    case kLessEqualInt: run_binary<uint8_t, I>(in, m, share, [](I a, I b) { return a <= b; }); break;
    case kEqualInt: run_binary<uint8_t, I>(in, m, share, [](I a, I b) { return a == b; }); break;
    case kAnd: run_binary<uint8_t, uint8_t>(in, m, share, [](uint8_t a, uint8_t b) -> uint8_t { return a & b; }); break;
    case kOr: run_binary<uint8_t, uint8_t>(in, m, share, [](uint8_t a, uint8_t b) -> uint8_t { return a | b; }); break;
    case kMean: run_mean(in, m, share); break;
    case kNormalize: run_normalize(in, m, share); break;
    case kEmbed: return run_embed(in, m, share);
    case kEmbedPacked: return run_embed_packed(in, m, share);
    case kIndexCopy: return run_index_copy(in, m, share);
    case kArrange: run_arrange(in, m); break;
    case kLinear: run_linear(in, m); break;
    case kDot: run_dot(in, m); break;
    case kAttend: run_attend(in, m, scratch); break;
    default: return false;
  }
  return true;
}

// How long the first thread was at each instruction, the wait for the others before the next included.
class Stopwatch {
 public:
  explicit Stopwatch(int64_t* spent) : spent_(spent), last_(Clock::now()) {}

  void lap() {
    const auto now = Clock::now();
    *spent_++ = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  int64_t* spent_;
  Clock::time_point last_;
};

int64_t length(const int64_t* words, const int64_t* end) {
  int64_t count = 0;
  for (const int64_t* at = words; at < end; at += at[0]) ++count;
  return count;
}

void run_program(const Tensor& code, const Tensor& bases, int64_t threads, const std::optional<Tensor>& spent) {
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Long && bases.scalar_type() == ScalarType::Long &&
                      code.is_contiguous() && bases.is_contiguous() && threads > 0,
                  "a program is contiguous INT64 words, with a table of INT64 addresses, for at least one thread");
  const int64_t* words = static_cast<const int64_t*>(code.data_ptr());
  const int64_t* end = words + code.numel();
  const int64_t* addresses = static_cast<const int64_t*>(bases.data_ptr());
  STD_TORCH_CHECK(!spent || (spent->scalar_type() == ScalarType::Long && spent->is_contiguous() &&
                             spent->numel() == length(words, end)),
                  "times are INT64 nanoseconds, one for each instruction");
  static thread_local std::vector<float> own;
  std::vector<float>& scratch = own;  // the caller's, whichever thread looks at it
  std::atomic<const int64_t*> failed{nullptr};
  as_team(static_cast<int>(threads), [&](const Member& m) {
    std::optional<Stopwatch> watch;
    if (spent && m.index == 0) watch.emplace(static_cast<int64_t*>(spent->data_ptr()));
    for (const int64_t* at = words; at < end; at += at[0]) {
      const int64_t share = at[2];
      if (at[3]) m.meet();
      if (watch && at != words) watch->lap();
      if (share == kSolo && m.index) continue;
      Reader in{at + 4, addresses};
      if (!run_instruction(at[1], share, in, m, scratch)) failed.store(at, std::memory_order_relaxed);
    }
    if (watch) watch->lap();
  });
  const int64_t* culprit = failed.load();
  STD_TORCH_CHECK(!culprit, "instruction ", culprit ? culprit[1] : 0, " of the program met an index outside its table");
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("run_program(Tensor code, Tensor bases, int threads, Tensor? spent) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) { library.impl("run_program", TORCH_BOX(&autotune::run_program)); }
