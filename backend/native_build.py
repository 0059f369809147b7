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
from toolchain import cuda_command, cuda_library_dirs, find_cuda, job_limit

NO_TORCH = (
    "fused_resnet is built against the PyTorch you already have, and none was found: "
    "install it first ('pip install torch', 2.11 or newer) and run this command again."
)


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
        # Those that take the longest first: the kernels of a GPU, and the bindings with torch's headers.
        jobs = cuda_jobs(ext, nvcc, archs) if nvcc else []
        jobs += binding_jobs(ext, cxx, system_includes, with_cuda=bool(nvcc)) + core_jobs(ext, cxx, isas)
        if not jobs:
            raise SystemExit("fused_resnet: csrc/ holds no sources; this source tree is incomplete.")
        outputs = run_jobs(jobs, ext.root, objects)

        ext.extra_objects = ext.depends = [str(output) for output in outputs]
        ext.library_dirs = library_paths()
        # No -fopenmp here: it would ask for the system's libgomp. The OpenMP symbols come from the one that torch's
        # libraries, which we link against, bring along.
        ext.libraries = ["c10", "torch", "torch_cpu", "torch_python"]
        if nvcc:
            # The static runtime needs no CUDA on the machine that loads it, and meets no other version of itself.
            ext.library_dirs += cuda_library_dirs(nvcc)
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


def binding_jobs(
    ext: NativeExtension, cxx: list[str], system_includes: list[str], *, with_cuda: bool
) -> list[CompileJob]:
    command = [*cxx, *ext.binding_flags, "-DTORCH_EXTENSION_NAME=" + ext.name.rpartition(".")[2]]
    command += ["-DFUSED_RESNET_WITH_CUDA"] if with_cuda else []
    command += [ext.seam, f"-I{ext.root / 'csrc'}"]
    command += [flag for directory in system_includes for flag in ("-isystem", directory)]
    return [CompileJob(source, command) for source in ext.binding_sources]


def cuda_jobs(ext: NativeExtension, nvcc: str, archs: list[str]) -> list[CompileJob]:
    command = cuda_command(ext.root, nvcc, archs)
    return [CompileJob(source, command) for source in ext.cuda_sources]


def compiler_version(cxx: list[str]) -> str:
    try:
        version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(
            f"fused_resnet: no working C++ compiler: '{shlex.join(cxx)}' (set CXX to one that knows C++20)."
        ) from None
    return version.splitlines()[0]


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
