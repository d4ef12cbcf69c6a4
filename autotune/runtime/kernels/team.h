// Threads that run one program together and meet at barriers. They come from torch's own pool, for one call.
//
// If another process takes a core, the thread on it is late at every barrier, and the others wait for a whole time
// slice. Waiting threads sleep, so that the system may move the late one to a free core. If the waiting still takes
// long, the team goes on with fewer threads: first in the running program, then in the next ones, until all are tried
// again. The results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tensors.h"

namespace autotune {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 1 << 12;  // spins before sleeping, about 100 us; a thread later than that was interrupted
constexpr int kPatience = 64;    // spins before the clock is read; most waits are shorter
constexpr int64_t kHeldUpNs = 1000000;  // shorter waits are less than a time slice and do not shrink the team
constexpr int kHeldUpShare = 3;         // the team shrinks if it waited 1/3 of the time: see `team_after`
// Programs that a smaller team runs before all threads are tried again. An interruption that comes alone is short, as when
// callers end together and take a core for some milliseconds; after others that soon follow it, the rests grow.
constexpr int kLoneRest = 1, kShortestRest = 4, kLongestRest = 64;
constexpr int kCalm = 16;  // programs of all threads without an interruption, after which the next one comes alone

inline int64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// Sleeps while the word has this value; may return earlier. On other systems than Linux, it only yields.
inline void sleep_while(std::atomic<int>& word, int value) {
#ifdef __linux__
  static_assert(sizeof(word) == sizeof(int), "a futex is an int");
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  std::this_thread::yield();
#endif
}

inline void wake_all(std::atomic<int>& word) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// How many threads go on, if the team waited for late ones `held_up_ns` of the `passed_ns` since its last change, and a
// program usually takes `usual_ns`. A wait that is short beside the whole program does not shrink the team, even if it was
// most of the time so far: with fewer threads, the rest of the program and the next ones would take longer than that.
inline int team_after(int members, int64_t held_up_ns, int64_t passed_ns, int64_t usual_ns) {
  if (held_up_ns < std::max(kHeldUpNs, usual_ns / kHeldUpShare) || kHeldUpShare * held_up_ns < passed_ns) return members;
  return members - std::max(1, members / 4);
}

// Every thread waits for all others. The last one to arrive releases them.
class Barrier {
 public:
  explicit Barrier(int64_t usual_ns) : usual_ns_(usual_ns) {}

  // Returns how many threads go on: all, or only the first ones if `may_shrink` and the waits took long.
  int wait(int members, bool may_shrink) {
    if (members == 1) return 1;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      going_on_.store(after(members, may_shrink), std::memory_order_relaxed);
      round_.store(round + 1);
      if (asleep_.load()) wake_all(round_);
    } else {
      await(round);
    }
    return going_on_.load(std::memory_order_relaxed);  // a thread that does not go on may read a later, smaller number
  }

  // Sleeps until the program is over, for threads that left the team. They must not keep a core busy.
  void await_end() {
    while (!over_.load()) sleep_while(over_, 0);
  }
  void end() {
    over_.store(1);
    wake_all(over_);
  }

 private:
  void await(int round) {
    int64_t since = 0;
    for (int spins = 0; spins < kSpins; ++spins) {
      if (round_.load(std::memory_order_acquire) != round) return;
      if (spins == kPatience) since = now_ns();
      pause_briefly();
    }
    int64_t nobody = 0;
    waiting_since_ns_.compare_exchange_strong(nobody, since, std::memory_order_relaxed);
    if (round_.load() != round) waiting_since_ns_.store(0, std::memory_order_relaxed);  // the round ended just before
    asleep_.fetch_add(1);
    while (round_.load() == round) sleep_while(round_, round);
    asleep_.fetch_sub(1);
  }

  // Decides how many threads go on. Only the last one to arrive calls it, while all others wait.
  int after(int members, bool may_shrink) {
    if (const int64_t since = waiting_since_ns_.exchange(0, std::memory_order_relaxed)) held_up_ns_ += now_ns() - since;
    if (!may_shrink || held_up_ns_ < kHeldUpNs) return members;
    const int64_t now = now_ns();
    const int going_on = team_after(members, held_up_ns_, now - start_ns_, usual_ns_);
    if (going_on < members) {
      start_ns_ = now;
      held_up_ns_ = 0;
    }
    return going_on;
  }

  const int64_t usual_ns_;

  alignas(64) std::atomic<int> arrived_{0};
  int64_t held_up_ns_ = 0, start_ns_ = now_ns();  // only the last one to arrive uses these
  alignas(64) std::atomic<int> round_{0};
  std::atomic<int> going_on_{0};
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<int> over_{0};
  std::atomic<int64_t> waiting_since_ns_{0};  // when the first thread that ran out of spins began to wait
};

// The number of threads that recent programs of this process could use.
class Crew {
 public:
  int size(int wanted) const {
    return rest_.load(std::memory_order_relaxed) > 0 ? std::min(wanted, enough_.load(std::memory_order_relaxed)) : wanted;
  }

  int begin(int wanted) {
    const int begins = size(wanted), rest = rest_.load(std::memory_order_relaxed);
    if (rest > 0) rest_.store(rest - 1, std::memory_order_relaxed);
    return begins;
  }

  // How long the latest program took that ended with as many threads as it began with; 0: unknown.
  int64_t usual_ns() const { return usual_ns_.load(std::memory_order_relaxed); }

  // Learns from a program that began with `began` threads and ended with `ended`, as many or fewer, after `took_ns`.
  void learn(int began, int ended, int64_t took_ns) {
    if (ended == began) usual_ns_.store(took_ns, std::memory_order_relaxed);
    if (ended < began) {
      const int rest = next_rest_.load(std::memory_order_relaxed);
      enough_.store(ended, std::memory_order_relaxed);
      rest_.store(rest, std::memory_order_relaxed);
      next_rest_.store(std::clamp(2 * rest, kShortestRest, kLongestRest), std::memory_order_relaxed);
      calm_.store(0, std::memory_order_relaxed);
    } else if (began > enough_.load(std::memory_order_relaxed)) {  // more threads were tried again, and none was late
      enough_.store(INT_MAX, std::memory_order_relaxed);
      next_rest_.store(kShortestRest, std::memory_order_relaxed);
    } else if (enough_.load(std::memory_order_relaxed) == INT_MAX && calm_.load(std::memory_order_relaxed) < kCalm) {
      if (calm_.fetch_add(1, std::memory_order_relaxed) + 1 == kCalm) next_rest_.store(kLoneRest, std::memory_order_relaxed);
    }
  }

 private:
  std::atomic<int64_t> usual_ns_{0};
  std::atomic<int> enough_{INT_MAX}, rest_{0}, next_rest_{kLoneRest}, calm_{0};  // callers that overlap may mix them up
};

inline Crew crew;

struct Member {
  int index, members;
  Barrier& barrier;

  // Meets within an instruction, whose work is divided by the same number of threads before and after.
  void meet() const { barrier.wait(members, false); }
  // Meets between instructions. Returns whether this thread goes on.
  bool regroup() {
    members = barrier.wait(members, true);
    return index < members;
  }
  int64_t first(int64_t count) const { return count * index / members; }
  int64_t last(int64_t count) const { return count * (index + 1) / members; }
};

// Runs `work(member)` once on each of up to `wanted` threads at the same time. The pool may give fewer threads than
// wanted, for example inside another parallel region. The thread with the first share tells the others the size of a
// share.
template <class Work>
void as_team(int wanted, Work work) {
  const int asked = crew.begin(wanted);
  int began = 1, ended = 1;
  Barrier barrier(crew.usual_ns());
  const int64_t start_ns = now_ns();
  std::atomic<int64_t> share{0};
  torch::stable::parallel_for(0, asked, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0) share.store(end, std::memory_order_release);
    while (!share.load(std::memory_order_acquire)) std::this_thread::yield();
    const int64_t size = share.load(std::memory_order_relaxed);
    Member member{static_cast<int>(begin / size), static_cast<int>((asked + size - 1) / size), barrier};
    if (member.index == 0) began = member.members;
    work(member);
    if (member.index >= member.members) barrier.await_end();
    if (member.index) return;
    ended = member.members;
    if (ended < began) barrier.end();
  });
  crew.learn(began, ended, now_ns() - start_ns);
}

}  // namespace autotune
