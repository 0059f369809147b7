// Counting and reporting for the native tests: a case is one named comparison.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>

namespace fused_resnet::native_test {

class Report {
 public:
  // Begins a case; its name is printed only when something in it fails.
  void begin(std::string name) {
    end();
    name_ = std::move(name);
    open_ = true;
    failed_here_ = 0;
  }

  // Records a failure of the current case; the first few of each case are printed.
  __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
    constexpr int kShownPerCase = 3, kShownInAll = 200;
    if (failed_here_++ >= kShownPerCase || shown_ >= kShownInAll) return;
    ++shown_;
    std::fprintf(stderr, "FAIL %s: ", name_.c_str());
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
  }

  void skip(const std::string& name, const char* reason) { std::printf("skipped %s: %s\n", name.c_str(), reason); }

  // Prints the closing line; the program's exit status.
  int finish() {
    end();
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed_), static_cast<long long>(failed_));
    return failed_ == 0 && passed_ > 0 ? 0 : 1;
  }

 private:
  void end() {
    if (open_) ++(failed_here_ == 0 ? passed_ : failed_);
    open_ = false;
  }

  std::string name_;
  bool open_ = false;
  int64_t failed_here_ = 0, passed_ = 0, failed_ = 0;
  int shown_ = 0;
};

}  // namespace fused_resnet::native_test
