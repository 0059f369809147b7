#!/bin/sh
# Plants one bug at a time in a copy of the kernels and asks whether the tests
# notice. One kernel file is rebuilt per bug and linked with the sanitized build.
#   make -C tests/native mutants
set -eu
root=$(cd ../.. && pwd)
build=${BUILD:-$root/build/native}
work=$build/mutants
make --no-print-directory "$build/sanitized/native_test"
survivors=0

# mutant NAME FILE SED-EXPRESSION OBJECT: OBJECT (a .cpp under csrc/cpu) includes FILE.
mutant() {
  name=$1 file=$2 expression=$3 object=$4
  rm -rf "$work"
  mkdir -p "$work"
  cp -rp "$root/csrc" "$work/csrc"
  sed -i "$expression" "$work/csrc/cpu/$file"
  if cmp -s "$root/csrc/cpu/$file" "$work/csrc/cpu/$file"; then
    echo "mutant '$name' changes nothing: its pattern no longer occurs in $file" >&2
    exit 1
  fi
  # The other objects count as up to date; only the mutated one is rebuilt.
  cp -rp "$build/sanitized" "$work/sanitized"
  rm "$work/sanitized/cpu/${object%.cpp}.o" "$work/sanitized/native_test"
  find "$work/sanitized" -name '*.d' -delete
  find "$work/sanitized" -name '*.o' -exec touch {} +
  make --no-print-directory -s WARNINGS=-Wno-psabi CSRC="$work/csrc" BUILD="$work" "$work/sanitized/native_test"
  if "$work/sanitized/native_test" avx2 > "$work/log" 2>&1; then
    echo "SURVIVED: $name"
    survivors=$((survivors + 1))
  else
    echo "caught: $name ($(grep -m1 -oE 'FAIL [^:]*|ERROR: AddressSanitizer[^ ]* [a-z-]+' "$work/log" || echo 'crashed'))"
  fi
}

mutant "the last lane of a partial vector is left out" simd/rows.h \
  's/f(column, end - column);/f(column, end - column - 1);/' batch_norm/bn_avx2.cpp
mutant "mask bits are read one lane off" simd/rows.h \
  's/>> (column % 8);/>> ((column + 1) % 8);/' batch_norm/bn_avx2.cpp
mutant "a partial vector reads past the row" pool/kernel_body.h \
  's/return n == I::kWidth ? I::load(p) : load_n<I>(p, n);/return n > 0 ? I::load(p) : load_n<I>(p, n);/' pool/pool_avx2.cpp
mutant "merging chunks forgets the distance of their means" batch_norm/stats.cpp \
  's/ + n \* e)/)/' batch_norm/stats.cpp
mutant "the max-pool's window starts one column late" pool/kernel_body.h \
  's/kStride \* ow - 1 + kw/kStride * ow + kw/' pool/pool_avx2.cpp

rm -rf "$work"
[ "$survivors" -eq 0 ]
