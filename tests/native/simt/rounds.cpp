#include "rounds.h"

#include <algorithm>

#include "../tests.h"
#include "batch_norm/driver.cuh"
#include "pool/driver.cuh"

namespace fused_resnet::native_test {
namespace {

using namespace fused_resnet::cuda;

// apply, reduce, backward apply: of each residual kind.
enum Pass { kStats, kApply, kReduce = kApply + 3, kGradient = kReduce + 3, kStem = kGradient + 3, kPasses = kStem + 3 };
constexpr const char* kNames[kPasses] = {
    "statistics",       "apply",        "apply, residual", "apply, dual",        "reduce",
    "reduce, residual", "reduce, dual", "gradient",        "gradient, residual", "gradient, dual",
    "stem forward",     "stem reduce",  "stem gradient"};

// Of a pass's vector launches: the most steps of a thread, where there are several chunks and idle threads at the end;
// the most chunks.
struct Walk {
  int64_t steps = 0, chunks = 0;
};
Walk& walk_of(DType dtype, Layout layout, int pass) {
  static Walk walks[4][2][kPasses];
  return walks[static_cast<int>(dtype)][layout == Layout::kNHWC ? 1 : 0][pass];
}

void note(int pass, const Shape& shape, const Tile& t, bool vector) {
  if (!vector) return;
  Walk& walk = walk_of(shape.dtype, shape.layout, pass);
  const int64_t at_once = shape.layout == Layout::kNHWC ? t.rows : kThreads;
  if (t.chunks > 1 && t.total % at_once != 0) walk.steps = std::max(walk.steps, t.chunk / at_once);
  walk.chunks = std::max(walk.chunks, t.chunks);
}

// Vectors: as the drivers decide, or more strictly. (The tests' arrays of channels are aligned.)
Status forward(const BatchNormActForward& p) {
  if (p.shape.numel() > 0) {
    const Tile sums = make_tile(p.shape, kReduceBlocks), map = make_tile(p.shape, kMapBlocks);
    const auto kind = static_cast<int>(residual_kind(p.residual != nullptr, p.residual_has_norm));
    if (p.norm.batch_stats) note(kStats, p.shape, sums, whole_groups(sums) && aligned_to(16, p.x));
    const bool vector = whole_groups(map) && aligned_to(16, p.x, p.residual, p.y);
    note(kApply + kind, p.shape, map, vector);
  }
  return batch_norm_act_forward(p);
}

Status backward(const BatchNormActBackward& p) {
  if (p.shape.numel() > 0) {
    const Tile sums = make_tile(p.shape, kReduceBlocks), map = make_tile(p.shape, kMapBlocks);
    const bool dual = p.residual != nullptr && p.residual_has_norm;
    const auto kind = static_cast<int>(residual_kind(p.residual != nullptr || p.mask != nullptr, dual));
    const bool vector = whole_groups(map) && aligned_to(16, p.dy, p.x, p.residual, p.dx, p.dresidual);
    if (wants_sums(p, dual)) note(kReduce + kind, p.shape, sums, vector);
    if (p.dx != nullptr) note(kGradient + kind, p.shape, map, vector);
  }
  return batch_norm_act_backward(p);
}

Status stem_forward(const BatchNormActMaxPoolForward& p) {
  const StemTile s = make_stem_tile(p.shape, p.h, p.w, kMapBlocks);
  note(kStem, p.shape, s.tile, whole_groups(s, p.shape.layout) && aligned_to(16, p.x, p.y, p.argmax));
  return batch_norm_act_max_pool_forward(p);
}

Status stem_backward(const BatchNormActMaxPoolBackward& p) {
  const StemTile sums = make_stem_tile(p.shape, p.h, p.w, kReduceBlocks);
  const StemTile map = make_stem_tile(p.shape, p.h, p.w, kMapBlocks);
  const bool vector = whole_groups(map, p.shape.layout) && aligned_to(16, p.dy, p.x, p.dx, p.argmax);
  if (p.norm.batch_stats) note(kStem + 1, p.shape, sums.tile, vector);
  if (p.dx != nullptr) note(kStem + 2, p.shape, map.tile, vector);
  return batch_norm_act_max_pool_backward(p);
}

}  // namespace

void use_few_blocks(Backend& backend) {
  kReduceBlocks = 1;
  kMapBlocks = 2;
  // Two rounds of four groups, the most that a thread has under way, and one of which it finds a single one.
  kMostSteps = 9;
  backend.many_rows = 0;
  backend.many_rounds = true;
  backend.forward = forward;
  backend.backward = backward;
  backend.pool_forward = stem_forward;
  backend.pool_backward = stem_backward;
}

void check_rounds(Report& report, const Backend& backend) {
  for (DType dtype : backend.dtypes) {
    for (Layout layout : {Layout::kNHWC, Layout::kNCHW}) {
      for (int pass = 0; pass < kPasses; ++pass) {
        if (pass >= kStem && dtype == DType::kFloat64) continue;  // no vectors
        report.begin(std::string("several rounds of vectors: ") + kNames[pass] + ", " + dtype_name(dtype) +
                     (layout == Layout::kNHWC ? " nhwc" : " nchw"));
        const Walk& walk = walk_of(dtype, layout, pass);
        const int64_t at_once = pass < kStem ? 4 : 1;  // steps of a round, at most
        if (walk.steps <= 2 * at_once) report.fail("at most %lld steps", static_cast<long long>(walk.steps));
        const bool merged = dtype == DType::kFloat32 && (pass == kStats || pass == kReduce + 2);
        if (merged && walk.chunks <= kFinalLanes) {
          report.fail("%lld chunks, %d of which are merged at once", static_cast<long long>(walk.chunks), kFinalLanes);
        }
      }
    }
  }
}

}  // namespace fused_resnet::native_test
