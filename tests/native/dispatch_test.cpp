// The kernel table is complete and in the order that dispatch relies on.
#include <cstring>
#include <map>
#include <set>

#include "fused_resnet/capability.h"
#include "tests.h"

namespace fused_resnet::native_test {

void test_dispatch(Report& report) {
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);

  report.begin("kernel table: names are unique and say what the row says");
  std::set<std::string> names;
  for (size_t i = 0; i < count; ++i) {
    const KernelInfo& row = table[i];
    if (!names.insert(row.name).second) report.fail("%s stands twice", row.name);
    const std::string op = std::strcmp(row.op, "batch_norm") == 0 ? "bn" : row.op;
    const std::string expected = op + "_" + row.pass + "_" + dtype_name(row.dtype) + "_" + isa_name(row.isa);
    if (row.name != expected) report.fail("%s, expected %s", row.name, expected.c_str());
  }

  report.begin("kernel table: each (op, pass, dtype) has a scalar row and rises in level");
  std::map<std::string, int> last;
  for (size_t i = 0; i < count; ++i) {
    const KernelInfo& row = table[i];
    const std::string key = std::string(row.op) + " " + row.pass + " " + dtype_name(row.dtype);
    const int level = static_cast<int>(row.isa);
    const auto before = last.find(key);
    if (before == last.end() && level != 0) report.fail("%s: no scalar row first", row.name);
    if (before != last.end() && level <= before->second) report.fail("%s: out of order", row.name);
    last[key] = level;
  }
  for (const char* stem :
       {"batch_norm stats", "batch_norm apply", "batch_norm backward_reduce", "batch_norm backward_apply",
        "pool forward", "pool backward_reduce", "pool backward_apply"}) {
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      if (!last.count(std::string(stem) + " " + dtype_name(dtype))) report.fail("%s %s: none", stem, dtype_name(dtype));
    }
  }

  report.begin("names of levels parse back, others do not");
  for (int level = 0; level < kCpuIsaCount; ++level) {
    CpuIsa parsed = CpuIsa::kScalar;
    const auto isa = static_cast<CpuIsa>(level);
    if (!parse_isa(isa_name(isa), &parsed) || parsed != isa) report.fail("%s", isa_name(isa));
  }
  CpuIsa untouched = CpuIsa::kAvx2;
  if (parse_isa("avx9", &untouched) || untouched != CpuIsa::kAvx2) report.fail("avx9 was taken for a level");

  report.begin("bytes of a mask");
  for (Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
    for (int64_t length : {1, 7, 8, 9, 64}) {
      const Shape shape{2, length, 10 - length % 10, DType::kFloat32, layout};
      if (batch_norm_act_mask_bytes(shape) != mask_bytes(shape)) report.fail("of %s", shape_name(shape).c_str());
    }
  }
}

}  // namespace fused_resnet::native_test
