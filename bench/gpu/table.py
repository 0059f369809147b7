"""All results of one run of bench/gpu.sh as one table: what each step came to, then the figures, from their JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timing

Document = dict[str, Any]

SIDES = ("eager", "compile", "fused")
BENCHMARKS = ("ceilings", "tests", "kernels", "models", "inference", "graphs", "probe")


def load(folder: Path) -> dict[str, Document]:
    """The documents that are there and whole, by benchmark."""
    found: dict[str, Document] = {}
    for name in BENCHMARKS:
        path = folder / f"{name}.json"
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            timing.check(document)
            found[name] = document
    return found


def earlier(folder: Path, name: str) -> bool:
    """Whether a document is of another run than steps.tsv: no step of that name is noted there, and it is older."""
    noted = folder / "steps.tsv"
    if not noted.exists() or name in {step for step, _, _ in steps(folder)}:
        return False
    return (folder / f"{name}.json").stat().st_mtime < noted.stat().st_mtime


def steps(folder: Path) -> list[tuple[str, str, str]]:
    """What bench/gpu.sh noted: step, what became of it, seconds."""
    path = folder / "steps.tsv"
    if not path.exists():
        return []
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(name, state, seconds) for name, state, seconds in lines]


def _median(row: Document, key: str) -> float | None:
    return row[key]["median"] if key in row else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def ceilings(document: Document) -> Iterator[str]:
    """Best bandwidth of each kind, and matrix products."""
    rows = document["rows"]
    for name in ("copy", "read", "write"):
        best = max((row["gb_per_s"] for row in rows if row["name"] == name), default=None)
        yield f"  {name:<20}{_number(best, '10.0f', ' GB/s')}"
    for row in rows:
        if "tflop_per_s" in row:
            yield f"  {row['name']:<20}{row['tflop_per_s']:>10} TFLOP/s"
        elif row["name"] == "launch":
            yield f"  {'launch':<20}{_number(row['seconds']['median'] * 1e6, '10.2f', ' us')}"


def tests(document: Document) -> Iterator[str]:
    """Counts, what failed, and why tests were skipped."""
    for row in document["summary"]:
        if row["name"] == "total":
            counts = ", ".join(
                f"{row.get(key, 0)} {key.replace('_', ' ')}" for key in ("passed", "failed", "skipped", "not_run")
            )
            yield f"  {counts} of {row['collected']}"
            yield from (f"  skipped {count}: {why}" for why, count in row.get("why_skipped", {}).items())
        else:
            yield f"  FAILED {row['name']}: {row.get('message', '')}"


def kernels(document: Document) -> Iterator[str]:
    """Weighted by how often the model holds a unit."""
    header = f"{'dtype':<7}{'pass':<10}{'of copy':>8}{'worst':>8}{'x eager':>9}{'x cuDNN':>9}"
    yield f"  {'':<26}{header}  eager's batch norm"
    for row in document["summary"]:
        fraction, worst = row.get("copy_fraction"), row.get("copy_fraction_worst")
        yield (
            f"  {row['name']:<26}{row['dtype']:<7}{row.get('passes', ''):<10}{_number(fraction, '8.0%'):>8}"
            f"{_number(worst, '8.0%'):>8}{_number(row.get('speedup'), '9.2f'):>9}"
            f"{_number(row.get('speedup_over_cudnn'), '9.2f'):>9}  {' '.join(row.get('eager_batch_norm', []))}".rstrip()
        )
    refused = Counter(
        (row["contestant"], row["dtype"], row["passes"], row["why"])
        for row in document["rows"]
        if row.get("status") == "not supported"
    )
    for (contestant, dtype, passes, why), count in refused.items():
        yield f"  {contestant} not supported: {dtype} {passes}, {count} units: {why}"
    yield from _left_out(document)


def models(document: Document) -> Iterator[str]:
    """Images per second of every contestant; ratios are ours over theirs within a round."""
    header = "".join(f"{side:>10}" for side in SIDES)
    yield f"  {'':<10}{'dtype':<7}{'batch':>6}{header}   {'x eager':<9}{'x compile':<11}memory"
    done = [row for row in document["rows"] if "fused_images_per_s" in row]
    for row in done:
        speeds = "".join(
            f"{_number(row.get(f'{side}_images_per_s'), '10.1f'):>10}" for side in ("eager", "compile", "fused")
        )
        memory = row["fused_peak_bytes"] / row["eager_peak_bytes"] if "fused_peak_bytes" in row else None
        ratios = [_number(_median(row, key), ".3f") for key in ("speedup", "speedup_over_compile")]
        yield (
            f"  {row['name']:<10}{row['dtype']:<7}{row['batch']:>6}{speeds}   {ratios[0]:<9}{ratios[1]:<11}"
            f"{_number(memory, '.2f')}"
        )
    yield from _left_out(document)


def probe(document: Document) -> Iterator[str]:
    """On how many convolutions each pattern runs, and its time as a multiple of the plain convolution's."""
    summary = document["summary"]
    if not summary:  # it was cut off
        from gpu.probe import summarise

        summary = summarise(document["rows"])
    for row in summary:
        if row["name"] == "frontend":
            yield f"  {row['status']}: no fused cuDNN graph was tried"
            continue
        known = ("name", "dtype", "convolutions", "over_plain")
        states = ", ".join(f"{count} {state}" for state, count in row.items() if state not in known)
        ratios = f"; {' to '.join(f'{x:.2f}' for x in row['over_plain'])} of plain" if row.get("over_plain") else ""
        yield f"  {row['name']:<31}{row['dtype']:<6}{row['convolutions']} convolutions: {states}{ratios}"
    yield from _left_out(document)


def _left_out(document: Document) -> Iterator[str]:
    for row in document["rows"]:
        for key in ("failed", "skipped"):
            if isinstance(row.get(key), str):
                what = " ".join(str(row[k]) for k in ("name", "conv", "kind", "dtype") if k in row)
                sides = "/".join(row.get("sides", []))
                yield f"  {key}: {what} {sides}: {row[key]}".replace(" :", ":")


SECTIONS = {
    "ceilings": ceilings, "tests": tests, "kernels": kernels, "models": models,
    "inference": models, "graphs": models, "probe": probe,
}  # fmt: skip


def text(folder: Path) -> str:
    """The whole table."""
    documents = load(folder)
    lines: list[str] = []
    if documents:
        first = next(iter(documents.values()))
        machine = first["machine"]
        gpu = machine.get("gpu", {})
        lines.append(
            f"{gpu.get('name', '?')}, torch {machine['torch']}, CUDA {gpu.get('cuda')}, cuDNN {gpu.get('cudnn')}, "
            f"fused_resnet {machine['fused_resnet']} at {first['commit']}"
        )
    for name, state, seconds in steps(folder):
        lines.append(f"  {name:<12}{state:<34}{seconds:>5} s")
    for name, document in documents.items():
        mark = f" (of an earlier run: {document['created']})" if earlier(folder, name) else ""
        lines += [f"\n{name}{mark}", *SECTIONS[name](document)]
    return "\n".join(lines) if lines else f"no results in {timing.show(folder)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where bench/gpu.sh wrote its JSON")
    print(text(parser.parse_args(arguments).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
