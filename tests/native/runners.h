// Ways to run a kernel's chunks. All must give the same bits.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "fused_resnet/types.h"

namespace fused_resnet::native_test {

// Ranges of 1, 2, 3, 1, 2 ... chunks, the last one first.
inline Runner shuffled_runner() {
  auto for_each = [](int64_t count, Runner::Task task, void* arg) {
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (int64_t begin = 0, size = 1; begin < count; begin += size, size = size % 3 + 1) {
      ranges.emplace_back(begin, std::min(begin + size, count));
    }
    for (auto range = ranges.rbegin(); range != ranges.rend(); ++range) task(arg, range->first, range->second);
  };
  return {for_each, 5};
}

// Three threads, or another number, an equal share each, as at::parallel_for would.
template <int kThreads = 3>
inline Runner threaded_runner() {
  auto for_each = [](int64_t count, Runner::Task task, void* arg) {
    const int64_t share = (count + kThreads - 1) / kThreads;
    std::vector<std::thread> threads;
    for (int64_t begin = 0; begin < count; begin += share) {
      threads.emplace_back(task, arg, begin, std::min(begin + share, count));
    }
    for (std::thread& thread : threads) thread.join();
  };
  return {for_each, kThreads};
}

}  // namespace fused_resnet::native_test
