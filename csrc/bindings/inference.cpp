// The steps of a network in inference, one after another, without PyTorch's dispatcher between them.
//
// A plan is built once for one shape and then only read: any number of threads may run it, each with an arena of its
// own. Where a step reads and writes is a place: an offset into the arena, or one of the tensors of the call.
#include "bindings/inference.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <chrono>
#include <map>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "bindings/conv_problem.h"
#include "bindings/memory.h"
#include "bindings/plan.h"
#include "bindings/verbose.h"
#include "fused_resnet/batch_norm.h"
#include "fused_resnet/conv.h"
#include "fused_resnet/window.h"

namespace fused_resnet::bindings {
namespace {

namespace py = pybind11;

constexpr const char* kOp = "inference";

using Tensor = at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Extents = std::array<int64_t, 4>;  // n, c, h, w
using Pair = std::array<int64_t, 2>;
using Numerics = std::tuple<bool, int, bool>;             // ConvNumerics
using Act = std::tuple<int64_t, double, OptionalTensor>;  // kind, negative slope, prelu's slopes (C,)

// From 0 on: a byte of the arena. Below: tensor number -1 - place of the call.
using Place = int64_t;
// And of how many blocks of images what lies there is, one after another: a step works on one of them at a time.
using Where = std::pair<Place, int64_t>;

struct Operand {
  Place place = 0;
  int64_t blocks = 1;
  int64_t bytes = 0;  // of one block; 0: there is none
};

// What a call gives: memory for the values between steps, and tensors; and which block of images is next.
struct Memory {
  char* arena;
  const std::vector<Tensor>& tensors;
  int64_t block = 0;
  void* at(const Operand& o) const {
    if (o.bytes == 0) return nullptr;
    char* base = o.place >= 0 ? arena + o.place
                              : static_cast<char*>(tensors[static_cast<size_t>(-1 - o.place)].mutable_data_ptr());
    return o.blocks == 1 ? base : base + block * o.bytes;
  }
};

// Per-channel arrays that a step keeps alive. Without mean and variance of its own a norm is x * weight + bias.
struct AffineArrays {
  Tensor zero, one, weight, bias;
  AffineArrays() = default;
  AffineArrays(int64_t c, const OptionalTensor& scale, const OptionalTensor& shift, at::ScalarType stat)
      : zero(at::zeros({c}, stat)), one(at::ones({c}, stat)) {
    if (check::given(scale)) weight = *scale;
    if (check::given(shift)) bias = *shift;
  }
  NormParams params() const {
    NormParams p;
    p.mean = read_field(zero);
    p.rstd = read_field(one);
    p.weight = read(weight);
    p.bias = read(bias);
    return p;
  }
};

struct ActTensors {
  Tensor slope;
  ActParams params;
  ActTensors() = default;
  explicit ActTensors(const Act& act) {
    if (check::given(std::get<2>(act))) slope = *std::get<2>(act);
    params = act_params(std::get<0>(act), std::get<1>(act), slope);
  }
};

struct ConvStep {
  ConvForward p;
  Operand x, skip, y;
  Tensor weight, packed, bias;
  AffineArrays affine;
  ActTensors pre, act;
  std::array<Operand, 3> operands() const { return {x, skip, y}; }
};
struct WindowStep {
  WindowForward p;
  Operand x, y;
  std::array<Operand, 2> operands() const { return {x, y}; }
};
struct NormStep {
  BatchNormActForward p;
  Operand x, residual, y;
  AffineArrays affine;
  ActTensors act;
  std::array<Operand, 3> operands() const { return {x, residual, y}; }
};
using Step = std::variant<ConvStep, WindowStep, NormStep>;

ConvNumerics to_seam(const Numerics& numerics) {
  const auto [winograd, split, where_faster] = numerics;
  TORCH_CHECK(split == 0 || split == 2 || split == 3, kOp, ": expected 0, 2 or 3 parts of a float, got ", split);
  return {winograd, split, where_faster};
}

void check_packed(const Tensor& packed, const ConvShape& s, const ConvNumerics& numerics) {
  TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == at::kByte &&
                  packed.numel() == cpu::conv_packed_bytes(s, numerics),
              kOp, ": expected a weight packed for this convolution, got ", packed.numel(), " bytes");
}

// A channel array in the type of the kernels' arithmetic.
OptionalTensor stat(const OptionalTensor& t, int64_t channels, at::ScalarType dtype) {
  if (!check::given(t)) return std::nullopt;
  TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, kOp, ": expected a tensor of shape (", channels, ",), got ",
              t->sizes());
  return t->to(check::stat_dtype(dtype)).contiguous();
}
Act stat(const Act& act, int64_t channels, at::ScalarType dtype) {
  return {std::get<0>(act), std::get<1>(act), stat(std::get<2>(act), channels, dtype)};
}

class InferencePlan {
 public:
  explicit InferencePlan(at::ScalarType dtype) : scalar_(dtype), dtype_(to_dtype(dtype)), isa_(cpu::current_isa()) {
    TORCH_CHECK(check::supported_dtype(dtype), kOp, ": expected a floating dtype of the kernels, got ", dtype);
  }

  // `weight` is read unless it was packed exactly; then its shape is enough.
  void conv(const Where& x, const std::optional<Where>& skip, const Where& y, const Extents& in, const Tensor& weight,
            const OptionalTensor& packed, const OptionalTensor& bias, const Pair& stride, const Pair& padding,
            const Pair& dilation, int64_t groups, const Act& act, const OptionalTensor& scale,
            const OptionalTensor& shift, const Act& pre, const Numerics& numerics) {
    check_weight(weight, in[1], groups);
    ConvStep step;
    const ConvShape s = conv_shape(in, weight, {stride, padding, dilation, groups});
    TORCH_CHECK(cpu::conv_supported(s) && s.x_numel() > 0 && s.y_numel() > 0, kOp, ": a convolution without kernel");
    if (check::given(packed)) {
      check_packed(*packed, s, to_seam(numerics));
      step.packed = *packed;
    }
    if (!check::given(packed) || cpu::conv_reads_weight(s, to_seam(numerics), read(*packed))) {
      TORCH_CHECK(weight.is_cpu(), kOp, ": expected the weight itself, got its shape alone");
      step.weight = weight;
      step.p.weight = conv_weight(weight);
    }
    if (const OptionalTensor b = stat(bias, s.k, scalar_)) step.bias = *b;
    step.act = ActTensors(stat(act, s.k, scalar_));
    if (check::given(scale)) {
      step.affine = AffineArrays(s.c, stat(scale, s.c, scalar_), stat(shift, s.c, scalar_), stat_type());
      step.pre = ActTensors(stat(pre, s.c, scalar_));
      step.p.x.has_norm = true;
      step.p.x.norm = step.affine.params();
      step.p.x.act = step.pre.params;
    }
    step.p.shape = s;
    step.p.packed = read(step.packed);
    step.p.bias = read(step.bias);
    step.p.act = step.act.params;
    step.p.numerics = to_seam(numerics);
    step.x = source(x, s.x_numel());
    step.y = target(y, s.y_numel());
    if (skip.has_value()) step.skip = source(*skip, s.y_numel());
    steps_.emplace_back(std::move(step));
  }

  void window(bool mean, const Where& x, const Where& y, const Extents& in, const Pair& out, const Pair& kernel,
              const Pair& stride, const Pair& padding, const Pair& dilation, bool count_padding) {
    WindowStep step;
    WindowForward& p = step.p;
    p.kind = mean ? WindowKind::kMean : WindowKind::kMax;
    p.dtype = dtype_;
    p.n = in[0], p.c = in[1], p.h = in[2], p.w = in[3];
    p.out_h = out[0], p.out_w = out[1];
    p.kernel_h = kernel[0], p.kernel_w = kernel[1];
    p.stride_h = stride[0], p.stride_w = stride[1];
    p.pad_h = padding[0], p.pad_w = padding[1];
    p.dilation_h = dilation[0], p.dilation_w = dilation[1];
    p.count_padding = count_padding;
    step.x = source(x, p.n * p.h * p.w * p.c);
    step.y = target(y, p.n * p.out_h * p.out_w * p.c);
    steps_.emplace_back(step);
  }

  // y = act(x * scale + shift + residual), any of scale, shift and residual left out.
  void affine(const Where& x, const std::optional<Where>& residual, const Where& y, const Extents& in,
              const OptionalTensor& scale, const OptionalTensor& shift, const Act& act) {
    NormStep step;
    step.affine = AffineArrays(in[1], stat(scale, in[1], scalar_), stat(shift, in[1], scalar_), stat_type());
    step.act = ActTensors(stat(act, in[1], scalar_));
    step.p.shape = Shape{in[0], in[1], in[2] * in[3], dtype_, Layout::kNHWC};
    step.p.norm = step.affine.params();
    step.p.act = step.act.params;
    step.x = source(x, step.p.shape.numel());
    step.y = target(y, step.p.shape.numel());
    if (residual.has_value()) step.residual = source(*residual, step.p.shape.numel());
    steps_.emplace_back(std::move(step));
  }

  // Bytes of an arena for calls with this many threads.
  int64_t arena_bytes(int threads) const {
    int64_t workspace = 0;
    for (const Step& step : steps_) {
      workspace = std::max(workspace, std::visit([&](const auto& s) { return workspace_of(s.p, threads); }, step));
    }
    return values_bytes_ + workspace;
  }

  // Steps [begin, end) for every block of images; with `timed` the seconds of each step.
  std::vector<double> run(const Tensor& arena, const std::vector<Tensor>& tensors, size_t begin, size_t end,
                          int64_t blocks, bool timed) const {
    const Execution on(kOp, arena);
    TORCH_CHECK(begin <= end && end <= steps_.size(), kOp, ": expected steps of the plan's ", steps_.size(), ", got [",
                begin, ", ", end, ")");
    TORCH_CHECK(cpu::current_isa() == isa_, kOp, ": expected the instruction set that the plan was made for, ",
                isa_name(isa_), ", got ", isa_name(cpu::current_isa()));
    TORCH_CHECK(arena.numel() >= arena_bytes(on.runner().threads), kOp, ": expected an arena of ",
                arena_bytes(on.runner().threads), " bytes, got ", arena.numel());
    const auto check_operands = [&](const auto& s) {
      for (const Operand& o : s.operands()) check_operand(o, tensors, blocks);
    };
    for (size_t i = begin; i < end; ++i) std::visit(check_operands, steps_[i]);
    if (verbose) [[unlikely]]
      for (size_t i = begin; i < end; ++i) std::visit([](const auto& s) { announce(s.p); }, steps_[i]);
    Memory memory{static_cast<char*>(arena.mutable_data_ptr()), tensors};
    char* workspace = memory.arena + values_bytes_;
    std::vector<double> seconds(timed ? end - begin : 0);
    for (; memory.block < blocks; ++memory.block) {
      for (size_t i = begin; i < end; ++i) {
        const auto start = std::chrono::steady_clock::now();
        std::visit([&](const auto& s) { call(s, memory, workspace, on.runner()); }, steps_[i]);
        if (!timed) continue;
        seconds[i - begin] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      }
    }
    return seconds;
  }

  // By which kernels a step runs.
  std::string kernel(size_t i) const {
    TORCH_CHECK(i < steps_.size(), kOp, ": expected one of ", steps_.size(), " steps, got ", i);
    return std::visit([&](const auto& s) { return kernel_of(s.p); }, steps_[i]);
  }

 private:
  at::ScalarType stat_type() const { return check::stat_dtype(scalar_); }

  // Where a step reads: something that was written before, and as long.
  Operand source(const Where& where, int64_t elements) {
    const Operand o = operand(where, elements);
    const auto writer = written_.find(o.place);
    TORCH_CHECK(o.place < 0 || (writer != written_.end() && writer->second >= o.blocks * o.bytes), kOp,
                ": expected to read what an earlier step has written, got ", o.blocks * o.bytes, " bytes at ", o.place);
    return o;
  }
  Operand target(const Where& where, int64_t elements) {
    const Operand o = operand(where, elements);
    written_[o.place] = o.blocks * o.bytes;
    return o;
  }
  Operand operand(const Where& where, int64_t elements) {
    constexpr int64_t kAlignment = 64;
    const auto [place, blocks] = where;
    const int64_t bytes = elements * element_size(dtype_);
    TORCH_CHECK(blocks > 0, kOp, ": expected a number of blocks, got ", blocks);
    if (place >= 0) {
      TORCH_CHECK(place % kAlignment == 0, kOp, ": expected a place at a multiple of ", kAlignment, ", got ", place);
      values_bytes_ = std::max(values_bytes_, (place + blocks * bytes + kAlignment - 1) / kAlignment * kAlignment);
    }
    return {place, blocks, bytes};
  }
  void check_weight(const Tensor& weight, int64_t channels, int64_t groups) const {
    TORCH_CHECK(weight.scalar_type() == scalar_ && weight.dim() == 4 && groups > 0 &&
                    weight.size(1) * groups == channels && weight.size(0) % groups == 0,
                kOp, ": expected a weight of dtype ", scalar_, " and shape (K, C / groups, R, S) for ", channels,
                " channels in ", groups, " groups, got ", weight.scalar_type(), " and ", weight.sizes());
  }
  void check_operand(const Operand& o, const std::vector<Tensor>& tensors, int64_t blocks) const {
    if (o.bytes == 0) return;
    TORCH_CHECK(o.blocks == 1 || o.blocks == blocks, kOp, ": expected ", o.blocks, " blocks of images, got ", blocks);
    if (o.place >= 0) return;
    const size_t i = static_cast<size_t>(-1 - o.place);
    TORCH_CHECK(i < tensors.size(), kOp, ": expected at least ", i + 1, " tensors, got ", tensors.size());
    const Tensor& t = tensors[i];
    const bool dense = t.is_contiguous() || t.is_contiguous(at::MemoryFormat::ChannelsLast);
    TORCH_CHECK(
        t.is_cpu() && t.scalar_type() == scalar_ && t.numel() * element_size(dtype_) == o.bytes * o.blocks && dense,
        kOp, ": expected a dense tensor on the CPU of dtype ", scalar_, " and ", o.bytes * o.blocks, " bytes, got ",
        t.scalar_type(), " of shape ", t.sizes());
  }

  static int64_t workspace_of(const ConvForward& p, int threads) {
    return cpu::conv_forward_workspace(p.shape, p.numerics, threads, p.packed != nullptr);
  }
  static int64_t workspace_of(const WindowForward&, int) { return 0; }
  static int64_t workspace_of(const BatchNormActForward& p, int) {
    return cpu::batch_norm_act_forward_workspace(p.shape);
  }

  static void call(const ConvStep& s, const Memory& memory, void* workspace, const Runner& runner) {
    ConvForward p = s.p;
    p.x.data = memory.at(s.x);
    p.skip = memory.at(s.skip);
    p.y = memory.at(s.y);
    p.workspace = workspace;
    p.runner = runner;
    check::status(kOp, cpu::conv_forward(p));
  }
  static void call(const WindowStep& s, const Memory& memory, void*, const Runner& runner) {
    WindowForward p = s.p;
    p.x = memory.at(s.x);
    p.y = memory.at(s.y);
    p.runner = runner;
    check::status(kOp, cpu::window_forward(p));
  }
  static void call(const NormStep& s, const Memory& memory, void* workspace, const Runner& runner) {
    BatchNormActForward p = s.p;
    p.x = memory.at(s.x);
    p.residual = memory.at(s.residual);
    p.y = memory.at(s.y);
    p.workspace = workspace;
    p.runner = runner;
    check::status(kOp, cpu::batch_norm_act_forward(p));
  }

  static void announce(const ConvForward& p) { say_conv(kOp, p.shape, kernel_of(p)); }
  static void announce(const WindowForward& p) {
    say(kOp, {p.n, p.c, p.h * p.w, p.dtype, Layout::kNHWC}, "window", {pass_of(p)}, /*cuda=*/false);
  }
  static void announce(const BatchNormActForward& p) { say(kOp, p.shape, "batch_norm", {"apply"}, /*cuda=*/false); }

  static const char* pass_of(const WindowForward& p) { return p.kind == WindowKind::kMax ? "max" : "mean"; }

  static std::string kernel_of(const ConvForward& p) {
    char text[1024];
    const auto direction = p.packed != nullptr ? cpu::ConvDirection::kForwardPacked : cpu::ConvDirection::kForward;
    cpu::conv_plan(p.shape, direction, p.numerics, text, sizeof(text));
    return text;
  }
  static std::string kernel_of(const WindowForward& p) {
    return cpu::selected_kernel("window", pass_of(p), p.dtype)->name;
  }
  static std::string kernel_of(const BatchNormActForward& p) {
    return cpu::selected_kernel("batch_norm", "apply", p.shape.dtype)->name;
  }

  at::ScalarType scalar_;
  DType dtype_;
  CpuIsa isa_;
  std::vector<Step> steps_;
  std::map<Place, int64_t> written_;  // bytes, at places of the arena
  int64_t values_bytes_ = 0;
};

Tensor arena(int64_t bytes) { return empty_pooled({bytes}, at::TensorOptions(at::kByte)); }

// How the weight would be packed: equal names, equal bytes. None: there is no kernel that is worth it.
std::optional<std::string> packed_format(const Extents& in, const Tensor& weight, const Pair& stride,
                                         const Pair& padding, const Pair& dilation, int64_t groups,
                                         const Numerics& numerics) {
  const ConvShape s = conv_shape(in, weight, {stride, padding, dilation, groups});
  if (!cpu::conv_supported(s) || !own_groups(s, /*packed=*/true) || s.x_numel() <= 0 || s.y_numel() <= 0)
    return std::nullopt;
  char text[256];
  cpu::conv_packed_format(s, to_seam(numerics), text, sizeof(text));
  return text;
}

bool reads_weight(const Extents& in, const Tensor& weight, const Pair& stride, const Pair& padding,
                  const Pair& dilation, int64_t groups, const Numerics& numerics, const Tensor& packed) {
  const ConvShape s = conv_shape(in, weight, {stride, padding, dilation, groups});
  check_packed(packed, s, to_seam(numerics));
  return cpu::conv_reads_weight(s, to_seam(numerics), read(packed));
}

Tensor pack(const Extents& in, const Tensor& weight, const Pair& stride, const Pair& padding, const Pair& dilation,
            int64_t groups, const Numerics& numerics) {
  ConvPack p;
  p.shape = conv_shape(in, weight, {stride, padding, dilation, groups});
  const Tensor packed = arena(cpu::conv_packed_bytes(p.shape, to_seam(numerics)));
  const Execution on(kOp, packed);
  p.weight = conv_weight(weight);
  p.numerics = to_seam(numerics);
  p.packed = write(packed);
  p.runner = on.runner();
  check::status(kOp, cpu::conv_pack(p));
  return packed;
}

}  // namespace

void define_inference(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<InferencePlan>(m, "InferencePlan")
      .def(py::init<at::ScalarType>())
      .def("conv", &InferencePlan::conv)
      .def("window", &InferencePlan::window)
      .def("affine", &InferencePlan::affine)
      .def("arena_bytes", &InferencePlan::arena_bytes)
      .def("run", &InferencePlan::run, Release())
      .def("kernel", &InferencePlan::kernel);
  m.def("inference_packed_format", packed_format);
  m.def("inference_reads_weight", reads_weight);
  m.def("inference_pack", pack, Release());
  m.def("inference_arena", arena);
  m.def("conv_numerics", [] {
    const ConvNumerics allowed = bindings::numerics();
    return Numerics(allowed.allow_winograd, allowed.split, allowed.split_where_faster);
  });
}

}  // namespace fused_resnet::bindings
