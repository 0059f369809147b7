"""The GPU suite without a GPU: bench/gpu.sh refuses in one line, its steps and its table work, absence is said."""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet as fr

ROOT = Path(__file__).resolve().parent.parent
BENCH, SCRIPT = ROOT / "bench", ROOT / "bench" / "gpu.sh"
STEPS = ("build", "tests", "sanitizer", "ceilings", "kernels", "models", "inference", "graphs", "probe")
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


def shell(
    *arguments: str, path: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """bench/gpu.sh where no GPU is to be seen."""
    clean = {key: value for key, value in os.environ.items() if key not in ("OUT", "PYTHON", "PYTHONPATH", "CUDA_HOME")}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "PATH": path + clean["PATH"], **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=clean, timeout=120, check=False, cwd=cwd
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
  *is_available*) sleep "${{FAKE_SLEEP:-0}}"; echo yes ;;
  *get_device_name*) echo made-up ;;
  "-m gpu.table"*) exec {sys.executable} "$@" ;;
  *) echo "ran: $*"; env | grep ^FUSED_RESNET_; status=FAKE_${{2#gpu.}}; exit "${{!status:-0}}" ;;
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
    assert ran == [
        f"gpu.{name}" for name in ("build", "suite", "ceilings", "kernels", "models", "inference", "models", "probe")
    ]
    assert states(tmp_path / "out") == dict.fromkeys(steps, "ok") | {"probe": "not available here"}
    assert "--graphs" in (tmp_path / "out" / "graphs.log").read_text(encoding="utf-8")
    limits = [int(line.split()[4]) for line in done.stdout.splitlines() if line.startswith("== ") and "at most" in line]
    assert all(5 <= limit < 600 for limit in limits)
    assert "probe       not available here" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("1", "FAILED (status 1)"),
        ("3", "FAILED (status 3)"),  # only the probe may find nothing to examine
        ("4", "incomplete"),
        ("124", "out of time, partial results"),
    ],
)
def test_a_step_that_did_not_go_well_is_reported(status: str, state: str, fake_python: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = shell("--python", fake_python, "--out", str(out), "ceilings", "kernels", FAKE_ceilings=status)
    assert done.returncode == 1
    assert states(out) == {"ceilings": state, "kernels": "ok"}


def test_the_time_counts_from_the_start_of_the_script(fake_python: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = shell("--python", fake_python, "--out", str(out), "--minutes", "1", "kernels", FAKE_SLEEP="2")
    (limit,) = (int(line.split()[4]) for line in done.stdout.splitlines() if "(at most" in line)
    assert 25 <= limit <= 60 - 25 - 2


def test_the_build_may_take_all_the_time(fake_python: str, tmp_path: Path) -> None:
    done = shell("--python", fake_python, "--out", str(tmp_path / "out"), "build", "tests", "models")
    limits = {line.split()[1]: int(line.split()[4]) for line in done.stdout.splitlines() if "(at most" in line}
    assert limits["build"] > 540
    assert limits["tests"] < 400  # the models' part is theirs


def test_a_step_without_time_does_not_begin(fake_python: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = [step for step in STEPS if step not in ("ceilings", "sanitizer", "build")]
    done = shell("--python", fake_python, "--out", str(out), "--minutes", "1", "ceilings", *others)
    assert done.returncode == 1
    assert states(out) == {"ceilings": "no time was left"} | dict.fromkeys(others, "ok")
    assert "gpu.ceilings" not in done.stdout


def test_relative_paths_are_the_callers(fake_python: str, tmp_path: Path) -> None:
    python = Path(fake_python)
    done = shell("--python", f"fake/{python.name}", "--out", "results", "kernels", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path / "results") == {"kernels": "ok"}
    done = shell("--python", f"fake/{python.name}", "kernels", cwd=tmp_path, OUT="others")
    assert states(tmp_path / "others") == {"kernels": "ok"}


def test_what_would_disable_the_build_is_not_handed_on(fake_python: str, tmp_path: Path) -> None:
    given = {"FUSED_RESNET_DISABLE": "1", "FUSED_RESNET_VERBOSE": "1"}
    done = shell("--python", fake_python, "--out", str(tmp_path), "build", **given)
    assert "ran: -m gpu.build" in done.stdout
    assert "FUSED_RESNET_" not in done.stdout


def test_results_of_an_earlier_run_are_not_this_ones(fake_python: str, tmp_path: Path) -> None:
    for name in ("ceilings", "kernels"):
        report(name, tmp_path, [{"name": "matmul bf16", "skipped": "no time left"}], [])
        os.utime(tmp_path / f"{name}.json", (0, 0))
    (tmp_path / "kernels.part").touch()
    done = shell("--python", fake_python, "--out", str(tmp_path), "kernels")
    assert not list(tmp_path.glob("kernels.[jp]*"))
    assert "\nceilings (of an earlier run: 20" in done.stdout
    report("kernels", tmp_path, [], [])
    assert "\nkernels\n" in load("table").text(tmp_path)


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
        (None, "FAILED (status 1)"),  # there is no tool
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
    assert done.returncode == (0 if state == "ok" else 1)


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
        "eager_batch_norm": {"aten::native_batch_norm": 1}, "speedup_over_cudnn": SPREAD | {"median": 1.25},
    }  # fmt: skip
    refusal = {
        "name": "bn1", "dtype": "bf16", "passes": "forward", "contestant": "cudnn", "status": "not supported",
        "why": "made up",
    }  # fmt: skip
    alone = {"name": "bn1", "dtype": "bf16", "passes": "alone", "beyond_cache": True}
    alone["kernels"] = {"stats_kernel": {"seconds": 1e-3, "copy_fraction": 0.87}}
    report("kernels", tmp_path, [unit, refusal, alone], kernels.summarise([unit, refusal, alone]))
    rows = [model_row("bf16", ["eager", "compile", "fused"])]
    rows.append(model_row("fp16", ["eager", "fused"]) | {"skipped": "torch.compile: no time left"})
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
        "skipped: resnet50 fp16 eager/fused: torch.compile: no time left", "    1.50     1.25  aten::native_batch_norm",
        "cudnn not supported: bf16 forward, 1 units: made up",
    ):  # fmt: skip
        assert part in text, f"{part!r} is not in\n{text}"
    assert load("table").main([str(tmp_path)]) == 0


def test_an_empty_folder_has_no_table(tmp_path: Path) -> None:
    assert "no results" in load("table").text(tmp_path)


def test_a_report_is_whole_after_every_row_and_knows_failure(tmp_path: Path) -> None:
    written = load("common").Report("models", options(tmp_path), torch.device("cpu"))
    written.add({"name": "a"})
    assert [row["name"] for row in json.loads(written.path.read_text(encoding="utf-8"))["rows"]] == ["a"]
    assert written.close() == 0
    written.add({"name": "b", "skipped": "made up"})
    assert written.close() == 4
    written.add({"name": "c", "failed": "made up"})
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
    refusals = [row for row in written["rows"] if row.get("contestant") == "cudnn"]  # a CPU has none
    assert {row["passes"] for row in refusals} == {"forward", "backward", "infer"}
    assert all(row["status"] == "not supported" and row["why"] for row in refusals)
    took = {(row["kind"], row["passes"]): row["eager_batch_norm"] for row in written["rows"] if "fused_seconds" in row}
    for passes in ("forward", "backward", "infer"):
        assert took["bn_dual_act", passes] == {"aten::native_batch_norm": 2}
    row = next(row for row in written["rows"] if row["kind"] == "bn_act" and row["passes"] == "forward")
    assert row["minimum_bytes"] == 3 * row["tensor_bytes"]


def test_kernels_compare_inference_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("kernels").Case, "inferred", lambda self: (self.x.detach() * 2, self.x.detach()))
    small = ("--batch", "2", "--max-size", "4", "--rounds", "1", "--sample", "0.0001", "--model", "resnet18")
    status, written = run_here("kernels", tmp_path, *small, "--dtype", "fp32", "--seconds", "1e6", *allow_stock())
    assert status == 1
    assert all("infer: fused and stock disagree" in row["failed"] for row in written["rows"])


def test_a_profiler_that_sees_no_kernel_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = nullcontext(SimpleNamespace(key_averages=lambda: [SimpleNamespace(key="void at::native::copy_kernel")]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: seen)
    with pytest.raises(RuntimeError, match="saw none of our kernels"):
        load("kernels").profile(lambda: torch.ones(2), torch.device("cuda"))


class Dispatched(TorchDispatchMode):
    """Notes the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not any(t.is_meta for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)):
            self.names.add(str(func))
        return out


def test_operands_are_made_without_reductions() -> None:
    units = importlib.import_module("units")
    for kind, dtype, layout in itertools.product(
        units.KINDS, (torch.float32, torch.bfloat16, torch.float64), (torch.channels_last, torch.contiguous_format)
    ):
        with Dispatched() as seen:
            case = units.Case(units.Unit("a", 1, 13, 6, 4, kind), 3, dtype, layout)
        assert not {name for name in seen.names if "norm" in name or "pool" in name or "relu" in name}, kind
        y = case.kind.eager(*case.tensors, *case.norms, training=True)
        assert (y.shape, y.stride(), y.dtype) == (
            case.grad_output.shape,
            case.grad_output.stride(),
            case.grad_output.dtype,
        )


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("options", [(), ("--unchecked",)])
def test_the_sanitizers_program_runs(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    sanitized = load("sanitized")
    assert {(dtype, prelu) for _, dtype, _, _, prelu in sanitized.cases(list(sanitized.DTYPES))} == set(
        itertools.product(("bf16", "fp16", "fp32", "fp64"), (False, True))
    )
    assert sanitized.main(["--device", "cpu", *options]) == 0
    assert "fused batch norms ran" in capsys.readouterr().out


def test_the_device_that_is_asked_for_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert load("common").device(argparse.Namespace(device=name)) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]


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


@pytest.mark.usefixtures("needs_extension")
def test_inference_runs_and_a_failure_is_a_row(tmp_path: Path) -> None:
    small = ("--batch", "2", "--size", "64", "--rounds", "1", "--sample", "0.001", "--no-compile", "--dtype", "fp32")
    more = ("--model", "resnet18", "resnet0", "--seconds", "1e6", "--allow-stock")
    status, written = run_here("inference", tmp_path, *small, *more)
    assert status == 1
    done, failed = written["rows"]
    assert done["speedup"]["median"] > 0
    assert done["error"]["fused"] < 1e-4
    assert done["fused_images_per_s"] == round(2 / done["fused_seconds"]["median"], 1)
    assert "resnet0" in failed["failed"]


def test_inference_refuses_what_is_not_fused_and_recorded(tmp_path: Path) -> None:
    small = ("--batch", "2", "--size", "64", "--no-compile", "--dtype", "fp32", "--model", "resnet18")
    status, written = run_here("inference", tmp_path, *small, "--seconds", "1e6")  # a CPU has no CUDA graphs
    assert status == 1
    assert "0 fused convolutions at the first call" in written["rows"][0]["failed"]


def test_models_refuse_stock(tmp_path: Path) -> None:
    small = ("--batch", "4", "--size", "64", "--no-compile", "--dtype", "fp32", "--model", "resnet18")
    with fr.nn.stock():
        status, written = run_here("models", tmp_path, *small, "--seconds", "1e6")
    assert status == 1
    assert "0 batch norms ran fused" in written["rows"][0]["failed"]


def measured(setting: Any, sides: list[str], where: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """In place of gpu.models.measure."""
    row = {"name": setting.model, "batch": setting.batch, "dtype": setting.dtype, "graphs": False, "sides": list(sides)}
    return row | {f"{side}_images_per_s": 1.0 for side in sides}


def test_models_compile_first_and_say_what_they_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(load("common").time, "monotonic", lambda: now[0])

    def measure(setting: Any, sides: list[str], *rest: Any) -> dict[str, Any]:
        now[0] += 15.0 + (50.0 if "compile" in sides else 0.0)
        return measured(setting, sides, *rest)

    monkeypatch.setattr(load("models"), "measure", measure)
    everything, plain = ["eager", "compile", "fused"], ["eager", "fused"]
    # 85 for the first by estimate, 65 in truth; after that there is time to compile resnet18 once.
    status, written = run_here("models", tmp_path, "--seconds", "170")
    assert status == 4
    assert [(row["dtype"], row["name"], row["sides"]) for row in written["rows"]] == [
        ("bf16", "resnet50", everything),
        ("bf16", "resnet18", everything),
        ("fp16", "resnet50", plain),
        ("fp16", "resnet18", plain),
    ]
    assert [row.get("skipped", "")[:14] for row in written["rows"]] == ["", "", "torch.compile:", "torch.compile:"]
    now[0] = 0.0
    status, written = run_here("models", tmp_path, "--seconds", "261")
    assert status == 0
    assert all(row["sides"] == everything for row in written["rows"])


def test_inference_is_timed_without_compiling_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(load("common").time, "monotonic", lambda: now[0])
    states: list[list[str | None]] = []

    def measure(setting: Any, sides: list[str], *rest: Any) -> dict[str, Any]:
        if "compile" in sides:
            states.append([row.get("skipped") for row in json.loads((tmp_path / "inference.json").read_text())["rows"]])
            if setting.model == "resnet18":
                raise RuntimeError("made up")
        now[0] += 4.0 + (60.0 if "compile" in sides else 0.0)
        return measured(setting, sides, *rest)

    monkeypatch.setattr(load("inference"), "measure", measure)
    few = ("--dtype", "bf16", "--batch", "64", "1")
    # 16 for all four; then 44 by estimate for the first, 64 in truth, for which there is no time again.
    status, written = run_here("inference", tmp_path, *few, "--seconds", "140")
    assert status == 1
    everything, plain = ["eager", "compile", "fused"], ["eager", "fused"]
    assert states[0] == ["torch.compile: not begun"] * 4
    assert [(row["name"], row["batch"], row["sides"]) for row in written["rows"]] == [
        ("resnet50", 64, everything),
        ("resnet50", 1, plain),
        ("resnet18", 64, plain),
        ("resnet18", 1, plain),
    ]
    assert written["rows"][1]["skipped"].startswith("torch.compile: no time left")
    for row in written["rows"][2:]:
        assert row["failed"] == "RuntimeError: made up"
        assert "skipped" not in row
        assert row["fused_images_per_s"] == 1.0
    assert written["options"]["mode"] == "reduce-overhead"
    now[0] = 0.0
    status, written = run_here("inference", tmp_path, *few, "--model", "resnet50", "--seconds", "140")
    assert status == 0
    assert all(row["sides"] == everything for row in written["rows"])
    now[0] = 0.0
    status, written = run_here("inference", tmp_path, *few, "--seconds", "140", "--mode", "max-autotune")
    assert status == 4
    assert all(row["skipped"].startswith("torch.compile: no time left") for row in written["rows"])


def test_models_halve_a_batch_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(setting: Any, *rest: Any) -> dict[str, Any]:
        if setting.batch > 64:
            raise torch.OutOfMemoryError("made up")
        return measured(setting, *rest)

    monkeypatch.setattr(load("models"), "measure", measure)
    status, written = run_here("models", tmp_path, "--seconds", "1e6", "--dtype", "bf16", "--model", "resnet50")
    assert status == 0
    assert [row["batch"] for row in written["rows"]] == [64]


@pytest.mark.usefixtures("needs_extension")
def test_a_model_that_does_not_compile_is_timed_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> object:
        raise RuntimeError("made up")

    monkeypatch.setattr(torch, "compile", fail)
    small = ("--batch", "4", "--size", "64", "--rounds", "1", "--sample", "0.001")
    status, written = run_here("models", tmp_path, *small, "--dtype", "fp32", "--model", "resnet18", "--seconds", "1e6")
    assert status == 1
    (row,) = written["rows"]
    assert row["failed"] == "torch.compile: RuntimeError: made up"
    assert row["sides"] == ["eager", "fused"]
    assert row["speedup"]["median"] > 0


def test_without_time_everything_is_skipped_and_said(tmp_path: Path) -> None:
    for name, arguments in (
        ("kernels", ()),
        ("models", ()),
        ("inference", ()),
        ("probe", ("--model", "resnet18", "--size", "32")),
    ):
        status, written = run_here(name, tmp_path, "--seconds", "0", *arguments)
        assert status == (3 if name == "probe" else 4)
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
    [((8, 0), "8.0"), ((8, 9), "8.9"), ((8, 6), "8.0"), ((9, 0), "9.0a"), ((10, 0), "10.0"), ((12, 0), "8.0+PTX")],
)
def test_the_architecture_that_is_built(capability: tuple[int, int], architecture: str) -> None:
    assert load("build").architecture(capability, ["compute_80", "compute_89", "compute_100"]) == architecture


def test_the_build_is_for_this_gpu_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-arch ] && echo compute_80 && echo compute_86\n", encoding="utf-8")
    nvcc.chmod(0o755)
    foreign = {"TORCH_CUDA_ARCH_LIST": "7.5", "FUSED_RESNET_DISABLE": "1", "FUSED_RESNET_VERBOSE": "1"}
    for name, value in (foreign | {"FUSED_RESNET_CUDA": "0", "CUDA_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    given = load("build").environment()
    assert {name: given.get(name) for name in foreign} == dict.fromkeys(foreign) | {"TORCH_CUDA_ARCH_LIST": "8.6"}
    assert given["FUSED_RESNET_CUDA"] == "1"


def run_suite(folder: Path, seconds: str = "60", **files: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status of gpu.suite over files of these texts, and the summary that it wrote."""
    paths = []
    for name, text in files.items():
        paths.append(folder / f"test_{name}.py")
        paths[-1].write_text(f"import pytest\npytestmark = pytest.mark.gpu\n{text}", encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=f"{BENCH}:{ROOT}")
    command = [sys.executable, "-m", "gpu.suite", "--device", "cpu", "--seconds", seconds, "--out", str(folder)]
    command += [*map(str, paths), "--rootdir", str(folder), "-c", str(ROOT / "pyproject.toml")]
    # "--gpu-tests-on" comes from tests/conftest.py, which a test from elsewhere does not bring.
    command += ["-p", "tests.conftest"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert (folder / "tests.json").exists(), done.stdout + done.stderr
    summary: list[dict[str, Any]] = json.loads((folder / "tests.json").read_text(encoding="utf-8"))["summary"]
    return done.returncode, summary


GOOD = "def test_good(): pass\n"


def test_the_suite_counts_outcomes_and_stops_in_time(tmp_path: Path) -> None:
    text = GOOD + "def test_bad(): assert 1 == 2\ndef test_skipped(): pytest.skip('made up')\n"
    status, (total, failure) = run_suite(tmp_path, a=text)
    assert status == 1
    assert (total["passed"], total["failed"], total["skipped"], total["not_run"]) == (1, 1, 1, 0)
    assert total["why_skipped"] == {"made up": 1}
    assert failure["name"].endswith("test_bad")
    status, (total, *_) = run_suite(tmp_path, "0", a=text)
    assert status == 1
    assert total["not_run"] >= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pytest.skip('no such package', allow_module_level=True)\n", "skipped whole: Skipped: no such package"),
        ("import no_such_package\n", "failed whole: "),
    ],
)
def test_a_file_that_is_left_out_as_a_whole_fails_the_suite(text: str, message: str, tmp_path: Path) -> None:
    status, (total, failure) = run_suite(tmp_path, a=text, b=GOOD)
    assert status == 1
    assert total["passed"] == 1  # the other file ran
    assert failure["name"].endswith("test_a.py")
    assert failure["message"].startswith(message)


def test_an_abort_of_the_process_takes_no_result_with_it(tmp_path: Path) -> None:
    status, (total, *_) = run_suite(tmp_path, a=GOOD + "def test_abort():\n  import os\n  os.abort()\n" + GOOD)
    assert status != 0
    assert (total["passed"], total["not_run"]) == (1, 1)


BARE = """
import sys
for name in ("numpy", "torchvision", "timm"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]))
"""


def test_the_tests_of_the_gpu_need_pytest_alone() -> None:
    """No NumPy, no oracle: each file is collected, none skips itself."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "SKIPPED" not in done.stdout, done.stdout[-3000:]
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert f"tests/gpu/{file.name}::" in done.stdout, file.name


# What csrc/cuda/capability.cu and launch.h need of CUDA's runtime; each call fails as the program says.
RUNTIME = r"""
#pragma once
#include <cstddef>
#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
struct dim3 { unsigned x; dim3(unsigned x) : x(x) {} };
struct uint4 { unsigned x, y, z, w; };
struct cudaFuncAttributes {};
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorInvalidDeviceFunction = 98, cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209, cudaErrorInvalidPtx = 218, cudaErrorUnsupportedPtxVersion = 222
};
enum { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
inline cudaError_t failure = cudaSuccess;
inline int device = 0, asked = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* index) { *index = device; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 7 : 5;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) { ++asked; return failure; }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return failure; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "no kernel image";
}
"""
PROGRAM = r"""
#include CAPABILITY
struct Args {};
void kernel(Args) {}
int main() {
  using namespace fused_resnet;
  const auto ask = [](int index, cudaError_t error) {
    device = index, failure = error;
    bool may_pass = false;
    const Status status = cuda::device_status(&may_pass);
    std::printf("%d %d %s\n", asked, may_pass, status.ok() ? "ok" : status.message);
  };
  ask(0, cudaErrorMemoryAllocation), ask(0, cudaErrorMemoryAllocation), ask(0, cudaSuccess);
  ask(0, cudaErrorMemoryAllocation);  // it is known now that it runs
  int index = 0;
  for (cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction,
                            cudaErrorUnsupportedPtxVersion, cudaErrorInvalidPtx}) {
    ask(++index, error), ask(index, cudaSuccess);
  }
  failure = cudaErrorMemoryAllocation;
  std::puts(cuda::launch("apply: refused", &kernel, 1, 1, 0, nullptr, Args{}).message);
}
"""


def test_errors_of_cuda_are_told_from_a_build_for_other_gpus(tmp_path: Path) -> None:
    """The sources themselves, with a runtime that fails as it is told."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME, encoding="utf-8")
    (tmp_path / "program.cpp").write_text(PROGRAM, encoding="utf-8")
    capability = ROOT / "csrc/cuda/capability.cu"
    command = [compiler, "-std=c++20", f"-I{tmp_path}", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cuda"]
    command += [f'-DCAPABILITY="{capability}"', '-DFUSED_RESNET_CUDA_ARCHS="8.0+PTX;9.0a"', "-Wno-unknown-pragmas"]
    subprocess.run([*command, "program.cpp", "-o", "program"], cwd=tmp_path, check=True)
    lines = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True).stdout.splitlines()
    full = "fused_resnet: CUDA device 0 cannot be used: out of memory."
    assert lines[:4] == [f"1 1 {full}", f"2 1 {full}", "3 0 ok", "3 0 ok"]
    for index in range(1, 5):
        for line in lines[2 + 2 * index : 4 + 2 * index]:  # asked once
            assert line == (
                f"{3 + index} 0 fused_resnet was built for the CUDA architectures 8.0+PTX;9.0a, which device {index} "
                '(7.5) does not run: no kernel image. Rebuild with TORCH_CUDA_ARCH_LIST="7.5".'
            )
    assert lines[12:] == ["apply: refused: CUDA error: out of memory"]
