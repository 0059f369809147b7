// The activation pool: blocks never overlap, neighbours join, threads may share it.
#include "fused_resnet/memory.h"

#include <cstring>
#include <thread>

#include "tests.h"

namespace fused_resnet::native_test {
namespace {

using cpu::pool_allocate;
using cpu::pool_free;

struct Block {
  unsigned char* data;
  int64_t bytes;
  unsigned char mark;
};

bool holds_mark(const Block& block) {
  return block.data[0] == block.mark && block.data[block.bytes / 2] == block.mark &&
         block.data[block.bytes - 1] == block.mark;
}

// Random allocations and frees; a block's contents change when another overlaps it.
// Returns what went wrong, or null.
const char* churn(uint64_t seed) {
  Random random(seed);
  std::vector<Block> live;
  const char* wrong = nullptr;
  for (int step = 0; step < 400; ++step) {
    if (live.size() < 12 && random.next() % 3 != 0) {
      const int64_t bytes = 1 + static_cast<int64_t>(random.next() % (3 * cpu::kPoolMinBytes));
      auto* data = static_cast<unsigned char*>(pool_allocate(bytes));
      if (data == nullptr || !cpu::pool_owns(data)) return "no block, or one that is not owned";
      if (reinterpret_cast<uintptr_t>(data) % 64 != 0) wrong = "not aligned to 64 bytes";
      live.push_back({data, bytes, static_cast<unsigned char>(random.next())});
      std::memset(data, live.back().mark, static_cast<size_t>(bytes));
    } else if (!live.empty()) {
      const size_t which = random.next() % live.size();
      if (!holds_mark(live[which])) wrong = "another block wrote into this one";
      pool_free(live[which].data);
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(which));
    }
    if (step % 100 == 50) cpu::pool_trim();
  }
  for (const Block& block : live) {
    if (!holds_mark(block)) wrong = "another block, or trimming, wrote into this one";
    pool_free(block.data);
  }
  return wrong;
}

}  // namespace

void test_memory(Report& report) {
  report.begin("pool: random allocations, one thread");
  if (const char* wrong = churn(1)) report.fail("%s", wrong);
  if (cpu::pool_stats().live_bytes != 0) report.fail("all is freed, yet bytes are live");

  report.begin("pool: random allocations, three threads");
  const char* wrong[3] = {};
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 3; ++i) threads.emplace_back([&wrong, i] { wrong[i] = churn(i + 2); });
  for (std::thread& thread : threads) thread.join();
  for (const char* message : wrong) {
    if (message != nullptr) report.fail("%s", message);
  }

  report.begin("pool: freed neighbours join, and the address space is used again");
  const int64_t part = 8 * cpu::kPoolMinBytes, before = cpu::pool_stats().reserved_bytes;
  std::vector<void*> parts;
  for (int i = 0; i < 8; ++i) parts.push_back(pool_allocate(part));
  for (size_t i : {3u, 1u, 5u, 7u, 0u, 2u, 6u, 4u}) pool_free(parts[i]);
  void* whole = pool_allocate(8 * part);
  if (cpu::pool_stats().reserved_bytes != before) report.fail("a block of the same total needed new address space");
  if (cpu::pool_stats().live_bytes < 8 * part || cpu::pool_stats().peak_live_bytes < 8 * part)
    report.fail("statistics");
  pool_free(whole);
  if (cpu::pool_owns(whole)) report.fail("a freed block is still owned");

  report.begin("pool: a request beyond the machine's memory gives null");
  if (pool_allocate(int64_t{1} << 60) != nullptr) report.fail("2^60 bytes");
}

}  // namespace fused_resnet::native_test
