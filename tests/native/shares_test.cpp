// Items shared out to workers: every one is done once, whoever is slow, and nobody gets what is being done.
#include <thread>

#include "parallel.h"
#include "runners.h"
#include "tests.h"

namespace fused_resnet::native_test {
namespace {

using cpu::share_items;

constexpr int kPatience = 10'000'000;
constexpr int64_t kWork = cpu::kSerialElements;

void check_once(Report& report, const std::vector<std::atomic<int>>& times) {
  for (size_t i = 0; i < times.size(); ++i) {
    if (times[i] != 1) report.fail("item %zu of %zu done %d times", i, times.size(), times[i].load());
  }
}

void check_runner(Report& report, const char* name, const Runner& runner) {
  report.begin(std::string("items are shared, ") + name);
  for (int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int64_t workers : {1, 2, 3, 5, 100}) {
      std::vector<std::atomic<int>> times(count);
      share_items(runner, count, workers, kWork, [&](int64_t worker, int64_t begin, int64_t end) {
        if (worker < 0 || worker >= workers || begin < 0 || begin >= end || end > count) {
          report.fail("worker %d of %d got [%d, %d) of %d", static_cast<int>(worker), static_cast<int>(workers),
                      static_cast<int>(begin), static_cast<int>(end), static_cast<int>(count));
        }
        for (int64_t i = begin; i < end; ++i) ++times[i];
      });
      check_once(report, times);
    }
  }
}

// A worker that waits until the others have done everything else leaves them all but what it has taken.
void check_slow_worker(Report& report) {
  report.begin("who is slow has its items taken");
  constexpr int64_t kItems = 64;
  std::atomic<int64_t> done{0}, by_slow{0};
  share_items(threaded_runner<2>(), kItems, 2, kWork, [&](int64_t worker, int64_t begin, int64_t end) {
    if (worker == 0 && by_slow == 0) {
      by_slow = end - begin;
      for (int i = 0; i < kPatience && done < kItems - (end - begin); ++i) std::this_thread::yield();
    } else if (worker == 0) {
      by_slow += end - begin;
    }
    done += end - begin;
  });
  if (by_slow > kItems / 4) report.fail("the slow worker did %d of 64", static_cast<int>(by_slow));
  if (done != kItems) report.fail("%d of 64 done", static_cast<int>(done));
}

}  // namespace

void test_shares(Report& report) {
  check_runner(report, "one thread", Runner{});
  check_runner(report, "chunks in any order", shuffled_runner());
  check_runner(report, "three threads", threaded_runner());
  check_runner(report, "eight threads", threaded_runner<8>());
  check_slow_worker(report);
}

}  // namespace fused_resnet::native_test
