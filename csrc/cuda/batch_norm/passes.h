// What the files of one dtype (bn_<dtype>.cu) offer to the operators. T is the storage type.
#pragma once

#include "batch_norm/finalize.cuh"
#include "device/activation.cuh"
#include "fused_resnet/batch_norm.h"
#include "fused_resnet/workspace.h"

namespace fused_resnet::cuda {

template <class T>
Status forward(const BatchNormActForward& p);
template <class T>
Status backward(const BatchNormActBackward& p);

// mean, rstd, var of x, for the stem too. partials: stats_bytes(). `failure`: launch.h.
template <class T>
Status compute_stats(const char* failure, const void* x, const Shape& shape, const NormParams& norm, void* partials,
                     void* stream);
int64_t stats_bytes(const Shape& shape);

template <class T>
Status finalize_gradient(const char* failure, const FinalGradientArgs<Stat<T>>& args, void* stream);

// f.operator()<T>() for the storage type.
template <class F>
auto with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64:
      return f.template operator()<double>();
    case DType::kBFloat16:
      return f.template operator()<BFloat16>();
    case DType::kFloat16:
      return f.template operator()<Float16>();
    default:
      return f.template operator()<float>();
  }
}

// f(Case): the kernel for the case.
template <Layout kLayoutOf, bool kVectorOf>
struct Case {
  static constexpr Layout kLayout = kLayoutOf;
  static constexpr bool kVector = kVectorOf;
};

template <class F>
auto pick_kernel(Layout layout, bool vector, F f) {
  if (layout == Layout::kNHWC) return vector ? f(Case<Layout::kNHWC, true>{}) : f(Case<Layout::kNHWC, false>{});
  return vector ? f(Case<Layout::kNCHW, true>{}) : f(Case<Layout::kNCHW, false>{});
}

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// f(Case, class of activations).
template <class F>
auto pick_kernel(Layout layout, bool vector, Activation act, F f) {
  return pick_kernel(layout, vector, [=](auto c) {
    switch (class_of(act)) {
      case ActClass::kClip:
        return f(c, Constant<ActClass::kClip>{});
      case ActClass::kSlope:
        return f(c, Constant<ActClass::kSlope>{});
      default:
        return f(c, Constant<ActClass::kSmooth>{});
    }
  });
}

// True: every pointer that is not null is a multiple of `bytes`.
template <class... P>
bool aligned_to(uintptr_t bytes, const P*... p) {
  return (... && (reinterpret_cast<uintptr_t>(p) % bytes == 0));
}
inline bool aligned(const NormParams& p) { return aligned_to(16, p.mean, p.rstd, p.weight, p.bias); }

// b and c of Chain for both norms, then the partial sums of backward.
template <class S>
struct BackwardSpace {
  S *b, *c, *residual_b, *residual_c, *partials;
  int64_t bytes;
  BackwardSpace(Carver carver, int64_t padded, int64_t chunks)
      : b(carver.take<S>(padded)),
        c(carver.take<S>(padded)),
        residual_b(carver.take<S>(padded)),
        residual_c(carver.take<S>(padded)),
        partials(carver.take<S>(chunks * kSums * padded)),
        bytes(carver.used()) {}
};

template <class S>
GradientOut<S> gradient_out(const NormParams& norm, void* dweight, void* dbias, S* b, S* c) {
  return {norm.batch_stats,
          static_cast<const S*>(norm.rstd),
          static_cast<const S*>(norm.weight),
          static_cast<S*>(dweight),
          static_cast<S*>(dbias),
          b,
          c};
}

inline int64_t backward_bytes(DType dtype, const Tile& t) {
  const Carver count(nullptr);
  return dtype == DType::kFloat64 ? BackwardSpace<double>(count, t.padded, t.chunks).bytes
                                  : BackwardSpace<float>(count, t.padded, t.chunks).bytes;
}

}  // namespace fused_resnet::cuda
