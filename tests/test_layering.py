"""Who may include or import whom (the table of docs/architecture.md), held by a scan of the text.

`violations(root)` returns one line for each breach; the planted breaches below prove that each rule can fail.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ANGLE_INCLUDE = re.compile(r"^\s*#\s*include\s*<([^>]+)>", re.MULTILINE)
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^Python\.h$")
CUDA_HEADER = re.compile(r"^(cuda|cudnn|cub|cutlass|cute|nccl|thrust|mma)")
INTRINSIC = re.compile(r"\b(_mm\d*_\w+|__m(128|256|512)\w*|__tile1024i)\b|[<\"]\w*intrin\.h[>\"]")
ISA_FILE = re.compile(r"_(avx2|avx512|avx512_bf16|amx)\.(cpp|inc)$")
# What a file built for a wide instruction set may include of the standard library: no template whose code the linker
# could keep in place of the baseline's.
PLAIN_HEADERS = {"cfloat", "climits", "cmath", "cstddef", "cstdint", "cstring", "limits", "type_traits", "immintrin.h"}

# Python: a module may import what stands on an earlier line, or in its own unit.
PYTHON_LAYERS = (
    ("_env", "_version"),
    ("_extension",),
    ("memory", "numerics", "ops"),
    ("nn",),
    ("models",),
    ("convert", "inference"),
    ("timing",),
    ("testing",),
    ("train", "quick_bench"),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(PYTHON_LAYERS) for unit in units}
MAY_TOUCH_EXTENSION = {"_extension", "memory", "numerics", "ops", "testing"}
ORACLES = {"torchvision", "timm"}


def violations(root: Path) -> list[str]:
    return [*_cpp_violations(root), *_python_violations(root), *_outside_violations(root)]


def _cpp_violations(root: Path) -> Iterator[str]:
    csrc = root / "csrc"
    for path in sorted(csrc.rglob("*")):
        if not path.is_file():
            continue
        where, text = path.relative_to(root), _without_comments(path.read_text(encoding="utf-8"))
        layer = path.relative_to(csrc).parts[0]
        for name in INCLUDE.findall(text):
            if layer in ("include", "cpu", "cuda") and TORCH_HEADER.search(name):
                yield f"{where}: includes {name}; {layer} knows no torch and no pybind11"
            if layer in ("include", "cpu", "bindings") and CUDA_HEADER.search(name):
                yield f"{where}: includes {name}; only cuda/ knows CUDA"
            if layer == "include" and "/" in name and not name.startswith("fused_resnet/"):
                yield f"{where}: includes {name}; the seam uses C++ standard headers only"
            if layer == "bindings" and re.match(r"(\.\./)*(csrc/)?(cpu|cuda)/", name):
                yield f"{where}: includes {name}; bindings reach the backends through the seam only"
            if layer in ("cpu", "cuda") and re.match(r"(\.\./)*(csrc/)?bindings/", name):
                yield f"{where}: includes {name}; {layer} stands below the bindings"
            if layer == "cpu" and re.match(r"(\.\./)*(csrc/)?cuda/", name):
                yield f"{where}: includes {name}; the backends do not know each other"
        intrinsics_allowed = layer == "cpu" and ("simd" in path.parts or ISA_FILE.search(path.name))
        found = INTRINSIC.search(text)
        if found and layer != "cuda" and not intrinsics_allowed:
            yield f"{where}: uses {found[0]}; intrinsics belong in cpu/simd/ and files named *_<isa>.cpp"
        if ISA_FILE.search(path.name):
            for name in sorted(_standard_headers(path, csrc) - PLAIN_HEADERS):
                yield f"{where}: reaches <{name}>; files of one instruction set use no standard-library templates"


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def _standard_headers(path: Path, csrc: Path) -> set[str]:
    """Those that the file reaches, also through the project's own headers."""
    standard: set[str] = set()
    seen: set[Path] = set()
    queue = [path]
    while queue:
        file = queue.pop()
        if file in seen:
            continue
        seen.add(file)
        text = _without_comments(file.read_text(encoding="utf-8"))
        standard.update(ANGLE_INCLUDE.findall(text))
        for name in INCLUDE.findall(text):
            own = [base / name for base in (file.parent, csrc / "include", csrc / "cpu") if (base / name).is_file()]
            queue += own[:1]
    return standard


def _python_violations(root: Path) -> Iterator[str]:
    package = root / "fused_resnet"
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(root)
        unit = path.relative_to(package).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if unit != "__init__" and unit not in RANK:
            yield f"{where}: {unit} has no place in PYTHON_LAYERS"
            continue
        for module in _imported_modules(tree):
            top, _, rest = module.partition(".")
            if top in ORACLES:
                yield f"{where}: imports {top}, which is a test oracle only"
            target = rest.partition(".")[0]
            if top != "fused_resnet" or unit == "__init__" or target == unit:
                continue
            if target == "_C" and unit not in MAY_TOUCH_EXTENSION:
                yield f"{where}: imports fused_resnet._C; only the extension loader and ops touch it"
            elif target in RANK and RANK[target] >= RANK[unit]:
                yield f"{where}: imports {module}; {unit} stands below {target}"
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            name = ast.unparse(node)
            if name in ("os.environ", "os.getenv") and unit != "_env":
                yield f"{where}:{node.lineno}: reads the environment; only _env.py does"
            if name == "torch.ops.fused_resnet" and unit not in MAY_TOUCH_EXTENSION:
                yield f"{where}:{node.lineno}: calls torch.ops.fused_resnet; only ops does"


def _imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _outside_violations(root: Path) -> Iterator[str]:
    for path in sorted([*(root / "tests").rglob("*.py"), *(root / "bench").rglob("*.py")]):
        where = path.relative_to(root)
        if "native" in where.parts:
            continue
        for module in _imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            if module.startswith("fused_resnet._C"):
                yield f"{where}: imports {module}; outside tests/native use fused_resnet.testing"


def test_the_tree_keeps_its_layers() -> None:
    assert violations(ROOT) == []


def test_the_scan_sees_the_tree() -> None:
    assert (ROOT / "csrc/include/fused_resnet/types.h").is_file()
    assert len(list((ROOT / "csrc/cpu").rglob("*_avx2.cpp"))) > 0
    assert len(list((ROOT / "csrc/bindings").glob("*.cpp"))) > 0


@pytest.mark.parametrize(
    ("path", "text", "breach"),
    [
        ("csrc/include/fused_resnet/a.h", "#include <torch/types.h>\n", "knows no torch"),
        ("csrc/include/fused_resnet/a.h", '#include "cpu/isa.h"\n', "standard headers only"),
        ("csrc/cpu/a.cpp", "#include <ATen/ATen.h>\n", "knows no torch"),
        ("csrc/cpu/a.cpp", "#include <pybind11/pybind11.h>\n", "knows no torch"),
        ("csrc/cpu/a.cpp", "#include <cuda_runtime.h>\n", "only cuda/ knows CUDA"),
        ("csrc/cpu/a.cpp", "#include <immintrin.h>\n", "intrinsics belong"),
        ("csrc/cpu/a_scalar.cpp", "auto a = _mm256_setzero_ps();\n", "intrinsics belong"),
        ("csrc/cpu/a.cpp", '#include "bindings/checks.h"\n', "stands below the bindings"),
        ("csrc/cpu/a_avx2.cpp", "#include <vector>\n", "reaches <vector>"),
        ("csrc/cuda/a.cu", "#include <c10/cuda/CUDAStream.h>\n", "knows no torch"),
        ("csrc/bindings/a.cpp", '#include "cpu/isa.h"\n', "through the seam only"),
        ("fused_resnet/ops/a.py", "from fused_resnet.nn import blocks\n", "ops stands below nn"),
        ("fused_resnet/ops/a.py", "from fused_resnet import models\n", "ops stands below models"),
        ("fused_resnet/nn/a.py", "import fused_resnet.models.resnet\n", "nn stands below models"),
        ("fused_resnet/models/a.py", "from fused_resnet.convert import convert\n", "models stands below convert"),
        ("fused_resnet/train/a.py", "from fused_resnet import cli\n", "train stands below cli"),
        ("fused_resnet/nn/a.py", "from fused_resnet import _C\n", "only the extension loader"),
        ("fused_resnet/nn/a.py", "import torch\ntorch.ops.fused_resnet.conv2d\n", "only ops does"),
        ("fused_resnet/nn/a.py", 'import os\nos.environ["A"]\n', "only _env.py does"),
        ("fused_resnet/models/a.py", "import torchvision.models\n", "test oracle"),
        ("fused_resnet/a.py", "", "has no place"),
        ("tests/ops/a.py", "from fused_resnet import _C\n", "use fused_resnet.testing"),
        ("bench/a.py", "import fused_resnet._C\n", "use fused_resnet.testing"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, path: str, text: str, breach: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    found = violations(tmp_path)
    assert [line for line in found if breach in line], found


def test_a_header_reached_through_the_projects_own_is_found(tmp_path: Path) -> None:
    cpu = tmp_path / "csrc/cpu"
    cpu.mkdir(parents=True)
    (cpu / "a.h").write_text("#include <algorithm>\n", encoding="utf-8")
    (cpu / "a_avx512.cpp").write_text('// #include <map>\n#include "a.h"\n', encoding="utf-8")
    assert [line.split(":")[1] for line in violations(tmp_path)] == [
        " reaches <algorithm>; files of one instruction set use no standard-library templates"
    ]


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    for path, text in {
        "csrc/cpu/simd/a.h": "#include <immintrin.h>\n",
        "csrc/cpu/a_avx2.cpp": '#include <cstdint>\n#include "simd/a.h"\n',
        "csrc/bindings/a.cpp": '#include <torch/library.h>\n#include "fused_resnet/types.h"\n',
        "fused_resnet/nn/a.py": "from fused_resnet import ops\nfrom fused_resnet.nn import b\n",
        "fused_resnet/_env.py": "import os\nos.environ\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert violations(tmp_path) == []
