// A whole residual block as one autograd function. With z_i = conv_i(a_i):
//   behind their convolutions  a_1 = x, a_i = relu(norm_{i-1}(z_{i-1})), out = relu(norm_n(z_n) + shortcut)
//   before them (preact)       a_1 = relu(norm_1(x)), a_i = relu(norm_i(z_{i-1})), out = z_n + shortcut
// where the shortcut is x or norm(conv(x)); before activation x or conv(a_1).
//
// The normalised tensors never exist: each convolution applies the batch norm before it while it packs its operand, and
// sums the statistics of the one behind it while its result is in registers. Backward runs the same way in reverse.
// Saved: x, what each convolution put out (with `recompute` all but the last; with preact never the last), per-channel
// statistics, and behind a relu one bit per element of the output.
// Source: docs/convolution.md.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

#include <optional>
#include <utility>
#include <vector>

#include "bindings/autocast.h"
#include "bindings/autograd.h"
#include "bindings/conv_problem.h"
#include "bindings/ops.h"
#include "bindings/unit_passes.h"

namespace fused_resnet::bindings {
namespace {

struct Block {
  std::vector<Conv> convs;  // the main path's, then the shortcut's if it has one
  std::vector<Norm> norms;  // one behind each convolution, or one before each of the main path
  std::vector<Tensor> z;    // what each convolution puts out
  bool downsample = false;  // the shortcut is a convolution; without it x
  bool preact = false;
  bool recompute = false;  // the last main convolution's z is not kept for backward
  std::vector<SymInt> geometry;

  size_t main() const { return convs.size() - (downsample ? 1 : 0); }
  bool is_first(size_t i) const { return i == 0 || i == main(); }
  Operand operand(size_t i, const Tensor& x) const {
    if (is_first(i)) return {x, preact ? norms.data() : nullptr};
    return {z[i - 1], &norms[preact ? i : i - 1]};
  }
  Norm* behind(size_t i) {
    if (!preact) return &norms[i];
    return i + 1 < main() ? &norms[i + 1] : nullptr;
  }
  const Norm* shortcut_norm() const { return downsample && !preact ? &norms[main()] : nullptr; }
  const Tensor& shortcut_of(const Tensor& x) const { return downsample ? z[main()] : x; }
  // Every parameter that may need a gradient, in the order in which the data meets them.
  template <class F>
  void visit(F f) {
    for (size_t i = 0; i < convs.size(); ++i) {
      const bool has_norm = i < norms.size();
      if (preact && has_norm) f(norms[i].weight), f(norms[i].bias);
      f(convs[i].weight);
      if (!preact && has_norm) f(norms[i].weight), f(norms[i].bias);
    }
  }
};

// Output and, where a backward pass follows (`recorded`), the bits where the gradient passes.
std::tuple<Tensor, Tensor> run_forward(const Tensor& x, Block& block, bool recorded) {
  const size_t n = block.main();
  block.z.resize(block.convs.size());
  if (block.preact) take_statistics(x, block.norms.data());
  // The shortcut's first: before activation the last convolution adds it.
  for (size_t i = block.convs.size(); i-- > n;) {
    block.z[i] = convolve(block.operand(i, x), block.convs[i], block.preact ? nullptr : block.behind(i));
  }
  for (size_t i = 0; i < n; ++i) {
    const bool adds = block.preact && i + 1 == n;
    block.z[i] = convolve(block.operand(i, x), block.convs[i], block.behind(i), adds ? block.shortcut_of(x) : Tensor());
    if (!recorded && i > 0) block.z[i - 1] = Tensor();  // its only reader is done
  }
  if (block.preact) return {block.z[n - 1], Tensor()};
  const Norm &last = block.norms[n - 1], *shortcut = block.shortcut_norm();
  return add_op().call(block.z[n - 1], last.mean, last.rstd, optional(last.weight), optional(last.bias),
                       block.shortcut_of(x), mean_of(shortcut), rstd_of(shortcut), weight_of(shortcut),
                       bias_of(shortcut), kRelu, kNoSlope, recorded);
}

// The same block in elementary operations, for a backward pass that is itself recorded.
Tensor stock_block(const Tensor& x, const Block& block) {
  const auto activated = [&](const Tensor& pre) { return at::relu(pre).to(x.scalar_type()); };
  const Tensor first = block.preact ? activated(block.norms[0].stock(x)) : x;
  const size_t n = block.main();
  Tensor y = first, end;
  for (size_t i = 0; i < n; ++i) {
    end = block.convs[i].stock(y);
    if (!block.preact) end = block.norms[i].stock(end);
    if (i + 1 < n) y = activated(block.preact ? block.norms[i + 1].stock(end) : end);
  }
  if (!block.downsample) {
    end = end + x;
  } else {
    const Tensor z = block.convs[n].stock(first);
    end = end + (block.preact ? z : block.norms[n].stock(z));
  }
  return block.preact ? end : activated(end);
}

// Where the parameters of a block stand among the arguments of the autograd function, which takes no undefined ones.
class Places {
 public:
  explicit Places(Block& block) : convs_(block.convs.size()), weights_(convs_.size()), biases_(convs_.size()) {
    for (size_t i = 0; i < block.convs.size(); ++i) {
      const auto norm = [&] {
        if (i >= block.norms.size()) return;
        if (block.norms[i].weight.defined()) weights_[i] = next_++;
        if (block.norms[i].bias.defined()) biases_[i] = next_++;
      };
      if (block.preact) norm();
      convs_[i] = next_++;
      if (!block.preact) norm();
    }
  }
  static constexpr size_t kNone = 0;
  size_t count() const { return next_; }
  size_t conv(size_t i) const { return convs_[i]; }
  size_t weight(size_t i) const { return weights_[i]; }
  size_t bias(size_t i) const { return biases_[i]; }

 private:
  size_t next_ = 1;  // x is first
  std::vector<size_t> convs_, weights_, biases_;
};

// One backward pass: what is wanted, and where it goes.
class BlockBackward {
 public:
  BlockBackward(const AutogradContext* ctx, Block& block, const Tensor& x, const Tensor& mask)
      : ctx_(ctx), block_(block), places_(block), x_(x), mask_(mask) {}

  size_t results() const { return places_.count() + 1; }  // and the Block

  variable_list recorded(const Tensor& grad_output) const {
    Recorded r;
    Block copy = block_;
    const Tensor x = r.input(x_, 0, wants(0));
    size_t place = 1;
    copy.visit([&](Tensor& t) {
      if (!t.defined()) return;
      t = r.input(t, place, wants(place));
      ++place;
    });
    return r.grad(stock_block(x, copy), grad_output, results());
  }

  variable_list run(const Tensor& dout) {
    result_.resize(results());
    block_.preact ? before_convolutions(dout) : behind_convolutions(dout);
    return std::move(result_);
  }

 private:
  bool wants(size_t place) const { return ctx_->needs_input_grad(place); }
  // Whether anything before this place has a gradient. A shortcut's come later.
  bool wants_below(size_t place) const {
    for (size_t i = 0; i < place; ++i) {
      if (wants(i)) return true;
    }
    return false;
  }
  void put(size_t place, const Tensor& grad, const Tensor& parameter) {
    if (place != Places::kNone && wants(place)) result_[place] = parameter_grad(grad, parameter);
  }
  void norm_gradients(size_t norm, const Gradient& g) {
    put(places_.weight(norm), g.dweight, block_.norms[norm].weight);
    put(places_.bias(norm), g.dbias, block_.norms[norm].bias);
  }
  void conv_gradient(size_t conv, const Gradient& g) {
    if (!wants(places_.conv(conv))) return;
    result_[places_.conv(conv)] = std::get<0>(weight_gradient(g, block_.convs[conv], block_.operand(conv, x_)));
  }
  // The gradient of what a convolution reads, and its weight's if that is wanted.
  Gradient through_convolution(size_t conv, const Gradient& g, const Tensor& skip = {}, const Tensor& skip_mask = {}) {
    const Operand in = block_.operand(conv, x_);
    if (!wants(places_.conv(conv))) return data_gradient(g, block_.convs[conv], in, skip, skip_mask);
    auto [before, weight] = both_gradients(g, block_.convs[conv], in, skip, skip_mask);
    result_[places_.conv(conv)] = weight;
    return before;
  }
  // From behind the last convolution of the main path to before the first, as far as anything is wanted.
  std::optional<Gradient> main_path(Gradient g, const Tensor& skip, const Tensor& skip_mask) {
    for (size_t i = block_.main(); i-- > 0;) {
      if (!wants_below(places_.conv(i))) {
        conv_gradient(i, g);
        return std::nullopt;
      }
      g = through_convolution(i, g, i > 0 ? Tensor() : skip, i > 0 ? Tensor() : skip_mask);
      if (g.norm != nullptr) norm_gradients(block_.preact ? i : i - 1, g);
    }
    return g;
  }

  void behind_convolutions(const Tensor& dout) {
    const size_t n = block_.main();
    if (!block_.z[n - 1].defined()) {
      // The same kernel on the same operands: the same bits. The statistics are known.
      block_.z[n - 1] = convolve(block_.operand(n - 1, x_), block_.convs[n - 1], nullptr);
    }
    const Norm &last = block_.norms[n - 1], *shortcut = block_.shortcut_norm();
    // Sums of the batch norms that end the block; both see the same gradient.
    auto [dx, dweight, dbias, dresidual, dshortcut_weight, dshortcut_bias, dslope] = backward_op().call(
        dout, block_.z[n - 1], last.mean, last.rstd, optional(last.weight), optional(last.bias),
        shortcut == nullptr ? OptionalTensor() : block_.z[n], mean_of(shortcut), rstd_of(shortcut), weight_of(shortcut),
        bias_of(shortcut), {}, mask_, last.training, shortcut != nullptr && shortcut->training, kRelu, kNoSlope,
        {false, true, true, false, shortcut != nullptr, shortcut != nullptr, false});
    Gradient g{dout, mask_, &last, block_.z[n - 1], dweight, dbias};
    norm_gradients(n - 1, g);
    Tensor skip = dout, skip_mask = mask_;
    if (shortcut != nullptr) {
      const Gradient branch{dout, mask_, shortcut, block_.z[n], dshortcut_weight, dshortcut_bias};
      norm_gradients(n, branch);
      skip = skip_mask = Tensor();
      if (wants(0)) {
        skip = through_convolution(n, branch).dy;
      } else {
        conv_gradient(n, branch);
      }
    }
    const std::optional<Gradient> first = main_path(std::move(g), skip, skip_mask);
    if (first.has_value() && wants(0)) result_[0] = first->dy;
  }

  void before_convolutions(const Tensor& dout) {
    const size_t n = block_.main();
    const Gradient g{dout};
    Tensor skip;
    if (block_.downsample) {
      conv_gradient(n, g);
      // Of the activated tensor, as what it is added to.
      if (wants_below(places_.conv(0))) skip = data_gradient(g, block_.convs[n], {x_}).dy;
    }
    const std::optional<Gradient> first = main_path(g, skip, {});
    if (!first.has_value() || !wants(0)) return;
    result_[0] = input_gradient(*first, block_.downsample ? Tensor() : dout);
  }

  const AutogradContext* ctx_;
  Block& block_;
  const Places places_;
  const Tensor x_, mask_;
  variable_list result_;
};

class ResidualBlock : public torch::autograd::Function<ResidualBlock> {
 public:
  // inputs: x, then what Block::visit meets and is defined.
  static Tensor forward(AutogradContext* ctx, at::TensorList inputs, Block* block) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor x = inputs[0];
    auto [y, mask] = run_forward(x, *block, /*recorded=*/true);
    variable_list saved{x, mask};
    block->visit([&](const Tensor& t) { saved.push_back(t); });
    std::vector<int64_t> training;
    std::vector<double> eps;
    for (const Norm& norm : block->norms) {
      saved.push_back(norm.mean);
      saved.push_back(norm.rstd);
      training.push_back(norm.training);
      eps.push_back(norm.eps);
    }
    for (size_t i = 0; i < block->z.size(); ++i) {
      const bool last = i + 1 == block->main();
      saved.push_back((last && block->recompute) || (block->preact && i + 1 >= block->main()) ? Tensor() : block->z[i]);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["geometry"] = block->geometry;
    ctx->saved_data["downsample"] = block->downsample;
    ctx->saved_data["preact"] = block->preact;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    Block block = load(ctx, saved);
    BlockBackward backward(ctx, block, saved[0], saved[1]);
    if (!grads[0].defined()) return variable_list(backward.results());
    if (at::GradMode::is_enabled()) return backward.recorded(grads[0]);
    at::AutoDispatchBelowADInplaceOrView below;
    // Once for all that read it: the last block of a model gets an expanded one from its average pooling.
    return backward.run(in_memory_format(grads[0], at::MemoryFormat::ChannelsLast));
  }

 private:
  static Block load(AutogradContext* ctx, const variable_list& saved) {
    Block block;
    const std::vector<int64_t> training = ctx->saved_data["training"].toIntVector();
    const std::vector<double> eps = ctx->saved_data["eps"].toDoubleVector();
    block.geometry = ctx->saved_data["geometry"].toSymIntVector();
    block.downsample = ctx->saved_data["downsample"].toBool();
    block.preact = ctx->saved_data["preact"].toBool();
    block.convs.resize(block.geometry.size() / Geometry::kValues);
    block.norms.resize(training.size());
    auto next = saved.begin() + 2;
    block.visit([&](Tensor& t) { t = *next++; });
    for (size_t i = 0; i < block.convs.size(); ++i) {
      const SymIntArrayRef all = block.geometry;
      block.convs[i].geometry = Geometry::of(all.slice(i * Geometry::kValues, Geometry::kValues));
    }
    for (size_t i = 0; i < block.norms.size(); ++i) {
      Norm& norm = block.norms[i];
      norm.mean = *next++;
      norm.rstd = *next++;
      norm.training = training[i] != 0;
      norm.eps = eps[i];
    }
    for (; next != saved.end(); ++next) {
      // Hooks on saved tensors may bring it back in another layout; the mask's rows are those of this one.
      block.z.push_back(next->defined() ? in_memory_format(*next, at::MemoryFormat::ChannelsLast) : *next);
    }
    return block;
  }
};

// The output, then mean and biased variance of every batch norm that used batch statistics, for its running ones.
std::vector<Tensor> run_block(const Tensor& x, at::TensorList conv_weights, const c10::List<OptionalTensor>& weights,
                              const c10::List<OptionalTensor>& biases, const c10::List<OptionalTensor>& running_means,
                              const c10::List<OptionalTensor>& running_vars, c10::List<bool> training,
                              at::ArrayRef<double> eps, SymIntArrayRef geometry, bool downsample, bool recompute,
                              bool preact) {
  constexpr const char* kOp = "residual_block";
  check::activation_tensor(kOp, "x", x);
  Block block;
  block.downsample = downsample;
  block.preact = preact;
  block.recompute = recompute;
  block.geometry = geometry.vec();
  block.convs.resize(conv_weights.size());
  const size_t norms = block.convs.size() - (downsample && preact ? 1 : 0);
  TORCH_CHECK(block.convs.size() >= (downsample ? 2u : 1u) && weights.size() == norms && biases.size() == norms &&
                  running_means.size() == norms && running_vars.size() == norms && training.size() == norms &&
                  eps.size() == norms && geometry.size() == Geometry::kValues * block.convs.size(),
              kOp, ": expected lists of as many units as conv_weights has, got ", conv_weights.size(), " weights and ",
              weights.size(), " batch norms");
  for (size_t i = 0; i < block.convs.size(); ++i) {
    Conv& conv = block.convs[i];
    conv.weight = conv_weights[i];
    conv.geometry = Geometry::of(geometry.slice(i * Geometry::kValues, Geometry::kValues));
    TORCH_CHECK(conv.weight.defined() && conv.weight.dim() == 4, kOp,
                ": expected conv_weights of shape (O, C, KH, KW), got ", conv.weight.sym_sizes());
  }
  for (size_t i = 0; i < norms; ++i) {
    const OptionalTensor weight = weights.get(i), bias = biases.get(i), mean = running_means.get(i),
                         var = running_vars.get(i);
    if (preact && i == 0) {
      check::norm(kOp, check::kNorm, x, weight, bias, mean, var, training.get(i), eps[i]);
    } else {
      check_conv_norm(kOp, x, conv_weights[preact ? i - 1 : i], weight, bias, mean, var, training.get(i), eps[i]);
    }
    block.norms.push_back({value_or_undefined(weight), value_or_undefined(bias), value_or_undefined(mean),
                           value_or_undefined(var), training.get(i), eps[i]});
  }
  std::vector<Tensor> inputs{x};
  block.visit([&](const Tensor& t) {
    if (t.defined()) inputs.push_back(t);
  });
  bool record = false;
  for (const Tensor& t : inputs) record = record || wants_grad({&t});
  std::vector<Tensor> result;
  if (at::GradMode::is_enabled() && record) {
    result.push_back(ResidualBlock::apply(at::TensorList(inputs), &block));
  } else {
    result.push_back(std::get<0>(run_forward(x, block, /*recorded=*/false)));
  }
  for (const Norm& norm : block.norms) {
    if (!norm.training) continue;
    result.push_back(norm.mean);
    result.push_back(norm.var);
  }
  return result;
}

std::vector<Tensor> residual_block(const Tensor& x, at::TensorList conv_weights,
                                   const c10::List<OptionalTensor>& weights, const c10::List<OptionalTensor>& biases,
                                   const c10::List<OptionalTensor>& running_means,
                                   const c10::List<OptionalTensor>& running_vars, c10::List<bool> training,
                                   at::ArrayRef<double> eps, SymIntArrayRef geometry, bool downsample, bool recompute,
                                   bool preact) {
  for (const Tensor& w : conv_weights) {
    TORCH_CHECK(w.defined() && w.scalar_type() == x.scalar_type(), "residual_block: expected conv_weights of dtype ",
                x.scalar_type(), ", got ", w.defined() ? toString(w.scalar_type()) : "None");
  }
  return run_block(x, conv_weights, weights, biases, running_means, running_vars, std::move(training), eps, geometry,
                   downsample, recompute, preact);
}

// Weights stay as they are: kernels that multiply bfloat16 round them while they pack them, the others need not. Copies
// of fewer bits would be made for every step, and kept for backward.
std::vector<Tensor> residual_block_autocast(const Tensor& x, at::TensorList conv_weights,
                                            const c10::List<OptionalTensor>& weights,
                                            const c10::List<OptionalTensor>& biases,
                                            const c10::List<OptionalTensor>& running_means,
                                            const c10::List<OptionalTensor>& running_vars, c10::List<bool> training,
                                            at::ArrayRef<double> eps, SymIntArrayRef geometry, bool downsample,
                                            bool recompute, bool preact) {
  const Autocast<at::kCPU> autocast;
  std::vector<Tensor> cast;
  for (const Tensor& w : conv_weights) cast.push_back(w.scalar_type() == at::kFloat ? w : autocast.cast(w));
  return run_block(autocast.cast(x), cast, weights, biases, running_means, running_vars, std::move(training), eps,
                   geometry, downsample, recompute, preact);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_resnet, CompositeImplicitAutograd, m) { m.impl("residual_block", TORCH_FN(residual_block)); }
TORCH_LIBRARY_IMPL(fused_resnet, AutocastCPU, m) { m.impl("residual_block", TORCH_FN(residual_block_autocast)); }

}  // namespace fused_resnet::bindings
