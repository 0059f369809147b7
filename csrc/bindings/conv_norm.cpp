// Convolutions with the batch norms around them, on the CPU: check, allocate, fill the seam's structs, call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>
#include <utility>

#include "bindings/conv_problem.h"
#include "bindings/conv_run.h"
#include "bindings/ops.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::bindings {
namespace {

// One batch norm of a call and the tensor it normalises; every tensor a kernel reads is kept alive here.
struct Normed {
  Tensor data;  // channels_last; undefined: there is no norm
  NormOperands norm;
  Tensor slope;

  Normed() = default;
  Normed(const Plan& plan, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& weight,
         const OptionalTensor& bias)
      : data(plan.x), norm(saved_operands(plan, *mean, *rstd, weight, bias)) {}
};

void check_norm(const char* op, const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd,
                const OptionalTensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(check::given(mean) && check::given(rstd), op, ": expected mean and rstd both or neither, got one alone");
  check::statistic(op, "mean", *mean, x);
  check::statistic(op, "rstd", *rstd, x);
  check::channel(op, "weight", weight, x);
  check::channel(op, "bias", bias, x);
}

// prelu's slope is no argument here.
void check_act(const char* op, int64_t act) {
  TORCH_CHECK_VALUE(act >= 0 && act < kActivationCount && act != static_cast<int64_t>(Activation::kPrelu), op,
                    ": expected act from 0 to ", kActivationCount - 1, " and not prelu, got ", act);
}

ConvInput conv_input(const Tensor& x, const Normed& norm, int64_t act, double negative_slope) {
  ConvInput in;
  in.data = read(x);
  if (!norm.data.defined()) return in;
  in.has_norm = true;
  in.norm = norm.norm.params(/*batch_stats=*/false);
  in.act = act_params(act, negative_slope, norm.slope);
  return in;
}

void check_gradient(const char* op, const Tensor& grad_output, const Tensor& x) {
  check::device(op, "grad_output", grad_output, x);
  TORCH_CHECK(grad_output.scalar_type() == x.scalar_type(), op, ": expected grad_output of dtype ", x.scalar_type(),
              ", got ", grad_output.scalar_type());
}

// One bit per element of `t` in NHWC rows.
void check_mask(const char* op, const char* name, const Tensor& mask, const Tensor& t) {
  check::device(op, name, mask, t);
  const int64_t bytes = t.size(0) * t.size(2) * t.size(3) * ((t.size(1) + 7) / 8);
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.numel() == bytes && mask.is_contiguous(), op, ": expected ", name,
              " of ", bytes, " bytes, got ", mask.sizes(), " of dtype ", mask.scalar_type());
}

// Everything about the gradient of a convolution's output.
struct OutputGradient {
  Tensor dy, mask, z;
  NormOperands norm;
  Tensor dweight, dbias;
  bool has_norm = false, training = false;

  struct Arguments {
    const Tensor& grad_output;
    const OptionalTensor &mask, &z, &mean, &rstd, &weight, &grad_weight, &grad_bias;
    bool training;
  };

  OutputGradient(const char* op, const Arguments& given) : dy(nhwc(given.grad_output)), training(given.training) {
    if (check::given(given.mask)) {
      mask = *given.mask;
      check_mask(op, "mask", mask, dy);
    }
    if (!check::given(given.z)) return;
    has_norm = true;
    check::same(op, "z", *given.z, dy);
    check_norm(op, dy, given.mean, given.rstd, given.weight, {});
    z = nhwc(*given.z);
    norm = saved_operands(Plan(dy), *given.mean, *given.rstd, given.weight, {});
    if (!training) return;
    TORCH_CHECK(check::given(given.grad_weight) && check::given(given.grad_bias), op,
                ": expected grad_z_weight and grad_z_bias with training, got None");
    check::statistic(op, "grad_z_weight", *given.grad_weight, dy);
    check::statistic(op, "grad_z_bias", *given.grad_bias, dy);
    dweight = given.grad_weight->contiguous();
    dbias = given.grad_bias->contiguous();
  }

  ConvGradient seam() const {
    ConvGradient g;
    g.data = read(dy);
    g.mask = mask.defined() ? mask.const_data_ptr<uint8_t>() : nullptr;
    g.has_norm = has_norm;
    if (!has_norm) return g;
    g.z = read(z);
    g.norm = norm.params(training);
    g.dweight = read(dweight);
    g.dbias = read(dbias);
    return g;
  }
};

void check_problem(const char* op, const ConvShape& s) {
  TORCH_CHECK(cpu::conv_supported(s), op, ": expected a convolution that the kernels take, got kernel ", s.r, "x", s.s,
              " in ", s.groups, " groups");
}

Tensors4 forward(const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& weight,
                 const OptionalTensor& bias, int64_t act, double negative_slope, const Tensor& conv_weight_,
                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                 const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double eps,
                 const OptionalTensor& conv_bias, const OptionalTensor& skip, bool statistics) {
  constexpr const char* kOp = "conv2d_norm_forward";
  check::conv2d(kOp, check::kFusedConv, x, conv_weight_, conv_bias, c10::fromIntArrayRefSlow(stride),
                c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), groups,
                check::WeightDtype::kAsXOrFloat);
  if (check::given(mean)) check_norm(kOp, x, mean, rstd, weight, bias);
  check_act(kOp, act);
  if (statistics) check_conv_norm(kOp, x, conv_weight_, {}, {}, running_mean, running_var, training, eps);
  const ConvShape s = conv_shape(x.sizes(), conv_weight_, {stride, padding, dilation, groups}, x.scalar_type());
  check_problem(kOp, s);
  const Execution on(kOp, x);
  const Tensor dense = nhwc(x);
  const Plan plan(dense);
  Normed norm;
  if (check::given(mean)) norm = Normed(plan, mean, rstd, weight, bias);
  const Tensor z = empty_pooled(conv_output_sizes(s), x.options(), kChannelsLast);
  Tensor added;
  if (check::given(skip)) {
    check::same(kOp, "skip", *skip, z);
    added = nhwc(*skip);
  }
  const Plan out(z);
  const Tensor offset = out.stat(conv_bias);
  NormOperands stats;
  if (statistics) stats = forward_operands(on, out, {}, {}, running_mean, running_var, training, eps);
  if (z.numel() > 0 && x.numel() > 0) {
    ConvForward p;
    p.shape = s;
    p.x = conv_input(dense, norm, act, negative_slope);
    p.weight = conv_weight(conv_weight_);
    p.bias = read(offset);
    p.skip = read(added);
    p.y = write(z);
    if (statistics && training) p.stats = stats.params(true);
    run(on, kOp, p);
  } else {
    z.zero_();
    stats.clear_batch_stats();
  }
  const auto or_none = [&](const Tensor& t) { return t.defined() ? t : out.empty_stat(0); };
  return {z, or_none(stats.mean), or_none(stats.rstd), or_none(stats.var)};
}

// What the backward operators have in common: the gradient of the output, as the batch norm behind had it, and what was
// convolved. Checks it all, and keeps what the kernels read alive.
struct BackwardOperands {
  const char* op;
  ConvShape s;
  bool has_norm;
  const Execution on;
  OutputGradient dy;
  Tensor x;  // channels_last; undefined where nothing reads it
  Normed norm;
  int64_t act;
  double negative_slope;

  struct Before {  // the batch norm and the activation before the convolution
    const OptionalTensor &mean, &rstd, &weight, &bias;
    int64_t act;
    double negative_slope;
  };

  BackwardOperands(const char* name, const OutputGradient::Arguments& gradient, const Tensor& conv_weight_,
                   const Tensor& x_, const Before& before, const ConvGeometry& g, bool reads_x)
      : op(name),
        s(problem(name, gradient.grad_output, conv_weight_, x_, before, g)),
        has_norm(check::given(before.mean)),
        on(name, x_),
        dy(name, gradient),
        act(before.act),
        negative_slope(before.negative_slope) {
    if (reads_x || has_norm) x = nhwc(x_);
    if (has_norm) norm = Normed(Plan(x), before.mean, before.rstd, before.weight, before.bias);
  }

  bool empty() const { return s.x_numel() == 0 || s.y_numel() == 0; }
  ConvInput input() const { return conv_input(x, norm, act, negative_slope); }

 private:
  static ConvShape problem(const char* op, const Tensor& grad_output, const Tensor& conv_weight_, const Tensor& x,
                           const Before& before, const ConvGeometry& g) {
    check::conv2d(op, check::kFusedConv, x, conv_weight_, {}, c10::fromIntArrayRefSlow(g.stride),
                  c10::fromIntArrayRefSlow(g.padding), c10::fromIntArrayRefSlow(g.dilation), g.groups,
                  check::WeightDtype::kAsXOrFloat);
    const ConvShape s = conv_shape(x.sizes(), conv_weight_, g, x.scalar_type());
    check_problem(op, s);
    TORCH_CHECK(grad_output.sizes().equals(conv_output_sizes(s)), op, ": expected grad_output of shape ",
                at::IntArrayRef(conv_output_sizes(s)), ", got ", grad_output.sizes());
    check_gradient(op, grad_output, x);
    if (check::given(before.mean)) check_norm(op, x, before.mean, before.rstd, before.weight, before.bias);
    check_act(op, before.act);
    return s;
  }
};

// The gradient of x, and where x had a batch norm those of its parameters.
struct DataGradient {
  Tensor weight, extra, skip_mask, dx, dweight, dbias;

  DataGradient(const BackwardOperands& o, const Tensor& x, const Tensor& conv_weight_, const OptionalTensor& skip,
               const OptionalTensor& mask)
      : weight(conv_weight_) {
    if (check::given(skip)) {
      check::same(o.op, "skip", *skip, x);
      extra = nhwc(*skip);
    }
    if (check::given(mask)) {
      TORCH_CHECK(check::given(skip), o.op, ": expected skip with skip_mask, got None");
      check_mask(o.op, "skip_mask", *mask, x);
      skip_mask = *mask;
    }
    dx = empty_pooled(x.sizes(), x.options(), kChannelsLast);
    const Plan plan(dx);
    dweight = plan.empty_stat(o.has_norm ? o.s.c : 0);
    dbias = plan.empty_stat(o.has_norm ? o.s.c : 0);
  }
  ConvBackwardData seam(const BackwardOperands& o) const {
    ConvBackwardData p;
    p.shape = o.s;
    p.dy = o.dy.seam();
    p.weight = conv_weight(weight);
    p.x = o.input();
    if (o.has_norm) {
      p.dweight = write(dweight);
      p.dbias = write(dbias);
    }
    p.skip = read(extra);
    p.skip_mask = skip_mask.defined() ? skip_mask.const_data_ptr<uint8_t>() : nullptr;
    p.dx = write(dx);
    return p;
  }
  void clear() const {
    for (const Tensor* t : {&dx, &dweight, &dbias}) t->zero_();
  }
};

// Of the weight and the bias. A parameter's gradient is not in the pool, as conv.cpp says.
struct WeightGradient {
  Tensor dw, db;

  WeightGradient(const BackwardOperands& o, const Tensor& conv_weight_, bool has_bias)
      : dw(at::empty_like(conv_weight_, conv_weight_.options(), conv_weight_.suggest_memory_format())),
        db(Plan(o.x).empty_stat(has_bias ? o.s.k : 0)) {}
  ConvBackwardWeight seam(const BackwardOperands& o) const {
    ConvBackwardWeight p;
    p.shape = o.s;
    p.dy = o.dy.seam();
    p.x = o.input();
    p.layout = conv_weight(dw);
    p.dweight = write(dw);
    p.dbias = db.numel() > 0 ? write(db) : nullptr;
    return p;
  }
  void clear() const {
    dw.zero_();
    db.zero_();
  }
};

Tensors3 backward_data(const Tensor& grad_output, const OptionalTensor& mask, const OptionalTensor& z,
                       const OptionalTensor& z_mean, const OptionalTensor& z_rstd, const OptionalTensor& z_weight,
                       const OptionalTensor& grad_z_weight, const OptionalTensor& grad_z_bias, bool training,
                       const Tensor& conv_weight_, const Tensor& x, const OptionalTensor& mean,
                       const OptionalTensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                       int64_t act, double negative_slope, const OptionalTensor& skip, const OptionalTensor& skip_mask,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const BackwardOperands o("conv2d_norm_backward_data",
                           {grad_output, mask, z, z_mean, z_rstd, z_weight, grad_z_weight, grad_z_bias, training},
                           conv_weight_, x, {mean, rstd, weight, bias, act, negative_slope},
                           {stride, padding, dilation, groups}, /*reads_x=*/false);
  const DataGradient data(o, x, conv_weight_, skip, skip_mask);
  if (o.empty()) {
    data.clear();
  } else {
    ConvBackwardData p = data.seam(o);
    run(o.on, o.op, p);
  }
  return {data.dx, data.dweight, data.dbias};
}

std::tuple<Tensor, Tensor> backward_weight(const Tensor& grad_output, const OptionalTensor& mask,
                                           const OptionalTensor& z, const OptionalTensor& z_mean,
                                           const OptionalTensor& z_rstd, const OptionalTensor& z_weight,
                                           const OptionalTensor& grad_z_weight, const OptionalTensor& grad_z_bias,
                                           bool training, const Tensor& conv_weight_, const Tensor& x,
                                           const OptionalTensor& mean, const OptionalTensor& rstd,
                                           const OptionalTensor& weight, const OptionalTensor& bias, int64_t act,
                                           double negative_slope, at::IntArrayRef stride, at::IntArrayRef padding,
                                           at::IntArrayRef dilation, int64_t groups, bool has_conv_bias) {
  const BackwardOperands o("conv2d_norm_backward_weight",
                           {grad_output, mask, z, z_mean, z_rstd, z_weight, grad_z_weight, grad_z_bias, training},
                           conv_weight_, x, {mean, rstd, weight, bias, act, negative_slope},
                           {stride, padding, dilation, groups}, /*reads_x=*/true);
  const WeightGradient gradient(o, conv_weight_, has_conv_bias);
  if (o.empty()) {
    gradient.clear();
  } else {
    ConvBackwardWeight p = gradient.seam(o);
    run(o.on, o.op, p);
  }
  return {gradient.dw, gradient.db};
}

Tensors5 backward(const Tensor& grad_output, const OptionalTensor& mask, const OptionalTensor& z,
                  const OptionalTensor& z_mean, const OptionalTensor& z_rstd, const OptionalTensor& z_weight,
                  const OptionalTensor& grad_z_weight, const OptionalTensor& grad_z_bias, bool training,
                  const Tensor& conv_weight_, const Tensor& x, const OptionalTensor& mean, const OptionalTensor& rstd,
                  const OptionalTensor& weight, const OptionalTensor& bias, int64_t act, double negative_slope,
                  const OptionalTensor& skip, const OptionalTensor& skip_mask, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool has_conv_bias) {
  const BackwardOperands o("conv2d_norm_backward",
                           {grad_output, mask, z, z_mean, z_rstd, z_weight, grad_z_weight, grad_z_bias, training},
                           conv_weight_, x, {mean, rstd, weight, bias, act, negative_slope},
                           {stride, padding, dilation, groups}, /*reads_x=*/true);
  const DataGradient data(o, x, conv_weight_, skip, skip_mask);
  const WeightGradient gradient(o, conv_weight_, has_conv_bias);
  if (o.empty()) {
    data.clear();
    gradient.clear();
  } else {
    ConvBackwardData p = data.seam(o);
    ConvBackwardWeight q = gradient.seam(o);
    run(o.on, o.op, p, q);
  }
  return {data.dx, data.dweight, data.dbias, gradient.dw, gradient.db};
}

}  // namespace

void check_conv_norm(const char* op, const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight,
                     const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     bool training, double eps) {
  const SymInt channels = conv_weight.sym_size(0);
  const auto vector = [&](const char* name, const OptionalTensor& t) {
    if (!check::given(t)) return;
    check::device(op, name, *t, x);
    TORCH_CHECK(t->dim() == 1 && t->sym_size(0) == channels, op, ": expected ", name, " of shape (", channels,
                ",), got ", t->sym_sizes());
    const at::ScalarType dtype = t->scalar_type(), stat = check::stat_dtype(x.scalar_type());
    TORCH_CHECK(dtype == x.scalar_type() || dtype == stat, op, ": expected ", name, " of dtype ", stat,
                " with x of dtype ", x.scalar_type(), ", got ", dtype);
  };
  vector("weight", weight);
  vector("bias", bias);
  vector("running_mean", running_mean);
  vector("running_var", running_var);
  TORCH_CHECK_VALUE(eps > 0 && eps <= std::numeric_limits<double>::max(), op, ": expected eps > 0, got ", eps);
  if (!training) {
    TORCH_CHECK(check::given(running_mean) && check::given(running_var), op,
                ": expected running_mean and running_var when not training, got None");
    return;
  }
  TORCH_CHECK(check::given(running_mean) == check::given(running_var), op,
              ": expected running_mean and running_var both or neither, got one alone");
  TORCH_CHECK(!check::given(running_mean) || running_mean->scalar_type() == running_var->scalar_type(), op,
              ": expected running_var of the dtype of running_mean, got another");
}

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("conv2d_norm_forward", TORCH_FN(forward));
  m.impl("conv2d_norm_backward", TORCH_FN(backward));
  m.impl("conv2d_norm_backward_data", TORCH_FN(backward_data));
  m.impl("conv2d_norm_backward_weight", TORCH_FN(backward_weight));
}

}  // namespace fused_resnet::bindings
