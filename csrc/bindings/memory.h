// Memory of outputs and workspaces. Large CPU blocks come from the activation
// pool (fused_resnet/memory.h) inside a PoolScope, and from PyTorch's allocator
// everywhere else.
#pragma once

#include <ATen/core/Tensor.h>

namespace fused_resnet::bindings {

// While one lives, what ATen allocates on this thread comes from the pool: other
// threads, and this one outside, are not affected. Nests.
class PoolScope {
 public:
  PoolScope();
  ~PoolScope();
  PoolScope(const PoolScope&) = delete;
  PoolScope& operator=(const PoolScope&) = delete;
};

at::Tensor empty_pooled(at::IntArrayRef sizes, const at::TensorOptions& options,
                        at::MemoryFormat memory_format = at::MemoryFormat::Contiguous);

// Puts the allocator that honours PoolScope in front of PyTorch's. Once, at import.
void install_pool_allocator();
void set_pool_enabled(bool enabled);
bool pool_enabled();

}  // namespace fused_resnet::bindings
