// One parallel region for a whole operator: the calling thread leads, and hands out its loops to threads that stay.
//
// A region of OpenMP ends with two barriers that wake the other threads by the system, whether they sleep or not. A short
// prompt has 400 loops of some microseconds. Here the leader publishes a loop in one word, threads claim its shares, and
// the leader takes what nobody has claimed. So a thread whose core is taken delays nobody unless it holds a share.
#pragma once

#include <exception>
#include <utility>

#include "team.h"

namespace autotune {

class Gang {
 public:
  explicit Gang(int64_t threads) : threads_(std::min<int64_t>(threads, kMostShares)) {}

  // Calls use(begin, end) for all parts of a loop. As in torch's parallel_for, a part is not shorter than the grain unless
  // it is the last one. Only the leader calls it.
  template <class Use>
  void divide(int64_t begin, int64_t end, int64_t grain, const Use& use) {
    const int64_t count = end - begin, shares = std::min(threads_, (count + grain - 1) / std::max<int64_t>(1, grain));
    if (shares < 2) return count > 0 ? use(begin, end) : void();
    const int64_t size = (count + shares - 1) / shares;
    loop_ = {&use, [](const void* use, int64_t from, int64_t to) { (*static_cast<const Use*>(use))(from, to); }, begin, end,
             size};
    done_.store(0, std::memory_order_relaxed);
    const int64_t used = (count + size - 1) / size;
    publish(++loops_ << 2 * kShareBits | used << kShareBits);
    while (claim(open_.load(std::memory_order_relaxed))) {
    }
    await_done(static_cast<int>(used));
    if (failed_.load()) std::rethrow_exception(error_);
  }

  // Works on the leader's loops until it dismisses the gang.
  void serve() {
    for (int64_t seen; (seen = open_.load(std::memory_order_acquire)) != kOver;)
      if (!claim(seen)) await_other_than(seen);
  }
  void dismiss() { publish(kOver); }

 private:
  static constexpr int kShareBits = 8;
  static constexpr int64_t kMostShares = (1 << kShareBits) - 1, kOver = -1;

  struct Loop {
    const void* use;
    void (*call)(const void*, int64_t, int64_t);
    int64_t begin, end, size;
  };

  // `open_` is the number of the loop, its shares and how many of them are claimed.
  void publish(int64_t open) {
    open_.store(open);
    calls_.fetch_add(1);
    if (asleep_.load()) wake_all(calls_);
  }

  // Takes a share of the loop that was open, and works on it. Returns whether there was one.
  bool claim(int64_t seen) {
    const int64_t share = seen & kMostShares;
    if (share >= (seen >> kShareBits & kMostShares)) return false;
    if (!open_.compare_exchange_strong(seen, seen + 1, std::memory_order_acq_rel)) return true;  // another was faster
    const int64_t from = loop_.begin + share * loop_.size;  // the loop stays until this share is done
    try {
      loop_.call(loop_.use, from, std::min(loop_.end, from + loop_.size));
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    done_.fetch_add(1);
    if (leader_sleeps_.load()) wake_all(done_);
    return true;
  }

  void await_done(int shares) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (done_.load(std::memory_order_acquire) == shares) return;
      pause_briefly();
    }
    leader_sleeps_.store(1);
    for (int done; (done = done_.load()) != shares;) sleep_while(done_, done);
    leader_sleeps_.store(0);
  }

  void await_other_than(int64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (open_.load(std::memory_order_acquire) != seen) return;
      pause_briefly();
    }
    asleep_.fetch_add(1);
    const int calls = calls_.load();
    if (open_.load() == seen) sleep_while(calls_, calls);
    asleep_.fetch_sub(1);
  }

  const int64_t threads_;
  int64_t loops_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // of the first share that failed
  alignas(64) std::atomic<int64_t> open_{0};
  alignas(64) Loop loop_{};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<int> leader_sleeps_{0};
  alignas(64) std::atomic<int> calls_{0};
  std::atomic<int> asleep_{0};
};

inline thread_local Gang* led = nullptr;  // by this thread, and free for a loop

// Sets the gang that this thread leads, for as long as it exists.
class Lead {
 public:
  explicit Lead(Gang* gang) : before_(std::exchange(led, gang)) {}
  ~Lead() { led = before_; }
  Lead(const Lead&) = delete;

 private:
  Gang* const before_;
};

// Calls use(begin, end) for parts of a loop, on the threads that this thread leads, or else on torch's.
template <class Use>
void on_threads(int64_t begin, int64_t end, int64_t grain, const Use& use) {
  Gang* const gang = led;
  if (!gang) return torch::stable::parallel_for(begin, end, grain, use);
  const Lead none(nullptr);  // a loop within a loop is not divided
  gang->divide(begin, end, grain, use);
}

// Runs work(), whose loops are divided among all threads.
template <class Work>
void in_gang(Work work) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto leader = std::this_thread::get_id();
  Gang gang(threads);
  std::exception_ptr error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    if (std::this_thread::get_id() != leader) return gang.serve();
    try {
      const Lead lead(&gang);
      work();
    } catch (...) {
      error = std::current_exception();
    }
    gang.dismiss();
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace autotune
