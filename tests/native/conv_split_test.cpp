// How exact convolutions of floats in bfloat16 parts are, beside those of whole floats: the table of docs/numerics.md.
#include <cmath>
#include <cstdio>

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

// RMS of the error / RMS of the result.
double error(Report& report, const Problem& p, CpuIsa isa, int split) {
  cpu::set_isa_cap(isa);
  const auto row = [](int64_t count) { return Shape{1, 1, count, DType::kFloat32, Layout::kNHWC}; };
  const Guarded x = input_tensor(row(p.shape.x_numel()), p.x.value, false);
  const Guarded weight = input_tensor(row(p.shape.c * p.shape.k), p.weight.value, false);
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
  const Values got = read_tensor(row(p.shape.y_numel()), y);
  double wrong = 0, all = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    wrong += (got[i] - p.y.value[i]) * (got[i] - p.y.value[i]);
    all += p.y.value[i] * p.y.value[i];
  }
  return std::sqrt(wrong / all);
}

}  // namespace

void test_split_floats(Report& report) {
  if (cpu::detected_isa() < CpuIsa::kAmx) {
    report.skip("floats in parts", "this processor has no AMX");
    return;
  }
  for (const Data data : {Data::kNormal, Data::kLargeMean, Data::kLognormal}) {
    for (const int channels : {256, 576, 1024, 1152, 4608}) {
      report.begin(std::string("floats in parts, ") + kDataNames[static_cast<int>(data)]);
      const Problem p = make_problem(channels, data);
      const double whole = error(report, p, CpuIsa::kAvx512, 0);
      const double six = error(report, p, CpuIsa::kAmx, 3), three = error(report, p, CpuIsa::kAmx, 2);
      std::printf("%s, %d channels: whole %.2g, six products %.2g, three %.2g\n", kDataNames[static_cast<int>(data)],
                  channels, whole, six, three);
      // Of chains of 64 additions, whose error is half to a sixth of what one chain has.
      if (!(six <= 1.4 * whole)) report.fail("%d channels: error %.3g, of whole floats %.3g", channels, six, whole);
      // Uniform errors of two parts: 2^-16 of an operand at most, a third of it in the mean, on both sides.
      if (!(three <= 0x1p-17 + whole)) report.fail("%d channels, three products: error %.3g", channels, three);
    }
  }
  cpu::set_isa_cap(cpu::detected_isa());
}

}  // namespace fused_resnet::native_test
