// Memory that a thread keeps from call to call, until `free_kept`.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace autotune {

// A block that one thread keeps; it grows as needed. All blocks of a thread are in a list.
class Kept {
 public:
  // Frees the calling thread's blocks. Returns their bytes.
  static int64_t free_all() {
    int64_t freed = 0;
    for (Kept* kept = first; kept; kept = kept->next_) {
      freed += kept->bytes_;
      kept->held_.reset();
      kept->bytes_ = 0;
    }
    return freed;
  }

 protected:
  Kept() : next_(first) { first = this; }

  void* room_of(int64_t bytes) {
    if (bytes > bytes_) {
      held_.reset();
      bytes_ = 0;
      held_.reset(::operator new(bytes, kCacheLine));
      bytes_ = bytes;
    }
    return held_.get();
  }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  static inline thread_local Kept* first = nullptr;

  struct Free {
    void operator()(void* at) const { ::operator delete(at, kCacheLine); }
  };
  std::unique_ptr<void, Free> held_;
  int64_t bytes_ = 0;
  Kept* next_;
};

// Room for numbers, aligned to cache lines. Declare it `static thread_local`.
template <class Number>
class Scratch : Kept {
 public:
  Number* room(int64_t count) { return static_cast<Number*>(room_of(count * static_cast<int64_t>(sizeof(Number)))); }
};

}  // namespace autotune
