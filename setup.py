"""Builds the extension `fused_resnet._C`. What is compiled and how: here. How it is run: backend/native_build.py.

Build-time variables:
    MAX_JOBS              compile jobs at once; default: limited by cores and free memory
    CXX                   the C++ compiler (C++20: g++ 11 or clang 14, or newer)
    FUSED_RESNET_CUDA     0: never, 1: required, auto (default): when csrc/cuda has sources and an nvcc is found
    CUDA_HOME             where nvcc is, when it is not on PATH
    TORCH_CUDA_ARCH_LIST  default "8.0+PTX;9.0a"
"""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "backend"))

from native_build import NativeBuild, NativeExtension  # noqa: E402  (lives in backend/, found through the line above)

CORE_FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall"]
BINDING_FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall"]

# prefetchw is a no-op where a CPU does not have it.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]
# gcc 12's own AVX-512 headers trip these warnings (GCC bug 105593).
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprfchw", *QUIET]
# File name suffix -> the flags of that file alone. Files without a suffix are built for the baseline, like scalar.
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {"scalar": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}

setup(
    ext_modules=[
        NativeExtension(
            "fused_resnet._C",
            root=ROOT,
            core_sources="csrc/cpu/**/*.cpp",
            binding_sources="csrc/bindings/*.cpp",
            cuda_sources="csrc/cuda/**/*.cu",
            seam="csrc/include",
            core_flags=CORE_FLAGS,
            binding_flags=BINDING_FLAGS,
            isa_flags=ISA_FLAGS,
        )
    ],
    cmdclass={"build_ext": NativeBuild},
)
