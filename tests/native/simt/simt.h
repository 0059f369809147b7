// CUDA's execution model on the CPU: what a kernel file needs of <cuda_runtime.h>. A fibre per thread, one block at a
// time, in an order that a seed decides. Compile with -DFR_SIMT -fno-strict-aliasing and sanitizers.
//
// Found and reported: accesses outside arrays (AddressSanitizer; dynamic shared memory is a heap block of exactly the
// launch's size), misaligned vectors (UndefinedBehaviorSanitizer), barriers or warp operations that not all their
// threads reach, launches that no GPU takes. A missing barrier shows as results that depend on the seed, or as the NaN
// that fills dynamic shared memory when a block begins.
//
// Not modelled: warps in lockstep, memory ordering between blocks, kernels that opt in to more than 48 KiB of shared
// memory, __launch_bounds__, the device's own rounding of exp and tanh, contraction into fma. Two threads that race for
// a global address are seen only where the schedule changes the result.
#pragma once

#include <math.h>  // not <cmath>: as with nvcc, the overloads for float stand in the global namespace
#include <string.h>

#include <cstddef>
#include <cstdint>

#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// One block at a time: one copy will do. It keeps what the last block left; dynamic shared memory is the stricter one.
#define __shared__ static

// Of the running thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ------------------------------------------------------------------- the runtime, as far as launching needs it

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

cudaError_t cudaGetLastError();  // of the launches since the last call
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);  // of the last failure: what happened where

namespace fused_resnet::simt {

// The order of threads within each interval between barriers, and of blocks. 0: ascending.
void set_schedule(uint64_t seed);

// The first failure since clear_failure(), whoever has asked cudaGetLastError(); null: none.
const char* failure();
void clear_failure();

// The running block's, 128-byte aligned.
unsigned char* dynamic_shared();

int64_t blocks_run();  // since the program began

void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* argument);

// Runs body() once per thread, all done on return.
template <class F>
void launch(dim3 grid, dim3 block, size_t shared_bytes, F body) {
  launch(grid, block, shared_bytes, [](void* f) { (*static_cast<F*>(f))(); }, &body);
}

enum class WarpOp { kSync, kShuffle, kBallot };
// The running thread's 64 bits go to its warp; it continues when every lane of the mask has come. A shuffle returns
// lane `source`'s bits, a ballot the lanes whose bits are not zero.
uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t bits, int source);
int lane();

}  // namespace fused_resnet::simt

void __syncthreads();
inline void __threadfence() {}
inline void __threadfence_block() {}

#include "intrinsics.h"
