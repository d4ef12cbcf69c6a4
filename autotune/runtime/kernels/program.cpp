// Runs a recorded decode step: instructions over fixed memory, by one team of threads, without decisions at run time.
//
// A program is a sequence of INT64 words. The first is the number of addresses that it needs. Every instruction begins
// with its length, its code, how threads share it and whether all threads meet before it. The words after that depend
// on the code. Memory is named by a base (an index into the table of addresses that the call passes) and an offset in
// bytes, so that one program serves any cache of its shape. autotune/runtime/steps/program writes the program and
// checks the tensors at the addresses.
#include "instructions.h"

#include <chrono>
#include <optional>

namespace autotune {
namespace {

constexpr int64_t kHeader = 4;  // words at the start of every instruction

// Returns false if an index was outside its table.
bool run_instruction(int64_t code, int64_t share, Reader& in, const Member& m, std::vector<float>& scratch) {
  using I = int64_t;
  switch (code) {
    case kCopy: run_unary<float, float>(in, m, share, [](float a) { return a; }); break;
    case kToFloat: run_unary<float, I>(in, m, share, [](I a) { return static_cast<float>(a); }); break;
    case kWidenHalf: run_unary<float, Half>(in, m, share, [](const Half& a) { return widen_one(&a); }); break;
    case kWidenBf16: run_unary<float, Bf16>(in, m, share, [](const Bf16& a) { return widen_one(&a); }); break;
    case kNarrowHalf: run_unary<Half, float>(in, m, share, narrow_one); break;
    case kCopyInt: run_unary<I, I>(in, m, share, [](I a) { return a; }); break;
    case kCopyBool: run_unary<uint8_t, uint8_t>(in, m, share, [](uint8_t a) { return a; }); break;
    case kNegative: run_unary<float, float>(in, m, share, [](float a) { return -a; }); break;
    case kInverseRoot: run_unary<float, float>(in, m, share, [](float a) { return 1 / std::sqrt(a); }); break;
    case kRoot: run_unary<float, float>(in, m, share, [](float a) { return std::sqrt(a); }); break;
    case kExp: run_unary<float, float>(in, m, share, [](float a) { return std::exp(a); }); break;
    case kTanh: run_vectors(in, m, share, hyperbolic_tangent); break;
    case kSigmoid: run_vectors(in, m, share, sigmoid); break;
    case kSilu: run_vectors(in, m, share, silu); break;
    case kRelu: run_unary<float, float>(in, m, share, [](float a) { return a < 0 ? 0 : a; }); break;
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
    case kLarger: run_binary<float, float>(in, m, share, [](float a, float b) { return a > b || a != a ? a : b; }); break;
    case kSmaller: run_binary<float, float>(in, m, share, [](float a, float b) { return a < b || a != a ? a : b; }); break;
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
    case kRms: run_rms(in, m, share); break;
    case kRotate: run_rotate(in, m, share); break;
    case kGateSilu: run_gate(in, m, share, silu); break;
    case kGateGeluTanh: run_gate(in, m, share, gelu_tanh); break;
    case kEmbed: return run_embed(in, m, share);
    case kEmbedPacked: return run_embed_packed(in, m, share);
    case kIndexCopy: return run_index_copy(in, m, share);
    case kArrange: run_arrange(in, m); break;
    case kLinear: run_linear(in, m); break;
    case kRound: run_round(in, m); break;
    case kLinearRounded: run_linear_rounded(in, m); break;
    case kDot: run_dot(in, m); break;
    case kAttend: run_attend(in, m, scratch); break;
    default: return false;
  }
  return true;
}

// Measures the first thread's time for each instruction, including the wait for the others before the next one.
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

// Counts the instructions. Each must have a valid length, and the last must end with the words.
int64_t length(const int64_t* words, const int64_t* end) {
  int64_t count = 0;
  for (; words < end; words += words[0], ++count)
    STD_TORCH_CHECK(end - words >= kHeader && words[0] >= kHeader && words[0] <= end - words && words[1] >= 0 &&
                        words[1] <= kAttend && words[2] >= kSolo && words[2] <= kTeam,
                    "instruction ", count, " of the program is damaged");
  return count;
}

void run_program(const Tensor& code, const Tensor& bases, int64_t threads, const std::optional<Tensor>& spent) {
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Long && bases.scalar_type() == ScalarType::Long &&
                      code.is_contiguous() && bases.is_contiguous() && threads > 0,
                  "a program is contiguous INT64 words, with a table of INT64 addresses, for at least one thread");
  STD_TORCH_CHECK(code.numel() > 0, "a program begins with the number of its addresses");
  const int64_t* words = static_cast<const int64_t*>(present(code).data_ptr());
  const int64_t* end = words + code.numel();
  const int64_t* addresses = static_cast<const int64_t*>(present(bases).data_ptr());
  STD_TORCH_CHECK(bases.numel() >= *words, "the program needs ", *words, " addresses, and was given ", bases.numel());
  const int64_t count = length(++words, end);
  STD_TORCH_CHECK(!spent || (spent->scalar_type() == ScalarType::Long && spent->is_contiguous() &&
                             present(*spent).numel() == count),
                  "times are INT64 nanoseconds, one for each instruction");
  static thread_local std::vector<float> own;
  std::vector<float>& scratch = own;  // the calling thread's, for all threads of the team
  std::atomic<const int64_t*> failed{nullptr};
  std::atomic<bool> starved{false};
  as_team(static_cast<int>(threads), [&](Member& m) {
    std::optional<Stopwatch> watch;
    if (spent && m.index == 0) watch.emplace(static_cast<int64_t*>(spent->data_ptr()));
    for (const int64_t* at = words; at < end; at += at[0]) {
      const int64_t share = at[2];
      if (at[3] && !m.regroup()) return;
      if (watch && at != words) watch->lap();
      if (share == kSolo && m.index) continue;
      Reader in{at + kHeader, addresses};
      try {
        if (!run_instruction(at[1], share, in, m, scratch)) failed.store(at, std::memory_order_relaxed);
      } catch (const std::bad_alloc&) {  // a thread that left would be waited for
        starved.store(true, std::memory_order_relaxed);
      }
    }
    if (watch) watch->lap();
  });
  STD_TORCH_CHECK(!starved.load(), "the program found not enough memory");
  const int64_t* culprit = failed.load();
  STD_TORCH_CHECK(!culprit, "instruction ", culprit ? culprit[1] : 0, " of the program met an index outside its table");
}

// The number of threads with which the next program will begin.
int64_t team_size(int64_t wanted) { return crew.size(static_cast<int>(wanted)); }

// How many of its threads a team goes on with after waits.
int64_t next_team_size(int64_t members, int64_t held_up_ns, int64_t passed_ns, int64_t usual_ns) {
  return team_after(static_cast<int>(members), held_up_ns, passed_ns, usual_ns);
}

// With how many threads a new crew begins each program, if some programs, lost [programs] bool, lose a thread.
Tensor team_sizes(const Tensor& lost, int64_t wanted) {
  STD_TORCH_CHECK(lost.scalar_type() == ScalarType::Bool && lost.is_contiguous() && wanted > 1,
                  "expected contiguous booleans, and more than one thread");
  const bool* loses = static_cast<const bool*>(present(lost).data_ptr());
  const Tensor sizes = empty_floats({lost.numel()});
  Crew own;
  for (int64_t i = 0; i < lost.numel(); ++i) {
    const int began = own.begin(static_cast<int>(wanted));
    own.learn(began, loses[i] && began > 1 ? began - 1 : began, 0);
    floats(sizes)[i] = static_cast<float>(began);
  }
  return sizes;
}

}  // namespace
}  // namespace autotune

STABLE_TORCH_LIBRARY_FRAGMENT(autotune, library) {
  library.def("run_program(Tensor code, Tensor bases, int threads, Tensor? spent) -> ()");
  library.def("team_size(int wanted) -> int");
  library.def("team_sizes(Tensor lost, int wanted) -> Tensor");
  library.def("next_team_size(int members, int held_up_ns, int passed_ns, int usual_ns) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CPU, library) {
  library.impl("run_program", TORCH_BOX(&autotune::run_program));
  library.impl("team_sizes", TORCH_BOX(&autotune::team_sizes));
}

STABLE_TORCH_LIBRARY_IMPL(autotune, CompositeExplicitAutograd, library) {
  library.impl("team_size", TORCH_BOX(&autotune::team_size));
  library.impl("next_team_size", TORCH_BOX(&autotune::next_team_size));
}
