// Plain vocabulary of the seam: what every backend and the bindings agree on.
// C++ standard headers only: no torch, no pybind11, no CUDA.
#pragma once

#include <cstdint>

namespace fused_resnet {

enum class DType : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Which axis of a (N, C, S) activation is contiguous in memory, S = H * W.
enum class Layout : uint8_t { kNHWC, kNCHW };

enum class Activation : uint8_t {
  kIdentity = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kPrelu = 3,
  kSigmoid = 4,
  kTanh = 5,
  kSilu = 6,
};
inline constexpr int kActivationCount = 7;

// An activation tensor's extent. Dense in `layout`, no gaps. Units are elements.
struct Shape {
  int64_t n = 0;
  int64_t c = 0;
  int64_t s = 0;  // spatial positions per image
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kNHWC;

  int64_t numel() const { return n * c * s; }
  int64_t per_channel() const { return n * s; }  // M of docs/batch_norm_math.md
};

inline constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Statistics, per-channel parameters and their gradients are float, or double
// where the activations are double. "stat dtype" in comments means this type.
inline constexpr int64_t stat_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// Success has a null message. A message is valid until this thread's next call.
struct Status {
  const char* message = nullptr;
  bool ok() const { return message == nullptr; }
};

// How a CPU kernel reaches the caller's thread pool. `for_each` calls
// task(arg, begin, end) over disjoint ranges covering [0, count), in any order
// and on any number of threads, and returns when all are done.
// A null `for_each` means: run on this thread.
struct Runner {
  using Task = void (*)(void* arg, int64_t begin, int64_t end);
  void (*for_each)(int64_t count, Task task, void* arg) = nullptr;
  int threads = 1;
};

}  // namespace fused_resnet
