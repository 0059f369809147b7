// Running statistics: updated in training, read in evaluation.
#include "compare.h"
#include "tests.h"

namespace fused_resnet::native_test {
namespace {

void test_update(Report& report, const Backend& backend) {
  Random random(3);
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (DType running : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (double momentum : {0.1, 0.0, 1.0, 2.0, -0.5}) {
        report.begin(backend.name + std::string(" running statistics in ") + dtype_name(running) + " from " +
                     dtype_name(dtype) + ", momentum " + std::to_string(momentum));
        constexpr int64_t kChannels = 19, kCount = 7;
        Values mean, var, old_mean, old_var;
        for (int64_t c = 0; c < kChannels; ++c) {
          mean.push_back(rounded(random.uniform(-3, 3), dtype)), var.push_back(rounded(random.uniform(0, 4), dtype));
          old_mean.push_back(rounded(random.uniform(-3, 3), running));
          old_var.push_back(rounded(random.uniform(0, 4), running));
        }
        Guarded mean_bytes = channel_array(mean, dtype), var_bytes = channel_array(var, dtype);
        Guarded running_mean = channel_array(old_mean, running), running_var = channel_array(old_var, running);
        BatchNormUpdateRunning p;
        p.c = kChannels, p.dtype = dtype, p.running_dtype = running, p.count = 1, p.momentum = momentum;
        p.mean = mean_bytes.data(), p.var = var_bytes.data();
        p.running_mean = running_mean.data(), p.running_var = running_var.data();
        if (run(backend, backend.update_running, p).ok()) report.fail("one value per channel was accepted");
        if (read_channels(running_mean, running) != old_mean) report.fail("a refused update changed the mean");
        p.count = kCount;
        const Status status = run(backend, backend.update_running, p);
        if (!status.ok()) report.fail("%s", status.message);
        Result expected_mean, expected_var;
        for (size_t c = 0; c < mean.size(); ++c) {
          const double unbiased = var[c] * kCount / (kCount - 1);
          expected_mean.value.push_back((1 - momentum) * old_mean[c] + momentum * mean[c]);
          expected_var.value.push_back((1 - momentum) * old_var[c] + momentum * unbiased);
        }
        expected_mean.scale = expected_var.scale = Values(mean.size(), 10);
        const DType arithmetic = running == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
        expect_close(report, "mean", read_channels(running_mean, running), expected_mean, running, arithmetic, 4);
        expect_close(report, "var", read_channels(running_var, running), expected_var, running, arithmetic, 4);
        expect_guards(report, "running mean", running_mean);
        expect_guards(report, "running var", running_var);
      }
    }
  }
}

void test_fixed(Report& report, const Backend& backend) {
  Random random(4);
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t channels : {1, 19, 256, 1025}) {
      report.begin(backend.name + " fixed statistics of " + dtype_name(dtype) + ", " + std::to_string(channels) +
                   " channels");
      const DType stat = stat_dtype(dtype);
      Values mean, var;
      for (int64_t c = 0; c < channels; ++c) {
        mean.push_back(rounded(random.uniform(-3, 3), stat)), var.push_back(rounded(random.uniform(0, 4), stat));
      }
      var[0] = 0;
      const Guarded running_mean = channel_array(mean, stat), running_var = channel_array(var, stat);
      Guarded out_mean(channels * element_size(stat)), out_rstd(channels * element_size(stat));
      BatchNormFixedStats p;
      p.c = channels, p.dtype = dtype, p.eps = 1e-3;
      p.running_mean = running_mean.data(), p.running_var = running_var.data();
      p.mean = out_mean.data(), p.rstd = out_rstd.data();
      const Status status = run(backend, backend.fixed_stats, p);
      if (!status.ok()) report.fail("%s", status.message);
      Result rstd;
      for (double v : var) rstd.value.push_back(1 / std::sqrt(v + p.eps));
      rstd.scale = rstd.value;
      expect_same_bytes(report, "mean", out_mean, running_mean);
      expect_close(report, "rstd", read_channels(out_rstd, stat), rstd, stat, stat, 4);
      expect_guards(report, "mean", out_mean);
      expect_guards(report, "rstd", out_rstd);
    }
  }
}

}  // namespace

void test_running_statistics(Report& report, const Backend& backend) {
  test_update(report, backend);
  test_fixed(report, backend);
}

}  // namespace fused_resnet::native_test
