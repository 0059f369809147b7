// The one place where kernels start, and where the CUDA runtime comes from. With FR_SIMT the same sources are ordinary
// C++ and run on the CPU: tests/native/simt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

#include "fused_resnet/types.h"

#ifdef FR_SIMT
#include "simt.h"
#define FR_UNROLL
#define FR_NO_UNROLL
#define FR_NO_INLINE
#else
#include <cuda_runtime.h>
#define FR_UNROLL _Pragma("unroll")
#define FR_NO_UNROLL _Pragma("unroll 1")
#define FR_NO_INLINE __noinline__
#endif

#define FR_DEVICE __device__ __forceinline__

namespace fused_resnet::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;  // of a block, but for the finalize kernels

// The block's dynamic shared memory, 16-byte aligned.
#ifdef FR_SIMT
inline unsigned char* dynamic_shared() { return simt::dynamic_shared(); }
#else
FR_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ uint4 fr_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(fr_dynamic_shared);
}
#endif

// Says what failed, and what CUDA calls it. bench/gpu/suite.py looks for "CUDA error".
inline Status cuda_failure(const char* failure, cudaError_t error) {
  thread_local char message[256];
  std::snprintf(message, sizeof(message), "%s: CUDA error: %s", failure, cudaGetErrorString(error));
  return {message};
}

// Kernels take one argument: a plain struct. `failure` names the operator; the message begins with it when the launch
// is refused.
template <class Args>
Status launch(const char* failure, void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes,
              void* stream, const Args& args) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (blocks < 1 || blocks > kMostBlocks) return {failure};
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
#ifdef FR_SIMT
  static_cast<void>(stream);
  simt::launch(grid, block, static_cast<size_t>(shared_bytes), [&] { kernel(args); });
  const cudaError_t error = cudaGetLastError();
#else
  void* argument[] = {const_cast<Args*>(&args)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, argument,
                                             static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
#endif
  return error == cudaSuccess ? Status{} : cuda_failure(failure, error);
}

}  // namespace fused_resnet::cuda
