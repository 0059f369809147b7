// Running chunks on the caller's threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "fused_resnet/types.h"

namespace fused_resnet::cpu {

// Below this many elements a thread team costs more than it saves.
inline constexpr int64_t kSerialElements = 16384;

inline bool serial(const Runner& runner, int64_t count, int64_t elements) {
  return runner.for_each == nullptr || runner.threads <= 1 || count <= 1 || elements < kSerialElements;
}

// f(begin, end) over disjoint ranges of [0, count); `elements` is the work in all.
template <class F>
void for_chunks(const Runner& runner, int64_t count, int64_t elements, const F& f) {
  if (count <= 0) return;
  if (serial(runner, count, elements)) {
    f(static_cast<int64_t>(0), count);
    return;
  }
  const Runner::Task task = [](void* arg, int64_t begin, int64_t end) { (*static_cast<const F*>(arg))(begin, end); };
  runner.for_each(count, task, const_cast<void*>(static_cast<const void*>(&f)));
}

// Items [0, count) on some workers. Each begins with its own part of them and takes half of what is left of it at a
// time; who has none left takes from the others, since cores are not all equally fast: neighbours share them.
class Shares {
 public:
  Shares(int64_t count, int64_t workers) : parts_(workers < kMost ? workers : kMost) {
    for (int64_t i = 0; i < parts_; ++i) {
      left_[i].range.store(packed(count * i / parts_, count * (i + 1) / parts_), std::memory_order_relaxed);
    }
  }
  // False: all are taken.
  bool take(int64_t worker, int64_t* begin, int64_t* end) {
    for (int64_t i = 0; i < parts_; ++i) {
      const int64_t part = (worker + i) % parts_;
      if (take_of(left_[part].range, /*front=*/part == worker, begin, end)) return true;
    }
    return false;
  }

 private:
  static constexpr int64_t kMost = 64;
  struct alignas(64) Part {
    std::atomic<uint64_t> range;
  };
  static uint64_t packed(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static bool take_of(std::atomic<uint64_t>& range, bool front, int64_t* begin, int64_t* end) {
    uint64_t now = range.load(std::memory_order_relaxed);
    for (;;) {
      const auto first = static_cast<int64_t>(now >> 32), last = static_cast<int64_t>(now & 0xffffffff);
      if (first == last) return false;
      const int64_t some = (last - first + 1) / 2;
      *begin = front ? first : last - some;
      *end = *begin + some;
      const uint64_t rest = front ? packed(first + some, last) : packed(first, last - some);
      if (range.compare_exchange_weak(now, rest, std::memory_order_relaxed)) return true;
    }
  }

  int64_t parts_;
  Part left_[kMost];
};

// f(worker, begin, end) until all of [0, count) is done, fewer than 2^32.
template <class F>
void share_items(const Runner& runner, int64_t count, int64_t workers, int64_t elements, const F& f) {
  if (serial(runner, workers, elements)) {
    if (count > 0) f(static_cast<int64_t>(0), static_cast<int64_t>(0), count);
    return;
  }
  Shares shares(count, workers);
  for_chunks(runner, workers, kSerialElements, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      int64_t begin = 0, end = 0;
      while (shares.take(worker, &begin, &end)) f(worker, begin, end);
    }
  });
}

}  // namespace fused_resnet::cpu
