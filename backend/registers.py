"""What became of each CUDA kernel: registers, spilled bytes, shared memory.

Fails when a kernel spills, and when one that moves whole vectors stores them in pieces.

    python backend/registers.py            compiles csrc/cuda, for the architectures of a build
    python backend/registers.py LOG ...    reads what `nvcc -Xptxas -v` wrote ("-": standard input); no stores there

Stores are judged in PTX: ptxas makes one instruction of each, and nvcc is all it takes.

Standard library only. Where there is no nvcc it says so and succeeds: there is nothing to judge.
"""

import argparse
import concurrent.futures
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from toolchain import cuda_command, find_cuda, job_limit

ROOT = Path(__file__).resolve().parents[1]

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")

_PTX_ENTRY = re.compile(r"\.entry (\w+)\(")
_PTX_STORE = re.compile(r"\bst\.global[.:\w]*?((?:\.v\d)?)\.[a-z](\d+)\s")
# Who writes tensors, compiled for vectors: kVector is the one `bool` among the template arguments.
_WRITES_VECTORS = re.compile(r"(?:apply|forward)_kernelI\w*Lb1E")
_WHOLE, _MASK_BYTE, _TAPS = ".v4.32", ".8", ".64"


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    spilled: int  # bytes stored and loaded again
    shared: int  # static bytes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("logs", nargs="*", metavar="LOG", help="output of nvcc -Xptxas -v; default: compile")
    logs = parser.parse_args(argv).logs
    in_pieces: list[str] = []
    if logs:
        texts = [sys.stdin.read() if log == "-" else Path(log).read_text(encoding="utf-8") for log in logs]
    else:
        sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
        nvcc, archs = find_cuda(sources)
        if nvcc is None:
            print("registers: nothing to compile: " + ("no nvcc was found" if sources else "csrc/cuda has no sources"))
            return 0
        compiled = compile_all([*cuda_command(ROOT, nvcc, archs), "-Xptxas", "-v"], sources)
        texts = [log for log, _ in compiled]
        in_pieces = sorted({name for _, ptx in compiled for name in split_stores(ptx)})
        if not any(_WRITES_VECTORS.search(ptx) for _, ptx in compiled):
            raise SystemExit("registers: no kernel that writes vectors was found in the PTX")
    kernels = sorted({kernel for text in texts for kernel in parse(text)})
    if not kernels:
        print("registers: no kernel in what ptxas said", file=sys.stderr)
        return 1
    print("\n".join(table(kernels)))
    spilling = [kernel for kernel in kernels if kernel.spilled]
    if spilling:
        print(f"registers: {len(spilling)} of {len(kernels)} kernels spill", file=sys.stderr)
    for name in in_pieces:
        print(f"registers: {name} stores vectors in pieces", file=sys.stderr)
    return 1 if spilling or in_pieces else 0


def compile_all(command: list[str], sources: list[Path]) -> list[tuple[str, str]]:
    """What nvcc says about each source, and the PTX it made on the way."""
    with tempfile.TemporaryDirectory() as directory:

        def compile_one(numbered: tuple[int, Path]) -> tuple[str, str]:
            number, source = numbered
            kept = Path(directory) / str(number)
            kept.mkdir()
            flags = ["--keep", "--keep-dir", str(kept), "-c", str(source), "-o", str(kept / "object.o")]
            done = subprocess.run([*command, *flags], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"registers: {source.relative_to(ROOT)} does not compile:\n{done.stdout}{done.stderr}")
            ptx = "".join(path.read_text(encoding="utf-8") for path in sorted(kept.glob("*.ptx")))
            shutil.rmtree(kept)
            return done.stdout + done.stderr, ptx

        with concurrent.futures.ThreadPoolExecutor(job_limit()) as pool:
            return list(pool.map(compile_one, enumerate(sources)))


def parse(log: str) -> Iterator[Kernel]:
    """The kernels that ptxas describes in `log`, with their mangled names."""
    name = arch = function = ""
    spilled = 0
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            (name, arch), spilled = found.groups(), 0
        elif found := _PROPERTIES.search(line):
            function = found[1]  # also of functions that kernels call: theirs count as well
        elif found := _SPILLS.search(line):
            spilled += int(found[1]) + int(found[2])
        elif name and (found := _USED.search(line)):
            shared = _SHARED.search(line)
            yield Kernel(name, arch, int(found[1]), spilled, int(shared[1]) if shared else 0)
            name = ""
    if name:
        print(f"registers: the log ends within {function or name}", file=sys.stderr)


def split_stores(ptx: str) -> Iterator[str]:
    """The kernels that write tensors in vectors, and yet store other things than 16 bytes, a mask's byte and 8 taps."""
    stores: dict[str, set[str]] = {}
    name = ""
    for line in ptx.splitlines():
        if found := _PTX_ENTRY.search(line):
            stores[name := found[1]] = set()
        elif name and (found := _PTX_STORE.search(line)):
            stores[name].add(f"{found[1]}.{found[2]}")
    for name, widths in stores.items():
        if _WRITES_VECTORS.search(name) and (_WHOLE not in widths or widths - {_WHOLE, _MASK_BYTE, _TAPS}):
            yield short(demangle([name])[0])


def table(kernels: Sequence[Kernel]) -> Iterator[str]:
    """The lines of a table, names as C++ writes them."""
    names = [short(name) for name in demangle([kernel.name for kernel in kernels])]
    width = max(map(len, [*names, "kernel"]))
    yield f"{'kernel':{width}}  {'arch':8}{'registers':>10}{'spill bytes':>13}{'shared':>9}"
    for name, kernel in zip(names, kernels, strict=True):
        yield f"{name:{width}}  {kernel.arch:8}{kernel.registers:>10}{kernel.spilled:>13}{kernel.shared:>9}"


def demangle(names: Sequence[str]) -> list[str]:
    """As they are where no tool can tell."""
    for tool in ("cu++filt", "c++filt"):
        if shutil.which(tool):
            done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=False)
            lines = done.stdout.splitlines()
            if done.returncode == 0 and len(lines) == len(names):
                return lines
    return list(names)


def short(name: str) -> str:
    """Without namespaces, result and arguments: what tells one kernel from the others."""
    name = re.sub(r"\(anonymous namespace\)::|\([\w:]+\)(?=[\w-])|\b[a-z_]\w*::", "", name).removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


if __name__ == "__main__":
    sys.exit(main())
