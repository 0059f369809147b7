// A weight gradient beside the data gradient of the same convolution: both read the gradient, and where a batch norm
// stands behind the convolution what that had put out. Each unit of the data gradient is followed by the blocks of the
// weight gradient that lie there, while what they read is in a cache. Source: docs/convolution.md.
#pragma once

#include <cstdint>

#include "fused_resnet/conv.h"

namespace fused_resnet::cpu {

// How a data gradient of pixels that follow each other is cut.
struct DataUnits {
  int64_t count = 0;   // none: it is not such a one
  int64_t pixels = 0;  // of each but the last
};
DataUnits backward_data_units(const ConvShape& s, const ConvNumerics& numerics);

// One unit of the data gradient, which has just been computed.
struct DataUnit {
  int64_t index;
  // The gradient of its pixels as it was multiplied, `channels` apart, in the problem's dtype; null where it was not
  // packed, or not as that.
  const void* packed;
  int64_t channels;
};

struct Beside {
  int64_t slices;
  const int64_t* first_unit;  // [slice], and behind the last one
  const void* self;
  // Worker `worker` is in `slice`, alone, and meets its units in order.
  void (*run)(const void* self, int64_t worker, int64_t slice, const DataUnit& unit);
};

// The data gradient of a problem that has units.
Status backward_data_beside(const ConvBackwardData& p, const Beside& beside);

}  // namespace fused_resnet::cpu
