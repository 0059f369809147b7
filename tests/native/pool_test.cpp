// The stem (batch norm + activation + 3x3/2 max-pool): every kernel of a
// backend against the reference.
#include "fused_resnet/pool.h"

#include "compare.h"
#include "tests.h"

namespace fused_resnet::native_test {
namespace {

enum class Tensor { kX, kDy, kOut, kArgmax };  // kOut: y and dx

struct Case {
  int64_t n, c, h, w;
  DType dtype;
  Layout layout;
  Activation act;
  bool training;
  int variant;
  // All, or a single one.
  bool misaligned(Tensor tensor) const {
    return variant % 3 == 2 || (variant % 6 == 4 && variant / 6 % 4 == static_cast<int>(tensor));
  }
  bool affine() const { return variant % 5 != 4; }
  bool wants_dx() const { return variant % 7 != 5; }
  bool wants_parameters() const { return variant % 7 != 6; }
  Shape shape() const { return {n, c, h * w, dtype, layout}; }
  Shape pooled() const { return pooled_shape(shape(), h, w); }
};

double pre_units(const Case& k) { return k.training ? sum_units(k.shape().per_channel()) : kElementUnits; }

struct Data {
  Values x, dy;
  ReferenceNorm norm;
  ReferenceAct act;
  Guarded x_bytes, dy_bytes, weight, bias, slope;
};

Data make_data(const Case& k) {
  Random random(static_cast<uint64_t>(k.variant) + 77);
  const DType stat = stat_dtype(k.dtype);
  Data d;
  for (int64_t i = 0; i < k.shape().numel(); ++i) d.x.push_back(rounded(random.bell() + 0.5, k.dtype));
  d.norm.batch_stats = k.training;
  d.act = {k.act, 0.125, {}};
  for (int64_t c = 0; c < k.c; ++c) {
    d.act.slope.push_back(rounded(random.uniform(-0.5, 0.5), stat));
    if (k.affine()) {
      d.norm.weight.push_back(rounded(random.uniform(-1.5, 1.5), stat));
      d.norm.bias.push_back(rounded(random.uniform(-1, 1), stat));
    }
    d.norm.mean.push_back(rounded(random.uniform(-1, 1), stat));
    d.norm.rstd.push_back(rounded(random.uniform(0.5, 2), stat));
  }
  if (k.training) batch_statistics(k.shape(), d.x, &d.norm);
  d.x_bytes = input_tensor(k.shape(), d.x, k.misaligned(Tensor::kX));
  d.weight = channel_array(d.norm.weight, stat), d.bias = channel_array(d.norm.bias, stat);
  d.slope = channel_array(d.act.slope, stat);
  return d;
}

ActParams act_params(Data& d) {
  ActParams p;
  p.kind = d.act.kind;
  p.negative_slope = d.act.negative_slope;
  if (p.kind == Activation::kPrelu) p.slope = d.slope.data();
  return p;
}

NormParams norm_params(Data& d, Guarded& mean, Guarded& rstd) {
  NormParams p;
  p.batch_stats = d.norm.batch_stats;
  p.eps = d.norm.eps;
  p.weight = d.norm.weight.empty() ? nullptr : d.weight.data();
  p.bias = d.norm.bias.empty() ? nullptr : d.bias.data();
  p.mean = mean.data(), p.rstd = rstd.data();
  return p;
}

struct ForwardOutputs {
  Guarded y, argmax, mean, rstd, var, workspace;
};

ForwardOutputs run_forward(Report& report, const Backend& backend, const Case& k, Data& d, const Way& way,
                           bool save_argmax) {
  ForwardOutputs out;
  const DType stat = stat_dtype(k.dtype);
  out.y = output_tensor(k.pooled(), k.misaligned(Tensor::kOut));
  out.argmax = Guarded(k.pooled().numel(), k.misaligned(Tensor::kArgmax) ? 1 : 0);
  out.mean = channel_array(d.norm.mean, stat), out.rstd = channel_array(d.norm.rstd, stat);
  out.var = Guarded(k.c * stat_size(k.dtype));
  out.workspace = Guarded(backend.pool_workspace(k.shape(), k.h, k.w));
  BatchNormActMaxPoolForward p;
  p.shape = k.shape(), p.h = k.h, p.w = k.w;
  p.x = d.x_bytes.data();
  p.norm = norm_params(d, out.mean, out.rstd);
  if (k.training) p.norm.var = out.var.data();
  p.act = act_params(d);
  p.y = out.y.data();
  p.argmax = save_argmax ? out.argmax.data() : nullptr;
  p.workspace = out.workspace.data();
  const Status status = run(backend, backend.pool_forward, p, way);
  if (!status.ok()) report.fail("forward: %s", status.message);
  return out;
}

// Argmax as logical values (n, c, pooled position).
std::vector<int> read_argmax(const Case& k, const Guarded& argmax) {
  std::vector<int> taps;
  const Shape pooled = k.pooled();
  for (int64_t n = 0; n < pooled.n; ++n)
    for (int64_t c = 0; c < pooled.c; ++c)
      for (int64_t s = 0; s < pooled.s; ++s) taps.push_back(argmax.data()[offset_of(pooled, n, c, s)]);
  return taps;
}

// f(logical index of the pooled element, n, c, i, j).
template <class F>
void for_pooled(const Case& k, F f) {
  size_t index = 0;
  for (int64_t n = 0; n < k.n; ++n)
    for (int64_t c = 0; c < k.c; ++c)
      for (int64_t i = 0; i < stem_pool_extent(k.h); ++i)
        for (int64_t j = 0; j < stem_pool_extent(k.w); ++j) f(index++, n, c, i, j);
}

void check_forward(Report& report, const Case& k, const Result& q, const ForwardOutputs& out) {
  const DType stat = stat_dtype(k.dtype);
  Result y;
  y.resize(static_cast<size_t>(k.pooled().numel()));
  const std::vector<int> taps = read_argmax(k, out.argmax);
  for_pooled(k, [&](size_t index, int64_t n, int64_t c, int64_t i, int64_t j) {
    double best = -INFINITY, scale = 0, chosen = -INFINITY;
    for_window(k.h, k.w, i, j, [&](int tap, int64_t position) {
      const size_t at_x = at(k.shape(), n, c, position);
      best = std::max(best, q.value[at_x]), scale = std::max(scale, q.scale[at_x]);
      if (tap == taps[index]) chosen = q.value[at_x];
    });
    y.value[index] = best, y.scale[index] = scale;
    // Values that round to the same number are equal winners.
    const double slack = 2 * bound(best, scale, k.dtype, stat, pre_units(k));
    if (!(chosen >= best - slack))
      report.fail("argmax[%zu] = %d holds %g, the maximum is %g", index, taps[index], chosen, best);
  });
  expect_close(report, "y", read_tensor(k.pooled(), out.y), y, k.dtype, stat, pre_units(k));
  for (const Guarded* buffer : {&out.y, &out.argmax, &out.mean, &out.rstd, &out.var, &out.workspace}) {
    expect_guards(report, "forward output", *buffer);
  }
}

struct BackwardOutputs {
  Guarded dx, dweight, dbias, dslope, workspace;
};

BackwardOutputs run_backward(Report& report, const Backend& backend, const Case& k, Data& d, ForwardOutputs& saved,
                             const Way& way) {
  BackwardOutputs out;
  out.dx = output_tensor(k.shape(), k.misaligned(Tensor::kOut));
  for (Guarded* array : {&out.dweight, &out.dbias, &out.dslope}) *array = Guarded(k.c * stat_size(k.dtype));
  out.workspace = Guarded(backend.pool_workspace(k.shape(), k.h, k.w));
  BatchNormActMaxPoolBackward p;
  p.shape = k.shape(), p.h = k.h, p.w = k.w;
  p.dy = d.dy_bytes.data(), p.x = d.x_bytes.data(), p.argmax = saved.argmax.data();
  p.norm = norm_params(d, saved.mean, saved.rstd);
  p.act = act_params(d);
  if (k.wants_dx()) p.dx = out.dx.data();
  if (k.wants_parameters()) p.dweight = out.dweight.data(), p.dbias = out.dbias.data();
  if (k.wants_parameters() && k.act == Activation::kPrelu) p.dslope = out.dslope.data();
  p.workspace = out.workspace.data();
  const Status status = run(backend, backend.pool_backward, p, way);
  if (!status.ok()) report.fail("backward: %s", status.message);
  return out;
}

// The gradient before the pool: each window's goes to its winner.
Result unpooled(const Case& k, const Values& dy, const std::vector<int>& taps) {
  Result dq;
  dq.resize(static_cast<size_t>(k.shape().numel()));
  for_pooled(k, [&](size_t index, int64_t n, int64_t c, int64_t i, int64_t j) {
    for_window(k.h, k.w, i, j, [&](int tap, int64_t position) {
      if (tap != taps[index]) return;
      dq.value[at(k.shape(), n, c, position)] += dy[index];
      dq.scale[at(k.shape(), n, c, position)] += std::abs(dy[index]);
    });
  });
  return dq;
}

// dy, zero where rounding decides on which side of a kink the winner lies.
Values random_gradient(const Case& k, const Result& pre, const std::vector<int>& taps) {
  Random random(static_cast<uint64_t>(k.variant) + 5);
  Values dy(taps.size());
  const double unsure = 2 * pre_units(k) * rounding_unit(stat_dtype(k.dtype));
  for_pooled(k, [&](size_t index, int64_t n, int64_t c, int64_t i, int64_t j) {
    dy[index] = rounded(random.bell() + 0.25, k.dtype);
    for_window(k.h, k.w, i, j, [&](int tap, int64_t position) {
      const size_t at_x = at(k.shape(), n, c, position);
      if (tap == taps[index] && has_kink(k.act) && std::abs(pre.value[at_x]) <= unsure * pre.scale[at_x]) dy[index] = 0;
    });
  });
  return dy;
}

void check_backward(Report& report, const Case& k, const Gradients& expected, const BackwardOutputs& out) {
  const DType stat = stat_dtype(k.dtype);
  const double units = sum_units(k.shape().per_channel());
  if (k.wants_dx()) expect_close(report, "dx", read_tensor(k.shape(), out.dx), expected.dx, k.dtype, stat, units);
  if (k.wants_parameters()) {
    expect_close(report, "dweight", read_channels(out.dweight, stat), expected.dweight, stat, stat, units);
    expect_close(report, "dbias", read_channels(out.dbias, stat), expected.dbias, stat, stat, units);
    if (k.act == Activation::kPrelu) {
      expect_close(report, "dslope", read_channels(out.dslope, stat), expected.dslope, stat, stat, units);
    }
  }
  for (const Guarded* buffer : {&out.dx, &out.dweight, &out.dbias, &out.dslope, &out.workspace}) {
    expect_guards(report, "backward output", *buffer);
  }
}

void run_case(Report& report, const Backend& backend, const Case& k) {
  report.begin(backend.name + " pool " + shape_name(k.shape()) + " (" + std::to_string(k.h) + "x" +
               std::to_string(k.w) + ") " + activation_name(k.act) + (k.training ? " train" : " eval") + " variant " +
               std::to_string(k.variant % 840));
  Data d = make_data(k);
  const Result pre = pre_activation(k.shape(), d.x, d.norm, {}, nullptr);
  ForwardOutputs forward = run_forward(report, backend, k, d, {}, true);
  check_forward(report, k, activated(k.shape(), pre, d.act), forward);
  expect_same_bytes(report, "y without argmax", run_forward(report, backend, k, d, {}, false).y, forward.y);

  const std::vector<int> taps = read_argmax(k, forward.argmax);
  d.dy = random_gradient(k, pre, taps);
  d.dy_bytes = input_tensor(k.pooled(), d.dy, k.misaligned(Tensor::kDy));
  const BackwardOutputs gradients = run_backward(report, backend, k, d, forward, {});
  check_backward(report, k, backward(k.shape(), unpooled(k, d.dy, taps), d.x, d.norm, {}, nullptr, d.act), gradients);

  for (const Way& way : backend.other_ways(k.variant, k.shape().numel())) {
    const ForwardOutputs again = run_forward(report, backend, k, d, way, true);
    expect_same_bytes(report, "y", again.y, forward.y);
    expect_same_bytes(report, "argmax", again.argmax, forward.argmax);
    expect_same_bytes(report, "rstd", again.rstd, forward.rstd);
    const BackwardOutputs repeated = run_backward(report, backend, k, d, forward, way);
    expect_same_bytes(report, "dx", repeated.dx, gradients.dx);
    expect_same_bytes(report, "dweight", repeated.dweight, gradients.dweight);
    expect_same_bytes(report, "dslope", repeated.dslope, gradients.dslope);
  }
}

struct Extent {
  int64_t n, c, h, w;
};
// Windows cut by every edge, odd and even extents; channel and row tails of 4, 8 and 16 lanes.
constexpr Extent kSmall[] = {{1, 1, 1, 1},  {1, 1, 1, 2},   {2, 3, 2, 1},  {1, 5, 2, 2},  {2, 7, 3, 3},
                             {1, 8, 4, 5},  {2, 9, 5, 4},   {1, 16, 6, 7}, {1, 17, 7, 6}, {1, 3, 3, 31},
                             {1, 2, 4, 32}, {1, 33, 5, 33}, {1, 1, 9, 66}};
constexpr Extent kLarge[] = {{2, 64, 24, 16}, {1, 3, 75, 90}, {2, 40, 33, 15}, {1, 264, 6, 9}};
// Vectors for many rounds: a block takes less than an image at a time, and more.
constexpr Extent kRoundsNHWC[] = {{2, 24, 45, 37}, {20, 8, 18, 30}};
constexpr Extent kRoundsNCHW[] = {{2, 1, 252, 160}, {10, 2, 100, 80}};

}  // namespace

void test_pool(Report& report, const Backend& backend) {
  int variant = 0;
  auto run = [&](const Extent& e, DType dtype, Layout layout, Activation act) {
    for (bool training : {true, false}) {
      run_case(report, backend, {e.n, e.c, e.h, e.w, dtype, layout, act, training, variant++});
    }
  };
  auto run_main = [&](const Extent& e, DType dtype, Layout layout) {
    for (Activation act : {Activation::kRelu, Activation::kPrelu, Activation::kSilu}) run(e, dtype, layout, act);
  };
  for (DType dtype : backend.dtypes) {
    for (Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      for (const Extent& e : kSmall) {
        if (backend.many_rounds) break;  // one step of windows, however many blocks
        for (int act = 0; act < kActivationCount; ++act) run(e, dtype, layout, static_cast<Activation>(act));
      }
      for (const Extent& e : kLarge) run_main(e, dtype, layout);
      if (backend.many_rounds) {
        for (const Extent& e : layout == Layout::kNHWC ? kRoundsNHWC : kRoundsNCHW) run_main(e, dtype, layout);
      }
      if (backend.many_rows > 0 && dtype == DType::kFloat32) {
        run_case(report, backend, {backend.many_rows, 1, 1, 1, dtype, layout, Activation::kPrelu, true, 0});
      }
    }
  }
}

}  // namespace fused_resnet::native_test
