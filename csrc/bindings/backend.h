// Which kernels serve a tensor, the CPU's or a GPU's, and what a call of them needs around it. No other file of the
// bindings knows that there is more than one backend; none includes CUDA's headers, or torch's that need them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "bindings/checks.h"
#include "fused_resnet/batch_norm.h"
#include "fused_resnet/pool.h"
#include "fused_resnet/types.h"

namespace torch {
class Library;
}

namespace fused_resnet::bindings {

// The functions of the seam that have one implementation for each kind of device.
struct Backend {
  int64_t (*forward_workspace)(const Shape& shape);
  int64_t (*backward_workspace)(const Shape& shape);
  int64_t (*max_pool_workspace)(const Shape& shape, int64_t h, int64_t w);
  Status (*forward)(const BatchNormActForward& p);
  Status (*backward)(const BatchNormActBackward& p);
  Status (*update_running)(const BatchNormUpdateRunning& p);
  Status (*fixed_stats)(const BatchNormFixedStats& p);
  Status (*max_pool_forward)(const BatchNormActMaxPoolForward& p);
  Status (*max_pool_backward)(const BatchNormActMaxPoolBackward& p);
};

// One call of operator `op` on the device of x. While it lives, that device is the current one; work is queued on the
// stream that was PyTorch's current one, and nothing waits for it.
class Execution {
 public:
  Execution(const char* op, const at::Tensor& x);
  Execution(const Execution&) = delete;
  Execution& operator=(const Execution&) = delete;

  const Backend* operator->() const { return backend_; }
  const Runner& runner() const { return runner_; }  // CPU

  // `run(&Backend::forward, p)`: calls it, and throws what it complains about.
  template <typename Params>
  void run(Status (*Backend::*function)(const Params&), Params& p) const {
    if constexpr (requires { p.runner; }) p.runner = runner_;
    p.stream = stream_;
    check::status(op_, (backend_->*function)(p));
  }

  // FUSED_RESNET_VERBOSE; see verbose.h.
  void say(const Shape& shape, const char* family, std::initializer_list<const char*> passes) const;

 private:
  const char* op_;
  const Backend* backend_;
  Runner runner_;
  void* stream_ = nullptr;
  c10::OptionalDeviceGuard device_;
};

// Why CUDA device `index` cannot run the kernels, in one sentence; nothing when it can.
std::optional<std::string> why_no_cuda(int64_t index);

// The device operators, for whichever backend the library `m` is for.
void register_batch_norm(torch::Library& m);  // batch_norm.cpp
void register_conv(torch::Library& m);        // conv.cpp
void register_pool(torch::Library& m);        // pool.cpp

}  // namespace fused_resnet::bindings
