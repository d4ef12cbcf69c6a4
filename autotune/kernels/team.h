// Threads that run one program together and meet at barriers, borrowed from torch's own pool for the time of one call.
#pragma once

#include <atomic>
#include <thread>

#include "tensors.h"

namespace autotune {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 1 << 14;  // about a hundred microseconds; then another process may want the core

template <class Done>
inline void wait_until(Done done) {
  for (int spins = 0; !done(); ++spins)
    if (spins < kSpins)
      pause_briefly();
    else
      std::this_thread::yield();
}

// Everyone waits for everyone: the last to arrive lets the others go.
class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

struct Member {
  int index, members;
  Barrier& barrier;

  void meet() const { barrier.wait(members); }
  int64_t first(int64_t count) const { return count * index / members; }
  int64_t last(int64_t count) const { return count * (index + 1) / members; }
};

// Runs `work(member)` once on each of up to `wanted` threads at the same time. The pool may give fewer than asked for
// (inside another parallel region, say); whoever gets the first share tells the others how large the shares are.
template <class Work>
void as_team(int wanted, Work work) {
  Barrier barrier;
  std::atomic<int64_t> share{0};
  torch::stable::parallel_for(0, wanted, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0) share.store(end, std::memory_order_release);
    wait_until([&] { return share.load(std::memory_order_acquire) != 0; });
    const int64_t size = share.load(std::memory_order_relaxed);
    work(Member{static_cast<int>(begin / size), static_cast<int>((wanted + size - 1) / size), barrier});
  });
}

}  // namespace autotune
