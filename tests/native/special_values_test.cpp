// Where floating point is hardest: large means, constants, overflow, NaN,
// infinities, signed zeros, ties, and tensors without elements.
#include <cmath>
#include <limits>

#include "compare.h"
#include "fused_resnet/pool.h"
#include "tests.h"

namespace fused_resnet::native_test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Output {
  Values y, mean, rstd, var;
  Guarded mask;
  Status status;
};

struct Options {
  bool training = true;
  Activation act = Activation::kIdentity;
  double bias = 0;
  const Values* residual = nullptr;
};

// Weight 1; in evaluation mean 0 and rstd 1, so that pre is x + bias [+ residual].
Output normalise(const Backend& backend, const Shape& shape, const Values& x, const Options& options) {
  const DType stat = stat_dtype(shape.dtype);
  const auto channels = static_cast<size_t>(shape.c);
  Guarded x_bytes = input_tensor(shape, x, false), y = output_tensor(shape, false), residual;
  Guarded mean = channel_array(Values(channels, 0), stat), rstd = channel_array(Values(channels, 1), stat);
  Guarded var(shape.c * stat_size(shape.dtype)), bias = channel_array(Values(channels, options.bias), stat);
  Guarded workspace(backend.forward_workspace(shape));
  Output out;
  out.mask = Guarded(mask_bytes(shape));
  BatchNormActForward p;
  p.shape = shape;
  p.x = x_bytes.data(), p.y = y.data(), p.workspace = workspace.data();
  p.norm.batch_stats = options.training;
  p.norm.mean = mean.data(), p.norm.rstd = rstd.data(), p.norm.var = var.data(), p.norm.bias = bias.data();
  p.act.kind = options.act, p.act.negative_slope = 0.5;
  const Guarded slope = channel_array(Values(channels, 0.5), stat);
  p.act.slope = slope.data();
  if (options.residual != nullptr) {
    residual = input_tensor(shape, *options.residual, false);
    p.residual = residual.data();
    p.mask = out.mask.data();
  }
  out.status = run(backend, backend.forward, p);
  out.y = read_tensor(shape, y), out.mean = read_channels(mean, stat), out.rstd = read_channels(rstd, stat);
  if (options.training) out.var = read_channels(var, stat);
  return out;
}

Values noise(const Shape& shape, double centre, double spread) {
  Random random(9);
  Values x;
  for (int64_t i = 0; i < shape.numel(); ++i) x.push_back(rounded(centre + spread * random.bell(), shape.dtype));
  return x;
}

void test_large_mean(Report& report, const Backend& backend, const Shape& shape, double centre, double spread) {
  report.begin("variance at mean " + std::to_string(centre) + ", std " + std::to_string(spread) + ", " +
               shape_name(shape));
  const Values x = noise(shape, centre, spread);
  ReferenceNorm exact;
  batch_statistics(shape, x, &exact);
  const Output out = normalise(backend, shape, x, {});
  for (size_t c = 0; c < exact.var.size(); ++c) {
    const double error = std::abs(out.var[c] - exact.var[c]) / exact.var[c];
    if (!(error <= 1e-6)) report.fail("channel %zu: relative error %g", c, error);
  }
}

void test_constant(Report& report, const Backend& backend, const Shape& shape, double value) {
  report.begin("constant channels of " + std::to_string(value) + ", " + shape_name(shape));
  Options options;
  options.bias = 0.25;
  const double constant = rounded(value, shape.dtype);
  const Output out = normalise(backend, shape, Values(static_cast<size_t>(shape.numel()), constant), options);
  for (double y : out.y) {
    if (y != 0.25) return report.fail("y = %g, expected the bias 0.25", y);
  }
}

void test_huge(Report& report, const Backend& backend, const Shape& shape) {
  report.begin("values near 1e30, " + shape_name(shape));
  const Values x = noise(shape, 0, 1e30);
  ReferenceNorm exact;
  batch_statistics(shape, x, &exact);
  const Output out = normalise(backend, shape, x, {});
  for (int64_t c = 0; c < shape.c; ++c) {
    const auto channel = static_cast<size_t>(c);
    for_channel(shape, c, [&](size_t i) {
      const double expected = (x[i] - exact.mean[channel]) * exact.rstd[channel];
      if (!(std::abs(out.y[i] - expected) <= 1e-5)) report.fail("y = %g, expected %g", out.y[i], expected);
    });
  }
}

// A value that is not finite spoils its own channel only.
void test_spoiled_channel(Report& report, const Backend& backend, const Shape& shape, double bad) {
  report.begin("one " + std::to_string(bad) + " in training, " + shape_name(shape));
  Values x = noise(shape, 1, 1);
  const Output clean = normalise(backend, shape, x, {});
  const int64_t channel = shape.c / 2;
  x[at(shape, shape.n - 1, channel, shape.s - 1)] = bad;
  const Output out = normalise(backend, shape, x, {});
  for (int64_t c = 0; c < shape.c; ++c) {
    for_channel(shape, c, [&](size_t i) {
      if (c == channel ? !std::isnan(out.y[i]) : out.y[i] != clean.y[i]) report.fail("y[%zu] = %g", i, out.y[i]);
    });
  }
}

// Evaluation, position by position. PyTorch: max(x, 0) and its kin.
void test_elements(Report& report, const Backend& backend, const Shape& shape) {
  struct Expectation {
    Activation act;
    double x, y;
    bool bit;
  };
  const Expectation table[] = {
      {Activation::kRelu, kNan, kNan, true},       {Activation::kRelu, kInf, kInf, true},
      {Activation::kRelu, -kInf, 0, false},        {Activation::kRelu, 0, 0, false},
      {Activation::kLeakyRelu, kNan, kNan, false}, {Activation::kLeakyRelu, -kInf, -kInf, false},
      {Activation::kLeakyRelu, -2, -1, false},     {Activation::kPrelu, kNan, kNan, false},
      {Activation::kPrelu, -2, -1, false},         {Activation::kSigmoid, kNan, kNan, false},
      {Activation::kSigmoid, kInf, 1, false},      {Activation::kSigmoid, -kInf, 0, false},
      {Activation::kTanh, kNan, kNan, false},      {Activation::kTanh, kInf, 1, false},
      {Activation::kTanh, -kInf, -1, false},       {Activation::kSilu, kNan, kNan, false},
      {Activation::kSilu, kInf, kInf, false},      {Activation::kSilu, -kInf, kNan, false},
      {Activation::kIdentity, kNan, kNan, false},  {Activation::kIdentity, -kInf, -kInf, false}};
  for (const Expectation& e : table) {
    report.begin(std::string(activation_name(e.act)) + "(" + std::to_string(e.x) + ") in evaluation, " +
                 shape_name(shape));
    // Each position in turn is special: whole vectors and tails take it alike.
    const bool has_mask = e.act == Activation::kRelu || e.act == Activation::kLeakyRelu;
    const Values residual(static_cast<size_t>(shape.numel()), 0.0);
    const Values x(static_cast<size_t>(shape.numel()), e.x);
    Options options;
    options.training = false, options.act = e.act, options.residual = &residual;
    const Output out = normalise(backend, shape, x, options);
    for (int64_t n = 0; n < shape.n; ++n) {
      for (int64_t c = 0; c < shape.c; ++c) {
        for (int64_t s = 0; s < shape.s; ++s) {
          const double y = out.y[at(shape, n, c, s)];
          const bool equal = std::isnan(e.y) ? std::isnan(y) : std::abs(y - e.y) < 1e-30 || y == e.y;
          if (!equal) report.fail("(%d, %d, %d): %g, expected %g", int(n), int(c), int(s), y, e.y);
          if (has_mask && mask_bit(shape, out.mask, n, c, s) != e.bit)
            report.fail("mask bit of (%d, %d, %d)", int(n), int(c), int(s));
        }
      }
    }
  }
}

// mean 0, rstd 1, bias -0.0: the sum of x and the residual, signed zeros included.
void test_signed_zero(Report& report, const Backend& backend, const Shape& shape) {
  report.begin("x + residual through bias -0.0 keeps -0.0, " + shape_name(shape));
  const auto count = static_cast<size_t>(shape.numel());
  const Values negative(count, -0.0), positive(count, 0.0);
  Options options;
  options.training = false, options.bias = -0.0;
  for (const Values* residual : {&negative, &positive}) {
    options.residual = residual;
    for (double y : normalise(backend, shape, negative, options).y) {
      if (y != 0 || std::signbit(y) != std::signbit((*residual)[0])) report.fail("-0.0 + %g = %g", (*residual)[0], y);
    }
  }
}

// The same through relu, which is where PyTorch's devices differ.
void test_relu_of_zero(Report& report, const Backend& backend, const Shape& shape) {
  report.begin("relu of signed zeros, " + shape_name(shape));
  const auto count = static_cast<size_t>(shape.numel());
  Options options;
  options.training = false, options.bias = -0.0, options.act = Activation::kRelu;
  for (double zero : {-0.0, 0.0}) {
    const Values x(count, zero);
    const bool negative = std::signbit(zero) && std::signbit(backend.relu_of_negative_zero);
    for (bool added : {false, true}) {
      options.residual = added ? &x : nullptr;
      for (double y : normalise(backend, shape, x, options).y) {
        if (y != 0 || std::signbit(y) != negative) report.fail("relu(%g) = %g", zero, y);
      }
    }
  }
}

// An outlier at the start of everything must not move the shift of others. Of a thread that walks several values the
// first is the shift until the block agrees on one: then what the sums' length allows.
void test_outlier(Report& report, const Backend& backend, const Shape& shape) {
  report.begin("a first value far from the rest, " + shape_name(shape));
  Values x = noise(shape, 0, 1);
  for (int64_t c = 0; c < shape.c; ++c) x[at(shape, 0, c, 0)] = 300;
  ReferenceNorm exact;
  batch_statistics(shape, x, &exact);
  const Output out = normalise(backend, shape, x, {});
  const double sums = sum_units(shape.n * shape.s) * rounding_unit(DType::kFloat32);
  const double allowed = backend.many_rounds || backend.outlier_error == 0 ? sums : backend.outlier_error;
  for (size_t c = 0; c < exact.var.size(); ++c) {
    const double error = std::abs(out.var[c] - exact.var[c]) / exact.var[c];
    if (!(error <= allowed)) report.fail("channel %zu: relative error %g", c, error);
  }
}

// Small integers are exact: ties, NaN and -inf decide alike in any arithmetic.
void test_pool_ties(Report& report, const Backend& backend, int64_t h, int64_t w, DType dtype, Layout layout) {
  const Shape shape{2, 19, h * w, dtype, layout}, pooled = pooled_shape(shape, h, w);
  report.begin("max-pool of ties, NaN and -inf, " + shape_name(shape));
  Random random(static_cast<uint64_t>(h * 100 + w));
  Values x;
  for (int64_t i = 0; i < shape.numel(); ++i) {
    const uint64_t kind = random.next() % 16;
    x.push_back(kind == 0 ? kNan : kind < 5 ? -kInf : static_cast<double>(random.next() % 3) - 1);
  }
  const auto channels = static_cast<size_t>(shape.c);
  const DType stat = stat_dtype(dtype);
  Guarded x_bytes = input_tensor(shape, x, false), y = output_tensor(pooled, false), argmax(pooled.numel());
  Guarded mean = channel_array(Values(channels, 0), stat), rstd = channel_array(Values(channels, 1), stat);
  Guarded workspace(backend.pool_workspace(shape, h, w));
  BatchNormActMaxPoolForward p;
  p.shape = shape, p.h = h, p.w = w;
  p.x = x_bytes.data(), p.y = y.data(), p.argmax = argmax.data(), p.workspace = workspace.data();
  p.norm.mean = mean.data(), p.norm.rstd = rstd.data();
  const Status status = run(backend, backend.pool_forward, p);
  if (!status.ok()) return report.fail("%s", status.message);

  const Values got = read_tensor(pooled, y);
  const int64_t pooled_w = stem_pool_extent(w);
  for (int64_t n = 0; n < shape.n; ++n) {
    for (int64_t c = 0; c < shape.c; ++c) {
      for (int64_t s = 0; s < pooled.s; ++s) {
        int winner = -1;
        double best = -kInf;
        for_window(h, w, s / pooled_w, s % pooled_w, [&](int tap, int64_t position) {
          const double value = x[at(shape, n, c, position)];
          if (winner < 0 || value > best || std::isnan(value)) winner = tap, best = value;
        });
        const double value = got[at(pooled, n, c, s)];
        const int tap = argmax.data()[offset_of(pooled, n, c, s)];
        if (tap != winner) report.fail("window (%d, %d, %d): tap %d, expected %d", int(n), int(c), int(s), tap, winner);
        if (!(value == best || (std::isnan(value) && std::isnan(best))))
          report.fail("maximum %g, expected %g", value, best);
      }
    }
  }
}

void test_empty(Report& report, const Backend& backend, DType dtype, Layout layout) {
  for (const Shape& shape :
       {Shape{0, 3, 4, dtype, layout}, Shape{2, 0, 4, dtype, layout}, Shape{2, 3, 0, dtype, layout}}) {
    report.begin("no elements: a clear status, no crash, " + shape_name(shape));
    const Output out = normalise(backend, shape, {}, {});
    if (out.status.ok()) report.fail("accepted");
    Guarded workspace(backend.backward_workspace(shape));
    BatchNormActBackward p;
    p.shape = shape, p.workspace = workspace.data();
    if (run(backend, backend.backward, p).ok()) report.fail("accepted by backward");
  }
}

}  // namespace

void test_special_values(Report& report, const Backend& backend) {
  for (DType dtype : backend.dtypes) {
    for (Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      const Shape small{2, 19, 21, dtype, layout}, one_row{1, 37, 1, dtype, layout}, wide{3, 5, 4100, dtype, layout};
      for (const Shape& shape : {small, one_row}) {
        test_elements(report, backend, shape);
        test_signed_zero(report, backend, shape);
        test_relu_of_zero(report, backend, shape);
      }
      for (const Shape& shape : {small, wide, Shape{1, 4, 1, dtype, layout}, Shape{1, 3, 13, dtype, layout}}) {
        for (double value : {1.0, 3.3, -0.1, 60000.0}) test_constant(report, backend, shape, value);
        if (dtype != DType::kFloat16) test_constant(report, backend, shape, 1e10);
      }
      for (double bad : {kNan, kInf, -kInf}) test_spoiled_channel(report, backend, small, bad);
      if (dtype == DType::kFloat32) {
        for (const Shape& shape : {wide, Shape{4, 70, 900, dtype, layout}, Shape{32, 3, 100, dtype, layout}}) {
          test_large_mean(report, backend, shape, 1e4, 1);
          test_large_mean(report, backend, shape, -3, 3e-4);
          test_large_mean(report, backend, shape, 0, 1);
        }
        for (int64_t channels : {5, 16}) test_outlier(report, backend, {4, channels, 400, dtype, layout});
        test_huge(report, backend, small);
      }
      test_pool_ties(report, backend, 7, 20, dtype, layout);
      test_pool_ties(report, backend, 6, 39, dtype, layout);
      test_empty(report, backend, dtype, layout);
    }
  }
}

}  // namespace fused_resnet::native_test
