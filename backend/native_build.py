"""Compiles the extension: per-file ISA flags, ninja when there is one, jobs limited by cores and memory.

torch's own BuildExtension gives every file of an extension the same flags, so the compile step is ours; linking and
packaging stay setuptools'. Beside the extension goes `_C.json`, which says what it was built from: the package reads
it before loading the extension, because loading one that was built for another torch may crash.
"""

import concurrent.futures
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension
from setuptools.command.build_ext import build_ext

NO_TORCH = (
    "fused_resnet is built against the PyTorch you already have, and none was found: "
    "install it first ('pip install torch', 2.11 or newer) and run this command again."
)
DEFAULT_CUDA_ARCHS = "8.0;9.0a+PTX"
BYTES_PER_JOB = 2 * 2**30  # a translation unit that includes torch's headers peaks at about 1.5 GiB


class NativeExtension(Extension):
    """What is compiled: a glob pattern for each kind of file, and its flags.

    Every file sees the seam's headers, and those of its own layer.
    """

    def __init__(
        self,
        name: str,
        *,
        root: Path,
        seam: str,
        core_sources: str,
        binding_sources: str,
        cuda_sources: str,
        core_flags: list[str],
        binding_flags: list[str],
        isa_flags: dict[str, list[str]],
    ) -> None:
        super().__init__(name, sources=[], language="c++")
        self.root = root
        self.core_sources = self._glob(core_sources)
        self.binding_sources = self._glob(binding_sources)
        self.cuda_sources = self._glob(cuda_sources)
        self.seam = f"-I{root / seam}"
        self.core_flags, self.binding_flags, self.isa_flags = core_flags, binding_flags, isa_flags

    def _glob(self, pattern: str) -> list[Path]:
        return sorted(path.relative_to(self.root) for path in self.root.glob(pattern))


class CompileJob(NamedTuple):
    source: Path  # relative to the root, as its object is to the directory of objects
    command: list[str]  # without source, output and dependency file


class NativeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        assert isinstance(ext, NativeExtension)
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise SystemExit(NO_TORCH) from None

        cxx = shlex.split(os.environ.get("CXX", "c++"))
        isas = list(ext.isa_flags) if on_x86() else ["scalar"]
        nvcc, archs = find_cuda(ext.cuda_sources)
        config = {
            "torch_version": str(torch.__version__),
            "compiler": compiler_version(cxx),
            "isas": isas,
            "cuda_archs": archs,
        }
        # Not build_temp: an editable install would make that a throw-away directory, and build all anew each time.
        objects = ext.root / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        system_includes = [*include_paths(), *self.compiler.include_dirs]
        # The bindings first: with torch's headers they take the longest.
        jobs = binding_jobs(ext, cxx, system_includes) + core_jobs(ext, cxx, isas)
        if nvcc:
            jobs += cuda_jobs(ext, nvcc, archs)
        if not jobs:
            raise SystemExit("fused_resnet: csrc/ holds no sources; this source tree is incomplete.")
        outputs = run_jobs(jobs, ext.root, objects)

        ext.extra_objects = ext.depends = [str(output) for output in outputs]
        ext.library_dirs = library_paths()
        # No -fopenmp here: it would ask for the system's libgomp. The OpenMP symbols come from the one that torch's
        # libraries, which we link against, bring along.
        ext.libraries = ["c10", "torch", "torch_cpu", "torch_python"]
        if nvcc:
            ext.library_dirs.append(str(Path(nvcc).resolve().parents[1] / "lib64"))
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
            ext.extra_link_args = ["-Wl,--exclude-libs,ALL"]
        super().build_extension(ext)
        config_path(self.get_ext_fullpath(ext.name)).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        build_py: Any = self.get_finalized_command("build_py")
        for ext in self.extensions:
            package, _, _ = ext.name.rpartition(".")
            built = config_path(os.path.join(self.build_lib, self.get_ext_filename(ext.name)))
            shutil.copyfile(built, Path(build_py.get_package_dir(package)) / built.name)

    def get_outputs(self) -> list[str]:
        outputs: list[str] = super().get_outputs()
        return outputs + [str(config_path(path)) for path in outputs]


def config_path(extension_file: str) -> Path:
    path = Path(extension_file)
    return path.with_name(path.name.split(".")[0] + ".json")


def on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def isa_of(source: Path, isa_flags: dict[str, list[str]]) -> str:
    """The longest ISA name that ends the file's stem; "scalar" when none does."""
    return max((isa for isa in isa_flags if source.stem.endswith("_" + isa)), key=len, default="scalar")


def core_jobs(ext: NativeExtension, cxx: list[str], isas: list[str]) -> list[CompileJob]:
    own = f"-I{ext.root / 'csrc/cpu'}"
    jobs = []
    for source in ext.core_sources:
        isa = isa_of(source, ext.isa_flags)
        if isa in isas:
            jobs.append(CompileJob(source, [*cxx, *ext.core_flags, *ext.isa_flags[isa], ext.seam, own]))
    return jobs


def binding_jobs(ext: NativeExtension, cxx: list[str], system_includes: list[str]) -> list[CompileJob]:
    command = [*cxx, *ext.binding_flags, "-DTORCH_EXTENSION_NAME=" + ext.name.rpartition(".")[2]]
    command += [ext.seam, f"-I{ext.root / 'csrc'}"]
    command += [flag for directory in system_includes for flag in ("-isystem", directory)]
    return [CompileJob(source, command) for source in ext.binding_sources]


def cuda_jobs(ext: NativeExtension, nvcc: str, archs: list[str]) -> list[CompileJob]:
    command = [nvcc, "-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", *arch_flags(archs)]
    command += [ext.seam, f"-I{ext.root / 'csrc/cuda'}"]
    return [CompileJob(source, command) for source in ext.cuda_sources]


def compiler_version(cxx: list[str]) -> str:
    try:
        version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"fused_resnet: no working C++ compiler: '{shlex.join(cxx)}' (set CXX to one that knows C++20)."
        ) from None
    return version.splitlines()[0]


def find_cuda(sources: list[Path]) -> tuple[str | None, list[str]]:
    """(nvcc, architectures), or (None, []) for a build without CUDA."""
    wish = os.environ.get("FUSED_RESNET_CUDA", "auto").lower() or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"FUSED_RESNET_CUDA is '{wish}': expected 0, 1 or auto.")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") + os.pathsep + os.environ.get("PATH", ""))
    if wish == "1" and not sources:
        raise SystemExit("FUSED_RESNET_CUDA=1, but this version of fused_resnet has no CUDA sources (csrc/cuda).")
    if wish == "1" and nvcc is None:
        raise SystemExit("FUSED_RESNET_CUDA=1, but no nvcc was found: put it on PATH or set CUDA_HOME.")
    if wish == "0" or not sources or nvcc is None:
        return None, []
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    return nvcc, archs.replace(" ", ";").split(";")


def arch_flags(archs: list[str]) -> list[str]:
    """["9.0a+PTX"] -> -gencode for sm_90a, and for compute_90a as PTX."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def job_limit() -> int:
    """MAX_JOBS, else the cores this process may use, fewer when memory is short."""
    wish = os.environ.get("MAX_JOBS")
    if wish:
        if not wish.isdecimal() or int(wish) < 1:
            raise SystemExit(f"MAX_JOBS is '{wish}': expected a whole number, 1 or more.")
        return int(wish)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii").split()
        available = int(meminfo[meminfo.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, available // BYTES_PER_JOB))


def run_jobs(jobs: list[CompileJob], root: Path, objects: Path) -> list[Path]:
    """Compiles what changed (without ninja: everything) and returns the objects."""
    outputs = [objects / job.source.with_suffix(job.source.suffix + ".o") for job in jobs]
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
    # Also beside the interpreter: a virtual environment that is used without being activated is not on PATH.
    ninja = shutil.which("ninja", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if ninja:
        write_ninja_file(objects / "build.ninja", jobs, root, outputs)
        run([ninja, "-C", str(objects), "-j", str(job_limit())])
    else:
        with concurrent.futures.ThreadPoolExecutor(job_limit()) as pool:
            commands = (
                [*job.command, "-c", str(root / job.source), "-o", str(output)]
                for job, output in zip(jobs, outputs, strict=True)
            )
            list(pool.map(run, commands))
    return outputs


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode:
        raise SystemExit(f"fused_resnet: this command failed; its messages are above.\n  {shlex.join(command)}")


def write_ninja_file(path: Path, jobs: list[CompileJob], root: Path, outputs: list[Path]) -> None:
    def value(text: str) -> str:
        return text.replace("$", "$$")

    def file(name: Path) -> str:
        return value(str(name)).replace(" ", "$ ").replace(":", "$:")

    lines = ["rule compile", "  command = $compile -MD -MF $out.d -c $in -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc", "  description = $in"]
    for job, output in zip(jobs, outputs, strict=True):
        lines.append(f"build {file(output)}: compile {file(root / job.source)}")
        lines.append(f"  compile = {value(shlex.join(job.command))}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
