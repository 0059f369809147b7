"""Writes the batch-norm units of a model as data: `python bench/shapes/derive.py` rewrites the CSV files beside it.

A unit is what one fused call covers: the block's last batch norm with its residual, or with the downsample's batch
norm, counts once. Shapes come from running the real model on the meta device, at 224 x 224.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import torch
from torch import nn

import fused_resnet as fr

FOLDER = Path(__file__).resolve().parent
MODELS = ("resnet18", "resnet50")
COLUMNS = ("name", "count", "channels", "height", "width", "kind")
IMAGE_SIZE = 224


def batch_norm_shapes(model: nn.Module, image_size: int = IMAGE_SIZE) -> dict[str, tuple[int, int, int]]:
    """Qualified name of each BatchNorm2d to the (C, H, W) it normalises, in order of execution."""
    shapes: dict[str, tuple[int, int, int]] = {}

    def recorder(name: str):  # type: ignore[no-untyped-def]  # a closure per module
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            _, c, h, w = inputs[0].shape
            shapes[name] = (c, h, w)

        return hook

    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(recorder(name)) for name, norm in norms]
    try:
        model(torch.empty(2, 3, image_size, image_size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def unit_kind(model: nn.Module, name: str) -> str | None:
    """What the batch norm `name` of a torchvision-style ResNet is fused with; None: part of another unit."""
    owner_name, _, leaf = name.rpartition(".")
    if not owner_name:
        return "stem_pool"
    if owner_name.endswith("downsample"):
        return None
    block = model.get_submodule(owner_name)
    is_last = not hasattr(block, f"bn{int(leaf.removeprefix('bn')) + 1}")
    if not is_last:
        return "bn_act"
    return "bn_add_act" if block.downsample is None else "bn_dual_act"


def units(model_name: str) -> list[dict[str, str | int]]:
    """Rows of the CSV file: equal units merged, named after the first."""
    with torch.device("meta"):
        model = getattr(fr.models, model_name)()
    rows: dict[tuple[object, ...], dict[str, str | int]] = {}
    for name, (c, h, w) in batch_norm_shapes(model).items():
        kind = unit_kind(model, name)
        if kind is None:
            continue
        row = rows.setdefault(
            (c, h, w, kind), {"name": name, "count": 0, "channels": c, "height": h, "width": w, "kind": kind}
        )
        row["count"] = int(row["count"]) + 1
    return list(rows.values())


def csv_text(model_name: str) -> str:
    """The whole CSV file of one model."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(units(model_name))
    return buffer.getvalue()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"default: {' '.join(MODELS)}")
    for name in parser.parse_args().models:
        path = FOLDER / f"{name}.csv"
        path.write_text(csv_text(name), encoding="utf-8")
        print(f"{path.name}: {len(path.read_text(encoding='utf-8').splitlines()) - 1} units")


if __name__ == "__main__":
    main()
