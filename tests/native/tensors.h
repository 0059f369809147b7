// Test data: values as doubles in (n, c, s) order beside their encoded, laid-out
// and guarded bytes as a kernel sees them.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "fused_resnet/types.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define FR_CLOSE(p, n) __asan_poison_memory_region(p, n)
#define FR_OPEN(p, n) __asan_unpoison_memory_region(p, n)
#else
#define FR_CLOSE(p, n) (static_cast<void>(p), static_cast<void>(n))
#define FR_OPEN(p, n) (static_cast<void>(p), static_cast<void>(n))
#endif

namespace fused_resnet::native_test {

using Values = std::vector<double>;  // logical order: ((n * C) + c) * S + s

// Deterministic and fast: splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform(double low, double high) { return low + (high - low) * static_cast<double>(next() >> 11) * 0x1p-53; }
  double bell() { return uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1); }  // variance 1

 private:
  uint64_t state_;
};

// The relative error of one rounding to the type.
inline double rounding_unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-11;
  }
}
// Half the distance between subnormals, where rounding is absolute.
inline double smallest_step(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-1074;  // the smallest double, not its half
    case DType::kFloat32:
      return 0x1p-150;
    case DType::kBFloat16:
      return 0x1p-134;
    default:
      return 0x1p-25;
  }
}
inline DType stat_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
inline const char* dtype_name(DType dtype) {
  static constexpr std::array<const char*, 4> kNames = {"f64", "f32", "bf16", "f16"};
  return kNames[static_cast<size_t>(dtype)];
}

inline void encode(double value, DType dtype, void* at) {
  const float single = static_cast<float>(value);
  if (dtype == DType::kFloat64) {
    std::memcpy(at, &value, 8);
  } else if (dtype == DType::kFloat32) {
    std::memcpy(at, &single, 4);
  } else if (dtype == DType::kFloat16) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(at, &half, 2);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const uint16_t top = single != single ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy(at, &top, 2);
  }
}

inline double decode(const void* at, DType dtype) {
  if (dtype == DType::kFloat64) {
    double value;
    std::memcpy(&value, at, 8);
    return value;
  }
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, at, 4);
    return value;
  }
  if (dtype == DType::kFloat16) {
    _Float16 value;
    std::memcpy(&value, at, 2);
    return static_cast<double>(value);
  }
  uint16_t top;
  std::memcpy(&top, at, 2);
  const uint32_t bits = static_cast<uint32_t>(top) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline double rounded(double value, DType dtype) {
  unsigned char bytes[8];
  encode(value, dtype, bytes);
  return decode(bytes, dtype);
}

// Bytes between canaries, `misalign` bytes off a 64-byte boundary, filled with
// 0xff: a NaN in every floating type, so that what is never written shows.
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(int64_t size, int64_t misalign = 0) : size_(size), misalign_(misalign) {
    const int64_t total = (kGuard + misalign + size + kGuard + 63) / 64 * 64;
    block_.reset(static_cast<unsigned char*>(std::aligned_alloc(64, static_cast<size_t>(total))));
    total_ = total;
    std::memset(block_.get(), kCanary, static_cast<size_t>(total));
    std::memset(data(), 0xff, static_cast<size_t>(size));
    close_guards();
  }

  unsigned char* data() { return block_.get() + kGuard + misalign_; }
  const unsigned char* data() const { return block_.get() + kGuard + misalign_; }
  int64_t size() const { return size_; }

  bool guards_intact() const {
    open_guards();
    const bool intact = canaries_alive();
    close_guards();
    return intact;
  }
  bool same_bytes(const Guarded& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), static_cast<size_t>(size_)) == 0;
  }

 private:
  bool canaries_alive() const {
    for (int64_t i = 0; i < total_; ++i) {
      const bool inside = i >= kGuard + misalign_ && i < kGuard + misalign_ + size_;
      if (!inside && block_.get()[i] != kCanary) return false;
    }
    return true;
  }
  // AddressSanitizer also catches who only reads there.
  void open_guards() const { FR_OPEN(block_.get(), static_cast<size_t>(total_)); }
  void close_guards() const {
    const unsigned char* end = data() + size_;
    FR_CLOSE(block_.get(), static_cast<size_t>(data() - block_.get()));
    FR_CLOSE(end, static_cast<size_t>(block_.get() + total_ - end));
  }
  static constexpr int64_t kGuard = 128;
  static constexpr unsigned char kCanary = 0xc5;
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> block_;
  int64_t size_ = 0, misalign_ = 0, total_ = 0;
};

// Where element (n, c, s) lies.
inline int64_t offset_of(const Shape& shape, int64_t n, int64_t c, int64_t s) {
  return shape.layout == Layout::kNHWC ? (n * shape.s + s) * shape.c + c : (n * shape.c + c) * shape.s + s;
}

inline int64_t misalignment(const Shape& shape, bool misaligned) { return misaligned ? element_size(shape.dtype) : 0; }

inline Guarded output_tensor(const Shape& shape, bool misaligned) {
  return Guarded(shape.numel() * element_size(shape.dtype), misalignment(shape, misaligned));
}

inline Guarded input_tensor(const Shape& shape, const Values& values, bool misaligned) {
  Guarded out = output_tensor(shape, misaligned);
  size_t i = 0;
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t s = 0; s < shape.s; ++s)
        encode(values[i++], shape.dtype, out.data() + offset_of(shape, n, c, s) * element_size(shape.dtype));
  return out;
}

inline Values read_tensor(const Shape& shape, const Guarded& tensor) {
  Values values;
  values.reserve(static_cast<size_t>(shape.numel()));
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t s = 0; s < shape.s; ++s)
        values.push_back(decode(tensor.data() + offset_of(shape, n, c, s) * element_size(shape.dtype), shape.dtype));
  return values;
}

// Eight in a row, about a test's, of every 24 lie one element off a 16-byte boundary.
inline Guarded channel_array(const Values& values, DType dtype) {
  static int calls = 0;
  const bool misaligned = calls++ / 8 % 3 == 2;
  Guarded out(static_cast<int64_t>(values.size()) * element_size(dtype), misaligned ? element_size(dtype) : 0);
  for (size_t i = 0; i < values.size(); ++i) {
    encode(values[i], dtype, out.data() + static_cast<int64_t>(i) * element_size(dtype));
  }
  return out;
}

inline Values read_channels(const Guarded& array, DType dtype) {
  Values values;
  for (int64_t i = 0; i < array.size(); i += element_size(dtype)) values.push_back(decode(array.data() + i, dtype));
  return values;
}

inline int64_t mask_bytes(const Shape& shape) {
  const bool nhwc = shape.layout == Layout::kNHWC;
  return (nhwc ? shape.n * shape.s : shape.n * shape.c) * (((nhwc ? shape.c : shape.s) + 7) / 8);
}

// Bit of element (n, c, s) in a mask: rows of the contiguous axis, whole bytes each.
inline bool mask_bit(const Shape& shape, const Guarded& mask, int64_t n, int64_t c, int64_t s) {
  const bool nhwc = shape.layout == Layout::kNHWC;
  const int64_t length = nhwc ? shape.c : shape.s, row = nhwc ? n * shape.s + s : n * shape.c + c;
  const int64_t column = nhwc ? c : s;
  return (mask.data()[row * ((length + 7) / 8) + column / 8] >> (column % 8)) & 1;
}

}  // namespace fused_resnet::native_test
