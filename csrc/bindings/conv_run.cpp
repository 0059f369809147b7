#include "bindings/conv_run.h"

#include <algorithm>

#include "bindings/conv_problem.h"
#include "bindings/verbose.h"

namespace fused_resnet::bindings {
namespace {

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

at::Tensor scratch(int64_t bytes) { return empty_pooled({bytes}, at::TensorOptions(at::kByte)); }

}  // namespace

void run(const Execution& on, const char* op, ConvForward& p) {
  p.runner = on.runner();
  p.numerics = numerics();
  const at::Tensor workspace = scratch(cpu::conv_forward_workspace(p.shape, p.numerics, p.runner.threads));
  p.workspace = write(workspace);
  say_plan(op, p.shape, /*backward=*/false, p.numerics);
  check::status(op, cpu::conv_forward(p));
}

void run(const Execution& on, const char* op, ConvBackwardData& p) {
  p.runner = on.runner();
  p.numerics = numerics();
  const at::Tensor workspace = scratch(cpu::conv_backward_data_workspace(p.shape, p.numerics, p.runner.threads));
  p.workspace = write(workspace);
  say_plan(op, p.shape, /*backward=*/true, p.numerics);
  check::status(op, cpu::conv_backward_data(p));
}

void run(const Execution& on, const char* op, ConvBackwardWeight& p) {
  p.runner = on.runner();
  p.numerics = numerics();
  const at::Tensor workspace = scratch(cpu::conv_backward_weight_workspace(p.shape, p.numerics, p.runner.threads));
  p.workspace = write(workspace);
  say_weight_plan(op, p.shape, p.numerics);
  check::status(op, cpu::conv_backward_weight(p));
}

void run(const Execution& on, const char* op, ConvBackwardData& p, ConvBackwardWeight& q) {
  p.runner = q.runner = on.runner();
  p.numerics = q.numerics = numerics();
  const int threads = p.runner.threads;
  const int64_t bytes = cpu::conv_backward_data_workspace(p.shape, p.numerics, threads);
  const int64_t more = cpu::conv_backward_weight_workspace(q.shape, q.numerics, threads);
  const bool together = cpu::conv_runs_together(p.shape, p.numerics, threads);
  const at::Tensor workspace = scratch(together ? bytes : std::max(bytes, more));
  const at::Tensor other = together ? scratch(more) : workspace;
  p.workspace = write(workspace);
  q.workspace = write(other);
  say_plan(op, p.shape, /*backward=*/true, p.numerics);
  say_weight_plan(op, q.shape, q.numerics);
  if (verbose) [[unlikely]] {
    say_conv(op, p.shape, together ? "both gradients unit by unit" : "one gradient after the other");
  }
  check::status(op, cpu::conv_backward(p, q));
}

}  // namespace fused_resnet::bindings
