// The halves of batch norm that stand alone where a convolution does the other one: statistics without output, and the
// gradient of the input from sums that are known. The same kernels as in the whole: the same bits.
#include "compare.h"
#include "fused_resnet/batch_norm.h"
#include "runners.h"
#include "tests.h"

namespace fused_resnet::native_test {
namespace {

struct Parts {
  Shape shape;
  DType stat;
  Guarded x, dy, skip, weight, mean, rstd, var, dweight, dbias;

  Parts(const Shape& s, bool misaligned) : shape(s), stat(stat_dtype(s.dtype)) {
    Random random(static_cast<uint64_t>(s.numel()));
    const auto tensor = [&](double offset) {
      Values values;
      for (int64_t i = 0; i < s.numel(); ++i) values.push_back(rounded(random.bell() + offset, s.dtype));
      return input_tensor(s, values, misaligned);
    };
    x = tensor(0.5), dy = tensor(0.1), skip = tensor(-0.2);
    Values w;
    for (int64_t c = 0; c < s.c; ++c) w.push_back(rounded(random.uniform(-1.5, 1.5), stat));
    weight = channel_array(w, stat);
    for (Guarded* array : {&mean, &rstd, &var, &dweight, &dbias}) *array = Guarded(s.c * element_size(stat));
  }
  NormParams norm(bool batch_stats) {
    NormParams p;
    p.batch_stats = batch_stats;
    p.weight = weight.data(), p.mean = mean.data(), p.rstd = rstd.data();
    return p;
  }
};

void check_statistics(Report& report, Parts& d) {
  Guarded y = output_tensor(d.shape, false), mean(d.mean.size()), rstd(d.mean.size()), var(d.mean.size());
  Guarded whole_workspace(cpu::batch_norm_act_forward_workspace(d.shape));
  BatchNormActForward whole;
  whole.shape = d.shape, whole.x = d.x.data(), whole.y = y.data(), whole.workspace = whole_workspace.data();
  whole.norm = d.norm(true);
  whole.norm.mean = mean.data(), whole.norm.rstd = rstd.data(), whole.norm.var = var.data();
  if (!cpu::batch_norm_act_forward(whole).ok()) report.fail("the whole forward pass failed");

  Guarded workspace(cpu::batch_norm_statistics_workspace(d.shape));
  BatchNormStatistics p;
  p.shape = d.shape, p.x = d.x.data(), p.workspace = workspace.data(), p.runner = shuffled_runner();
  p.norm = d.norm(true);
  p.norm.var = d.var.data();
  const Status status = cpu::batch_norm_statistics(p);
  if (!status.ok()) report.fail("%s", status.message);
  expect_same_bytes(report, "mean", d.mean, mean);
  expect_same_bytes(report, "rstd", d.rstd, rstd);
  expect_same_bytes(report, "var", d.var, var);
  for (const Guarded* array : {&d.mean, &d.rstd, &d.var, &workspace}) expect_guards(report, "statistics", *array);
}

void check_input_gradient(Report& report, Parts& d, bool batch_stats) {
  Guarded whole_dx = output_tensor(d.shape, false), dx = output_tensor(d.shape, false);
  Guarded workspace(cpu::batch_norm_act_backward_workspace(d.shape));
  BatchNormActBackward whole;
  whole.shape = d.shape, whole.dy = d.dy.data(), whole.x = d.x.data(), whole.norm = d.norm(batch_stats);
  whole.dx = whole_dx.data(), whole.dweight = d.dweight.data(), whole.dbias = d.dbias.data();
  whole.workspace = workspace.data();
  if (!cpu::batch_norm_act_backward(whole).ok()) report.fail("the whole backward pass failed");

  BatchNormInputGradient p;
  p.shape = d.shape, p.dy = d.dy.data(), p.x = d.x.data(), p.norm = d.norm(batch_stats);
  p.dweight = d.dweight.data(), p.dbias = d.dbias.data();
  p.workspace = workspace.data(), p.dx = dx.data(), p.runner = shuffled_runner();
  const Status status = cpu::batch_norm_input_gradient(p);
  if (!status.ok()) report.fail("%s", status.message);
  // The sums were rounded on their way.
  const auto expect = [&](const char* what, const Guarded& got, const Values& skip) {
    const Values plain = read_tensor(d.shape, whole_dx), dy = read_tensor(d.shape, d.dy);
    Result expected;
    for (size_t i = 0; i < plain.size(); ++i) {
      const double added = skip.empty() ? 0 : skip[i];
      expected.value.push_back(plain[i] + added);
      const double spread = 8 * (1 + std::abs(dy[i])) * rounding_unit(d.stat) / rounding_unit(d.shape.dtype);
      expected.scale.push_back(std::abs(plain[i]) + std::abs(added) + spread);
    }
    expect_close(report, what, read_tensor(d.shape, got), expected, d.shape.dtype, d.shape.dtype, kElementUnits);
    expect_guards(report, what, got);
  };
  expect("dx", dx, {});
  Guarded first = output_tensor(d.shape, false);
  for (const Runner& runner : {Runner{}, threaded_runner(), shuffled_runner()}) {
    Guarded with_skip = output_tensor(d.shape, true);
    p.skip = d.skip.data(), p.dx = with_skip.data(), p.runner = runner;
    if (!cpu::batch_norm_input_gradient(p).ok()) report.fail("refused a skip");
    expect("dx with skip", with_skip, read_tensor(d.shape, d.skip));
    if (runner.for_each == nullptr) std::memcpy(first.data(), with_skip.data(), static_cast<size_t>(first.size()));
    expect_same_bytes(report, "dx with skip", with_skip, first);
  }
  expect_guards(report, "workspace", workspace);
}

}  // namespace

void test_batch_norm_parts(Report& report) {
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      for (const auto& [n, c, s] :
           {std::array<int64_t, 3>{1, 1, 2}, {2, 3, 35}, {3, 17, 49}, {2, 65, 9}, {4, 256, 400}, {1, 1030, 70}}) {
        Parts parts({n, c, s, dtype, layout}, c % 2 == 1);
        report.begin("parts of batch norm, " + shape_name(parts.shape));
        check_statistics(report, parts);
        for (bool batch_stats : {true, false}) check_input_gradient(report, parts, batch_stats);
      }
    }
  }
  report.begin("parts of batch norm of nothing");
  if (cpu::batch_norm_statistics({}).ok()) report.fail("statistics of nothing");
  if (cpu::batch_norm_input_gradient({}).ok()) report.fail("a gradient of nothing");
}

}  // namespace fused_resnet::native_test
