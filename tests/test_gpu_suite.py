"""The GPU suite without a GPU: bench/gpu.sh refuses in one line, its steps and its table work, absence is said."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fused_resnet as fr

ROOT = Path(__file__).resolve().parent.parent
BENCH, SCRIPT = ROOT / "bench", ROOT / "bench" / "gpu.sh"
STEPS = ("build", "tests", "sanitizer", "ceilings", "kernels", "models", "graphs", "probe")
SPREAD = {"median": 1.5, "q1": 1.4, "q3": 1.6, "low": 1.0, "high": 2.0}

pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="the benchmarks are not part of this distribution"),
    pytest.mark.skipif(sys.platform != "linux", reason="bench/gpu.sh is for Linux"),
]


@pytest.fixture(autouse=True)
def _script_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture(autouse=True)
def _global_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts change it; this puts it back."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)


def load(name: str) -> ModuleType:
    return importlib.import_module(f"gpu.{name}")


def allow_stock() -> tuple[str, ...]:
    return () if fr.is_available() else ("--allow-stock",)


def shell(*arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """bench/gpu.sh where no GPU is to be seen."""
    clean = {key: value for key, value in os.environ.items() if key not in ("OUT", "PYTHON", "PYTHONPATH", "CUDA_HOME")}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "PATH": path + clean["PATH"], **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=clean, timeout=120, check=False
    )


def test_the_script_is_bash_and_executable() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = shell("--python", sys.executable, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"bench/gpu.sh: no GPU: {sys.executable}: torch {torch.__version__} sees none\n"
    assert not (tmp_path / "out").exists()


def test_without_pytorch_it_says_so_in_one_line(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    bare.chmod(0o755)
    assert shell(PYTHON=str(bare)).stderr == f"bench/gpu.sh: no GPU: {bare}: no PyTorch\n"
    assert shell("--python", "/no/such").stderr == "bench/gpu.sh: no GPU: no such Python: /no/such\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teste",), "unknown step teste: expected one of build tests"),
        (("--fast",), "unknown option --fast"),
        (("--out",), "--out needs a value"),
        (("--minutes", "0"), "--minutes: expected a whole number above 0, got 0"),
        (("--minutes", "many"), "--minutes: expected a whole number above 0, got many"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = shell(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_help_lists_the_steps() -> None:
    done = shell("--help")
    assert done.returncode == 0
    assert all(f"\n  {step} " in done.stdout for step in STEPS)


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    """An interpreter that claims a GPU and only notes which module it should run; the table is real."""
    path = tmp_path / "fake" / "python"
    path.parent.mkdir()
    path.write_text(
        f"""#!/bin/bash
case "$*" in
  *is_available*) echo yes ;;
  *get_device_name*) echo made-up ;;
  "-m gpu.table"*) exec {sys.executable} "$@" ;;
  *) echo "ran: $*"; status=FAKE_${{2#gpu.}}; exit "${{!status:-0}}" ;;
esac
""",
        encoding="utf-8",
    )
    path.chmod(0o755)
    return str(path)


def states(folder: Path) -> dict[str, str]:
    lines = (folder / "steps.tsv").read_text(encoding="utf-8").splitlines()
    return {line.split("\t")[0]: line.split("\t")[1] for line in lines}


def test_steps_run_in_order_with_their_time_and_a_table_last(fake_python: str, tmp_path: Path) -> None:
    steps = [step for step in STEPS if step != "sanitizer"]
    done = shell("--python", fake_python, *steps, OUT=str(tmp_path / "out"), FAKE_probe="3")
    assert done.returncode == 0, done.stderr
    ran = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("ran: -m")]
    assert ran == [f"gpu.{name}" for name in ("build", "suite", "ceilings", "kernels", "models", "models", "probe")]
    assert states(tmp_path / "out") == dict.fromkeys(steps, "ok") | {"probe": "not available here"}
    assert "--graphs" in (tmp_path / "out" / "graphs.log").read_text(encoding="utf-8")
    limits = [int(line.split()[4]) for line in done.stdout.splitlines() if line.startswith("== ") and "at most" in line]
    assert all(5 <= limit < 600 for limit in limits)
    assert "probe       not available here" in done.stdout.splitlines()[-1]


def test_steps_that_fail_or_run_out_of_time_are_reported(fake_python: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = shell(
        "--python", fake_python, "--out", str(out), "ceilings", "kernels", FAKE_ceilings="1", FAKE_kernels="124"
    )
    assert done.returncode == 1
    assert states(out) == {"ceilings": "FAILED (status 1)", "kernels": "out of time, partial results"}


def test_nothing_runs_after_a_failed_build(fake_python: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = shell("--python", fake_python, "--out", str(out), "build", "tests", FAKE_build="1")
    assert done.returncode == 1
    assert states(out) == {"build": "FAILED (status 1)"}
    assert "nothing else is run without a build" in done.stderr


@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        ("ERROR SUMMARY: 0 errors RACECHECK SUMMARY: 0 hazards displayed", "ok"),
        ("ERROR SUMMARY: 1 error RACECHECK SUMMARY: 0 hazards displayed", "FAILED (status 1)"),
        ("", "FAILED (status 1)"),  # the tool ended well and said nothing
        (None, "not available here"),
    ],
)
def test_a_sanitizer_must_have_run(verdict: str | None, state: str, fake_python: str, tmp_path: Path) -> None:
    out, tools = tmp_path / "out", tmp_path / "tools"
    tools.mkdir()
    if verdict is not None:
        tool = tools / "compute-sanitizer"
        loop = "while [[ $1 != --log-file ]]; do shift; done"
        tool.write_text(f"#!/bin/bash\n{loop}\necho '{verdict}' >\"$2\"\n", encoding="utf-8")
        tool.chmod(0o755)
    done = shell("--python", fake_python, "--out", str(out), "sanitizer", path=f"{tools}:", CUDA_HOME="/no/such")
    assert states(out) == {"sanitizer": state}, done.stdout + done.stderr


def test_every_test_of_the_folder_is_marked_gpu() -> None:
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert files
    for file in files:
        marks = [
            ast.unparse(node.value)
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        ]
        assert len(marks) == 1, file.name
        assert "pytest.mark.gpu" in marks[0], file.name


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(out=folder, device="cpu")


def report(name: str, folder: Path, rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> None:
    written = load("common").Report(name, options(folder), torch.device("cpu"))
    for row in rows:
        written.add(row)
    written.close(summary)


def model_row(dtype: str, sides: list[str], graphs: bool = False) -> dict[str, Any]:
    row: dict[str, Any] = {"name": "resnet50", "batch": 256, "dtype": dtype, "graphs": graphs, "sides": sides}
    for i, side in enumerate(sides):
        row |= {f"{side}_images_per_s": 1000.5 + i, f"{side}_seconds": SPREAD, f"{side}_peak_bytes": 2**30 - i * 2**28}
    row["speedup"] = SPREAD
    if "compile" in sides:
        row["speedup_over_compile"] = SPREAD | {"median": 1.25}
    return row


def test_the_table_of_made_up_numbers(tmp_path: Path) -> None:
    kernels, probe = load("kernels"), load("probe")
    report("ceilings", tmp_path, [
        {"name": "copy", "bytes": 1 << 30, "seconds": SPREAD, "gb_per_s": 2345.6},
        {"name": "matmul bf16", "size": 8192, "seconds": SPREAD, "tflop_per_s": 678.9},
        {"name": "launch", "seconds": SPREAD},
    ], [])  # fmt: skip
    unit = {
        "name": "bn1", "kind": "bn_act", "count": 2, "shape": [256, 64, 56, 56], "dtype": "bf16", "passes": "forward",
        "beyond_cache": True, "fused_seconds": SPREAD, "speedup": SPREAD, "copy_fraction": SPREAD | {"median": 0.91},
    }  # fmt: skip
    alone = {"name": "bn1", "dtype": "bf16", "passes": "alone", "beyond_cache": True}
    alone["kernels"] = {"stats_kernel": {"seconds": 1e-3, "copy_fraction": 0.87}}
    report("kernels", tmp_path, [unit, alone], kernels.summarise([unit, alone]))
    rows = [model_row("bf16", ["eager", "fused"]), model_row("bf16", ["eager", "compile", "fused"])]
    failed = {"name": "resnet18", "dtype": "fp16", "sides": ["eager", "fused"], "failed": "RuntimeError: made up"}
    report("models", tmp_path, [*rows, failed], [])
    tried = [
        {"name": "conv_genstats", "conv": "a", "dtype": "fp16", "status": "runs"},
        {"name": "conv_genstats", "conv": "b", "dtype": "fp16", "status": "not supported"},
    ]
    report("probe", tmp_path, tried, probe.summarise(tried))
    total = {
        "name": "total",
        "collected": 9,
        "passed": 5,
        "failed": 1,
        "skipped": 2,
        "not_run": 1,
        "why_skipped": {"x": 2},
    }
    report("tests", tmp_path, [], [total, {"name": "tests/gpu/a.py::b", "message": "E assert"}])
    (tmp_path / "steps.tsv").write_text("build\tok\t12\n", encoding="utf-8")
    text = load("table").text(tmp_path)
    for part in (
        "build       ok                                   12 s", "2346 GB/s", "678.9 TFLOP/s", "1500000.00 us",
        "5 passed, 1 failed, 2 skipped, 1 not run of 9", "skipped 2: x", "FAILED tests/gpu/a.py::b: E assert",
        "91%", "87%", "1000.5    1001.5    1002.5   1.500    1.250      0.50",
        "failed: resnet18 fp16 eager/fused: RuntimeError: made up", "2 convolutions: 1 runs, 1 not supported",
    ):  # fmt: skip
        assert part in text, f"{part!r} is not in\n{text}"
    assert text.count("resnet50") == 1  # once, and with torch.compile
    assert load("table").main([str(tmp_path)]) == 0


def test_an_empty_folder_has_no_table(tmp_path: Path) -> None:
    assert "no results" in load("table").text(tmp_path)


def test_a_report_is_whole_after_every_row_and_knows_failure(tmp_path: Path) -> None:
    written = load("common").Report("models", options(tmp_path), torch.device("cpu"))
    written.add({"name": "a"})
    assert [row["name"] for row in json.loads(written.path.read_text(encoding="utf-8"))["rows"]] == ["a"]
    assert written.close() == 0
    written.add({"name": "b", "failed": "made up"})
    assert written.close() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["models.json"]


def test_a_deadline_says_what_it_refuses() -> None:
    deadline = load("common").Deadline(10.0)
    assert deadline.skip(1.0) is None
    assert "needs about 60 s" in deadline.skip(60.0)


def run_here(name: str, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    torch.set_num_threads(1)  # shapes so small only wait for a second thread; tests/conftest.py sets it back
    status = load(name).main(["--device", "cpu", "--out", str(folder), *arguments])
    written = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    importlib.import_module("timing").check(written)
    return status, written


def test_ceilings_run(tmp_path: Path) -> None:
    status, written = run_here("ceilings", tmp_path, "--max-mb", "16", "--matrix", "64", "--rounds", "1")
    assert status == 0
    assert {row["name"] for row in written["rows"]} > {"copy", "read", "write", "launch", "matmul bf16"}


def test_kernels_run(tmp_path: Path) -> None:
    small = ("--batch", "2", "--max-size", "4", "--rounds", "1", "--sample", "0.0001", "--model", "resnet18")
    status, written = run_here("kernels", tmp_path, *small, "--dtype", "fp32", "--seconds", "1e6", *allow_stock())
    assert status == 0, written["rows"]
    assert {row["passes"] for row in written["rows"]} == {"forward", "backward", "infer", "alone"}
    row = next(row for row in written["rows"] if row["kind"] == "bn_act" and row["passes"] == "forward")
    assert row["minimum_bytes"] == 3 * row["tensor_bytes"]


def test_bytes_of_the_kernels_add_up_to_the_units() -> None:
    units, kernels = importlib.import_module("units"), load("kernels")
    for kind in ("bn_act", "bn_add_act", "bn_dual_act", "stem_pool"):
        alone = kernels.kernel_passes(kind).values()
        assert sum(alone) == units.KINDS[kind].forward_passes + units.KINDS[kind].backward_passes, kind


@pytest.mark.usefixtures("needs_extension")
def test_models_run_and_a_failure_is_a_row(tmp_path: Path) -> None:
    small = ("--batch", "4", "--size", "64", "--rounds", "1", "--sample", "0.001", "--no-compile")
    more = ("--dtype", "fp32", "--model", "resnet18", "resnet0", "--seconds", "1e6")
    status, written = run_here("models", tmp_path, *small, *more)
    assert status == 1
    done, failed = written["rows"]
    assert done["speedup"]["median"] > 0
    assert done["verified_batch"] == 4
    assert "resnet0" in failed["failed"]


def test_models_refuse_stock(tmp_path: Path) -> None:
    small = ("--batch", "4", "--size", "64", "--no-compile", "--dtype", "fp32", "--model", "resnet18")
    with fr.nn.stock():
        status, written = run_here("models", tmp_path, *small, "--seconds", "1e6")
    assert status == 1
    assert "0 batch norms ran fused" in written["rows"][0]["failed"]


def test_without_time_everything_is_skipped_and_said(tmp_path: Path) -> None:
    for name, arguments in (("kernels", ()), ("models", ()), ("probe", ("--model", "resnet18", "--size", "32"))):
        _, written = run_here(name, tmp_path, "--seconds", "0", *arguments)
        assert written["rows"]
        assert all(row["skipped"].startswith("no time left") for row in written["rows"])


def test_the_probe_says_that_the_frontend_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = load("probe")
    monkeypatch.setattr(probe, "frontend", lambda: (None, load("patterns").NOT_INSTALLED))
    monkeypatch.setattr(probe, "convolutions", lambda *_: load("convolutions").convolutions(["resnet18"], 32)[:2])
    status, written = run_here(
        "probe", tmp_path, "--batch", "1", "--rounds", "1", "--sample", "0.001", "--dtype", "fp32"
    )
    assert status == 3
    assert "cudnn frontend not installed: no fused cuDNN graph was tried" in capsys.readouterr().out
    patterns = [row for row in written["rows"] if row["name"] in probe.PATTERNS]
    assert len(patterns) == 2 * len(probe.PATTERNS)
    assert {row["status"] for row in patterns} == {"cudnn frontend not installed"}
    assert written["summary"][-1] == {"name": "frontend", "status": "cudnn frontend not installed"}


def test_the_frontend_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = load("patterns")

    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(name: str) -> ModuleType:
        raise ImportError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(patterns.importlib, "import_module", absent)
    assert patterns.frontend() == (None, "cudnn frontend not installed")
    monkeypatch.setattr(patterns.importlib, "import_module", broken)
    assert "cannot be imported: libcudnn" in str(patterns.frontend()[1])


class Unsupported(Exception):  # noqa: N818  # cuDNN's own name for it ends otherwise, too
    """Stands for cudnn.cudnnGraphNotSupportedError."""


@pytest.mark.parametrize(
    ("error", "status"), [(Unsupported("no engine"), "not supported"), (TypeError("odd"), "failed to build or run")]
)
def test_patterns_that_do_not_build_are_answers(error: Exception, status: str) -> None:
    def pygraph(**_: object) -> object:
        raise error

    kinds = SimpleNamespace(HALF=1, BFLOAT16=2, FLOAT=3)
    cudnn = SimpleNamespace(cudnnGraphNotSupportedError=Unsupported, pygraph=pygraph, data_type=kinds)
    conv = load("convolutions").Conv(8, 8, 3, 1, 1, 5, 5)
    operands = load("convolutions").Operands(conv, 2, torch.bfloat16, torch.device("cpu"))
    for name in load("patterns").PATTERNS:
        run, row = load("probe").try_pattern(name, operands, cudnn, None)
        assert run is None
        assert row["status"] == status
        assert str(error) in row["why"]


def test_convolutions_of_the_models() -> None:
    found = load("convolutions").convolutions(["resnet18", "resnet50"])
    assert sum(conv.count for conv in found) == 20 + 53
    assert str(found[0]) == "3->64 7x7/2 224x224"
    assert found[0].output_size == (112, 112)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), "8.0"), ((8, 9), "8.0"), ((9, 0), "9.0a"), ((10, 0), "8.0+PTX"), ((12, 0), "8.0+PTX")],
)
def test_the_architecture_that_is_built(capability: tuple[int, int], architecture: str) -> None:
    assert load("build").architecture(capability) == architecture


def test_the_suite_counts_outcomes_and_stops_in_time(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(
        """
import pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert 1 == 2
def test_skipped(): pytest.skip("made up")
""",
        encoding="utf-8",
    )
    environment = dict(os.environ, PYTHONPATH=f"{BENCH}:{ROOT}")
    results = {}
    for seconds in ("60", "0"):
        command = [sys.executable, "-m", "gpu.suite", "--device", "cpu", "--seconds", seconds, "--out", str(tmp_path)]
        command += [str(tmp_path / "test_made_up.py"), "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        # "--gpu-tests-on" comes from tests/conftest.py, which a test from elsewhere does not bring.
        command += ["-p", "tests.conftest"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        results[seconds] = json.loads((tmp_path / "tests.json").read_text(encoding="utf-8"))["summary"]
    total, failure = results["60"]
    assert (total["passed"], total["failed"], total["skipped"], total["not_run"]) == (1, 1, 1, 0)
    assert total["why_skipped"] == {"made up": 1}
    assert failure["name"].endswith("test_bad")
    assert results["0"][0]["not_run"] >= 2
