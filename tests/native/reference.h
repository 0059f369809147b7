// docs/batch_norm_math.md as plain loops in double precision: the oracle. Sums
// run in long double, so that its own error does not show in tests of doubles.
//
// Beside each result stands its `scale`: the sum of the magnitudes that went into
// it, so that "a few rounding errors" has a meaning where terms cancel.
#pragma once

#include <cmath>
#include <limits>

#include "fused_resnet/pool.h"
#include "tensors.h"

namespace fused_resnet::native_test {

struct ReferenceNorm {
  bool batch_stats = false;
  double eps = 1e-5;
  Values weight, bias;     // empty: ones, zeros
  Values mean, rstd, var;  // (C,); read unless batch_stats
  double w(int64_t c) const { return weight.empty() ? 1 : weight[static_cast<size_t>(c)]; }
  double b(int64_t c) const { return bias.empty() ? 0 : bias[static_cast<size_t>(c)]; }
};

struct ReferenceAct {
  Activation kind = Activation::kIdentity;
  double negative_slope = 0.01;
  Values slope;  // prelu
  double a(int64_t c) const { return kind == Activation::kPrelu ? slope[static_cast<size_t>(c)] : negative_slope; }
};

struct Result {
  Values value, scale;
  void resize(size_t n) { value.assign(n, 0), scale.assign(n, 0); }
};

using Sum = long double;

inline size_t at(const Shape& shape, int64_t n, int64_t c, int64_t s) {
  return static_cast<size_t>((n * shape.c + c) * shape.s + s);
}

template <class F>
inline void for_channel(const Shape& shape, int64_t c, F f) {
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t s = 0; s < shape.s; ++s) f(at(shape, n, c, s));
}

inline double sigmoid(double p) { return 1 / (1 + std::exp(-p)); }

inline double act_value(const ReferenceAct& act, double p, int64_t c) {
  switch (act.kind) {
    case Activation::kIdentity:
      return p;
    case Activation::kRelu:
      return p <= 0 ? 0 : p;
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
      return p > 0 ? p : act.a(c) * p;
    case Activation::kSigmoid:
      return sigmoid(p);
    case Activation::kTanh:
      return std::tanh(p);
    case Activation::kSilu:
      return p * sigmoid(p);
  }
  return 0;
}

inline double act_derivative(const ReferenceAct& act, double p, int64_t c) {
  const double sig = sigmoid(p), t = std::tanh(p);
  switch (act.kind) {
    case Activation::kIdentity:
      return 1;
    case Activation::kRelu:
      return p <= 0 ? 0 : 1;
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
      return p > 0 ? 1 : act.a(c);
    case Activation::kSigmoid:
      return sig * (1 - sig);
    case Activation::kTanh:
      return 1 - t * t;
    case Activation::kSilu:
      return sig * (1 + p * (1 - sig));
  }
  return 0;
}

inline bool has_kink(Activation kind) {
  return kind == Activation::kRelu || kind == Activation::kLeakyRelu || kind == Activation::kPrelu;
}

// Two passes: no shift is needed.
inline void batch_statistics(const Shape& shape, const Values& x, ReferenceNorm* norm) {
  const auto channels = static_cast<size_t>(shape.c);
  norm->mean.assign(channels, 0), norm->var.assign(channels, 0), norm->rstd.assign(channels, 0);
  const Sum m = static_cast<Sum>(shape.per_channel());
  for (int64_t c = 0; c < shape.c; ++c) {
    Sum sum = 0, square = 0;
    for_channel(shape, c, [&](size_t i) { sum += x[i]; });
    const Sum mean = sum / m;
    for_channel(shape, c, [&](size_t i) { square += (x[i] - mean) * (x[i] - mean); });
    const auto channel = static_cast<size_t>(c);
    norm->mean[channel] = static_cast<double>(mean), norm->var[channel] = static_cast<double>(square / m);
    norm->rstd[channel] = static_cast<double>(1 / std::sqrt(square / m + norm->eps));
  }
}

inline void add_normalised(const Shape& shape, const Values& x, const ReferenceNorm& norm, Result* pre) {
  for (int64_t c = 0; c < shape.c; ++c) {
    const auto channel = static_cast<size_t>(c);
    const double mean = norm.mean[channel], s = norm.w(c) * norm.rstd[channel], b = norm.b(c);
    // A mean computed from the batch is known up to a rounding of the values' spread.
    const double spread = norm.batch_stats ? std::sqrt(norm.var[channel]) : 0;
    for_channel(shape, c, [&](size_t i) {
      pre->value[i] += (x[i] - mean) * s + b;
      pre->scale[i] += (std::abs(x[i]) + std::abs(mean) + spread) * std::abs(s) + std::abs(b);
    });
  }
}

// pre of the plain, residual and dual form. residual_norm null: r is added as it is.
inline Result pre_activation(const Shape& shape, const Values& x, const ReferenceNorm& norm, const Values& residual,
                             const ReferenceNorm* residual_norm) {
  Result pre;
  pre.resize(x.size());
  add_normalised(shape, x, norm, &pre);
  if (residual_norm != nullptr) {
    add_normalised(shape, residual, *residual_norm, &pre);
  } else {
    for (size_t i = 0; i < residual.size(); ++i) {
      pre.value[i] += residual[i], pre.scale[i] += std::abs(residual[i]);
    }
  }
  return pre;
}

inline Result activated(const Shape& shape, const Result& pre, const ReferenceAct& act) {
  Result y = pre;
  for (int64_t c = 0; c < shape.c; ++c) {
    for_channel(shape, c, [&](size_t i) {
      y.value[i] = act_value(act, pre.value[i], c);
      y.scale[i] = std::max(1.0, std::abs(act.a(c))) * pre.scale[i] + std::abs(y.value[i]);
    });
  }
  return y;
}

struct Gradients {
  Result dx, dresidual;                                             // as x
  Result dweight, dbias, dresidual_weight, dresidual_bias, dslope;  // (C,)
};

inline Result exact(const Values& values) {
  Result out{values, values};
  for (double& scale : out.scale) scale = std::abs(scale);
  return out;
}

// One normalisation's input and parameter gradients from g.
inline void norm_backward(const Shape& shape, const Result& g, const Values& x, const ReferenceNorm& norm, Result* dx,
                          Result* dweight, Result* dbias) {
  const Sum m = static_cast<Sum>(shape.per_channel());
  dx->resize(x.size()), dweight->resize(static_cast<size_t>(shape.c)), dbias->resize(static_cast<size_t>(shape.c));
  for (int64_t c = 0; c < shape.c; ++c) {
    const auto channel = static_cast<size_t>(c);
    const double mean = norm.mean[channel], rstd = norm.rstd[channel];
    Sum dw = 0, db = 0, dw_scale = 0, db_scale = 0;
    auto size_of = [&](size_t i) { return (std::abs(x[i] - mean) + 0x1p-3 * std::abs(mean)) * rstd; };
    for_channel(shape, c, [&](size_t i) {
      db += g.value[i], db_scale += g.scale[i];
      dw += static_cast<Sum>(g.value[i]) * (x[i] - mean) * rstd, dw_scale += g.scale[i] * size_of(i);
    });
    dweight->value[channel] = static_cast<double>(dw), dweight->scale[channel] = static_cast<double>(dw_scale);
    dbias->value[channel] = static_cast<double>(db), dbias->scale[channel] = static_cast<double>(db_scale);
    const double a = norm.w(c) * rstd;
    for_channel(shape, c, [&](size_t i) {
      const double xhat = (x[i] - mean) * rstd;
      dx->value[i] = a * g.value[i], dx->scale[i] = std::abs(a) * g.scale[i];
      if (norm.batch_stats) {
        dx->value[i] -= static_cast<double>(a * (db + xhat * dw) / m);
        dx->scale[i] += static_cast<double>(std::abs(a) * (db_scale + size_of(i) * dw_scale) / m);
      }
    });
  }
}

inline Gradients backward(const Shape& shape, const Result& dy, const Values& x, const ReferenceNorm& norm,
                          const Values& residual, const ReferenceNorm* residual_norm, const ReferenceAct& act) {
  const Result pre = pre_activation(shape, x, norm, residual, residual_norm);
  Gradients out;
  out.dslope.resize(static_cast<size_t>(shape.c));
  Result g;
  g.resize(x.size());
  for (int64_t c = 0; c < shape.c; ++c) {
    const auto channel = static_cast<size_t>(c);
    for_channel(shape, c, [&](size_t i) {
      const double derivative = act_derivative(act, pre.value[i], c);
      const double slack = has_kink(act.kind) || act.kind == Activation::kIdentity ? 0 : 1 + pre.scale[i];
      g.value[i] = dy.value[i] * derivative;
      g.scale[i] = dy.scale[i] * (std::abs(derivative) + slack);
      if (pre.value[i] <= 0) {
        out.dslope.value[channel] += dy.value[i] * pre.value[i];
        out.dslope.scale[channel] += dy.scale[i] * pre.scale[i];
      }
    });
  }
  norm_backward(shape, g, x, norm, &out.dx, &out.dweight, &out.dbias);
  if (residual_norm != nullptr) {
    norm_backward(shape, g, residual, *residual_norm, &out.dresidual, &out.dresidual_weight, &out.dresidual_bias);
  } else {
    out.dresidual = g;
  }
  return out;
}

// The 3x3 stride-2 padding-1 window of pooled position (i, j): f(tap, position in
// the image) for every tap inside it.
template <class F>
inline void for_window(int64_t h, int64_t w, int64_t i, int64_t j, F f) {
  for (int64_t k = 0; k < 3; ++k) {
    for (int64_t l = 0; l < 3; ++l) {
      const int64_t row = 2 * i - 1 + k, column = 2 * j - 1 + l;
      if (row >= 0 && row < h && column >= 0 && column < w) f(static_cast<int>(3 * k + l), row * w + column);
    }
  }
}

inline Shape pooled_shape(const Shape& shape, int64_t h, int64_t w) {
  Shape pooled = shape;
  pooled.s = stem_pool_extent(h) * stem_pool_extent(w);
  return pooled;
}

}  // namespace fused_resnet::native_test
