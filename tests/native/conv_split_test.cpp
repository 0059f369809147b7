// How exact convolutions of floats in bfloat16 parts are, beside those of whole floats: the table of docs/numerics.md.
#include <cmath>
#include <cstdio>
#include <string>

#include "conv_reference.h"
#include "fused_resnet/capability.h"
#include "tests.h"

namespace fused_resnet::native_test {
namespace {

enum class Data { kNormal, kLargeMean, kLognormal };
constexpr const char* kDataNames[] = {"normal", "mean 100", "lognormal"};

double element(Random& random, Data data) {
  if (data == Data::kNormal) return random.bell();
  if (data == Data::kLargeMean) return 100 + random.bell();
  return std::exp(3 * random.bell()) * (random.next() % 2 == 0 ? 1 : -1);
}

struct Problem {
  ConvShape shape;
  Result x, weight;  // weight: [channel][filter]
  Terms y;
};

Problem make_problem(int64_t channels, Data data) {
  Problem p;
  p.shape = {1, 6, 6, channels, 32, 1, 1};
  Random random(static_cast<uint64_t>(channels) * 3 + static_cast<uint64_t>(data));
  for (int64_t i = 0; i < p.shape.x_numel(); ++i) {
    p.x.value.push_back(rounded(element(random, data), DType::kFloat32));
  }
  const Data weights = data == Data::kLognormal ? data : Data::kNormal;
  for (int64_t i = 0; i < channels * p.shape.k; ++i) {
    p.weight.value.push_back(rounded(element(random, weights) / std::sqrt(channels), DType::kFloat32));
  }
  p.x = exact(p.x.value), p.weight = exact(p.weight.value);
  p.y = convolved(p.shape, p.x, p.weight);
  return p;
}

Shape row_of(int64_t count) { return {1, 1, count, DType::kFloat32, Layout::kNHWC}; }

// RMS of the error / RMS of the result.
double error(const Values& expected, const Guarded& bytes) {
  const Values got = read_tensor(row_of(static_cast<int64_t>(expected.size())), bytes);
  double wrong = 0, all = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    wrong += (got[i] - expected[i]) * (got[i] - expected[i]);
    all += expected[i] * expected[i];
  }
  return std::sqrt(wrong / all);
}

double forward_error(Report& report, const Problem& p, CpuIsa isa, int split) {
  cpu::set_isa_cap(isa);
  const Guarded x = input_tensor(row_of(p.shape.x_numel()), p.x.value, false);
  const Guarded weight = input_tensor(row_of(p.shape.c * p.shape.k), p.weight.value, false);
  ConvForward f;
  f.numerics = {false, split};
  Guarded y(p.shape.y_numel() * 4), workspace(cpu::conv_forward_workspace(p.shape, f.numerics, 1));
  f.shape = p.shape;
  f.x.data = x.data();
  f.weight = {weight.data(), 1, p.shape.k, 0, 0};
  f.y = y.data();
  f.workspace = workspace.data();
  const Status status = cpu::conv_forward(f);
  if (!status.ok()) report.fail("%s", status.message);
  return error(p.y.value, y);
}

// The same sums as a weight gradient: channels are pixels, positions are channels.
double weight_error(Report& report, const Problem& p, CpuIsa isa, int split) {
  cpu::set_isa_cap(isa);
  const int64_t pixels = p.shape.c, channels = p.shape.h * p.shape.w, filters = p.shape.k;
  Values x(p.x.value.size());
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < channels; ++c) x[i * channels + c] = p.x.value[c * pixels + i];
  }
  const Guarded a = input_tensor(row_of(pixels * channels), x, false);
  const Guarded dz = input_tensor(row_of(pixels * filters), p.weight.value, false);
  ConvBackwardWeight w;
  w.shape = {1, 1, pixels, channels, filters, 1, 1};
  w.numerics = {false, split};
  Guarded dweight(channels * filters * 4), workspace(cpu::conv_backward_weight_workspace(w.shape, w.numerics, 1));
  w.x.data = a.data();
  w.dy.data = dz.data();
  w.dweight = dweight.data();
  w.layout = {nullptr, 1, filters, 0, 0};
  w.workspace = workspace.data();
  const Status status = cpu::conv_backward_weight(w);
  if (!status.ok()) report.fail("%s", status.message);
  return error(p.y.value, dweight);
}

using ErrorOf = double (*)(Report&, const Problem&, CpuIsa, int);

void check_errors(Report& report, const char* what, ErrorOf error_of, const Problem& p) {
  const double whole = error_of(report, p, CpuIsa::kAvx512, 0);
  const double six = error_of(report, p, CpuIsa::kAmx, 3), three = error_of(report, p, CpuIsa::kAmx, 2);
  std::printf("%s, sums of %d: whole %.2g, six products %.2g, three %.2g\n", what, static_cast<int>(p.shape.c), whole,
              six, three);
  // Of chains of 64 additions, whose error is half to a sixth of what one chain has.
  if (!(six <= 1.4 * whole)) report.fail("error %.3g, of whole floats %.3g", six, whole);
  // Uniform errors of two parts: 2^-16 of an operand at most, a third of it in the mean, on both sides.
  if (!(three <= 0x1p-17 + whole)) report.fail("three products: error %.3g", three);
  if (!(three > 3 * six)) report.fail("three products as exact as six: %.3g", three);
}

}  // namespace

void test_split_floats(Report& report) {
  if (cpu::detected_isa() < CpuIsa::kAmx) {
    report.skip("floats in parts", "this processor has no AMX");
    return;
  }
  for (const Data data : {Data::kNormal, Data::kLargeMean, Data::kLognormal}) {
    for (const int channels : {256, 576, 1024, 1152, 4608}) {
      const std::string name = kDataNames[static_cast<int>(data)];
      report.begin("floats in parts, " + name + ", sums of " + std::to_string(channels));
      const Problem p = make_problem(channels, data);
      check_errors(report, (name + ", forward").c_str(), forward_error, p);
      check_errors(report, (name + ", weight gradient").c_str(), weight_error, p);
    }
  }
  cpu::set_isa_cap(cpu::detected_isa());
}

}  // namespace fused_resnet::native_test
