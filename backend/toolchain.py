"""nvcc, its flags, and how many compilers may run at once. Standard library only: backend/registers.py uses it too."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

# GPUs newer than these run the PTX of compute_80, translated by their driver when the module is loaded. It is the plain
# one on purpose: PTX of sm_90a is for that architecture alone and runs on no later one.
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"
# No contraction, as on the CPU: a multiply and an add are one operation only where the source says fma. Otherwise
# forward and backward could round the same expression differently, and disagree on which side of zero it is.
CUDA_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
USUAL_CUDA = "/usr/local/cuda"
BYTES_PER_JOB = 2 * 2**30  # a translation unit that includes torch's headers peaks at about 1.5 GiB


def find_cuda(sources: list[Path]) -> tuple[str | None, list[str]]:
    """(nvcc, architectures), or (None, []) for a build without CUDA."""
    wish = os.environ.get("FUSED_RESNET_CUDA", "auto").lower() or "auto"
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"FUSED_RESNET_CUDA is '{wish}': expected 0, 1 or auto.")
    nvcc = find_nvcc()
    if wish == "1" and not sources:
        raise SystemExit("FUSED_RESNET_CUDA=1, but this version of fused_resnet has no CUDA sources (csrc/cuda).")
    if wish == "1" and nvcc is None:
        raise SystemExit("FUSED_RESNET_CUDA=1, but no nvcc was found: put it on PATH or set CUDA_HOME.")
    if wish == "0" or not sources or nvcc is None:
        return None, []
    return nvcc, wanted_archs()


def find_nvcc() -> str | None:
    """That of CUDA_HOME, else the one on PATH, else that of the usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [home and os.path.join(home, "bin"), os.environ.get("PATH"), os.path.join(USUAL_CUDA, "bin")]
    return shutil.which("nvcc", path=os.pathsep.join(place for place in places if place))


def wanted_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, as PyTorch's own extensions understand it, or the default."""
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    return [arch for arch in archs.replace(" ", ";").split(";") if arch]


def arch_flags(archs: list[str]) -> list[str]:
    """["8.0+PTX"] -> -gencode for sm_80, and for compute_80 as PTX.

    Raises SystemExit for what is no architecture's number.
    """
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has '{arch}': expected numbers such as 8.0, 9.0a or 8.0+PTX.")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_command(root: Path, nvcc: str, archs: list[str]) -> list[str]:
    """What compiles a file of csrc/cuda, without source and output."""
    # The kernels' error texts name what was built.
    define = f'-DFUSED_RESNET_CUDA_ARCHS="{";".join(archs)}"'
    includes = [f"-I{root / 'csrc/include'}", f"-I{root / 'csrc/cuda'}"]
    return [nvcc, *CUDA_FLAGS, *arch_flags(archs), define, *includes]


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where cudart_static is. nvcc itself is asked: it may be a wrapper that stands elsewhere than its toolkit."""
    command = [nvcc, "--dryrun", "-x", "cu", "-o", os.devnull, os.devnull]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    words = [word for line in lines if line.startswith("#$ LIBRARIES=") for word in shlex.split(line.partition("=")[2])]
    places = [Path(word[2:]) for word in words if word.startswith("-L")]
    places += [Path(nvcc).resolve().parents[1] / name for name in ("lib64", "lib")]
    # None: the linker's own directories, where distributions put it.
    return [str(place) for place in places if (place / "libcudart_static.a").exists()][:1]


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
