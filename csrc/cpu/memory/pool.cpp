#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#include "fused_resnet/memory.h"

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
// Address space is asked for in large pieces so that neighbours can be joined.
// Untouched pages cost nothing. The smaller pieces are for limited address spaces.
constexpr int64_t kSegments[] = {int64_t{16} << 30, int64_t{1} << 30, 0};
constexpr int64_t kGranule = 4096;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t physical_memory() {
  static const int64_t bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  return bytes;
}

class Pool {
 public:
  void* allocate(int64_t bytes) {
    // The system promises untouched memory without limit, and kills a process that uses it.
    if (bytes > physical_memory()) return nullptr;
    const int64_t size = round_up(std::max<int64_t>(bytes, 1), kGranule);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto hole = first_fit(size);
    if (hole == free_.end()) {
      if (!grow(size)) return nullptr;
      hole = first_fit(size);
    }
    const auto [address, have] = *hole;
    free_.erase(hole);
    if (have > size) free_.emplace(address + size, have - size);
    live_.emplace(address, size);
    stats_.live_bytes += size;
    stats_.peak_live_bytes = std::max(stats_.peak_live_bytes, stats_.live_bytes);
    return address;
  }

  bool owns(const void* p) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return live_.count(static_cast<char*>(const_cast<void*>(p))) != 0;
  }

  void free(void* p) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto block = live_.find(static_cast<char*>(p));
    if (block == live_.end()) return;
    char* address = block->first;
    int64_t size = block->second;
    live_.erase(block);
    stats_.live_bytes -= size;
    const auto next = free_.find(address + size);
    if (next != free_.end() && segments_.count(next->first) == 0) {
      size += next->second;
      free_.erase(next);
    }
    const auto after = free_.lower_bound(address);
    if (after != free_.begin() && segments_.count(address) == 0) {
      const auto before = std::prev(after);
      if (before->first + before->second == address) {
        before->second += size;
        return;
      }
    }
    free_.emplace(address, size);
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  PoolStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [address, size] : free_) madvise(address, static_cast<size_t>(size), MADV_DONTNEED);
  }

 private:
  using Holes = std::map<char*, int64_t>;

  // The lowest address. What a training step keeps is freed in reverse order, so that blocks pile up without holes
  // from the bottom and the touched part stays close to the live one; best fit scatters them (measured: twice as much).
  Holes::iterator first_fit(int64_t size) {
    return std::find_if(free_.begin(), free_.end(), [size](const auto& hole) { return hole.second >= size; });
  }

  // Segments are cut to huge-page boundaries; a segment's start is never joined
  // with what happens to lie before it.
  bool grow(int64_t size) {
    for (const int64_t segment : kSegments) {
      const int64_t want = std::max(segment, round_up(size, kHugePage));
      const int64_t mapped = want + kHugePage;
      void* raw = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (raw == MAP_FAILED) continue;
      char* const begin = static_cast<char*>(raw);
      char* const aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(begin), kHugePage));
      if (aligned > begin) munmap(begin, static_cast<size_t>(aligned - begin));
      const int64_t rest = mapped - (aligned - begin) - want;
      if (rest > 0) munmap(aligned + want, static_cast<size_t>(rest));
      madvise(aligned, static_cast<size_t>(want), MADV_HUGEPAGE);  // a hint: refusal is no error
      segments_.insert(aligned);
      stats_.reserved_bytes += want;
      free_.emplace(aligned, want);
      return true;
    }
    return false;
  }

  std::mutex mutex_;
  Holes free_;  // by address
  std::unordered_map<char*, int64_t> live_;
  std::set<char*> segments_;
  PoolStats stats_;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const instance = [] {
    // A forked child must not inherit a lock that some other thread held.
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
    return new Pool;
  }();
  return *instance;
}

}  // namespace

void* pool_allocate(int64_t bytes) { return pool().allocate(bytes); }
bool pool_owns(const void* p) { return pool().owns(p); }
void pool_free(void* p) { pool().free(p); }
PoolStats pool_stats() { return pool().stats(); }
void pool_trim() { pool().trim(); }

}  // namespace fused_resnet::cpu
