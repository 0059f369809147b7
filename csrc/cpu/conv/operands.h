// From the seam's ConvInput and ConvGradient to what kernels read.
#pragma once

#include "batch_norm/params.h"
#include "conv/kernels.h"
#include "fused_resnet/conv.h"
#include "fused_resnet/workspace.h"

namespace fused_resnet::cpu {

// A panel of filters may end up to one vector behind the last channel.
inline int64_t padded_columns(int64_t c) { return padded_channels(c) + kChannelPad; }

// `from` (c,) in `to`, with zeros behind.
template <class S>
S* fill_columns(S* to, const S* from, int64_t c) {
  for (int64_t i = 0; i < padded_columns(c); ++i) to[i] = i < c ? from[i] : S(0);
  return to;
}

// Per-channel arrays of one operand.
template <class S>
struct OperandArrays {
  NormArrays<S> norm;
  S *slope, *b, *c_term;
  OperandArrays(Carver& carver, int64_t padded)
      : norm(carver, padded),
        slope(carver.take<S>(padded)),
        b(carver.take<S>(padded)),
        c_term(carver.take<S>(padded)) {}

  void fill_input(const ConvInput& x, const ConvShape& s, ConvOperand* o) {
    o->data = x.data;
    if (!x.has_norm) return;
    const int64_t padded = padded_columns(s.c);
    norm.fill(x.norm, s.c, padded);
    fill_slope(slope, x.act, s.c, padded);
    o->kind = OperandKind::kNorm;
    o->act = x.act.kind;
    o->slope = slope;
    point_at_norm(o);
  }

  // docs/batch_norm_math.md, as GradientArrays::set has it.
  void fill_gradient(const ConvGradient& dy, const ConvShape& s, ConvOperand* o) {
    o->data = dy.data;
    o->mask = dy.mask;
    o->c = s.k;
    if (!dy.has_norm) return;
    const int64_t padded = padded_columns(s.k);
    norm.fill(dy.norm, s.k, padded);
    const double count = static_cast<double>(s.n * s.out_h() * s.out_w());
    for (int64_t i = 0; i < padded; ++i) {
      b[i] = c_term[i] = S(0);
      if (i >= s.k || !dy.norm.batch_stats) continue;
      const double scale = static_cast<double>(norm.scale[i]);
      const double rstd = static_cast<double>(static_cast<const S*>(dy.norm.rstd)[i]);
      b[i] = static_cast<S>(-scale * rstd * static_cast<double>(static_cast<const S*>(dy.dweight)[i]) / count);
      c_term[i] = static_cast<S>(-scale * static_cast<double>(static_cast<const S*>(dy.dbias)[i]) / count);
    }
    o->kind = OperandKind::kGradient;
    o->z = dy.z;
    o->batch_stats = dy.norm.batch_stats;
    o->b = b;
    o->c_term = c_term;
    point_at_norm(o);
  }

 private:
  void point_at_norm(ConvOperand* o) const {
    o->mean = norm.mean;
    o->scale = norm.scale;
    o->bias = norm.bias;
  }
};

}  // namespace fused_resnet::cpu
