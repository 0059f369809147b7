// Convolution as plain loops in double precision. Tensors are NHWC throughout, the weight is [tap][channel][filter].
#pragma once

#include "compare.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::native_test {

// Sums of products beside their `scale` (the sum of magnitudes) and `noise`: the root of the sum of squares, what
// independent roundings of every product's operand add up to.
struct Terms : Result {
  Values noise;
  void resize(size_t n) {
    Result::resize(n);
    noise.assign(n, 0);
  }
};

// f(index in x, in the weight, in y) for every product of the forward pass.
template <class F>
inline void for_products(const ConvShape& s, F f) {
  const int64_t oh = s.out_h(), ow = s.out_w(), c_count = s.c / s.groups, k_count = s.k / s.groups;
  for (int64_t pixel = 0; pixel < s.n * oh * ow; ++pixel) {
    const int64_t top = pixel / ow % oh * s.stride_h - s.pad_h, left = pixel % ow * s.stride_w - s.pad_w;
    for (int64_t tap = 0; tap < s.r * s.s; ++tap) {
      const int64_t row = top + tap / s.s * s.dilation_h, column = left + tap % s.s * s.dilation_w;
      if (row < 0 || row >= s.h || column < 0 || column >= s.w) continue;
      const int64_t x = (pixel / (oh * ow) * s.h + row) * s.w + column;
      for (int64_t g = 0; g < s.groups; ++g) {
        for (int64_t c = 0; c < c_count; ++c) {
          const int64_t w = (tap * c_count + c) * s.k + g * k_count, y = pixel * s.k + g * k_count;
          for (int64_t k = 0; k < k_count; ++k) f(x * s.c + g * c_count + c, w + k, y + k);
        }
      }
    }
  }
}

// Every element of `out` is the sum of products a * b; to, of_a and of_b choose among (x, weight, y).
template <int kTo, int kA, int kB>
inline Terms sum_products(const ConvShape& s, size_t size, const Result& a, const Result& b) {
  Terms out;
  out.resize(size);
  double *value = out.value.data(), *scale = out.scale.data(), *noise = out.noise.data();
  const double *av = a.value.data(), *as = a.scale.data(), *bv = b.value.data(), *bs = b.scale.data();
  for_products(s, [=](int64_t x, int64_t w, int64_t y) {
    const int64_t at[3] = {x, w, y};
    const double product = av[at[kA]] * bv[at[kB]];
    value[at[kTo]] += product;
    scale[at[kTo]] += as[at[kA]] * bs[at[kB]];
    noise[at[kTo]] += product * product;
  });
  for (double& n : out.noise) n = std::sqrt(n);
  return out;
}

inline Terms convolved(const ConvShape& s, const Result& a, const Result& weight) {
  return sum_products<2, 0, 1>(s, static_cast<size_t>(s.y_numel()), a, weight);
}
inline Terms data_gradient(const ConvShape& s, const Result& dz, const Result& weight) {
  return sum_products<0, 2, 1>(s, static_cast<size_t>(s.x_numel()), dz, weight);
}
inline Terms weight_gradient(const ConvShape& s, const Result& dz, const Result& a) {
  return sum_products<1, 2, 0>(s, static_cast<size_t>(s.k * (s.c / s.groups) * s.r * s.s), dz, a);
}

// f(index, channel) for every element of an NHWC tensor.
template <class F>
inline void for_elements(size_t numel, int64_t channels, F f) {
  for (size_t i = 0; i < numel; ++i) f(i, static_cast<int64_t>(i) % channels);
}

// norm(x) before its activation, with statistics that are given.
inline Result normalised(const Values& x, int64_t channels, const ReferenceNorm& norm) {
  Result pre;
  pre.resize(x.size());
  for_elements(x.size(), channels, [&](size_t i, int64_t c) {
    const double mean = norm.mean[static_cast<size_t>(c)], s = norm.w(c) * norm.rstd[static_cast<size_t>(c)];
    pre.value[i] = (x[i] - mean) * s + norm.b(c);
    pre.scale[i] = (std::abs(x[i]) + std::abs(mean)) * std::abs(s) + std::abs(norm.b(c));
  });
  return pre;
}

// act(norm(x))
inline Result prologue(const Values& x, int64_t channels, const ReferenceNorm& norm, const ReferenceAct& act) {
  Result y = normalised(x, channels, norm);
  for_elements(x.size(), channels, [&](size_t i, int64_t c) {
    y.value[i] = act_value(act, y.value[i], c);
    y.scale[i] = std::max(1.0, std::abs(act.a(c))) * y.scale[i] + std::abs(y.value[i]);
    if (std::isfinite(y.value[i])) y.scale[i] = std::min(y.scale[i], 1e300);  // sigmoid of an infinity, times zero
  });
  return y;
}

// The gradient through the batch norm of y, whose parameter gradients are given.
inline Result gradient_prologue(const Values& g, const Values& z, int64_t channels, const ReferenceNorm& norm,
                                const Values& dweight, const Values& dbias) {
  Result dz;
  dz.resize(g.size());
  const double count = static_cast<double>(g.size()) / static_cast<double>(channels);
  for_elements(g.size(), channels, [&](size_t i, int64_t c) {
    const auto channel = static_cast<size_t>(c);
    const double mean = norm.mean[channel], rstd = norm.rstd[channel], s = norm.w(c) * rstd;
    dz.value[i] = s * g[i], dz.scale[i] = std::abs(s * g[i]);
    if (!norm.batch_stats) return;
    const double by_weight = rstd * dweight[channel] / count, by_bias = dbias[channel] / count;
    dz.value[i] -= s * (by_bias + (z[i] - mean) * by_weight);
    dz.scale[i] += std::abs(s) * (std::abs(by_bias) + (std::abs(z[i]) + std::abs(mean)) * std::abs(by_weight));
  });
  return dz;
}

// Sums over the pixels of `terms` times `factor`, for every channel. One operand's element is in up to `taps` of them.
template <class F>
inline Terms channel_sums(const Terms& terms, int64_t channels, int64_t taps, F factor) {
  Terms out;
  out.resize(static_cast<size_t>(channels));
  std::vector<Sum> sum(static_cast<size_t>(channels), 0);
  for_elements(terms.value.size(), channels, [&](size_t i, int64_t c) {
    const auto channel = static_cast<size_t>(c);
    const double f = factor(i, channel);
    sum[channel] += static_cast<Sum>(terms.value[i]) * f;
    out.scale[channel] += terms.scale[i] * std::abs(f);
    out.noise[channel] += terms.noise[i] * terms.noise[i] * f * f;
  });
  for (size_t c = 0; c < sum.size(); ++c) out.value[c] = static_cast<double>(sum[c]);
  for (double& n : out.noise) n = std::sqrt(n * static_cast<double>(taps));
  return out;
}

// Mean and variance of y as it was stored. Kernels sum distances from some value of the channel, and their squares;
// units are merged in double, which doubles notice.
struct Statistics {
  Terms mean, var;
};
inline Statistics statistics(const Values& y, int64_t channels, DType dtype) {
  Terms terms;
  terms.value = y, terms.scale.assign(y.size(), 0), terms.noise = terms.scale;
  Statistics out{channel_sums(terms, channels, 1, [](size_t, size_t) { return 1.0; }), {}};
  const double count = static_cast<double>(y.size()) / static_cast<double>(channels);
  for (double& mean : out.mean.value) mean /= count;
  Values largest(static_cast<size_t>(channels), 0);
  for_elements(y.size(), channels, [&](size_t i, int64_t c) {
    const auto channel = static_cast<size_t>(c);
    terms.value[i] -= out.mean.value[channel];
    largest[channel] = std::max(largest[channel], 2 * std::abs(terms.value[i]));
  });
  out.var = channel_sums(terms, channels, 1, [&](size_t i, size_t) { return terms.value[i]; });
  for (size_t c = 0; c < largest.size(); ++c) {
    out.var.value[c] /= count;
    out.mean.scale[c] = largest[c] + (dtype == DType::kFloat64 ? std::abs(out.mean.value[c]) : 0);
    out.var.scale[c] = largest[c] * out.mean.scale[c];
  }
  return out;
}

}  // namespace fused_resnet::native_test
