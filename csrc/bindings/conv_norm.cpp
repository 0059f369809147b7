// Convolutions with the batch norms around them, on the CPU: check, allocate, fill the seam's structs, call.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>
#include <utility>

#include "bindings/conv_problem.h"
#include "bindings/ops.h"
#include "bindings/verbose.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::bindings {
namespace {

constexpr at::MemoryFormat kChannelsLast = at::MemoryFormat::ChannelsLast;

void say_plan(const char* op, const ConvShape& s, bool backward, const ConvNumerics& allowed) {
  if (!verbose) [[likely]]
    return;
  char text[1024];
  cpu::conv_plan(s, backward ? cpu::ConvDirection::kBackwardData : cpu::ConvDirection::kForward, allowed, text,
                 sizeof(text));
  say_conv(op, s, text);
}

void say_weight_plan(const char* op, const ConvShape& s, const ConvNumerics& allowed) {
  if (!verbose) [[likely]]
    return;
  say_conv(op, s, cpu::conv_weight_plan(s, allowed));
}

Tensor scratch(int64_t bytes) { return empty_pooled({bytes}, at::TensorOptions(at::kByte)); }

// Calls the seam: threads, workspace, what the process allows, and the plan where somebody wants to read it.
void run(const Execution& on, const char* op, ConvForward& p) {
  p.runner = on.runner();
  p.numerics = numerics();
  const Tensor workspace = scratch(cpu::conv_forward_workspace(p.shape, p.numerics, p.runner.threads));
  p.workspace = write(workspace);
  say_plan(op, p.shape, /*backward=*/false, p.numerics);
  check::status(op, cpu::conv_forward(p));
}
void run(const Execution& on, const char* op, ConvBackwardData& p) {
  p.runner = on.runner();
  p.numerics = numerics();
  const Tensor workspace = scratch(cpu::conv_backward_data_workspace(p.shape, p.numerics, p.runner.threads));
  p.workspace = write(workspace);
  say_plan(op, p.shape, /*backward=*/true, p.numerics);
  check::status(op, cpu::conv_backward_data(p));
}
void run(const Execution& on, const char* op, ConvBackwardWeight& p) {
  p.runner = on.runner();
  p.numerics = numerics();
  const Tensor workspace = scratch(cpu::conv_backward_weight_workspace(p.shape, p.numerics, p.runner.threads));
  p.workspace = write(workspace);
  say_weight_plan(op, p.shape, p.numerics);
  check::status(op, cpu::conv_backward_weight(p));
}

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

Tensor nhwc(const Tensor& t) { return t.contiguous(kChannelsLast); }

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

  OutputGradient(const char* op, const Tensor& grad_output, const OptionalTensor& mask_bits, const OptionalTensor& z_,
                 const OptionalTensor& mean, const OptionalTensor& rstd, const OptionalTensor& weight,
                 const OptionalTensor& grad_weight, const OptionalTensor& grad_bias, bool batch_stats)
      : dy(nhwc(grad_output)), training(batch_stats) {
    if (check::given(mask_bits)) {
      mask = *mask_bits;
      check_mask(op, "mask", mask, dy);
    }
    if (!check::given(z_)) return;
    has_norm = true;
    check::same(op, "z", *z_, grad_output);
    check_norm(op, grad_output, mean, rstd, weight, {});
    z = nhwc(*z_);
    const Plan plan(dy);
    norm = saved_operands(plan, *mean, *rstd, weight, {});
    if (!training) return;
    TORCH_CHECK(check::given(grad_weight) && check::given(grad_bias), op,
                ": expected grad_z_weight and grad_z_bias with training, got None");
    check::statistic(op, "grad_z_weight", *grad_weight, grad_output);
    check::statistic(op, "grad_z_bias", *grad_bias, grad_output);
    dweight = grad_weight->contiguous();
    dbias = grad_bias->contiguous();
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
                c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), groups);
  if (check::given(mean)) check_norm(kOp, x, mean, rstd, weight, bias);
  check_act(kOp, act);
  if (statistics) check_conv_norm(kOp, x, conv_weight_, {}, {}, running_mean, running_var, training, eps);
  const ConvShape s = conv_shape(x.sizes(), conv_weight_, {stride, padding, dilation, groups});
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

Tensors3 backward_data(const Tensor& grad_output, const OptionalTensor& mask, const OptionalTensor& z,
                       const OptionalTensor& z_mean, const OptionalTensor& z_rstd, const OptionalTensor& z_weight,
                       const OptionalTensor& grad_z_weight, const OptionalTensor& grad_z_bias, bool training,
                       const Tensor& conv_weight_, const Tensor& x, const OptionalTensor& mean,
                       const OptionalTensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                       int64_t act, double negative_slope, const OptionalTensor& skip, const OptionalTensor& skip_mask,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  constexpr const char* kOp = "conv2d_norm_backward_data";
  check::conv2d(kOp, check::kFusedConv, x, conv_weight_, {}, c10::fromIntArrayRefSlow(stride),
                c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), groups);
  const ConvShape s = conv_shape(x.sizes(), conv_weight_, {stride, padding, dilation, groups});
  check_problem(kOp, s);
  TORCH_CHECK(grad_output.sizes().equals(conv_output_sizes(s)), kOp, ": expected grad_output of shape ",
              at::IntArrayRef(conv_output_sizes(s)), ", got ", grad_output.sizes());
  check_gradient(kOp, grad_output, x);
  const bool has_norm = check::given(mean);
  if (has_norm) check_norm(kOp, x, mean, rstd, weight, bias);
  check_act(kOp, act);
  const Execution on(kOp, x);
  const OutputGradient dy(kOp, grad_output, mask, z, z_mean, z_rstd, z_weight, grad_z_weight, grad_z_bias, training);
  Tensor dense, extra;
  Normed norm;
  if (has_norm) {
    dense = nhwc(x);
    norm = Normed(Plan(dense), mean, rstd, weight, bias);
  }
  if (check::given(skip)) {
    check::same(kOp, "skip", *skip, x);
    extra = nhwc(*skip);
  }
  if (check::given(skip_mask)) {
    TORCH_CHECK(check::given(skip), kOp, ": expected skip with skip_mask, got None");
    check_mask(kOp, "skip_mask", *skip_mask, x);
  }
  const Tensor dx = empty_pooled(x.sizes(), x.options(), kChannelsLast);
  const Plan plan(dx);
  const Tensor dweight = plan.empty_stat(has_norm ? s.c : 0), dbias = plan.empty_stat(has_norm ? s.c : 0);
  if (dx.numel() > 0 && grad_output.numel() > 0) {
    ConvBackwardData p;
    p.shape = s;
    p.dy = dy.seam();
    p.weight = conv_weight(conv_weight_);
    p.x = conv_input(dense, norm, act, negative_slope);
    if (has_norm) {
      p.dweight = write(dweight);
      p.dbias = write(dbias);
    }
    p.skip = read(extra);
    p.skip_mask = check::given(skip_mask) ? skip_mask->const_data_ptr<uint8_t>() : nullptr;
    p.dx = write(dx);
    run(on, kOp, p);
  } else {
    dx.zero_();
    dweight.zero_();
    dbias.zero_();
  }
  return {dx, dweight, dbias};
}

// A parameter's gradient is not in the pool, as conv.cpp says.
std::tuple<Tensor, Tensor> backward_weight(const Tensor& grad_output, const OptionalTensor& mask,
                                           const OptionalTensor& z, const OptionalTensor& z_mean,
                                           const OptionalTensor& z_rstd, const OptionalTensor& z_weight,
                                           const OptionalTensor& grad_z_weight, const OptionalTensor& grad_z_bias,
                                           bool training, const Tensor& conv_weight_, const Tensor& x,
                                           const OptionalTensor& mean, const OptionalTensor& rstd,
                                           const OptionalTensor& weight, const OptionalTensor& bias, int64_t act,
                                           double negative_slope, at::IntArrayRef stride, at::IntArrayRef padding,
                                           at::IntArrayRef dilation, int64_t groups, bool has_conv_bias) {
  constexpr const char* kOp = "conv2d_norm_backward_weight";
  check::conv2d(kOp, check::kFusedConv, x, conv_weight_, {}, c10::fromIntArrayRefSlow(stride),
                c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), groups);
  const ConvShape s = conv_shape(x.sizes(), conv_weight_, {stride, padding, dilation, groups});
  check_problem(kOp, s);
  TORCH_CHECK(grad_output.sizes().equals(conv_output_sizes(s)), kOp, ": expected grad_output of shape ",
              at::IntArrayRef(conv_output_sizes(s)), ", got ", grad_output.sizes());
  check_gradient(kOp, grad_output, x);
  const bool has_norm = check::given(mean);
  if (has_norm) check_norm(kOp, x, mean, rstd, weight, bias);
  check_act(kOp, act);
  const Execution on(kOp, x);
  const OutputGradient dy(kOp, grad_output, mask, z, z_mean, z_rstd, z_weight, grad_z_weight, grad_z_bias, training);
  const Tensor dense = nhwc(x);
  Normed norm;
  if (has_norm) norm = Normed(Plan(dense), mean, rstd, weight, bias);
  const Tensor dw = at::empty_like(conv_weight_, conv_weight_.options(), conv_weight_.suggest_memory_format());
  const Tensor db = Plan(dense).empty_stat(has_conv_bias ? s.k : 0);
  if (dense.numel() > 0 && grad_output.numel() > 0) {
    ConvBackwardWeight p;
    p.shape = s;
    p.dy = dy.seam();
    p.x = conv_input(dense, norm, act, negative_slope);
    p.layout = conv_weight(dw);
    p.dweight = write(dw);
    p.dbias = has_conv_bias ? write(db) : nullptr;
    run(on, kOp, p);
  } else {
    dw.zero_();
    db.zero_();
  }
  return {dw, db};
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

bool own_groups(const ConvShape& s, bool packed) {
  constexpr int64_t kLeast = 4, kFull = 16, kSmall = 14 * 14;
  const int64_t group = s.c / s.groups;
  const bool whole = s.c == s.k && group >= kLeast && (group & (group - 1)) == 0;
  // Groups that fill a vector are no faster than ATen's where a whole image is in cache, unless their weights are
  // packed.
  const bool small = !packed && group >= kFull && s.h * s.w <= kSmall && s.stride_h == 1 && s.stride_w == 1;
  return s.groups == 1 || (whole && !small);
}

bool own_convolution(const Tensor& x, const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef dilation,
                     const SymInt& groups) {
  if (!x.is_cpu() || x.suggest_memory_format() != kChannelsLast || x.sym_numel() == 0 || weight.sym_numel() == 0) {
    return false;
  }
  const auto value = [](const SymInt& i) { return i.guard_int(__FILE__, __LINE__); };
  ConvShape s;
  s.k = value(weight.sym_size(0));
  s.groups = value(groups);
  s.c = value(weight.sym_size(1)) * s.groups;
  s.r = value(weight.sym_size(2));
  s.s = value(weight.sym_size(3));
  s.stride_h = value(stride[0]);
  s.stride_w = value(stride[1]);
  s.dilation_h = value(dilation[0]);
  s.dilation_w = value(dilation[1]);
  if (s.groups != 1) {
    s.h = value(x.sym_size(2));
    s.w = value(x.sym_size(3));
  }
  // Measured: few channels are packed one by one, which a kernel as large as a ResNet's stem outweighs and smaller ones
  // do not.
  const int64_t taps = s.r * s.s;
  const bool narrow = (s.c < 8 && taps <= 16) || (s.c < 16 && s.c * taps > 512);
  return !narrow && own_groups(s) && cpu::conv_supported(s);
}

Tensor own_forward(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvGeometry& g) {
  const Execution on(op, x);
  const ConvShape s = conv_shape(x.sizes(), weight, g);
  const Tensor dense = nhwc(x);
  const Plan plan(dense);
  const Tensor b = bias.defined() ? plan.stat(bias) : Tensor();
  const Tensor y = empty_pooled(conv_output_sizes(s), x.options(), kChannelsLast);
  ConvForward p;
  p.shape = s;
  p.x.data = read(dense);
  p.weight = conv_weight(weight);
  p.bias = read(b);
  p.y = write(y);
  run(on, op, p);
  return y;
}

Tensor own_backward_data(const char* op, const Tensor& grad_output, at::IntArrayRef x_sizes, const Tensor& weight,
                         const ConvGeometry& g) {
  const Execution on(op, grad_output);
  const ConvShape s = conv_shape(x_sizes, weight, g);
  const Tensor dy = nhwc(grad_output);
  const Tensor dx = empty_pooled(x_sizes, grad_output.options(), kChannelsLast);
  ConvBackwardData p;
  p.shape = s;
  p.dy.data = read(dy);
  p.weight = conv_weight(weight);
  p.dx = write(dx);
  run(on, op, p);
  return dx;
}

std::pair<Tensor, Tensor> own_backward_weight(const char* op, const Tensor& grad_output, const Tensor& x,
                                              const Tensor& weight, bool bias, const ConvGeometry& g) {
  const Execution on(op, x);
  const ConvShape s = conv_shape(x.sizes(), weight, g);
  const Tensor dy = nhwc(grad_output), dense = nhwc(x);
  const Plan plan(dense);
  const Tensor dw = at::empty_like(weight, weight.options(), weight.suggest_memory_format());
  const Tensor db = plan.empty_stat(bias ? s.k : 0);
  ConvBackwardWeight p;
  p.shape = s;
  p.dy.data = read(dy);
  p.x.data = read(dense);
  p.layout = conv_weight(dw);
  p.dweight = write(dw);
  p.dbias = bias ? write(db) : nullptr;
  run(on, op, p);
  return {dw, db};
}

TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("conv2d_norm_forward", TORCH_FN(forward));
  m.impl("conv2d_norm_backward_data", TORCH_FN(backward_data));
  m.impl("conv2d_norm_backward_weight", TORCH_FN(backward_weight));
}

}  // namespace fused_resnet::bindings
