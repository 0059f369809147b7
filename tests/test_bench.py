"""The benchmarks execute, verify before they time, refuse stock, and write what the plot reads; no time is judged."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet import testing

BENCH = Path(__file__).resolve().parent.parent / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the benchmarks are not part of this distribution")


def load(name: str) -> ModuleType:
    """One of the scripts as a module; they find each other because their folders are on the path, as when run."""
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _script_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "shapes"))


def allow_stock() -> tuple[str, ...]:
    return () if fr.is_available() else ("--allow-stock",)


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_shapes_are_those_of_the_models(model: str) -> None:
    assert (BENCH / "shapes" / f"{model}.csv").read_text(encoding="utf-8") == load("derive").csv_text(model)


@pytest.mark.parametrize(("model", "norms"), [("resnet18", 20), ("resnet50", 53)])
def test_shapes_cover_every_batch_norm(model: str, norms: int) -> None:
    units = load("units").load_units(model)
    assert sum(unit.count * (2 if unit.kind == "bn_dual_act" else 1) for unit in units) == norms


CONVOLUTIONS = {"resnet18": 20, "resnet50": 53, "resnext50_32x4d": 53, "cifar.resnet20": 19}


@pytest.mark.parametrize(("model", "convolutions"), CONVOLUTIONS.items())
def test_convolutions_are_those_of_the_models(model: str, convolutions: int) -> None:
    text = (BENCH / "shapes" / f"conv-{model}.csv").read_text(encoding="utf-8")
    assert text == load("derive").conv_csv_text(model)
    rows = load("conv_cases").load(model)
    assert sum(row.count for row in rows) == convolutions
    network = load("derive").build(model)
    linear = network.fc.weight.numel()
    counted = fr.models.count(network, load("derive").image_size_of(model)).macs
    assert sum(row.count * row.macs() for row in rows) + linear == counted


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_ops_agree_on_every_kind(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    load("ops").main(["--quick", "--dry", "--pages", "fresh", "--layout", layout, *allow_stock()])
    assert "everything agreed" in capsys.readouterr().out


@pytest.mark.parametrize("passes", ["forward", "backward", "infer"])
def test_ops_run_each_pass(passes: str, capsys: pytest.CaptureFixture[str]) -> None:
    load("ops").main(["--quick", "--dry", "--pages", "fresh", "--passes", passes, "--dtype", "fp32", *allow_stock()])
    assert "everything agreed" in capsys.readouterr().out


def test_ops_write_what_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "ops.json"
    small = ("--quick", "--rounds", "1", "--batch", "1", "--max-size", "4", "--cache-mb", "1", "--dtype", "fp32")
    load("ops").main([*small, "--kind", "bn_act", "stem_pool", "--output", str(output), *allow_stock()])
    result = json.loads(output.read_text(encoding="utf-8"))
    load("timing").check(result)
    if sys.platform == "linux":  # each memory mode in a process of its own
        assert {row["pages"] for row in result["rows"]} == {"fresh", "resident"}
    assert {row["kind"] for row in result["rows"]} == {"bn_act", "stem_pool"}
    row = next(row for row in result["rows"] if row["kind"] == "bn_act")
    n, c, h, w = row["shape"]
    assert row["minimum_bytes"] == 8 * n * c * h * w * 4
    weighted = next(row for row in result["summary"] if row["name"] == "all units")
    speedups = [row["speedup"]["median"] for row in result["rows"] if row["pages"] == weighted["pages"]]
    assert min(speedups) <= weighted["speedup"] <= max(speedups)


def test_ops_refuse_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fr, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="nothing fused to time"):
        load("ops").main(["--quick", "--dry", "--pages", "fresh", "--kind", "bn_act"])


# Not smaller: a batch norm over two values has a gradient of zero, and its relative error is noise.
@pytest.mark.parametrize(("model", "size"), [("resnet18", "64"), ("cifar.resnet20", "32")])
def test_models_agree(model: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    load("models").main(["--quick", "--dry", "--model", model, "--batch", "4", "--size", size, *allow_stock()])
    assert "everything agreed" in capsys.readouterr().out


def test_models_refuse_stock() -> None:
    arguments = ["--quick", "--dry", "--model", "cifar.resnet20", "--batch", "2", "--size", "16", "--dtype", "fp32"]
    with fr.nn.stock(), pytest.raises(SystemExit, match="batch norms ran stock, 0 fused"):
        load("models").main(arguments)


def test_models_write_what_the_plot_draws(tmp_path: Path) -> None:
    output, picture = tmp_path / "models.json", tmp_path / "images" / "speed.svg"
    small = ("--quick", "--rounds", "1", "--model", "cifar.resnet20", "--batch", "2", "--size", "16", "--dtype", "fp32")
    load("models").main([*small, "--output", str(output), *allow_stock()])
    row = json.loads(output.read_text(encoding="utf-8"))["rows"][0]
    assert row["speedup"]["q1"] <= row["speedup"]["median"] <= row["speedup"]["q3"]
    if sys.platform == "linux":
        assert row["eager_peak_bytes"] > 0
        assert row["fused_peak_bytes"] > 0
    pytest.importorskip("matplotlib")
    load("plot").main([str(output), "--output", str(picture)])
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "resnet18"),
        ("--model", "cifar.resnet20"),
        ("--model", "resnext50_32x4d", "--only", "layer1.0.conv2", "layer2.0.conv2"),
        ("--model", "resnet50", "--blocks", "--only", "layer1.0", "layer2.0", "layer2.1"),
        ("--model", "resnet18", "--blocks", "--dtype", "bf16"),
    ],
)
def test_convolutions_agree(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    load("conv").main(["--quick", "--dry", *arguments])
    assert "everything agreed" in capsys.readouterr().out


@pytest.mark.usefixtures("needs_extension")
def test_convolutions_write_what_the_plot_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, picture = tmp_path / "conv.json", tmp_path / "images" / "roofline.svg"
    monkeypatch.setattr(load("ceilings"), "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(load("ceilings"), "MATRICES", (128,))
    small = ("--quick", "--rounds", "1", "--batch", "2", "--max-size", "8", "--pages", "fresh", "--threads", "1")
    load("conv").main([*small, "--only", "conv1", "layer1.0.conv2", "--output", str(output)])
    result = json.loads(output.read_text(encoding="utf-8"))
    load("timing").check(result)
    rows = result["rows"]
    assert len(rows) == 2 * (2 + 6)  # dtypes; the stem's passes and a block's convolution's
    row = next(row for row in rows if row["name"] == "layer1.0.conv2" and row["pass"] == "data fused")
    n, c, h, w = 2, 64, 8, 8
    assert row["flops"] == 2 * n * c * h * w * c * 9
    assert row["minimum_bytes"] == 4 * (4 * n * c * h * w + c * c * 9)
    assert all(0 < row["aten_of_ceiling"] <= 1 for row in rows)
    # Winograd's effective speed is no ceiling.
    counts = load("ceilings").counts
    assert (counts("own", 3), counts("own", 1), counts("aten", 3)) == (False, True, True)
    assert not any(c["by"].startswith("own") and "3x3" in c["by"] for c in result["ceilings"])
    together = next(row for row in result["summary"] if row["name"] == "with batch norm and relu")
    assert together["shapes"] == 2 + 3
    speedups = [row["speedup"]["median"] for row in rows if row["dtype"] == together["dtype"]]
    assert min(speedups) <= together["speedup"] <= max(speedups)
    pytest.importorskip("matplotlib")
    load("plot").main([str(output), "--output", str(picture)])
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")


@pytest.mark.usefixtures("needs_extension")
def test_blocks_write_what_was_measured(tmp_path: Path) -> None:
    output = tmp_path / "blocks.json"
    small = ("--quick", "--rounds", "1", "--batch", "2", "--max-size", "8", "--pages", "fresh", "--dtype", "fp32")
    load("conv").main([*small, "--blocks", "--model", "resnet18", "--only", "layer2.0", "--output", str(output)])
    result = json.loads(output.read_text(encoding="utf-8"))
    load("timing").check(result)
    (row,) = result["rows"]
    outputs = 2 * 4 * 4 * 128
    assert row["flops"] == 6 * outputs * (64 * 9 + 128 * 9 + 64)
    assert row["runs_as"] == "one operator"


@pytest.mark.usefixtures("needs_extension")
def test_convolutions_refuse_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    case, small = load("conv_cases").Case, ["--quick", "--dry", "--model", "resnet18", "--dtype", "fp32"]
    with fr.nn.stock(), pytest.raises(SystemExit, match="our side runs aten::"):
        load("conv").main([*small, "--blocks", "--only", "layer1.0"])
    monkeypatch.setattr(case, "_own_forward", lambda self: (self._aten_conv(self.x),))
    with pytest.raises(SystemExit, match="our side runs aten::"):
        load("conv").main([*small, "--only", "layer1.0.conv1"])
    monkeypatch.setattr(fr, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="nothing of ours to time"):
        load("conv").main(small)


INFERENCE = ("--models", "resnet18", "--batch", "2", "--size", "32", "--threads", "1")


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_inference_agrees_and_names_what_is_missing(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    missing = {name: c.why_missing(dtype) for name, c in load("contestants").CONTESTANTS.items()}
    present = [name for name in missing if name != "inductor"]  # it compiles for a minute
    load("inference").main([*INFERENCE, "--dtype", dtype, "--dry", "--contestants", *present])
    out = capsys.readouterr().out
    assert "everything agreed" in out
    for name in present:
        assert f"  {name:<12} {'missing: ' if missing[name] else 'error '}" in out
    assert missing["ours"] is None
    assert (missing["onnxruntime"] is None) <= (dtype == "fp32")


@pytest.mark.usefixtures("needs_extension")
@pytest.mark.parametrize("apart", [(), ("--apart",)])
def test_inference_writes_what_the_plot_draws(tmp_path: Path, apart: tuple[str, ...]) -> None:
    output, picture = tmp_path / "inference.json", tmp_path / "images" / "inference.svg"
    small = (*INFERENCE, "--dtype", "fp32", "--rounds", "2", "--contestants", "ours", "eager", *apart)
    load("inference").main([*small, "--json", str(output)])
    result = json.loads(output.read_text(encoding="utf-8"))
    load("timing").check(result)
    (row,) = result["rows"]
    assert row["apart"] is bool(apart)
    assert set(row["error"]) == {"ours", "eager"}
    assert row["speedup_over_eager"]["median"] > 0
    for name in ("ours", "eager"):
        assert row[f"{name}_start_seconds"] > 0
        assert row[f"{name}_images_per_s"] == pytest.approx(2 / row[f"{name}_seconds"]["median"], rel=1e-3)
    pytest.importorskip("matplotlib")
    load("plot").main([str(output), "--output", str(picture)])
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")


@pytest.mark.usefixtures("needs_extension")
def test_inference_refuses_stock_and_wrong_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = load("contestants")
    eager = contestants.CONTESTANTS["eager"]
    small = [*INFERENCE, "--dtype", "fp32", "--dry", "--contestants", "ours"]
    monkeypatch.setitem(contestants.CONTESTANTS, "ours", eager)
    with pytest.raises(SystemExit, match="ours runs aten::"):
        load("inference").main(small)

    def wrong(*arguments: Any) -> Any:
        call = eager.load(*arguments)
        return lambda: call() + torch.tensor([1e-2, *[0.0] * 999])

    monkeypatch.setitem(contestants.CONTESTANTS, "ours", contestants.Contestant(eager.save, wrong))
    with pytest.raises(SystemExit, match="ours: wrong logits"):
        load("inference").main(small)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("conv", ("--model", "resnet19"), "invalid choice"),
        ("conv", ("--layout", "contiguous"), "channels_last only"),
        ("plot", ("--output", "x.svg"), "name the results too"),
        ("ops", ("--rounds", "0"), "expected a whole number above 0"),
        ("ops", ("--kind", "conv"), "invalid choice"),
        ("ops", ("--model", "resnet18", "--kind", "bn"), "no unit of kind bn"),
        ("models", ("--model", "resnet19"), "invalid choice"),
        ("inference", ("--models", "resnet19"), "invalid choice"),
        ("inference", ("--contestants", "tvm"), "invalid choice"),
        ("inference", ("--batch", "0"), "expected a whole number above 0"),
        ("plot", ("/does/not/exist.json",), "exist.json"),
    ],
)
def test_bad_options_are_named(
    script: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load(script).main([*arguments, "--pages", "fresh"] if script == "ops" else arguments)
    assert message in capsys.readouterr().err + str(stop.value)


def valid_result() -> dict[str, Any]:
    spread = {"median": 1.5, "q1": 1.4, "q3": 1.6, "low": 1.0, "high": 2.0}
    return {
        "schema": 1, "benchmark": "models", "created": "2026-01-01T00:00:00+00:00", "commit": "unknown",
        "machine": {"cpu": "some"}, "options": {}, "rows": [{"name": "resnet18", "speedup": spread}], "summary": [],
    }  # fmt: skip


def test_result_check_accepts_the_valid_and_names_the_wrong() -> None:
    check = load("timing").check
    check(valid_result())
    for key in valid_result():
        broken = valid_result()
        del broken[key]
        with pytest.raises(ValueError, match=key):
            check(broken)
    broken = valid_result()
    del broken["rows"][0]["speedup"]["q1"]
    with pytest.raises(ValueError, match="speedup"):
        check(broken)


def test_verify_stops_what_disagrees() -> None:
    verify = load("timing").verify
    x = torch.ones(4)
    assert verify("same", [x], [x], 1e-6) == 0
    for wrong in (x + 1e-3, x * float("nan")):
        with pytest.raises(SystemExit, match="disagree"):
            verify("different", [x, wrong], [x, x], 1e-6)


def test_interleave_takes_turns_and_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_resnet.timing.MIN_SAMPLE_SECONDS", 0.0)  # one call a sample
    calls: list[str] = []
    result = testing.interleave({name: (lambda n=name: calls.append(n)) for name in "abc"}, rounds=4, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert [len(result.seconds[name]) for name in "abc"] == [4, 4, 4]


def test_interleave_repeats_short_calls_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_resnet.timing.MIN_SAMPLE_SECONDS", 3600.0)
    monkeypatch.setattr("fused_resnet.timing._sample", lambda call, repeats, _clock: (call(), repeats)[1:] * 2)
    result = testing.interleave({"a": lambda: None, "b": lambda: None}, rounds=1, warmup=1)
    assert result.seconds["a"] == result.seconds["b"] == [3600]


def test_ratio_is_taken_within_rounds() -> None:
    comparison = testing.Comparison({"stock": [2.0, 20.0, 4.0], "fused": [1.0, 10.0, 1.0]})
    ratio = comparison.ratio("stock", "fused")
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 4.0)


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, 0)])
def test_interleave_rejects_no_rounds(rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="rounds and warmup"):
        testing.interleave({"a": lambda: None}, rounds=rounds, warmup=warmup)


def test_batch_norms_are_counted() -> None:
    norm, x = torch.nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    stock = testing.count_batch_norms(lambda: [norm(x), norm(x)])
    assert (stock.fused, stock.stock, stock.stock_operators) == (0, 2, {"aten::native_batch_norm": 2})


@pytest.mark.usefixtures("needs_extension")
def test_fused_batch_norms_are_counted() -> None:
    x, mean, var = torch.randn(2, 4, 3, 3), torch.zeros(4), torch.ones(4)

    def call() -> None:
        fr.ops.batch_norm_act(x, mean, var, training=True)
        fr.ops.batch_norm_act_max_pool(x, mean, var, training=True)

    calls = testing.count_batch_norms(call)
    assert (calls.fused, calls.stock) == (2, 0)


@pytest.mark.usefixtures("needs_extension")
def test_batch_norms_inside_whole_blocks_are_counted() -> None:
    model = fr.models.resnet18(num_classes=4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    calls = testing.count_batch_norms(lambda: model(x))
    assert (calls.fused, calls.stock) == (20, 0)
