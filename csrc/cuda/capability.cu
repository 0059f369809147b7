// Which devices this build's kernels can run on. CUDA only: the emulation has no devices.
#include <cstdio>
#include <mutex>

#include "fused_resnet/capability.h"
#include "launch.h"

// The build's list, as TORCH_CUDA_ARCH_LIST has it: "8.0+PTX;9.0a".
#ifndef FUSED_RESNET_CUDA_ARCHS
#define FUSED_RESNET_CUDA_ARCHS "unknown"
#endif

namespace fused_resnet::cuda {
namespace {

// Stands for all kernels: they are built for the same architectures.
__global__ void probe_kernel() {}

constexpr int kMostDevices = 64;

struct Device {
  bool settled = false, runs = false;
  char message[320];  // written once, before anybody has seen it
};

// No image for this architecture. Every other error (a full or broken device) says nothing about the build.
bool no_image(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidPtx;
}

// Settles the device, or returns an error that may pass.
cudaError_t ask(int index, Device& device) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  device.runs = error == cudaSuccess;
  device.settled = device.runs || no_image(error);
  if (device.runs) return cudaSuccess;
  static_cast<void>(cudaGetLastError());
  if (!device.settled) return error;
  int major = 0, minor = 0;
  static_cast<void>(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  static_cast<void>(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  std::snprintf(device.message, sizeof(device.message),
                "fused_resnet was built for the CUDA architectures %s, which device %d (%d.%d) does not run: %s. "
                "Rebuild with TORCH_CUDA_ARCH_LIST=\"%d.%d\".",
                FUSED_RESNET_CUDA_ARCHS, index, major, minor, cudaGetErrorString(error), major, minor);
  return cudaSuccess;
}

}  // namespace

Status device_status(bool* may_pass) {
  if (may_pass != nullptr) *may_pass = false;
  static std::mutex mutex;
  static Device devices[kMostDevices];
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return {"fused_resnet: there is no CUDA device, or no driver that this build's CUDA runtime can use"};
  }
  if (index >= kMostDevices) return {"fused_resnet: only the first 64 CUDA devices are supported"};
  const std::lock_guard lock(mutex);
  Device& device = devices[index];
  const cudaError_t error = device.settled ? cudaSuccess : ask(index, device);
  if (error != cudaSuccess) {
    thread_local char message[256];
    std::snprintf(message, sizeof(message), "fused_resnet: CUDA device %d cannot be used: %s.", index,
                  cudaGetErrorString(error));
    if (may_pass != nullptr) *may_pass = true;
    return {message};
  }
  return device.runs ? Status{} : Status{device.message};
}

}  // namespace fused_resnet::cuda
