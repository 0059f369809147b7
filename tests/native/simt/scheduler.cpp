// The scheduler: which thread runs next, and what a barrier and a warp operation wait for.
//
// The thread that must wait picks the next one itself and switches to its fibre. A fibre whose thread has finished
// takes up a thread that has not begun: kernels without barriers run on one fibre, without a switch.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace fused_resnet::simt {
namespace {

constexpr int kMaxThreads = 1024, kLanes = 32;
constexpr size_t kMaxSharedBytes = 48 << 10;  // more is for kernels that opt in, which none does
constexpr unsigned kMaxGridX = 0x7fffffffu, kMaxGridYZ = 65535, kMaxBlockZ = 64;

struct Thread {
  Fiber* fiber;  // null before it begins and after it has ended
  uint3 index;
  WarpOp op;
  unsigned mask;
  int source;
  uint64_t bits, result;
};

struct Engine {
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  int threads = 0;
  Thread thread[kMaxThreads];
  std::vector<int> ready, woken;  // this interval's, in running order; the next one's
  size_t next = 0;                // in ready
  int at_barrier = 0, done = 0;
  unsigned at_warp[kMaxThreads / kLanes], ended[kMaxThreads / kLanes];  // lanes of each warp
  bool abandoned = false;

  std::vector<Fiber*> fibers, idle;
  Fiber* running = nullptr;

  unsigned char* shared = nullptr;
  uint64_t seed = 0, random = 0;
  int64_t blocks = 0;
  cudaError_t error = cudaSuccess;
  char last_failure[256] = "", first_failure[256] = "";
};
Engine& engine = *new Engine;  // never destroyed: the leak check at exit finds the fibres through it

uint64_t random_bits() {  // splitmix64
  uint64_t z = (engine.random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

template <class T>
void put_in_order(std::vector<T>& items) {
  if (engine.seed == 0) return;
  for (size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1], items[static_cast<size_t>((random_bits() >> 32) * i >> 32)]);
  }
}

void record(cudaError_t error, const char* what) {
  engine.error = error;
  std::snprintf(engine.last_failure, sizeof engine.last_failure, "%s", what);
  if (engine.first_failure[0] == 0) std::memcpy(engine.first_failure, engine.last_failure, sizeof engine.last_failure);
}

// Ends the launch from within a thread: the other threads' stacks are forgotten, and nothing on them is destroyed.
[[noreturn]] void abandon(const char* what) {
  char message[256];
  std::snprintf(message, sizeof message, "block (%u, %u, %u), thread (%u, %u, %u): %s", blockIdx.x, blockIdx.y,
                blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
  record(cudaErrorLaunchFailure, message);
  engine.abandoned = true;
  switch_fiber(engine.running, &main_fiber());
  std::abort();
}

[[noreturn]] void report_divergence() {
  int at_warp = 0;
  for (unsigned lanes : engine.at_warp) at_warp += __builtin_popcount(lanes);
  char what[128];
  std::snprintf(what, sizeof what,
                "%s divergence: %d threads wait at __syncthreads, %d at a warp operation, %d have ended",
                at_warp > 0 ? "warp operation" : "barrier", engine.at_barrier, at_warp, engine.done);
  abandon(what);
}

// The thread whose turn it is; -1: the block is done.
int pick() {
  if (engine.next == engine.ready.size()) {
    engine.ready.swap(engine.woken);
    engine.woken.clear();
    engine.next = 0;
    if (engine.ready.empty()) {
      if (engine.done == engine.threads) return -1;
      if (engine.at_barrier != engine.threads) report_divergence();
      engine.ready.resize(static_cast<size_t>(engine.threads));
      std::iota(engine.ready.begin(), engine.ready.end(), 0);
      engine.at_barrier = 0;
    }
    put_in_order(engine.ready);
  }
  return engine.ready[engine.next++];
}

void run_thread(Fiber* fiber) {
  for (;;) {
    Thread& self = engine.thread[fiber->thread];
    self.fiber = fiber;
    threadIdx = self.index;
    engine.body(engine.argument);
    self.fiber = nullptr;
    engine.ended[fiber->thread / kLanes] |= 1u << fiber->thread % kLanes;
    ++engine.done;
    const int next = pick();
    if (next >= 0 && engine.thread[next].fiber == nullptr) {
      fiber->thread = next;
      continue;
    }
    engine.idle.push_back(fiber);
    engine.running = next < 0 ? &main_fiber() : engine.thread[next].fiber;
    switch_fiber(fiber, engine.running);  // returns with another thread to begin
  }
}

void fiber_entry() { run_thread(engine.running); }

void begin(int thread, Fiber* from) {
  if (engine.idle.empty()) {
    engine.idle.push_back(new_fiber(fiber_entry));
    engine.fibers.push_back(engine.idle.back());
  }
  Fiber* fiber = engine.idle.back();
  engine.idle.pop_back();
  fiber->thread = thread;
  engine.running = fiber;
  switch_fiber(from, fiber);
}

// The running thread waits until it is picked again.
void wait(Thread& self) {
  Fiber* fiber = engine.running;
  const int next = pick();
  Thread& other = engine.thread[next];
  if (&other != &self) {
    if (other.fiber == nullptr) {
      begin(next, fiber);
    } else {
      engine.running = other.fiber;
      switch_fiber(fiber, other.fiber);
    }
  }
  threadIdx = self.index;
}

Thread& running_thread() { return engine.thread[engine.running->thread]; }

// False: abandoned.
bool run_block() {
  engine.ready.resize(static_cast<size_t>(engine.threads));
  std::iota(engine.ready.begin(), engine.ready.end(), 0);
  engine.woken.clear();
  engine.next = 0;
  engine.at_barrier = engine.done = 0;
  for (unsigned* lanes : {engine.at_warp, engine.ended}) std::fill_n(lanes, kMaxThreads / kLanes, 0u);
  for (int t = 0; t < engine.threads; ++t) engine.thread[t].fiber = nullptr;
  put_in_order(engine.ready);
  ++engine.blocks;
  begin(pick(), &main_fiber());
  if (!engine.abandoned) return true;
  engine.abandoned = false;
  engine.idle = engine.fibers;
  for (Fiber* fiber : engine.fibers) restart(fiber);
  return false;
}

const char* why_illegal(dim3 grid, dim3 block, size_t shared_bytes) {
  constexpr unsigned kLimit = kMaxThreads;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "a grid without blocks";
  if (threads == 0) return "a block without threads";
  if (block.x > kLimit || block.y > kLimit || threads > kLimit) return "a block of over 1024 threads";
  if (block.z > kMaxBlockZ) return "blockDim.z over 64";
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) return "a grid with too many blocks";
  if (shared_bytes > kMaxSharedBytes) return "over 48 KiB of shared memory";
  return nullptr;
}

void set_thread_indices(dim3 block) {
  Thread* thread = engine.thread;
  for (unsigned z = 0; z < block.z; ++z)
    for (unsigned y = 0; y < block.y; ++y)
      for (unsigned x = 0; x < block.x; ++x) (thread++)->index = {x, y, z};
}

}  // namespace

void set_schedule(uint64_t seed) { engine.seed = engine.random = seed; }
const char* failure() { return engine.first_failure[0] == 0 ? nullptr : engine.first_failure; }
void clear_failure() { engine.error = cudaSuccess, engine.first_failure[0] = 0; }
unsigned char* dynamic_shared() { return engine.shared; }
int64_t blocks_run() { return engine.blocks; }
int lane() { return engine.running->thread % kLanes; }

void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* argument) {
  if (const char* why = why_illegal(grid, block, shared_bytes)) {
    char message[128];
    std::snprintf(message, sizeof message, "illegal launch: %s", why);
    return record(cudaErrorInvalidConfiguration, message);
  }
  engine.body = thread, engine.argument = argument;
  engine.threads = static_cast<int>(block.x * block.y * block.z);
  gridDim = grid, blockDim = block;
  set_thread_indices(block);
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shared_bytes) != 0) std::abort();
  engine.shared = static_cast<unsigned char*>(shared);

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order;
  if (engine.seed != 0) {
    order.resize(blocks);
    std::iota(order.begin(), order.end(), 0);
    put_in_order(order);
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order.empty() ? i : order[i];
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::memset(shared, 0xff, shared_bytes);
    if (!run_block()) break;
  }
  std::free(shared);
  engine.shared = nullptr;
}

uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t bits, int source) {
  const int number = engine.running->thread, first = number / kLanes * kLanes;
  Thread* warp = engine.thread + first;
  Thread& self = engine.thread[number];
  unsigned& waiting = engine.at_warp[number / kLanes];
  const int lanes = std::min(engine.threads - first, kLanes);
  if ((mask >> (number - first) & 1) == 0) abandon("a warp operation's mask leaves out the caller");
  if (lanes < kLanes && mask >> lanes != 0) abandon("a warp operation names lanes that do not exist");
  if ((mask & engine.ended[number / kLanes]) != 0) abandon("a warp operation names a thread that has ended");
  if (op == WarpOp::kShuffle && (mask >> source & 1) == 0) abandon("a shuffle from a lane outside the mask");
  self.op = op, self.mask = mask, self.bits = bits, self.source = source;
  waiting |= 1u << (number - first);

  // Who waits at another operation is not here yet.
  bool complete = (waiting & mask) == mask;
  uint64_t ballot = 0;
  for (int l = 0; complete && l < lanes; ++l) {
    if ((mask >> l & 1) == 0) continue;
    complete = warp[l].op == op && warp[l].mask == mask;
    if (warp[l].bits != 0) ballot |= uint64_t{1} << l;
  }
  if (complete) {
    waiting &= ~mask;
    for (int l = 0; l < lanes; ++l) {
      if ((mask >> l & 1) == 0) continue;
      warp[l].result = op == WarpOp::kBallot ? ballot : warp[warp[l].source].bits;
      engine.woken.push_back(first + l);
    }
  }
  wait(self);
  return self.result;
}

}  // namespace fused_resnet::simt

using fused_resnet::simt::engine;

void __syncthreads() {
  ++engine.at_barrier;
  fused_resnet::simt::wait(fused_resnet::simt::running_thread());
}

cudaError_t cudaPeekAtLastError() { return engine.error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = engine.error;
  engine.error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : engine.last_failure; }
