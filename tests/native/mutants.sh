#!/bin/sh
# Plants one bug at a time in a copy of the kernels and asks whether the tests
# notice. One kernel file is rebuilt per bug and linked with the sanitized build.
#   make -C tests/native mutants
set -eu
unset MAKEFLAGS  # the calling make's
root=$(cd ../.. && pwd)
build=${BUILD:-../../build/native}  # as in the Makefile: its .d files name these very paths
work=$build/mutants
make --no-print-directory -s BUILD="$build" "$build/sanitized/native_test" "$build/simt/cuda_test"
# Who fails without a bug catches nothing.
"$build/sanitized/native_test" avx2
"$build/sanitized/native_test" avx512_bf16
"$build/simt/cuda_test" f32
"$build/simt/cuda_test" f32 small
survivors=0

# mutant NAME FILE SED-EXPRESSION OBJECT PROGRAM ARGUMENTS: FILE is under csrc, OBJECT and PROGRAM under the build folder.
mutant() {
  name=$1 file=$2 expression=$3 object=$4 program=$5 arguments=$6
  rm -rf "$work"
  mkdir -p "$work"
  cp -rp "$root/csrc" "$work/csrc"
  sed -i "$expression" "$work/csrc/$file"
  if cmp -s "$root/csrc/$file" "$work/csrc/$file"; then
    echo "mutant '$name' changes nothing: its pattern no longer occurs in $file" >&2
    exit 1
  fi
  # The other objects count as up to date; only the mutated one is rebuilt.
  cp -rp "$build/sanitized" "$build/simt" "$work"
  rm "$work/$object" "$work/$program"
  find "$work" -name '*.d' -delete
  find "$work" -name '*.o' -exec touch {} +
  make --no-print-directory -s WARNINGS=-Wno-psabi CSRC="$work/csrc" BUILD="$work" "$work/$program"
  # shellcheck disable=SC2086  # words
  if "$work/$program" $arguments > "$work/log" 2>&1; then
    echo "SURVIVED: $name"
    survivors=$((survivors + 1))
  else
    found='FAIL [^:]*|ERROR: AddressSanitizer[^ ]* [a-z-]+|runtime error: .*'
    echo "caught: $name ($(grep -m1 -oE "$found" "$work/log" || echo 'crashed'))"
  fi
}

# cpu NAME FILE SED-EXPRESSION OBJECT [LEVEL]: OBJECT (a .cpp under csrc/cpu) includes FILE.
cpu() {
  mutant "$1" "cpu/$2" "$3" "sanitized/cpu/${4%.cpp}.o" sanitized/native_test "${5:-avx2}"
}
# cuda NAME FILE SED-EXPRESSION OBJECT: OBJECT (a .cu under csrc/cuda, of fp32) includes FILE.
cuda() {
  mutant "CUDA: $1" "cuda/$2" "$3" "simt/kernels/${4%.cu}.o" simt/cuda_test f32
}
# The same with few blocks: what shows only where a thread walks several rounds.
cuda_small() {
  mutant "CUDA: $1" "cuda/$2" "$3" "simt/kernels/${4%.cu}.o" simt/cuda_test "f32 small"
}

cpu "the last lane of a partial vector is left out" simd/rows.h \
  's/f(column, end - column);/f(column, end - column - 1);/' batch_norm/bn_avx2.cpp
cpu "mask bits are read one lane off" simd/rows.h \
  's/>> (column % 8);/>> ((column + 1) % 8);/' batch_norm/bn_avx2.cpp
cpu "a partial vector reads past the row" pool/kernel_body.h \
  's/return n == I::kWidth ? I::load(p) : load_n<I>(p, n);/return n > 0 ? I::load(p) : load_n<I>(p, n);/' pool/pool_avx2.cpp
cpu "merging chunks forgets the distance of their means" batch_norm/stats.cpp \
  's/ + static_cast<double>(s.s) \* e \* e;/;/' batch_norm/stats.cpp
cpu "the max-pool's window starts one column late" pool/kernel_body.h \
  's/const int64_t begin = kStride \* ow - 1, right_column/const int64_t begin = kStride * ow, right_column/' pool/pool_avx2.cpp
cpu "sums take the first tap for the second" pool/kernel_body.h \
  's/for (int k = 1; k < 9; ++k) x = /for (int k = 2; k < 9; ++k) x = /' pool/pool_avx2.cpp
cpu "a square's last pixel forgets a window" pool/kernel_body.h \
  's/if (x == 1 \&\& y == 1) sum/if (false) sum/' pool/pool_avx2.cpp
cpu "a window's left column is the one before" pool/kernel_body.h \
  's/    keep(right, kept, at);/    keep(middle, kept, at);/' pool/pool_avx2.cpp
cpu "a pair's second image is the first again" conv/weight_pack.h \
  's/fill_rounded(operand, lines + p.a.h \* p.a.w, rounded + row, vector)/fill_rounded(operand, lines, rounded + row, vector)/' \
  conv/weight_avx512_bf16.cpp avx512_bf16
cpu "a row's last pixel has a neighbour" conv/weight_pack.h \
  's/(two ? row_steps : 0) : block.cols \/ 2;/(two ? row_steps : 0) : row_steps;/' \
  conv/weight_avx512_bf16.cpp avx512_bf16

cpu "a panel's last vector of filters is one short" conv/epilogue_body.h \
  's/const int64_t n = left >= I::kWidth ? I::kWidth : left;/const int64_t n = left >= I::kWidth ? I::kWidth : left - 1;/' \
  conv/conv_avx2.cpp
cpu "the line between packed pixels is forgotten" conv/kernel_body.h \
  's/v.pixel = p.images \* g.c_padded;/v.pixel = p.images * g.groups * g.group_c;/' conv/conv_avx2.cpp
cpu "dilated taps are neighbours" conv/kernel_body.h \
  's/const int64_t column = g.col_tap\[u\] - g.col_tap\[0\];/const int64_t column = u;/' conv/conv_avx2.cpp
cpu "a tap's columns by remainder start one late" conv/kernel_body.h \
  's/column \/ g.planes) \* v.pixel/(column + g.planes - 1) \/ g.planes) * v.pixel/' conv/conv_avx512_bf16.cpp avx512_bf16
cpu "every unit's statistics have the first one's shift" conv/driver.cpp \
  's/positions \* (static_cast<double>(shift\[i\]) - static_cast<double>(origin\[i\])) + //' conv/driver.cpp
cpu "a row's last pixel, left over from pairs, takes the next row's first" conv/weight_pack.h \
  's/2 \* i + 1 < b.cols ? line + 2 \* i + 1 : -1/line + 2 * i + 1/' conv/weight_avx512_bf16.cpp avx512_bf16

cpu "floats are split though their products are denormal" conv/split_layout.h \
  's/kMostSmallness = 100/kMostSmallness = 250/' conv/conv_amx.cpp amx
cpu "a square of weights is turned but for its inner quarters" simd/transpose.h \
  's/if constexpr (kHalf > 1) transpose/if constexpr (kHalf > 2) transpose/' conv/conv_avx2.cpp
cpu "a second chain of additions replaces the first" conv/tile_body.h \
  's/any_ ? each<true>(sum)/any_ ? each<false>(sum)/' conv/conv_avx2.cpp
cpu "a run of columns ends one element early" simd/amx_tile.h \
  's/left > 0 ? (1u << left) - 1 : 0/left > 0 ? (1u << left) \/ 2 - 1 : 0/' conv/conv_amx.cpp amx
cpu "a run of columns starts one column late" conv/fold_body.h \
  's/p.image + m, row, p.col0, columns/p.image + m, row, p.col0 + 1, columns/' conv/conv_amx.cpp amx
cpu "a whole tile of AMX forgets its bias" conv/epilogue_body.h \
  's/v\[j\] = I::add(I::load(values + (r \* 2 + j) \* I::kWidth), bias\[j\]);/v[j] = I::load(values + (r * 2 + j) * I::kWidth);/' \
  conv/conv_amx.cpp amx
cpu "what goes past the caches is the first vector only" conv/epilogue_body.h \
  's/stream ? I::stream(y + at + j \* kWidth, v\[j\])/stream ? I::stream(y + at + j * kWidth, v[0])/' conv/conv_avx2.cpp
cpu "the second product of floats in parts is left out" simd/amx_parts.h \
  '/multiply();  \/\/ 1, 0/d' conv/conv_amx.cpp amx
cpu "a pixel's third part is made of the second again" simd/amx_pixel_parts.h \
  's/v = without(v, _mm512_castsi512_si256(halves));/if (i == 0) &/' conv/weight_amx.cpp amx
cpu "weights are joined from two of their parts" simd/amx_parts.h \
  's/for (int i = 0; i < 3; ++i) {/for (int i = 0; i < 2; ++i) {/' conv/conv_amx.cpp amx
cpu "small floats are split for a weight gradient" conv/weight_driver.cpp \
  's/return small_a + small_dz <= kMostSmallness;/return true;/' conv/weight_driver.cpp amx
cpu "slices begin within a unit" conv/direct_weight_plan.cpp \
  's/cut_slices(a.blocks_w, each);/cut_slices(a.blocks_w, 1);/' conv/direct_weight_plan.cpp amx
cpu "the gradient of the unit before is dealt out" conv/weight_driver.cpp \
  's/const int64_t first = unit.index \* plan_.unit_blocks/const int64_t first = (unit.index + 1) * plan_.unit_blocks/' \
  conv/weight_driver.cpp
cpu "a bias is summed of rounded gradients" conv/weight_driver.cpp \
  's/ \&\& a.bias_sums == nullptr//' conv/weight_driver.cpp avx512_bf16
cpu "small floats of an earlier unit are forgotten" conv/weight_body.h \
  's/const bool goes_on = work.goes_on();/const bool goes_on = false;/' conv/weight_amx.cpp amx
cpu "a gradient of floats is stored as bfloat16" conv/weight_body.h \
  's/if (p.float_dweight) return finish<D, float>/if (false) return finish<D, float>/' conv/weight_avx2.cpp
cpu "a masked skip is added whole" conv/epilogue_body.h \
  's/without_masked(I::load(skip + at + j \* kWidth), pixel\[r\], column + j \* kWidth, kWidth)/I::load(skip + at + j * kWidth)/' \
  conv/conv_avx2.cpp
cpu "only the first tiles of filters are multiplied" conv/winograd_weight.h \
  's/some < tile1 \&\& safe; some += p.chunk_k/some < tile0 + 1 \&\& safe; some += p.chunk_k/' conv/winograd_avx2.cpp
cpu "groups of steps of dz are not filled up with zeros" conv/weight_pack.h \
  's/if constexpr (D::kGroup > 1) fill_up();//' conv/weight_amx.cpp amx
cpu "whole vectors are stored without their activation" conv/epilogue_body.h \
  '/v\[j\] = act_forward<I, A>(act, v\[j\], slope\[j\]);/d' conv/conv_avx2.cpp
cpu "a packed weight lies elsewhere" conv/driver.cpp 's/panels = there.panels;/panels = there.panels + 64;/' conv/driver.cpp
cpu "a maximum forgets a NaN" window/kernel_body.h \
  's/I::or_(I::gt(v, value), I::is_nan(v))/I::gt(v, value)/' window/window_avx2.cpp
cpu "a mean counts the padding always" window/kernel_body.h \
  's/if (p.count_padding) {/{/' window/window_avx2.cpp

cuda "no barrier before the warps' sums are read" device/reduce.cuh \
  '/shared\[threadIdx.x \/ kWarp\] = v;/{n;s/__syncthreads();//}' batch_norm/bn_f32.cu
cuda "a short group is written as a whole one" device/vec_io.cuh \
  's/if (j < count) p\[j\] = from_stat/p[j] = from_stat/' batch_norm/bn_f32.cu
cuda "vectors though the output is misaligned" batch_norm/driver.cuh \
  's/aligned_to(16, p.x, p.residual, p.y)/aligned_to(16, p.x, p.residual)/' batch_norm/bn_f32.cu
cuda "windows at the right edge take the next row" pool/forward.cuh \
  's/if (kVector || first + 2 \* j + 1 < s.w) winners/winners/' pool/pool_f32.cu
cuda_small "the next round stays in the image" device/tile.cuh \
  '/group_ -= t.groups;/{n;s/++image_;//}' batch_norm/bn_f32.cu

rm -rf "$work"
[ "$survivors" -eq 0 ]
