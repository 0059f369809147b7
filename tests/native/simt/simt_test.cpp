// Is the emulation itself right, and does it find what it is there to find?
#include "simt.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

#include "../check.h"

namespace {

using fused_resnet::native_test::Report;
namespace simt = fused_resnet::simt;

constexpr uint64_t kSeeds[] = {0, 1, 2, 3, 77};

// The buffers of one launch, on the heap with exact sizes.
using Floats = std::vector<float>;
using Ints = std::vector<int>;

// ---------------------------------------------------------------- what works

void test_indices(Report& report) {
  for (uint64_t seed : kSeeds) {
    report.begin("every thread of every block runs once, seed " + std::to_string(seed));
    simt::set_schedule(seed);
    const dim3 grid(3, 2, 4), block(5, 3, 2);
    Ints seen(3 * 2 * 4 * 5 * 3 * 2, 0);
    simt::launch(grid, block, 0, [&] {
      const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
      const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
      ++seen[b * blockDim.x * blockDim.y * blockDim.z + t];
    });
    for (int count : seen) {
      if (count != 1) report.fail("one ran %d times", count);
    }
    if (cudaGetLastError() != cudaSuccess) report.fail("%s", simt::failure());
  }
}

// The usual reduction: shuffles within warps, shared memory between them.
__global__ void sum_kernel(const float* in, int n, float* out, bool barrier) {
  auto* partial = reinterpret_cast<float*>(simt::dynamic_shared());
  const int block = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = static_cast<int>(blockIdx.x) * block + thread; i < n; i += block * static_cast<int>(gridDim.x)) {
    sum += in[i];
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (thread % warpSize == 0) partial[thread / warpSize] = sum;
  if (barrier) __syncthreads();
  if (thread < warpSize) {
    sum = thread < block / warpSize ? partial[thread] : 0;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (thread == 0) out[blockIdx.x] = sum;
  }
}

// As a tree in shared memory: a barrier per level.
__global__ void tree_kernel(const int* in, int* out) {
  auto* values = reinterpret_cast<int*>(simt::dynamic_shared());
  values[threadIdx.x] = in[threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = values[0];
}

Floats block_sums(uint64_t seed, const Floats& in, bool barrier) {
  simt::set_schedule(seed);
  Floats out(4, -1);
  simt::launch(4, 256, 8 * sizeof(float),
               [&] { sum_kernel(in.data(), static_cast<int>(in.size()), out.data(), barrier); });
  return out;
}

void test_sums(Report& report) {
  Floats in;
  for (int i = 0; i < 5000; ++i) in.push_back(static_cast<float>(i % 17));
  float expected = 0;
  for (float value : in) expected += value;  // small integers: exact
  for (uint64_t seed : kSeeds) {
    report.begin("sum through shuffles and a barrier, seed " + std::to_string(seed));
    float sum = 0;
    for (float value : block_sums(seed, in, true)) sum += value;
    if (sum != expected) report.fail("%g, expected %g", sum, expected);

    report.begin("sum through a tree, seed " + std::to_string(seed));
    Ints numbers(512);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int>(i);
    int total = 0;
    simt::launch(1, 512, 512 * sizeof(int), [&] { tree_kernel(numbers.data(), &total); });
    if (total != 512 * 511 / 2) report.fail("%d", total);

    report.begin("sum through atomics, seed " + std::to_string(seed));
    total = 0;
    simt::launch(7, 33, 0, [&] { atomicAdd(&total, static_cast<int>(threadIdx.x)); });
    if (total != 7 * 33 * 32 / 2) report.fail("%d", total);
    if (simt::failure() != nullptr) report.fail("%s", simt::failure());
  }
}

template <class T>
void test_shuffles_of(Report& report, const char* type) {
  for (uint64_t seed : kSeeds) {
    report.begin(std::string("shuffles of ") + type + ", seed " + std::to_string(seed));
    simt::set_schedule(seed);
    std::vector<T> up(64), down(64), exchanged(64), chosen(64), narrow(64);
    simt::launch(1, 64, 0, [&] {
      const unsigned all = 0xffffffffu, t = threadIdx.x;
      const T own = static_cast<T>(t) - static_cast<T>(1);  // negative, too
      up[t] = __shfl_up_sync(all, own, 3);
      down[t] = __shfl_down_sync(all, own, 5);
      exchanged[t] = __shfl_xor_sync(all, own, 9);
      chosen[t] = __shfl_sync(all, own, 33 + static_cast<int>(t));  // modulo the width
      narrow[t] = __shfl_down_sync(all, own, 1, 8);
    });
    for (int t = 0; t < 64; ++t) {
      const int lane = t % 32, warp = t - lane;
      const auto expect = [&](const char* what, T got, int source) {
        if (got != static_cast<T>(source) - static_cast<T>(1)) report.fail("%s of thread %d", what, t);
      };
      expect("up", up[static_cast<size_t>(t)], lane >= 3 ? t - 3 : t);
      expect("down", down[static_cast<size_t>(t)], lane + 5 < 32 ? t + 5 : t);
      expect("xor", exchanged[static_cast<size_t>(t)], t ^ 9);
      expect("index", chosen[static_cast<size_t>(t)], warp + (lane + 1) % 32);
      expect("down in eights", narrow[static_cast<size_t>(t)], t % 8 == 7 ? t : t + 1);
    }
    if (simt::failure() != nullptr) report.fail("%s", simt::failure());
  }
}

void test_votes(Report& report) {
  for (uint64_t seed : kSeeds) {
    report.begin("ballots, votes and part of a warp, seed " + std::to_string(seed));
    simt::set_schedule(seed);
    std::vector<unsigned> ballot(64), any(64), all(64), part(64);
    simt::launch(1, 64, 0, [&] {
      const unsigned t = threadIdx.x, full = 0xffffffffu;
      ballot[t] = __ballot_sync(full, t % 3 == 0);
      any[t] = static_cast<unsigned>(__any_sync(full, t == 40));
      all[t] = static_cast<unsigned>(__all_sync(full, t < 32));
      if (t % 32 < 8) part[t] = __ballot_sync(0xffu, t % 2);
      __syncwarp();
    });
    for (unsigned t = 0; t < 64; ++t) {
      unsigned expected = 0;
      for (unsigned l = 0; l < 32; ++l) expected |= static_cast<unsigned>((t / 32 * 32 + l) % 3 == 0) << l;
      if (ballot[t] != expected) report.fail("ballot of %u: %x", t, ballot[t]);
      if (any[t] != t / 32 || all[t] != 1 - t / 32) report.fail("votes of %u", t);
      if (part[t] != (t % 32 < 8 ? 0xaau : 0)) report.fail("ballot of eight, %u: %x", t, part[t]);
    }
    if (simt::failure() != nullptr) report.fail("%s", simt::failure());
  }
}

void test_shared_memory_is_fresh(Report& report) {
  report.begin("shared memory is NaN when a block begins");
  Ints fresh(6, 0);
  simt::launch(6, 1, 64, [&] {
    auto* values = reinterpret_cast<float*>(simt::dynamic_shared());
    fresh[blockIdx.x] = std::isnan(values[0]) && std::isnan(values[15]);
    values[0] = values[15] = 1;
  });
  for (int value : fresh) {
    if (value == 0) report.fail("not NaN");
  }
}

// --------------------------------------------------------- what must be found

// Runs body in a forked child; did AddressSanitizer or UndefinedBehaviorSanitizer end it?
template <class F>
bool crashes(F body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    // The sanitizer's report of a planted error would look like a real one.
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(0);
    body();
    _exit(0);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && status != 0;
}

// 16 threads, 16 floats of shared memory; thread 15 touches one that is not there.
__global__ void off_by_one_kernel(int offset, bool write, float* out) {
  auto* values = reinterpret_cast<float*>(simt::dynamic_shared());
  if (write) {
    values[static_cast<int>(threadIdx.x) + offset] = 1;
  } else {
    out[threadIdx.x] = values[static_cast<int>(threadIdx.x) + offset];
  }
}

void test_out_of_bounds(Report& report) {
  for (bool write : {true, false}) {
    for (int offset : {0, 1, -1}) {
      report.begin(std::string(write ? "a write " : "a read ") + std::to_string(offset) + " beyond shared memory");
      Floats out(16);
      const bool found = crashes(
          [&] { simt::launch(1, 16, 16 * sizeof(float), [&] { off_by_one_kernel(offset, write, out.data()); }); });
      if (found != (offset != 0)) report.fail(found ? "reported though correct" : "not found");
    }
  }
  report.begin("a write beyond a tensor");
  Floats out(100);
  if (!crashes([&] { simt::launch(2, 64, 0, [&] { out.data()[blockIdx.x * 64 + threadIdx.x] = 1; }); })) {
    report.fail("not found");
  }
  report.begin("a vector at an address that is no multiple of its size");
  alignas(16) static float floats[12];
  for (unsigned offset : {0u, 1u}) {
    const bool found = crashes([&] {
      simt::launch(1, 1, 0, [&] { *reinterpret_cast<float4*>(floats + 4 + offset) = make_float4(1, 2, 3, 4); });
    });
    if (found != (offset != 0)) report.fail(found ? "reported though correct" : "not found");
  }
}

void test_missing_barrier(Report& report) {
  report.begin("a missing barrier gives NaN or results that depend on the seed");
  const Floats in(5000, 1);
  const Floats expected = block_sums(0, in, true);
  int same = 0;
  for (uint64_t seed : kSeeds) {
    const Floats got = block_sums(seed, in, false);
    same += std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0;
  }
  if (same > 1) report.fail("right at %d seeds", same);
}

template <class F>
void expect_failure(Report& report, const char* name, const char* message, cudaError_t error, dim3 grid, dim3 block,
                    size_t shared_bytes, F body) {
  for (uint64_t seed : kSeeds) {
    report.begin(std::string(name) + ", seed " + std::to_string(seed));
    simt::set_schedule(seed);
    simt::clear_failure();
    simt::launch(grid, block, shared_bytes, body);
    const char* got = simt::failure();
    if (got == nullptr || std::strstr(got, message) == nullptr) report.fail("reported: %s", got ? got : "nothing");
    if (cudaGetLastError() != error) report.fail("another error code");
    if (cudaGetLastError() != cudaSuccess) report.fail("the error was not forgotten");
    simt::clear_failure();
    // The next launch is not disturbed.
    int total = 0;
    simt::launch(1, 64, 0, [&] {
      __syncthreads();
      atomicAdd(&total, 1);
    });
    if (total != 64 || simt::failure() != nullptr) report.fail("the next launch: %d threads", total);
  }
}

void test_divergence(Report& report) {
  const auto expect = [&](const char* name, const char* message, auto body) {
    expect_failure(report, name, message, cudaErrorLaunchFailure, 3, 64, 0, body);
  };
  expect("a thread ends while others wait at a barrier", "barrier divergence", [] {
    if (threadIdx.x == 13) return;
    __syncthreads();
  });
  expect("one barrier more for some", "barrier divergence: 32 threads wait", [] {
    __syncthreads();
    if (threadIdx.x < 32) __syncthreads();
  });
  expect("a lane at a barrier, the others at a shuffle", "warp operation divergence", [] {
    if (threadIdx.x == 5) __syncthreads();
    __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    if (threadIdx.x != 5) __syncthreads();
  });
  expect("a lane has ended, the others shuffle", "", [] {
    if (threadIdx.x == 5) return;
    __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  });
  expect("lanes at different operations", "warp operation divergence", [] {
    if (threadIdx.x % 2 == 0) {
      __syncwarp();
    } else {
      __ballot_sync(0xffffffffu, 1);
    }
  });
  expect("a mask without the caller", "leaves out the caller", [] { __syncwarp(0xffffu); });
  expect("a shuffle from outside the mask", "outside the mask", [] {
    if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1, 16);
  });
}

void test_illegal_launches(Report& report) {
  const auto expect = [&](const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
    expect_failure(report, name, "illegal launch", cudaErrorInvalidConfiguration, grid, block, shared_bytes, [] {});
  };
  expect("1025 threads", 1, 1025, 0);
  expect("33 x 32 threads", 1, dim3(33, 32), 0);
  expect("no blocks", 0, 32, 0);
  expect("no threads", 1, dim3(32, 0), 0);
  expect("more than 48 KiB", 1, 32, (48 << 10) + 1);
  expect("2^31 blocks", 1u << 31, 32, 0);
  expect("65536 blocks in y", dim3(1, 65536), 32, 0);
}

// Groups of eight; a wrong last one is left out.
__global__ void double_kernel(const float* in, int n, float* out, bool wrong) {
  const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 8;
  const int end = wrong ? n / 8 * 8 : n;
  for (int i = first; i < first + 8 && i < end; ++i) out[i] = 2 * in[i];
}

void test_wrong_tail(Report& report) {
  for (int n : {1, 7, 8, 100, 4096, 5001}) {
    for (bool wrong : {false, true}) {
      report.begin((wrong ? "a forgotten tail of " : "a tail of ") + std::to_string(n));
      const Floats in(static_cast<size_t>(n), 1);
      Floats out(static_cast<size_t>(n), -1);
      simt::launch(static_cast<unsigned>((n + 511) / 512), 64, 0,
                   [&] { double_kernel(in.data(), n, out.data(), wrong); });
      bool right = true;
      for (float value : out) right = right && value == 2;
      if (right != (!wrong || n % 8 == 0)) report.fail(right ? "not found" : "wrong values");
    }
  }
}

}  // namespace

int main() {
  Report report;
  test_indices(report);
  test_sums(report);
  test_shuffles_of<int>(report, "int");
  test_shuffles_of<float>(report, "float");
  test_shuffles_of<double>(report, "double");
  test_shuffles_of<long long>(report, "long long");
  test_votes(report);
  test_shared_memory_is_fresh(report);
  test_out_of_bounds(report);
  test_missing_barrier(report);
  test_divergence(report);
  test_illegal_launches(report);
  test_wrong_tail(report);
  return report.finish();
}
