// What a test needs to know of a backend: its name, its functions, and how to run the same work in another order.
#pragma once

#include <string>
#include <vector>

#include "fused_resnet/pool.h"

namespace fused_resnet::native_test {

// The order of a CPU kernel's chunks, or the seed of the emulated GPU's schedule.
struct Way {
  Runner runner = {};
  uint64_t seed = 0;
};

struct Backend {
  std::string name;
  std::vector<DType> dtypes;

  int64_t (*forward_workspace)(const Shape&);
  int64_t (*backward_workspace)(const Shape&);
  Status (*forward)(const BatchNormActForward&);
  Status (*backward)(const BatchNormActBackward&);
  Status (*update_running)(const BatchNormUpdateRunning&);
  Status (*fixed_stats)(const BatchNormFixedStats&);
  int64_t (*pool_workspace)(const Shape&, int64_t h, int64_t w);
  Status (*pool_forward)(const BatchNormActMaxPoolForward&);
  Status (*pool_backward)(const BatchNormActMaxPoolBackward&);

  // relu(-0.0), which PyTorch's own kernels answer -0.0 on the CPU and 0.0 on the GPU.
  double relu_of_negative_zero = -0.0;
  // Of a variance beside an outlier, relative. 0: what the sums' length allows, for one lane may sum a whole channel.
  double outlier_error = 0;
  // One-element rows, in fp32, until a thread walks several rounds; 0: it does so in the smaller cases.
  int64_t many_rows = 0;
  // Vectors, until a thread walks several rounds of several chunks: the emulated GPU's with few blocks.
  bool many_rounds = false;
  // Other ways than Way{}, all of which must give the same bits.
  std::vector<Way> (*other_ways)(int variant, int64_t numel);
  void (*begin)(uint64_t seed) = nullptr;  // before each call
  const char* (*failure)() = nullptr;      // after each call: says more than its Status
};

template <class P>
Status run(const Backend& backend, Status (*function)(const P&), P p, const Way& way = {}) {
  if constexpr (requires { p.runner; }) p.runner = way.runner;
  if (backend.begin != nullptr) backend.begin(way.seed);
  const Status status = function(p);
  const char* failure = backend.failure == nullptr ? nullptr : backend.failure();
  return failure == nullptr ? status : Status{failure};
}

}  // namespace fused_resnet::native_test
