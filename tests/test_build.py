"""The build: every way to install, each in a fresh virtual environment; and the build's own decisions.

The slow tests need pip's index (or its configured links). All but one build a small stand-in for csrc/, because what
they test is the build and not the kernels; `test_an_sdist_holds_all_that_a_build_needs` builds the real sources.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "backend")
TORCH = f"torch=={torch.__version__.partition('+')[0]}"

STAND_IN_MODULE = r"""
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>
#include "fused_resnet/types.h"
const char* flags_scalar();
const char* flags_avx2();
const char* flags_avx512();
const char* flags_avx512_bf16();
const char* flags_amx();
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("torch_version", [] { return TORCH_VERSION; });
  m.def("flags", [] {
    return std::vector<std::string>{flags_scalar(), flags_avx2(), flags_avx512(), flags_avx512_bf16(), flags_amx()};
  });
}
"""
STAND_IN_KERNEL = """
const char* flags_ISA() {
#if defined(__AMX_BF16__)
  return "amx";
#elif defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "scalar";
#endif
}
"""
ISAS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]
USE_STAND_IN = """
import torch
from fused_resnet import _C
print(_C.torch_version(), *_C.flags())
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output; a failure shows it."""
    result = attempt(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout
    return result.stdout


def attempt(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def make_venv(directory: Path, *requirements: str) -> Path:
    """Its interpreter."""
    run(sys.executable, "-m", "venv", directory, cwd=directory.parent)
    python = directory / "bin" / "python"
    if requirements:
        run(python, "-m", "pip", "install", "-q", *requirements, cwd=directory.parent)
    return python


@pytest.fixture(scope="module")
def torch_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_venv(tmp_path_factory.mktemp("with torch") / "venv", TORCH, "numpy", "setuptools>=77")


@pytest.fixture(scope="module")
def bare_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_venv(tmp_path_factory.mktemp("bare") / "venv", "setuptools>=77")


@pytest.fixture
def python(torch_venv: Path, tmp_path: Path) -> Iterator[Path]:
    """An interpreter with torch and without fused_resnet."""
    yield torch_venv
    run(torch_venv, "-m", "pip", "uninstall", "-q", "-y", "fused-resnet", cwd=tmp_path)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """The project's build files around sources that compile in seconds."""
    tree = tmp_path / "source tree"
    (tree / "csrc/cpu/flags").mkdir(parents=True)
    (tree / "csrc/bindings").mkdir()
    (tree / "fused_resnet").mkdir()
    for name in BUILD_FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "csrc/include", tree / "csrc/include")
    shutil.copy(ROOT / "fused_resnet/_version.py", tree / "fused_resnet")
    (tree / "fused_resnet/__init__.py").touch()
    (tree / "csrc/bindings/module.cpp").write_text(STAND_IN_MODULE, encoding="utf-8")
    for isa in ISAS:
        source = tree / f"csrc/cpu/flags/flags_{isa}.cpp"
        source.write_text(STAND_IN_KERNEL.replace("ISA", isa), encoding="utf-8")
    return tree


def check_stand_in(python: Path, cwd: Path) -> None:
    output = run(python, "-c", USE_STAND_IN, cwd=cwd).split()
    assert output == [TORCH.removeprefix("torch=="), *ISAS]


@pytest.mark.slow
@pytest.mark.parametrize("pip", ["pip==23.2", "pip"])
def test_pip_install_builds_against_the_installed_torch(python: Path, stand_in: Path, tmp_path: Path, pip: str) -> None:
    run(python, "-m", "pip", "install", "-q", "--upgrade", pip, cwd=tmp_path)
    output = run(python, "-m", "pip", "install", ".", cwd=stand_in)
    assert "Collecting torch" not in output
    check_stand_in(python, tmp_path)


@pytest.mark.slow
def test_pip_install_without_isolation(python: Path, stand_in: Path, tmp_path: Path) -> None:
    run(python, "-m", "pip", "install", "--no-build-isolation", ".", cwd=stand_in)
    check_stand_in(python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["--build-isolation", "--no-build-isolation"])
def test_an_editable_install_runs_the_source_tree(python: Path, stand_in: Path, tmp_path: Path, isolation: str) -> None:
    options = [] if isolation == "--build-isolation" else [isolation]
    run(python, "-m", "pip", "install", *options, "-e", ".", cwd=stand_in)
    check_stand_in(python, tmp_path)
    built = json.loads((stand_in / "fused_resnet/_C.json").read_text(encoding="utf-8"))
    assert built["isas"] == ISAS
    assert built["torch_version"] == torch.__version__
    (stand_in / "fused_resnet/added.py").write_text("VALUE = 7\n", encoding="utf-8")
    assert run(python, "-c", "from fused_resnet.added import VALUE; print(VALUE)", cwd=tmp_path) == "7\n"


@pytest.mark.slow
def test_an_activated_environment_serves_a_front_end_that_has_its_own(
    python: Path, bare_venv: Path, stand_in: Path, tmp_path: Path
) -> None:
    """`python -m build` and the like run the backend in a virtual environment of their own."""
    hook = "import torch_backend as b; print(b.get_requires_for_build_wheel()); print(b.build_wheel('dist'))"
    output = run(bare_venv, "-c", hook, cwd=stand_in, PYTHONPATH="backend", VIRTUAL_ENV=str(python.parents[1]))
    requirements, *_, wheel = output.splitlines()
    assert requirements == "[]"
    run(python, "-m", "pip", "install", "--no-deps", stand_in / "dist" / wheel, cwd=tmp_path)
    check_stand_in(python, tmp_path)


@pytest.mark.slow
def test_without_a_torch_one_is_asked_for(bare_venv: Path, stand_in: Path) -> None:
    hook = "import torch_backend as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())"
    output = run(bare_venv, "-c", hook, cwd=stand_in, PYTHONPATH="backend")
    assert "no PyTorch is installed here" in output
    assert output.splitlines()[-1] == "['torch>=2.11'] ['torch>=2.11']"


@pytest.mark.slow
def test_without_a_torch_and_without_isolation_one_sentence_says_so(bare_venv: Path, stand_in: Path) -> None:
    result = attempt(bare_venv, "-m", "pip", "install", "--no-build-isolation", "--no-deps", ".", cwd=stand_in)
    assert result.returncode != 0
    assert "install it first ('pip install torch'" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")
def test_with_ninja_only_what_changed_is_compiled(python: Path, stand_in: Path) -> None:
    build = (python, "setup.py", "build_ext", "--inplace")
    assert "[5/5]" in run(*build, cwd=stand_in)
    assert "no work to do" in run(*build, cwd=stand_in)
    (stand_in / "csrc/cpu/flags/flags_avx2.cpp").touch()
    assert "[1/1]" in run(*build, cwd=stand_in)
    (stand_in / "csrc/include/fused_resnet/types.h").touch()
    assert "module.cpp" in run(*build, cwd=stand_in)


@pytest.mark.slow
def test_a_source_that_does_not_compile_stops_the_build(python: Path, stand_in: Path) -> None:
    (stand_in / "csrc/cpu/flags/flags_avx2.cpp").write_text("this is no C++\n", encoding="utf-8")
    result = attempt(python, "setup.py", "build_ext", "--inplace", cwd=stand_in)
    assert result.returncode != 0
    assert "flags_avx2.cpp" in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.slow
def test_an_sdist_holds_all_that_a_build_needs(python: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (*BUILD_FILES, "csrc", "fused_resnet"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "_C.json", "__pycache__"))
        else:
            shutil.copy(source, tree / name)
    run(python, "-c", "import torch_backend; torch_backend.build_sdist('dist')", cwd=tree, PYTHONPATH="backend")
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(tree)) for part in ("csrc", "backend") for path in (tree / part).rglob("*.*")}
    assert {name for name in wanted if "__pycache__" not in name} <= packed

    run(python, "-m", "pip", "install", "--no-deps", sdist, cwd=tmp_path)
    use = """
import torch
import fused_resnet as fr
assert fr.is_available(), fr.build_info()
assert "site-packages" in fr.__file__, fr.__file__
x, mean, var = torch.randn(2, 8, 5, 5), torch.randn(8), torch.rand(8) + 0.5
y = fr.ops.batch_norm_act(x, mean, var)
torch.testing.assert_close(y, torch.relu(torch.nn.functional.batch_norm(x, mean, var)))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert run(python, "-W", "error", "-c", use, cwd=tmp_path) == "1\n"  # torch's OpenMP library and no second one


@pytest.fixture
def native_build(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT / "backend"))
    return importlib.import_module("native_build")


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "backend"))
    return importlib.import_module("toolchain")


def test_each_file_gets_the_flags_of_its_suffix(native_build: Any) -> None:
    flags: dict[str, list[str]] = {isa: [] for isa in ISAS}
    expected = {
        "bn_scalar.cpp": "scalar",
        "bn_avx2.cpp": "avx2",
        "bn_avx512.cpp": "avx512",
        "bn_avx512_bf16.cpp": "avx512_bf16",
        "conv_amx.cpp": "amx",
        "driver.cpp": "scalar",
        "avx2.cpp": "scalar",
    }
    assert {name: native_build.isa_of(Path(name), flags) for name in expected} == expected


def test_cuda_is_built_only_where_it_can_be(
    native_build: Any, toolchain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    monkeypatch.setattr(toolchain, "USUAL_CUDA", "/no/such")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    sources = [Path("csrc/cuda/a.cu")]

    monkeypatch.setenv("FUSED_RESNET_CUDA", "auto")
    assert native_build.find_cuda(sources) == (None, [])
    monkeypatch.setenv("FUSED_RESNET_CUDA", "1")
    with pytest.raises(SystemExit, match="no nvcc was found"):
        native_build.find_cuda(sources)
    with pytest.raises(SystemExit, match="no CUDA sources"):
        native_build.find_cuda([])
    monkeypatch.setenv("FUSED_RESNET_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected 0, 1 or auto"):
        native_build.find_cuda(sources)

    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("FUSED_RESNET_CUDA", "auto")
    assert native_build.find_cuda(sources) == (str(nvcc), ["8.0+PTX", "9.0a"])
    assert native_build.find_cuda([]) == (None, [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6")
    assert native_build.find_cuda(sources) == (str(nvcc), ["7.5", "8.6"])
    monkeypatch.setenv("FUSED_RESNET_CUDA", "0")
    assert native_build.find_cuda(sources) == (None, [])


def test_nvcc_of_cuda_home_then_of_path_then_of_the_usual_place(
    toolchain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, path, usual = (tmp_path / name for name in ("home", "path", "usual"))
    monkeypatch.setattr(toolchain, "USUAL_CUDA", str(usual))
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("CUDA_HOME", str(home))
    for place in (home / "bin", path, usual / "bin"):
        place.mkdir(parents=True)
        (place / "nvcc").touch(mode=0o755)
    assert toolchain.find_nvcc() == str(home / "bin/nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert toolchain.find_nvcc() == str(path / "nvcc")
    (path / "nvcc").unlink()
    assert toolchain.find_nvcc() == str(usual / "bin/nvcc")
    monkeypatch.delenv("PATH")
    assert toolchain.find_nvcc() == str(usual / "bin/nvcc")


def test_architectures_become_nvcc_flags(toolchain: Any) -> None:
    assert toolchain.arch_flags(["8.0+PTX", "9.0a", "10.0"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
    ]


@pytest.mark.parametrize("arch", ["Hopper", "sm_90", "9", "9.0 ; rm -rf", "9.0a+SASS"])
def test_what_is_no_architecture_is_refused(toolchain: Any, arch: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        toolchain.arch_flags([arch])


def test_the_default_architectures_serve_later_gpus(toolchain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    ptx = [flag for flag in toolchain.arch_flags(toolchain.wanted_archs()) if ",code=compute_" in flag]
    # That of an architecture with a letter runs on no other.
    assert ptx == ["-gencode=arch=compute_80,code=compute_80"]


def test_the_kernels_know_what_was_built(toolchain: Any) -> None:
    command = toolchain.cuda_command(ROOT, "nvcc", ["8.0+PTX", "9.0a"])
    assert command[0] == "nvcc"
    assert '-DFUSED_RESNET_CUDA_ARCHS="8.0+PTX;9.0a"' in command
    assert f"-I{ROOT}/csrc/include" in command


def test_the_bindings_know_whether_there_are_kernels(native_build: Any) -> None:
    ext = native_build.NativeExtension(
        "fused_resnet._C",
        root=ROOT,
        seam="csrc/include",
        core_sources="csrc/cpu/**/*.cpp",
        binding_sources="csrc/bindings/*.cpp",
        cuda_sources="csrc/cuda/**/*.cu",
        core_flags=[],
        binding_flags=[],
        isa_flags={},
    )
    for with_cuda in (False, True):
        jobs = native_build.binding_jobs(ext, ["c++"], [], with_cuda=with_cuda)
        assert jobs
        assert all(("-DFUSED_RESNET_WITH_CUDA" in job.command) is with_cuda for job in jobs)


def test_nvcc_is_asked_where_its_runtime_is(toolchain: Any, tmp_path: Path) -> None:
    """It may be a wrapper that stands elsewhere than its toolkit."""
    libraries = tmp_path / "a toolkit" / "lib"
    libraries.mkdir(parents=True)
    (libraries / "libcudart_static.a").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"""#!/bin/sh
echo '#$ TOP=anywhere' >&2
echo '#$ LIBRARIES=  "-L{tmp_path}/stubs" "-L{libraries}"' >&2
""")
    nvcc.chmod(0o755)
    assert toolchain.cuda_library_dirs(str(nvcc)) == [str(libraries)]
    nvcc.write_text("#!/bin/sh\n")
    assert toolchain.cuda_library_dirs(str(nvcc)) == []
    beside = tmp_path / "lib64" / "libcudart_static.a"
    beside.parent.mkdir()
    beside.touch()
    assert toolchain.cuda_library_dirs(str(nvcc)) == [str(beside.parent)]


def test_a_header_of_a_kernel_that_changed_has_it_compiled_again(
    native_build: Any,
    toolchain: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    nvcc = toolchain.find_nvcc()
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if nvcc is None or shutil.which("ninja", path=os.pathsep.join(places)) is None:
        pytest.skip("needs nvcc and ninja")
    monkeypatch.setenv("MAX_JOBS", "1")
    monkeypatch.chdir(tmp_path)
    cuda = tmp_path / "csrc/cuda"
    cuda.mkdir(parents=True)
    (cuda / "a.h").write_text("constexpr int kValue = 1;\n")
    source = cuda / "a b.cu"
    kernel = "__global__ void f(int* p) { *p = kValue; }"
    source.write_text(f'#include "a.h"\n{kernel}\nconst char* g() {{ return FUSED_RESNET_CUDA_ARCHS; }}\n')
    job = native_build.CompileJob(source.relative_to(tmp_path), toolchain.cuda_command(tmp_path, nvcc, ["8.0+PTX"]))

    def build() -> str:
        (built,) = native_build.run_jobs([job], tmp_path, tmp_path / "objects")
        assert b"8.0+PTX" in built.read_bytes()
        return capfd.readouterr().out

    assert "a b.cu" in build()
    assert "no work to do" in build()
    (cuda / "a.h").write_text("constexpr int kValue = 2;\n")
    assert "a b.cu" in build()


PTXAS_LOG = """\
ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN12fused_resnet4cuda5applyIfLb1EEEvPKfPf' for 'sm_80'
ptxas info    : Function properties for _ZN12fused_resnet4cuda5applyIfLb1EEEvPKfPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN12fused_resnet4cuda5statsIdEEvPKdPd' for 'sm_90a'
ptxas info    : Function properties for _ZN12fused_resnet4cuda5statsIdEEvPKdPd
    {stack} bytes stack frame, {stack} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 4096+16 bytes smem, 376 bytes cmem[0]
"""


@pytest.fixture
def registers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "backend"))
    return importlib.import_module("registers")


@pytest.mark.parametrize("spilled", [0, 8])
def test_a_spill_fails_the_table_of_registers(
    registers: Any, spilled: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text(PTXAS_LOG.format(stack=spilled, loads=3 * spilled))
    assert registers.main([str(log)]) == (1 if spilled else 0)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["kernel", "arch", "registers", "spill", "bytes", "shared"]
    assert rows[1][-4:] == ["sm_80", "32", "0", "0"]
    assert rows[2][-4:] == ["sm_90a", "255", str(4 * spilled), "4096"]
    assert ("1 of 2 kernels spill" in err) == bool(spilled)
    log.write_text("nothing\n")
    assert registers.main([str(log)]) == 1


def test_registers_need_no_nvcc(
    registers: Any, toolchain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toolchain, "USUAL_CUDA", "/no/such")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSED_RESNET_CUDA", "auto")
    assert registers.main([]) == 0
    assert "nothing to compile" in capsys.readouterr().out


def test_names_of_kernels_are_short_and_differ(registers: Any) -> None:
    long = (
        "void fused_resnet::cuda::(anonymous namespace)::apply<float, (fused_resnet::Layout)1, true>(fused_resnet::P)"
    )
    assert registers.short(long) == "apply<float, 1, true>"


def test_max_jobs_limits_the_jobs(native_build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native_build.job_limit() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="whole number"):
        native_build.job_limit()
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= native_build.job_limit() <= (os.cpu_count() or 1)
