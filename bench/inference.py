"""Times inference of whole networks: ours, eager PyTorch, inductor with frozen weights, OpenVINO, ONNX Runtime.

    python bench/inference.py                                   the five networks, fp32 and bf16, batch 1, 16 and 64
    python bench/inference.py --apart                           each contestant in a process of its own
    python bench/inference.py --models resnet50 --batch 1 --contestants ours openvino --rounds 5

All get the same weights, batch norms with random statistics included. Every contestant's logits are first compared with
those of eager PyTorch in double precision, and ours must not run PyTorch's convolutions. A contestant that is not
installed is named as missing; `pip install -r requirements/inference_bench.txt` installs them. The time to load a saved
file and to answer once, and the memory, come from a process of its own for each.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timing
import torch
import turns
from contestants import CONTESTANTS, DISTINCT, Setting, images, network
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing

Row = dict[str, object]

MODELS = ("resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2")
# fp32: of the logits, relative, to fp64. bf16: this many times eager's own error, and a slack.
TOLERANCE, BF16_FACTOR, BF16_SLACK = 1e-4, 1.5, 1e-2
OTHERS_WORK = ("aten::convolution", "aten::_convolution", "aten::conv2d", "aten::mkldnn_convolution", "aten::linear")
VERSIONS = ("torch", "openvino", "onnxruntime", "onnx")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--batch", nargs="+", type=timing.positive, default=[1, 16, 64], help="default: 1 16 64")
    parser.add_argument("--size", type=timing.positive, default=224, help="height and width (default: %(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=timing.DTYPES, default=list(timing.DTYPES), help="default: both")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--threads", type=timing.positive, help="default: what torch chose")
    parser.add_argument("--rounds", type=timing.positive, default=11, help="timed rounds (default: %(default)s)")
    parser.add_argument("--apart", action="store_true", help="each contestant in a process of its own")
    parser.add_argument("--no-costs", action="store_true", help="do not measure memory and the time to start")
    parser.add_argument("--dry", action="store_true", help="verify, time nothing, write nothing")
    parser.add_argument("--allow-stock", action="store_true", help="time ours even where it runs PyTorch's operators")
    parser.add_argument("--name", default="inference", help="name of the result file")
    parser.add_argument("--json", type=Path, help="JSON to write (default: bench/results/<cpu>-<isa>/<name>.json)")
    options = parser.parse_args(arguments)
    options.contestants = [name for name in CONTESTANTS if name in options.contestants]
    return options


def exact_logits(model: nn.Module, setting: Setting) -> Tensor:
    """Of the distinct images, by eager PyTorch in double precision."""
    with fr.nn.stock(), torch.no_grad():
        return copy.deepcopy(model).double()(images(setting)[:DISTINCT].double())  # type: ignore[no-any-return]


def verify(setting: Setting, name: str, logits: Tensor, exact: Tensor, tolerance: float) -> float:
    """The relative error of one contestant's logits; exits where it is too large."""
    error = timing.relative_error(logits, exact[torch.arange(setting.batch) % len(exact)])
    if not error <= tolerance:
        raise SystemExit(f"{setting}: {name}: wrong logits: relative error {error:.2e}, allowed {tolerance:.0e}")
    return error


def refuse_stock(setting: Setting, call: turns.Call, options: argparse.Namespace) -> None:
    """Exits where ours computes with PyTorch's operators, unless that is allowed."""
    found = sorted(set(OTHERS_WORK) & set(timing.events(call)))
    if found and not options.allow_stock:
        raise SystemExit(f"{setting}: ours runs {', '.join(found)} (--allow-stock times it anyway)")


def tolerance_of(setting: Setting, folder: Path, model: nn.Module, exact: Tensor) -> float:
    """What is allowed of each contestant."""
    if setting.dtype == "fp32":
        return TOLERANCE
    eager = CONTESTANTS["eager"]
    path = eager.save(copy.deepcopy(model), setting, folder)
    logits = eager.load(path, setting, images(setting))()
    return BF16_FACTOR * verify(setting, "eager", logits, exact, 1.0) + BF16_SLACK


def measure(
    setting: Setting, model: nn.Module, exact: Tensor, options: argparse.Namespace, progress: timing.Progress
) -> Row:
    """Verifies and times one setting."""
    missing = {name: why for name in options.contestants if (why := CONTESTANTS[name].why_missing(setting.dtype))}
    names = [name for name in options.contestants if name not in missing]
    row: Row = {
        "name": setting.model, "batch": setting.batch, "size": setting.size, "dtype": setting.dtype,
        "apart": options.apart, "missing": missing, "error": {},
    }  # fmt: skip
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tolerance = tolerance_of(setting, folder, model, exact)
        players: dict[str, turns.Here | turns.Apart] = {}
        for name in names:
            progress.begin(f"{setting}: preparing {name}")
            path = CONTESTANTS[name].save(copy.deepcopy(model), setting, folder)
            if options.apart or not (options.no_costs or options.dry):
                apart = turns.Apart(name, path, setting)
                row[f"{name}_start_seconds"] = float(f"{apart.start_seconds:.4g}")
                row[f"{name}_peak_bytes"], row[f"{name}_serving_bytes"] = apart.peak_bytes, apart.serving_bytes
                if options.apart:
                    players[name] = apart
                    errors[name] = verify(setting, name, apart.logits, exact, tolerance)
                else:
                    apart.close()
            if name == "ours" or not options.apart:
                here = turns.Here(name, path, setting)
                errors[name] = verify(setting, name, here.call(), exact, tolerance)
                players.setdefault(name, here)
                if name == "ours":
                    refuse_stock(setting, here.call, options)
        row["error"] = {name: float(f"{error:.3g}") for name, error in errors.items()}
        if not options.dry and players:
            progress.begin(str(setting))
            add_times(row, turns.take_turns(players, options.rounds, progress.advance), names, setting.batch)
        for player in players.values():
            if isinstance(player, turns.Apart):
                player.close()
    return row


def add_times(row: Row, comparison: testing.Comparison, names: Sequence[str], batch: int) -> None:
    """Adds each contestant's time, and how many times as fast ours is."""
    for name in names:
        row[f"{name}_seconds"] = comparison.time(name).to_json()
        row[f"{name}_images_per_s"] = round(batch / comparison.time(name).median, 3)
        if name != "ours" and "ours" in names:
            row[f"speedup_over_{name}"] = comparison.ratio(name, "ours").to_json()


def lines(row: Row, names: Sequence[str]) -> str:
    """One result as text, a line for each contestant."""
    text = [f"{row['name']} batch {row['batch']} {row['size']}x{row['size']} {row['dtype']}"]
    missing, errors = row["missing"], row["error"]
    assert isinstance(missing, dict)
    assert isinstance(errors, dict)
    for name in names:
        if name in missing:
            text.append(f"  {name:<12} missing: {missing[name]}")
            continue
        line = f"  {name:<12} error {errors[name]:.1e}"
        seconds, ratio = row.get(f"{name}_seconds"), row.get(f"speedup_over_{name}")
        if isinstance(seconds, dict):
            line += f"  {1e3 * seconds['median']:9.2f} ms  {row[f'{name}_images_per_s']:8.2f} img/s"
        if row.get(f"{name}_peak_bytes") is not None:
            mib = [int(str(row[f"{name}_{what}_bytes"])) / 2**20 for what in ("peak", "serving")]
            line += f"  start {row[f'{name}_start_seconds']:7.3f} s  memory {mib[0]:5.0f} MiB, serving {mib[1]:5.0f}"
        if isinstance(ratio, dict):
            line += f"  ours {ratio['median']:.3f}x [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"
        text.append(line)
    return "\n".join(text)


def versions() -> dict[str, str | None]:
    """Of what takes part; None: not installed."""
    found: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    count = len(options.models) * len(options.dtype) * len(options.batch)
    progress = timing.Progress(count * options.rounds)
    rows = []
    for name in options.models:
        model, exact = network(name), None
        for dtype in options.dtype:
            for batch in options.batch:
                setting = Setting(name, batch, options.size, dtype, torch.get_num_threads())
                exact = exact_logits(model, Setting(name, DISTINCT, options.size, dtype, 1)) if exact is None else exact
                row = measure(setting, model, exact, options, progress)
                progress.say(lines(row, options.contestants))
                rows.append(row)
    progress.close()
    if options.dry:
        print("dry run: everything agreed, nothing timed")
        return
    settings = {name: dict(CONTESTANTS[name].settings) for name in options.contestants}
    result = timing.document("inference", options, rows, [], contestants=settings, versions=versions())
    print(f"\nwritten: {timing.show(timing.write(result, options.json, options.name))}")


if __name__ == "__main__":
    main()
