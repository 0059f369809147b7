// A whole residual block as one autograd function: act(bn_n(conv_n(... act(bn_1(conv_1(x))))) + shortcut(x)).
//
// The normalised tensors never exist: each convolution applies the batch norm before it while it packs its operand, and
// sums the statistics of the one behind it while its result is in registers. Backward runs the same way in reverse.
// Saved: x, what each convolution put out (with `recompute` all but the last), per-channel statistics, one bit per
// element of the output.
// Source: docs/convolution.md.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "bindings/autocast.h"
#include "bindings/autograd.h"
#include "bindings/conv_problem.h"
#include "bindings/ops.h"

namespace fused_resnet::bindings {
namespace {

constexpr int64_t kRelu = static_cast<int64_t>(Activation::kRelu);
constexpr double kNoSlope = 0.01;
constexpr size_t kGeometryValues = 7;  // stride, padding, dilation, groups
constexpr size_t kUnitInputs = 3;      // convolution's weight, batch norm's weight and bias

// A convolution and the batch norm behind it.
struct Unit {
  Tensor conv_weight, weight, bias;
  Tensor running_mean, running_var;  // forward only
  bool training = false;
  double eps = 1e-5;
  std::vector<SymInt> stride, padding, dilation;
  SymInt groups = 1;
  Tensor z, mean, rstd, var;  // of the batch norm; var after a forward pass in training

  void set_geometry(SymIntArrayRef values) {
    stride = {values[0], values[1]};
    padding = {values[2], values[3]};
    dilation = {values[4], values[5]};
    groups = values[6];
  }
  Tensor stock_conv(const Tensor& x) const {
    return at::convolution_symint(x, conv_weight, {}, stride, padding, dilation, false, {0, 0}, groups);
  }
};

struct Block {
  std::vector<Unit> units;  // the main path, then the shortcut's if it has one
  bool downsample = false;
  bool recompute = false;  // the last main unit's z is not kept for backward
  std::vector<SymInt> geometry;

  size_t main_units() const { return units.size() - (downsample ? 1 : 0); }
  const Unit& last() const { return units[main_units() - 1]; }
  const Unit* shortcut() const { return downsample ? &units.back() : nullptr; }
};

// The operand of main unit i is x, or relu of the batch norm before it.
const Unit* before(const Block& block, size_t i) {
  return i == 0 || i == block.main_units() ? nullptr : &block.units[i - 1];
}

OptionalTensor mean_of(const Unit* unit) { return unit == nullptr ? OptionalTensor() : unit->mean; }
OptionalTensor rstd_of(const Unit* unit) { return unit == nullptr ? OptionalTensor() : unit->rstd; }
OptionalTensor weight_of(const Unit* unit) { return unit == nullptr ? OptionalTensor() : optional(unit->weight); }
OptionalTensor bias_of(const Unit* unit) { return unit == nullptr ? OptionalTensor() : optional(unit->bias); }

// What a unit's convolution puts out, with statistics of the batch, or copies of given ones.
Tensors4 convolve(const Unit& u, const Tensor& x, const Unit* prior, const OptionalTensor& running_mean,
                  const OptionalTensor& running_var, bool training) {
  return conv_norm_forward_op().call(prior == nullptr ? x : prior->z, mean_of(prior), rstd_of(prior), weight_of(prior),
                                     bias_of(prior), kRelu, kNoSlope, u.conv_weight, u.stride, u.padding, u.dilation,
                                     u.groups, running_mean, running_var, training, u.eps);
}

// Output and, with `save_mask`, the bits where the gradient passes.
std::tuple<Tensor, Tensor> run_forward(const Tensor& x, Block& block, bool save_mask) {
  for (size_t i = 0; i < block.units.size(); ++i) {
    Unit& u = block.units[i];
    std::tie(u.z, u.mean, u.rstd, u.var) =
        convolve(u, x, before(block, i), optional(u.running_mean), optional(u.running_var), u.training);
  }
  const Unit &last = block.last(), *shortcut = block.shortcut();
  return add_op().call(last.z, last.mean, last.rstd, optional(last.weight), optional(last.bias),
                       shortcut == nullptr ? x : shortcut->z, mean_of(shortcut), rstd_of(shortcut), weight_of(shortcut),
                       bias_of(shortcut), kRelu, kNoSlope, save_mask);
}

// The gradient of one unit's output, before its batch norm's backward.
struct Gradient {
  Tensor dy, mask;
  Tensor dweight, dbias;  // of the unit's batch norm
};

Tensor data_gradient(const Gradient& g, const Unit& u, const Tensor& x, const Unit* prior, const Tensor& skip,
                     const Tensor& skip_mask, Gradient* next) {
  auto [dx, dweight, dbias] = conv_norm_backward_data_op().call(
      g.dy, optional(g.mask), u.z, u.mean, u.rstd, optional(u.weight), optional(g.dweight), optional(g.dbias),
      u.training, u.conv_weight, x, mean_of(prior), rstd_of(prior), weight_of(prior), bias_of(prior), kRelu, kNoSlope,
      optional(skip), optional(skip_mask), u.stride, u.padding, u.dilation, u.groups);
  if (next != nullptr) *next = {dx, Tensor(), dweight, dbias};
  return dx;
}

Tensor weight_gradient(const Gradient& g, const Unit& u, const Tensor& x, const Unit* prior) {
  return conv_norm_backward_weight_op().call(g.dy, optional(g.mask), u.z, u.mean, u.rstd, optional(u.weight),
                                             optional(g.dweight), optional(g.dbias), u.training, u.conv_weight, x,
                                             mean_of(prior), rstd_of(prior), weight_of(prior), bias_of(prior), kRelu,
                                             kNoSlope, u.stride, u.padding, u.dilation, u.groups);
}

// The same block in elementary operations, for a backward pass that is itself recorded.
Tensor stock_block(const Tensor& x, const Block& block) {
  const auto normed = [&](const Unit& u, const Tensor& in) {
    return stock_norm(u.stock_conv(in), u.mean, u.rstd, u.weight, u.bias, u.training, u.eps);
  };
  Tensor y = x, pre;
  for (size_t i = 0; i < block.main_units(); ++i) {
    pre = normed(block.units[i], y);
    y = at::relu(pre).to(x.scalar_type());
  }
  const Unit* shortcut = block.shortcut();
  return at::relu(pre + (shortcut == nullptr ? x : normed(*shortcut, x))).to(x.scalar_type());
}

// Where the differentiable tensors of a block stand among the arguments of the autograd function, which takes no
// undefined ones.
class Places {
 public:
  explicit Places(const Block& block) {
    size_t next = 1;  // x is first
    for (const Unit& u : block.units) {
      for (const Tensor* t : {&u.conv_weight, &u.weight, &u.bias}) places_.push_back(t->defined() ? next++ : kNone);
    }
    count_ = next;
  }
  static constexpr size_t kNone = 0;
  size_t count() const { return count_; }
  size_t conv_weight(size_t unit) const { return places_[kUnitInputs * unit]; }
  size_t weight(size_t unit) const { return places_[kUnitInputs * unit + 1]; }
  size_t bias(size_t unit) const { return places_[kUnitInputs * unit + 2]; }

 private:
  std::vector<size_t> places_;
  size_t count_ = 0;
};

class ResidualBlock : public torch::autograd::Function<ResidualBlock> {
 public:
  // inputs: x, then what every unit has of its kUnitInputs.
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs, Block* block) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor x = inputs[0];
    auto [y, mask] = run_forward(x, *block, /*save_mask=*/true);
    variable_list saved{x, mask};
    std::vector<int64_t> training;
    std::vector<double> eps;
    for (const Unit& u : block->units) {
      const Tensor z = block->recompute && &u == &block->last() ? Tensor() : u.z;
      for (const Tensor& t : {u.conv_weight, u.weight, u.bias, z, u.mean, u.rstd}) saved.push_back(t);
      training.push_back(u.training);
      eps.push_back(u.eps);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["geometry"] = block->geometry;
    ctx->saved_data["downsample"] = block->downsample;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    Block block = load(ctx, saved);
    const Places places(block);
    variable_list result(places.count() + 1);  // and the Block
    const Tensor &x = saved[0], &mask = saved[1];
    if (!grads[0].defined()) return result;
    const auto wants = [&](size_t place) { return ctx->needs_input_grad(place); };
    const auto wants_parameter = [&](size_t place) { return place != Places::kNone && wants(place); };
    if (at::GradMode::is_enabled()) {
      Recorded r;
      Block recorded = block;
      const Tensor x_ = r.input(x, 0, wants(0));
      for (size_t i = 0; i < block.units.size(); ++i) {
        Unit& u = recorded.units[i];
        u.conv_weight = r.input(u.conv_weight, places.conv_weight(i), wants(places.conv_weight(i)));
        u.weight = r.input(u.weight, places.weight(i), wants_parameter(places.weight(i)));
        u.bias = r.input(u.bias, places.bias(i), wants_parameter(places.bias(i)));
      }
      return r.grad(stock_block(x_, recorded), grads[0], result.size());
    }

    at::AutoDispatchBelowADInplaceOrView below;
    const size_t n = block.main_units();
    // Once for all that read it: the last block of a model gets an expanded one from its average pooling.
    const Tensor dout = in_memory_format(grads[0], at::MemoryFormat::ChannelsLast);
    if (Unit& u = block.units[n - 1]; !u.z.defined()) {
      // The same kernel on the same operands: the same bits. The statistics are known, whatever it says of them.
      u.z = std::get<0>(convolve(u, x, before(block, n - 1), u.mean, u.rstd, /*training=*/false));
    }
    const Unit &last = block.last(), *shortcut = block.shortcut();
    Gradient g{dout, mask, {}, {}}, g_shortcut{dout, mask, {}, {}};
    {
      // Sums of the batch norms that end the block; both see the same gradient.
      auto [dx, dweight, dbias, dresidual, dshortcut_weight, dshortcut_bias, dslope] = backward_op().call(
          dout, last.z, last.mean, last.rstd, optional(last.weight), optional(last.bias),
          shortcut == nullptr ? OptionalTensor() : shortcut->z, mean_of(shortcut), rstd_of(shortcut),
          weight_of(shortcut), bias_of(shortcut), {}, mask, last.training, shortcut != nullptr && shortcut->training,
          kRelu, kNoSlope, {false, true, true, false, shortcut != nullptr, shortcut != nullptr, false});
      g.dweight = dweight;
      g.dbias = dbias;
      g_shortcut.dweight = dshortcut_weight;
      g_shortcut.dbias = dshortcut_bias;
    }
    const auto parameters = [&](size_t unit, const Gradient& gradient) {
      const Unit& u = block.units[unit];
      const size_t weight = places.weight(unit), bias = places.bias(unit);
      if (wants_parameter(weight)) result[weight] = parameter_grad(gradient.dweight, u.weight);
      if (wants_parameter(bias)) result[bias] = parameter_grad(gradient.dbias, u.bias);
    };

    Tensor skip = dout, skip_mask = mask;
    if (shortcut != nullptr) {
      parameters(n, g_shortcut);
      if (wants(places.conv_weight(n)))
        result[places.conv_weight(n)] = weight_gradient(g_shortcut, *shortcut, x, nullptr);
      if (wants(0)) skip = data_gradient(g_shortcut, *shortcut, x, nullptr, {}, {}, nullptr);
      skip_mask = Tensor();
    }
    for (size_t i = n; i-- > 0;) {
      const Unit &u = block.units[i], *prior = before(block, i);
      const Tensor& in = prior == nullptr ? x : prior->z;
      parameters(i, g);
      if (wants(places.conv_weight(i))) result[places.conv_weight(i)] = weight_gradient(g, u, in, prior);
      if (i == 0) {
        if (wants(0)) result[0] = data_gradient(g, u, in, nullptr, skip, skip_mask, nullptr);
      } else {
        if (!wants_below(ctx, places.conv_weight(i))) break;
        Gradient next;
        data_gradient(g, u, in, prior, {}, {}, &next);
        g = next;
      }
    }
    return result;
  }

 private:
  // Whether anything before this place has a gradient. A shortcut's come later.
  static bool wants_below(const AutogradContext* ctx, size_t place) {
    for (size_t i = 0; i < place; ++i) {
      if (ctx->needs_input_grad(i)) return true;
    }
    return false;
  }

  static Block load(AutogradContext* ctx, const variable_list& saved) {
    constexpr size_t kFirst = 2, kEach = 6;
    Block block;
    const std::vector<int64_t> training = ctx->saved_data["training"].toIntVector();
    const std::vector<double> eps = ctx->saved_data["eps"].toDoubleVector();
    block.geometry = ctx->saved_data["geometry"].toSymIntVector();
    block.downsample = ctx->saved_data["downsample"].toBool();
    for (size_t i = 0; i < training.size(); ++i) {
      Unit u;
      const Tensor* t = &saved[kFirst + kEach * i];
      u.conv_weight = t[0];
      u.weight = t[1];
      u.bias = t[2];
      // Hooks on saved tensors may bring it back in another layout; the mask's rows are those of this one.
      u.z = t[3].defined() ? in_memory_format(t[3], at::MemoryFormat::ChannelsLast) : t[3];
      u.mean = t[4];
      u.rstd = t[5];
      u.training = training[i] != 0;
      u.eps = eps[i];
      u.set_geometry(SymIntArrayRef(block.geometry).slice(i * kGeometryValues, kGeometryValues));
      block.units.push_back(std::move(u));
    }
    return block;
  }
};

// The output, then mean and biased variance of every batch norm that used batch statistics, for its running ones.
std::vector<Tensor> residual_block(const Tensor& x, at::TensorList conv_weights,
                                   const c10::List<OptionalTensor>& weights, const c10::List<OptionalTensor>& biases,
                                   const c10::List<OptionalTensor>& running_means,
                                   const c10::List<OptionalTensor>& running_vars, c10::List<bool> training,
                                   at::ArrayRef<double> eps, SymIntArrayRef geometry, bool downsample, bool recompute) {
  constexpr const char* kOp = "residual_block";
  const size_t count = conv_weights.size();
  check::activation_tensor(kOp, "x", x);
  TORCH_CHECK(count >= (downsample ? 2u : 1u) && weights.size() == count && biases.size() == count &&
                  running_means.size() == count && running_vars.size() == count && training.size() == count &&
                  eps.size() == count && geometry.size() == kGeometryValues * count,
              kOp, ": expected lists of as many units as conv_weights has, got ", count, " weights and ",
              weights.size(), " batch norms");
  Block block;
  block.downsample = downsample;
  block.recompute = recompute;
  block.geometry = geometry.vec();
  for (size_t i = 0; i < count; ++i) {
    const auto given = [&](const c10::List<OptionalTensor>& list) { return value_or_undefined(list.get(i)); };
    Unit u;
    u.conv_weight = conv_weights[i];
    u.weight = given(weights);
    u.bias = given(biases);
    u.running_mean = given(running_means);
    u.running_var = given(running_vars);
    u.training = training.get(i);
    u.eps = eps[i];
    u.set_geometry(geometry.slice(i * kGeometryValues, kGeometryValues));
    TORCH_CHECK(u.conv_weight.defined() && u.conv_weight.dim() == 4, kOp,
                ": expected conv_weights of shape (O, C, KH, KW), got ", u.conv_weight.sym_sizes());
    check_conv_norm(kOp, x, u.conv_weight, optional(u.weight), optional(u.bias), optional(u.running_mean),
                    optional(u.running_var), u.training, u.eps);
    block.units.push_back(std::move(u));
  }
  std::vector<Tensor> inputs{x};
  for (const Unit& u : block.units) {
    for (const Tensor& t : {u.conv_weight, u.weight, u.bias}) {
      if (t.defined()) inputs.push_back(t);
    }
  }
  bool record = false;
  for (const Tensor& t : inputs) record = record || wants_grad({&t});
  std::vector<Tensor> result;
  if (at::GradMode::is_enabled() && record) {
    result.push_back(ResidualBlock::apply(at::TensorList(inputs), &block));
  } else {
    result.push_back(std::get<0>(run_forward(x, block, /*save_mask=*/false)));
  }
  for (const Unit& u : block.units) {
    if (!u.training) continue;
    result.push_back(u.mean);
    result.push_back(u.var);
  }
  return result;
}

std::vector<Tensor> residual_block_autocast(const Tensor& x, at::TensorList conv_weights,
                                            const c10::List<OptionalTensor>& weights,
                                            const c10::List<OptionalTensor>& biases,
                                            const c10::List<OptionalTensor>& running_means,
                                            const c10::List<OptionalTensor>& running_vars, c10::List<bool> training,
                                            at::ArrayRef<double> eps, SymIntArrayRef geometry, bool downsample,
                                            bool recompute) {
  const Autocast<at::kCPU> autocast;
  std::vector<Tensor> cast;
  for (const Tensor& w : conv_weights) cast.push_back(autocast.cast(w));
  return residual_block_op().call(autocast.cast(x), cast, weights, biases, running_means, running_vars, training, eps,
                                  geometry, downsample, recompute);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CompositeImplicitAutograd, m) { m.impl("residual_block", TORCH_FN(residual_block)); }
TORCH_LIBRARY_IMPL(fused_resnet, AutocastCPU, m) { m.impl("residual_block", TORCH_FN(residual_block_autocast)); }

}  // namespace fused_resnet::bindings
