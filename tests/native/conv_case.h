// One convolution under test: its options, its data, and what the seam is told of both.
#pragma once

#include <string>

#include "conv_reference.h"
#include "tests.h"

namespace fused_resnet::native_test {

enum class Gradient { kPlain, kMask, kBatch, kBatchMask, kFixed, kFixedMask };  // what dy is, and its mask
enum class Skip { kNone, kPlain, kMask };
enum class WeightLayout { kContiguous, kChannelsLast, kFiltersLast };
// kHuge: one element of each tensor; kSmall, kTiny: all of them, products then near the smallest normal float.
enum class Special { kNone, kNanInTensors, kInfInTensors, kNanInWeight, kInfInWeight, kHuge, kSmall, kTiny };

struct ConvCase {
  ConvShape shape;
  uint64_t seed = 0;
  bool has_norm = false;
  Activation act = Activation::kIdentity;
  bool affine = true, bias = false, stats = false, dbias = false, misaligned = false;
  Gradient dy = Gradient::kPlain;
  Skip skip = Skip::kNone;
  WeightLayout layout = WeightLayout::kContiguous;
  Special special = Special::kNone;
  double offset = 0;          // of y, through its bias
  bool threads = false;       // real ones
  int together = 0;           // threads for which the two gradients are side by side, at least
  bool float_weight = false;  // with a problem of fewer bits

  bool gradient_norm() const { return dy != Gradient::kPlain && dy != Gradient::kMask; }
  bool gradient_mask() const {
    return dy == Gradient::kMask || dy == Gradient::kBatchMask || dy == Gradient::kFixedMask;
  }
  bool gradient_batch() const { return dy == Gradient::kBatch || dy == Gradient::kBatchMask; }
  bool wants_var() const { return seed % 3 != 0; }
  int64_t taps() const { return shape.r * shape.s; }
  DType stat() const { return stat_dtype(shape.dtype); }
  DType weight_dtype() const { return float_weight ? DType::kFloat32 : shape.dtype; }

  std::string name() const {
    const auto pair = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
    std::string text = std::string(dtype_name(shape.dtype)) + " " + std::to_string(shape.n) + "x" +
                       pair(shape.h, shape.w) + "x" + pair(shape.c, shape.k) + " taps " + pair(shape.r, shape.s) +
                       " stride " + pair(shape.stride_h, shape.stride_w) + " pad " + pair(shape.pad_h, shape.pad_w) +
                       " dilation " + pair(shape.dilation_h, shape.dilation_w);
    if (shape.groups > 1) text += " groups " + std::to_string(shape.groups);
    if (has_norm) text += std::string(" norm ") + activation_name(act);
    text += " dy " + std::to_string(static_cast<int>(dy)) + " skip " + std::to_string(static_cast<int>(skip)) +
            " weight " + std::to_string(static_cast<int>(layout));
    if (bias) text += " bias";
    if (stats) text += " stats";
    if (float_weight) text += " of floats";
    if (special != Special::kNone) text += " special " + std::to_string(static_cast<int>(special));
    return text;
  }
};

// Any NHWC tensor, as one row.
inline Shape row_of(int64_t count, DType dtype) { return {1, 1, count, dtype, Layout::kNHWC}; }

inline ConvWeight layout_strides(const ConvShape& s, WeightLayout layout) {
  const int64_t c = s.c / s.groups;
  switch (layout) {
    case WeightLayout::kContiguous:
      return {nullptr, c * s.r * s.s, s.r * s.s, s.s, 1};
    case WeightLayout::kChannelsLast:
      return {nullptr, c * s.r * s.s, 1, s.s * c, c};
    case WeightLayout::kFiltersLast:
      return {nullptr, 1, s.k, s.s * c * s.k, c * s.k};
  }
  return {};
}

inline ConvWeight weight_strides(const ConvCase& k) {
  ConvWeight weight = layout_strides(k.shape, k.layout);
  weight.is_float = k.weight_dtype() == DType::kFloat32;
  return weight;
}

// f(index in [tap][channel][filter], where it lies with these strides)
template <class F>
inline void for_weight(const ConvShape& s, const ConvWeight& strides, F f) {
  size_t i = 0;
  for (int64_t tap = 0; tap < s.r * s.s; ++tap)
    for (int64_t c = 0; c < s.c / s.groups; ++c)
      for (int64_t k = 0; k < s.k; ++k)
        f(i++,
          k * strides.stride_k + c * strides.stride_c + tap / s.s * strides.stride_r + tap % s.s * strides.stride_s);
}

struct ConvNorm {
  ReferenceNorm values;
  Guarded weight, bias, mean, rstd;
  NormParams params() {
    NormParams p;
    p.batch_stats = values.batch_stats;
    p.weight = values.weight.empty() ? nullptr : weight.data();
    p.bias = values.bias.empty() ? nullptr : bias.data();
    p.mean = mean.data(), p.rstd = rstd.data();
    return p;
  }
};

struct ConvData {
  Result x, dy, z, weight, skip, added;  // as they are stored; dy and skip masked. added: forward's skip
  Guarded added_bytes, x_bytes, dy_bytes, z_bytes, weight_bytes, skip_bytes, dy_mask, skip_mask;
  ConvNorm input, output;
  ReferenceAct act;
  Values bias, norm_dweight, norm_dbias;
  Guarded slope_bytes, bias_bytes, norm_dweight_bytes, norm_dbias_bytes;

  Result a, pre, dz;  // the operands, and x's norm before the activation
};

inline ConvNorm random_norm(const ConvCase& k, Random& random, int64_t channels, bool batch_stats) {
  ConvNorm norm;
  ReferenceNorm& v = norm.values;
  v.batch_stats = batch_stats;
  for (int64_t c = 0; c < channels; ++c) {
    if (k.affine) {
      v.weight.push_back(rounded(random.uniform(0.25, 1.5) * (random.next() % 2 == 0 ? 1 : -1), k.stat()));
      v.bias.push_back(rounded(random.uniform(-1, 1), k.stat()));
    }
    v.mean.push_back(rounded(random.uniform(-1, 1), k.stat()));
    v.rstd.push_back(rounded(random.uniform(0.5, 2), k.stat()));
  }
  norm.weight = channel_array(v.weight, k.stat()), norm.bias = channel_array(v.bias, k.stat());
  norm.mean = channel_array(v.mean, k.stat()), norm.rstd = channel_array(v.rstd, k.stat());
  return norm;
}

inline Values random_values(Random& random, int64_t count, DType dtype, double factor, double offset) {
  Values out;
  for (int64_t i = 0; i < count; ++i) out.push_back(rounded(factor * random.bell() + offset, dtype));
  return out;
}

// Random bits; elements without one become zeros in `values`.
inline Guarded random_mask(Random& random, int64_t channels, Values* values) {
  const int64_t row = (channels + 7) / 8;
  Guarded mask(static_cast<int64_t>(values->size()) / channels * row);
  for (int64_t i = 0; i < mask.size(); ++i) mask.data()[i] = static_cast<unsigned char>(random.next());
  for_elements(values->size(), channels, [&](size_t i, int64_t c) {
    const int64_t pixel = static_cast<int64_t>(i) / channels;
    if (((mask.data()[pixel * row + c / 8] >> (c % 8)) & 1) == 0) (*values)[i] = 0;
  });
  return mask;
}

// x, away from where rounding decides on which side of a kink its norm lies.
inline Values random_input(const ConvCase& k, Random& random, const ReferenceNorm& norm) {
  Values x = random_values(random, k.shape.x_numel(), k.shape.dtype, 1, 0.25);
  if (!k.has_norm || !has_kink(k.act)) return x;
  const double unsure = 4 * kElementUnits * rounding_unit(k.stat());
  for (bool again = true; again;) {
    again = false;
    const Result pre = normalised(x, k.shape.c, norm);
    for (size_t i = 0; i < x.size(); ++i) {
      if (std::abs(pre.value[i]) > unsure * pre.scale[i]) continue;
      x[i] = rounded(random.bell() + 0.25, k.shape.dtype);
      again = true;
    }
  }
  return x;
}

inline ConvData make_conv_data(const ConvCase& k) {
  const ConvShape& s = k.shape;
  Random random(k.seed * 7919 + 13);
  ConvData d;
  d.input = random_norm(k, random, s.c, false), d.output = random_norm(k, random, s.k, k.gradient_batch());
  d.act = {k.act, 0.125, {}};
  for (int64_t c = 0; c < s.c; ++c) d.act.slope.push_back(rounded(random.uniform(-0.5, 0.5), k.stat()));
  Values x = random_input(k, random, d.input.values), dy = random_values(random, s.y_numel(), s.dtype, 1, 0.25);
  const auto times = [](Values& values, double factor) {
    for (double& v : values) v *= factor;
  };
  const int64_t weights = s.k * (s.c / s.groups) * k.taps();
  const double spread = 1 / std::sqrt(static_cast<double>(s.c / s.groups * k.taps()));
  Values weight = random_values(random, weights, s.dtype, spread, spread / 8);
  const double special = k.special == Special::kNanInTensors || k.special == Special::kNanInWeight ? NAN : INFINITY;
  if (k.special == Special::kNanInTensors || k.special == Special::kInfInTensors) {
    x[random.next() % x.size()] = special, dy[random.next() % dy.size()] = special;
  } else if (k.special == Special::kHuge) {
    x[random.next() % x.size()] = dy[random.next() % dy.size()] = 0x1p60;
  } else if (k.special == Special::kSmall || k.special == Special::kTiny) {
    const double factor = k.special == Special::kSmall ? 0x1p-36 : 0x1p-56;
    times(x, factor), times(dy, factor), times(weight, factor);
  } else if (k.special != Special::kNone) {
    weight[random.next() % weight.size()] = special;
  }
  d.x_bytes = input_tensor(row_of(s.x_numel(), s.dtype), x, k.misaligned);
  d.dy_bytes = input_tensor(row_of(s.y_numel(), s.dtype), dy, k.misaligned);
  if (k.gradient_mask()) d.dy_mask = random_mask(random, s.k, &dy);
  Values z = random_values(random, s.y_numel(), s.dtype, 1, 0.25);
  d.z_bytes = input_tensor(row_of(s.y_numel(), s.dtype), z, k.misaligned);
  Values skip = random_values(random, s.x_numel(), s.dtype, 1, 0);
  d.skip_bytes = input_tensor(row_of(s.x_numel(), s.dtype), skip, k.misaligned);
  if (k.skip == Skip::kMask) d.skip_mask = random_mask(random, s.c, &skip);

  const Values added = random_values(random, s.y_numel(), s.dtype, 1, 0);
  d.added_bytes = input_tensor(row_of(s.y_numel(), s.dtype), added, k.misaligned);

  const int64_t unit = element_size(k.weight_dtype());
  d.weight_bytes = Guarded(weights * unit, k.misaligned ? unit : 0);
  for_weight(s, weight_strides(k),
             [&](size_t i, int64_t at) { encode(weight[i], k.weight_dtype(), d.weight_bytes.data() + at * unit); });
  const double count = static_cast<double>(s.y_numel() / s.k);
  d.bias = random_values(random, s.k, k.stat(), 1, k.offset);
  d.norm_dweight = random_values(random, s.k, k.stat(), std::sqrt(count), 0);
  d.norm_dbias = random_values(random, s.k, k.stat(), std::sqrt(count), 0);
  d.slope_bytes = channel_array(d.act.slope, k.stat()), d.bias_bytes = channel_array(d.bias, k.stat());
  d.norm_dweight_bytes = channel_array(d.norm_dweight, k.stat());
  d.norm_dbias_bytes = channel_array(d.norm_dbias, k.stat());

  if (k.has_norm) d.pre = normalised(x, s.c, d.input.values);
  d.a = k.has_norm ? prologue(x, s.c, d.input.values, d.act) : exact(x);
  d.dz = k.gradient_norm() ? gradient_prologue(dy, z, s.k, d.output.values, d.norm_dweight, d.norm_dbias) : exact(dy);
  d.x = exact(x), d.dy = exact(dy), d.z = exact(z), d.weight = exact(weight), d.skip = exact(skip);
  d.added = exact(added);
  return d;
}

inline ConvInput conv_input(const ConvCase& k, ConvData& d) {
  ConvInput x;
  x.data = d.x_bytes.data();
  x.has_norm = k.has_norm;
  x.norm = d.input.params();
  x.act.kind = k.act;
  x.act.negative_slope = d.act.negative_slope;
  if (k.act == Activation::kPrelu) x.act.slope = d.slope_bytes.data();
  return x;
}

inline ConvGradient conv_gradient(const ConvCase& k, ConvData& d) {
  ConvGradient dy;
  dy.data = d.dy_bytes.data();
  if (k.gradient_mask()) dy.mask = d.dy_mask.data();
  dy.has_norm = k.gradient_norm();
  if (!dy.has_norm) return dy;
  dy.z = d.z_bytes.data();
  dy.norm = d.output.params();
  dy.dweight = d.norm_dweight_bytes.data(), dy.dbias = d.norm_dbias_bytes.data();
  return dy;
}

inline ConvWeight conv_weight(const ConvCase& k, const ConvData& d) {
  ConvWeight weight = weight_strides(k);
  weight.data = d.weight_bytes.data();
  return weight;
}

}  // namespace fused_resnet::native_test
