// Activations over any vector type. Included inside an unnamed namespace.
#pragma once

// What the loops are compiled for; leaky_relu is prelu with one slope.
enum class ActClass : uint8_t { kIdentity, kRelu, kSlope, kSmooth };

inline ActClass act_class(Activation act) {
  switch (act) {
    case Activation::kIdentity:
      return ActClass::kIdentity;
    case Activation::kRelu:
      return ActClass::kRelu;
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
      return ActClass::kSlope;
    default:
      return ActClass::kSmooth;
  }
}

template <class I>
inline typename I::V sigmoid(typename I::V x) {
  const auto one = I::set1(1);
  return I::div(one, I::add(one, I::exp(I::sub(I::zero(), x))));
}

template <class I>
inline typename I::V smooth_forward(Activation act, typename I::V pre) {
  if (act == Activation::kTanh) return I::tanh(pre);
  const auto s = sigmoid<I>(pre);
  return act == Activation::kSilu ? I::mul(pre, s) : s;
}

// d act / d pre.
template <class I>
inline typename I::V smooth_derivative(Activation act, typename I::V pre) {
  const auto one = I::set1(1);
  if (act == Activation::kTanh) {
    const auto t = I::tanh(pre);
    return I::sub(one, I::mul(t, t));
  }
  const auto s = sigmoid<I>(pre);
  const auto q = I::sub(one, s);
  return act == Activation::kSilu ? I::mul(s, I::fma(pre, q, one)) : I::mul(s, q);
}

// Where the gradient passes unchanged. torch: relu blocks y <= 0, so NaN passes;
// leaky_relu and prelu pass x > 0, so NaN takes the slope.
template <class I, ActClass A>
inline typename I::M keep_mask(typename I::V pre) {
  if constexpr (A == ActClass::kRelu) return I::not_le(pre, I::zero());
  return I::gt(pre, I::zero());
}

template <class I, ActClass A>
inline typename I::V act_forward(Activation act, typename I::V pre, typename I::V slope) {
  if constexpr (A == ActClass::kIdentity) return pre;
  if constexpr (A == ActClass::kRelu) return I::max(I::zero(), pre);  // keeps NaN and -0
  if constexpr (A == ActClass::kSlope) return I::select(I::gt(pre, I::zero()), pre, I::mul(pre, slope));
  if constexpr (A == ActClass::kSmooth) return smooth_forward<I>(act, pre);
}

template <class I, ActClass A>
inline typename I::V act_masked_gradient(typename I::M keep, typename I::V dy, typename I::V slope) {
  if constexpr (A == ActClass::kRelu) return I::select(keep, dy, I::zero());
  return I::select(keep, dy, I::mul(dy, slope));
}

template <class I, ActClass A>
inline typename I::V act_gradient(Activation act, typename I::V dy, typename I::V pre, typename I::V slope) {
  if constexpr (A == ActClass::kIdentity) {
    return dy;
  } else if constexpr (A == ActClass::kSmooth) {
    return I::mul(dy, smooth_derivative<I>(act, pre));
  } else {
    return act_masked_gradient<I, A>(keep_mask<I, A>(pre), dy, slope);
  }
}

// The gradient through one normalisation. Fixed statistics pass g * scale alone.
template <class I>
inline typename I::V chain(bool batch_stats, typename I::V g, typename I::V scale, typename I::V xc, typename I::V b,
                           typename I::V c) {
  return batch_stats ? I::fma(g, scale, I::fma(xc, b, c)) : I::mul(g, scale);
}
