// Pooling over windows: every kernel of every level against plain loops. csrc/include/fused_resnet/window.h is the
// contract.
#include "fused_resnet/window.h"

#include "conv_check.h"

namespace fused_resnet::native_test {
namespace {

struct Axis {
  int64_t extent, kernel, stride = 1, pad = 0, dilation = 1;
  bool ceil = false;
  // As torch has it: the last window begins inside the image or the padding before it.
  int64_t positions() const {
    const int64_t room = extent + 2 * pad - dilation * (kernel - 1) - 1;
    const int64_t count = (room + (ceil ? stride - 1 : 0)) / stride + 1;
    return ceil && (count - 1) * stride >= extent + pad ? count - 1 : count;
  }
  int64_t start(int64_t position) const { return position * stride - pad; }
};

struct WindowCase {
  WindowKind kind;
  DType dtype;
  int64_t n, c;
  Axis rows, cols;
  uint64_t seed = 0;
  bool count_padding = true, misaligned = false, threads = false;
  double special = 0;  // in some elements of x; 0: nowhere

  int64_t x_numel() const { return n * rows.extent * cols.extent * c; }
  int64_t y_numel() const { return n * rows.positions() * cols.positions() * c; }
  std::string name() const {
    const auto axis = [](const Axis& a) {
      return std::to_string(a.extent) + " kernel " + std::to_string(a.kernel) + "/" + std::to_string(a.stride) +
             " pad " + std::to_string(a.pad) + " dilation " + std::to_string(a.dilation) + (a.ceil ? " ceil" : "");
    };
    return std::string(kind == WindowKind::kMax ? "max " : "mean ") + dtype_name(dtype) + " " + std::to_string(n) +
           "x" + std::to_string(c) + " rows " + axis(rows) + " columns " + axis(cols) +
           (count_padding ? " padding counts" : "") + (special == 0 ? "" : " special " + std::to_string(special));
  }
};

Values random_x(const WindowCase& k) {
  Random random(k.seed * 31 + 3);
  Values x = random_values(random, k.x_numel(), k.dtype, 1, 0);
  if (k.special == 0) return x;
  // Whole channels too, so that windows have nothing else.
  for (size_t i = 0; i < x.size(); ++i) {
    if (random.next() % 7 == 0 || static_cast<int64_t>(i) % k.c == 1) x[i] = k.special;
  }
  return x;
}

// Elements of a window along one axis up to the padded border.
int64_t padded_count(const Axis& a, int64_t position) {
  return std::min(a.start(position) + a.kernel, a.extent + a.pad) - a.start(position);
}

Terms reference(const WindowCase& k, const Values& x) {
  Terms y;
  y.resize(static_cast<size_t>(k.y_numel()));
  size_t at = 0;
  for (int64_t image = 0; image < k.n; ++image) {
    for (int64_t j = 0; j < k.rows.positions(); ++j) {
      for (int64_t i = 0; i < k.cols.positions(); ++i) {
        for (int64_t c = 0; c < k.c; ++c, ++at) {
          double most = -INFINITY, sum = 0, scale = 0;
          int64_t count = 0;
          for (int64_t r = 0; r < k.rows.kernel; ++r) {
            for (int64_t s = 0; s < k.cols.kernel; ++s) {
              const int64_t row = k.rows.start(j) + r * k.rows.dilation, col = k.cols.start(i) + s * k.cols.dilation;
              if (row < 0 || row >= k.rows.extent || col < 0 || col >= k.cols.extent) continue;
              const double v = x[static_cast<size_t>(((image * k.rows.extent + row) * k.cols.extent + col) * k.c + c)];
              if (std::isnan(v) || v > most) most = std::isnan(most) ? most : v;
              sum += v, scale += std::abs(v), ++count;
            }
          }
          if (k.count_padding) count = padded_count(k.rows, j) * padded_count(k.cols, i);
          const double divisor = static_cast<double>(std::max<int64_t>(count, 1));
          y.value[at] = k.kind == WindowKind::kMax ? most : sum / divisor;
          y.scale[at] = k.kind == WindowKind::kMax ? 0 : scale / divisor;  // a maximum is exact
        }
      }
    }
  }
  return y;
}

Guarded run(Report& report, const WindowCase& k, const Guarded& x, const Runner& runner) {
  const int64_t unit = element_size(k.dtype);
  Guarded y(k.y_numel() * unit, k.misaligned ? unit : 0);
  WindowForward p;
  p.kind = k.kind, p.dtype = k.dtype;
  p.n = k.n, p.h = k.rows.extent, p.w = k.cols.extent, p.c = k.c;
  p.out_h = k.rows.positions(), p.out_w = k.cols.positions();
  p.kernel_h = k.rows.kernel, p.kernel_w = k.cols.kernel;
  p.stride_h = k.rows.stride, p.stride_w = k.cols.stride;
  p.pad_h = k.rows.pad, p.pad_w = k.cols.pad;
  p.dilation_h = k.rows.dilation, p.dilation_w = k.cols.dilation;
  p.count_padding = k.count_padding;
  p.x = x.data();
  p.y = y.data();
  p.runner = runner;
  const Status status = cpu::window_forward(p);
  if (!status.ok()) report.fail("%s", status.message);
  expect_guards(report, "window", y);
  return y;
}

void run_case(Report& report, const std::vector<CpuIsa>& levels, const WindowCase& k) {
  const Values x = random_x(k);
  const Guarded x_bytes = input_tensor(row_of(k.x_numel(), k.dtype), x, k.misaligned);
  const Terms expected = reference(k, x);
  for (CpuIsa isa : levels) {
    cpu::set_isa_cap(isa);
    report.begin(std::string(isa_name(isa)) + " window " + k.name());
    const Guarded y = run(report, k, x_bytes, {});
    expect_terms(report, "y", read_row(y, k.dtype), expected, k.dtype, stat_dtype(k.dtype),
                 sum_units(k.rows.kernel * k.cols.kernel), 0);
    expect_same_bytes(report, "y", run(report, k, x_bytes, shuffled_runner()), y);
    if (!k.threads) continue;
    expect_same_bytes(report, "y", run(report, k, x_bytes, threaded_runner<2>()), y);
    expect_same_bytes(report, "y", run(report, k, x_bytes, threaded_runner<3>()), y);
    expect_same_bytes(report, "y", run(report, k, x_bytes, threaded_runner<5>()), y);
  }
}

// Tails of vectors, and of the blocks that a pixel's channels are cut into.
constexpr int64_t kChannels[] = {1, 3, 8, 13, 16, 17, 33, 64, 255, 256, 257, 600};

struct Variants {
  Report& report;
  const std::vector<CpuIsa>& levels;
  DType dtype;
  uint64_t seed = 0;

  void both(int64_t n, const Axis& rows, const Axis& cols, bool threads = false, double special = 0) {
    for (const bool count_padding : {true, false})
      one(WindowKind::kMean, n, rows, cols, count_padding, threads, special);
    one(WindowKind::kMax, n, rows, cols, true, threads, special);
  }
  void one(WindowKind kind, int64_t n, const Axis& rows, const Axis& cols, bool count_padding = true,
           bool threads = false, double special = 0) {
    WindowCase k{kind, dtype, n, 0, rows, cols};
    k.c = threads ? 300 : kChannels[seed % std::size(kChannels)];
    k.seed = ++seed;
    k.count_padding = count_padding, k.threads = threads, k.special = special;
    k.misaligned = seed % 3 == 0;
    run_case(report, levels, k);
  }
};

void check_refusals(Report& report) {
  report.begin("refused windows");
  const Guarded x(64), untouched(64);
  Guarded y(64);
  WindowForward good;
  good.n = good.h = good.w = good.c = good.out_h = good.out_w = 1;
  good.x = x.data(), good.y = y.data();
  int64_t WindowForward::* const extents[] = {
      &WindowForward::n,        &WindowForward::h,        &WindowForward::w,          &WindowForward::c,
      &WindowForward::out_h,    &WindowForward::out_w,    &WindowForward::kernel_h,   &WindowForward::kernel_w,
      &WindowForward::stride_h, &WindowForward::stride_w, &WindowForward::dilation_h, &WindowForward::dilation_w};
  for (size_t i = 0; i < std::size(extents); ++i) {
    WindowForward bad = good;
    bad.*extents[i] = 0;
    if (cpu::window_forward(bad).ok()) report.fail("taken though extent %zu is 0", i);
  }
  expect_same_bytes(report, "y of a refused call", y, untouched);
  if (!cpu::window_forward(good).ok()) report.fail("one pixel is refused");
}

}  // namespace

void test_window(Report& report, const std::vector<CpuIsa>& all) {
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const std::vector<CpuIsa> levels = own_levels(all, "window", dtype);
    Variants v{report, levels, dtype};
    for (int64_t kernel = 1; kernel <= 5; ++kernel) {
      for (int64_t stride = 1; stride <= 3; ++stride) {
        const int64_t pad = kernel / 2;
        v.both(1, {7, kernel, stride}, {6, kernel, stride});
        v.both(2, {6, kernel, stride, pad}, {9, kernel, stride, pad});
        for (const int64_t extent : {6, 7, 8}) {
          v.both(1, {extent, kernel, stride, pad, 1, true}, {extent + 3, kernel, stride, 0, 1, true});
        }
      }
    }
    // one axis alone, windows larger than the image, the stem's
    v.both(1, {1, 1}, {9, 3, 2, 1});
    v.both(1, {5, 4, 1, 2}, {1, 1});
    v.both(2, {2, 5, 1, 2}, {3, 5, 2, 2});
    v.both(1, {14, 3, 2, 1}, {15, 3, 2, 1});
    // dilation, and a window between whose taps the image lies
    v.one(WindowKind::kMax, 2, {9, 3, 1, 1, 2}, {10, 3, 2, 1, 3});
    v.one(WindowKind::kMax, 1, {8, 2, 1, 1, 5}, {7, 3, 1, 0, 2});
    v.one(WindowKind::kMax, 1, {10, 4, 1, 2, 2}, {11, 5, 2, 2, 2});
    v.one(WindowKind::kMax, 1, {13, 5, 1, 2, 3}, {9, 4, 3, 2, 2});
    v.one(WindowKind::kMax, 1, {9, 3, 2, 1, 3, true}, {12, 2, 3, 1, 4, true});
    v.one(WindowKind::kMax, 1, {2, 2, 1, 1, 3}, {2, 2, 1, 1, 3});
    // means of whole images
    for (int i = 0; i < static_cast<int>(std::size(kChannels)); ++i) v.one(WindowKind::kMean, 2, {7, 7}, {7, 7});
    v.one(WindowKind::kMean, 1, {23, 23}, {31, 31});
    for (const double special : std::initializer_list<double>{NAN, -INFINITY, INFINITY}) {
      for (int i = 0; i < 4; ++i) v.both(1, {7, 3, 2, 1}, {8, 3, 2, 1}, false, special);
      v.one(WindowKind::kMean, 2, {5, 5}, {4, 4}, true, false, special);
    }
    v.both(2, {13, 3, 2, 1}, {12, 3, 2, 1}, true);
    v.one(WindowKind::kMean, 3, {9, 9}, {8, 8}, true, true);
  }
  check_refusals(report);
}

}  // namespace fused_resnet::native_test
