#include "bindings/memory.h"

#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>

#include "fused_resnet/memory.h"

namespace fused_resnet::bindings {
namespace {

thread_local int scope_depth = 0;
std::atomic<bool> enabled{true};

void free_block(void* p) { cpu::pool_free(p); }

// PyTorch's own CPU allocator, except inside a PoolScope and for large blocks.
class PoolAllocator final : public c10::Allocator {
 public:
  explicit PoolAllocator(c10::Allocator* stock) : stock_(stock) {}

  c10::DataPtr allocate(size_t bytes) override {
    const auto size = static_cast<int64_t>(bytes);
    if (scope_depth > 0 && size >= cpu::kPoolMinBytes && enabled.load(std::memory_order_relaxed)) {
      void* p = cpu::pool_allocate(size);
      if (p != nullptr) return {p, p, &free_block, c10::Device(c10::DeviceType::CPU)};
    }
    return stock_->allocate(bytes);  // also where the pool has nothing: its error says how much was asked for
  }
  // raw_allocate may have been answered by either side.
  c10::DeleterFnPtr raw_deleter() const override { return &free_any; }
  void copy_data(void* dest, const void* src, std::size_t count) const override { stock_->copy_data(dest, src, count); }

 private:
  static void free_any(void* p);
  c10::Allocator* stock_;
};

PoolAllocator* installed = nullptr;
c10::Allocator* stock_allocator = nullptr;

void PoolAllocator::free_any(void* p) {
  if (cpu::pool_owns(p)) {
    cpu::pool_free(p);
  } else {
    stock_allocator->raw_deleter()(p);
  }
}

}  // namespace

PoolScope::PoolScope() { ++scope_depth; }
PoolScope::~PoolScope() { --scope_depth; }

at::Tensor empty_pooled(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat memory_format) {
  const PoolScope scope;
  return at::empty(sizes, options, memory_format);
}

void install_pool_allocator() {
  if (installed != nullptr) return;
  stock_allocator = c10::GetCPUAllocator();
  installed = new PoolAllocator(stock_allocator);  // lives as long as the tensors that refer to it
  c10::SetCPUAllocator(installed, 0);
}

void set_pool_enabled(bool value) { enabled.store(value, std::memory_order_relaxed); }
bool pool_enabled() { return enabled.load(std::memory_order_relaxed); }

}  // namespace fused_resnet::bindings
