"""Writes batch-norm units and convolutions of models as data: `python bench/shapes/derive.py` rewrites the CSV files.

A unit is what one fused call covers: the block's last batch norm with its residual, or with the downsample's batch
norm, counts once. `<model>.csv` holds the units, `conv-<model>.csv` the distinct convolutions. Shapes come from running
the real model on the meta device, at 224 x 224, CIFAR models at 32 x 32.
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
CONV_MODELS = ("resnet18", "resnet50", "resnext50_32x4d", "cifar.resnet20")
CONV_COLUMNS = (
    "name", "count", "role", "in_channels", "out_channels", "height", "width", "kernel", "stride", "padding",
    "dilation", "groups",
)  # fmt: skip
IMAGE_SIZE, CIFAR_SIZE = 224, 32

Row = dict[str, str | int]


def build(model_name: str) -> nn.Module:
    """The model without storage; "cifar.resnet20" is that of `fused_resnet.models.cifar`."""
    family, _, name = model_name.rpartition(".")
    with torch.device("meta"):
        model: nn.Module = getattr(getattr(fr.models, family) if family else fr.models, name)()
    return model


def image_size_of(model_name: str) -> int:
    """Height and width of the images that the model is made for."""
    return CIFAR_SIZE if model_name.startswith("cifar.") else IMAGE_SIZE


def input_shapes(
    model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...], image_size: int
) -> list[tuple[str, nn.Module, tuple[int, int, int]]]:
    """Qualified name, module and the (C, H, W) it gets, of every module of `kind`, in order of execution."""
    found: list[tuple[str, nn.Module, tuple[int, int, int]]] = []

    def recorder(name: str):  # type: ignore[no-untyped-def]  # a closure per module
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            _, c, h, w = inputs[0].shape
            found.append((name, module, (c, h, w)))

        return hook

    chosen = [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]
    handles = [m.register_forward_pre_hook(recorder(name)) for name, m in chosen]
    try:
        model(torch.empty(2, 3, image_size, image_size, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return found


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


def units(model_name: str) -> list[Row]:
    """Rows of the units' CSV file: equal units merged, named after the first."""
    model = build(model_name)
    rows: dict[tuple[object, ...], Row] = {}
    for name, _, (c, h, w) in input_shapes(model, nn.BatchNorm2d, image_size_of(model_name)):
        kind = unit_kind(model, name)
        if kind is None:
            continue
        row = rows.setdefault(
            (c, h, w, kind), {"name": name, "count": 0, "channels": c, "height": h, "width": w, "kind": kind}
        )
        row["count"] = int(row["count"]) + 1
    return list(rows.values())


def equal_pair(model_name: str, name: str, pair: object) -> int:
    """The one number of a pair; every convolution of these models is square."""
    if not isinstance(pair, tuple) or len(set(pair)) != 1:
        raise SystemExit(f"{model_name}: {name}: expected the same number twice, got {pair}")
    return int(pair[0])


def role(model: nn.Module, name: str) -> str:
    """Where the convolution `name` stands in a ResNet.

    "stem"; "first", "middle" or "last" of a block's branch; "shortcut". A batch norm and a relu stand before a middle
    and a last one, and behind all but the last and the shortcut, whose batch norms end in the block's add.
    """
    owner_name, _, leaf = name.rpartition(".")
    if not owner_name:
        return "stem"
    if owner_name.endswith("downsample"):
        return "shortcut"
    number = int(leaf.removeprefix("conv"))
    if number == 1:
        return "first"
    return "middle" if hasattr(model.get_submodule(owner_name), f"conv{number + 1}") else "last"


def convolutions(model_name: str) -> list[Row]:
    """Rows of the convolutions' CSV file: equal ones merged, named after the first."""
    model = build(model_name)
    rows: dict[tuple[object, ...], Row] = {}
    for name, module, (c, h, w) in input_shapes(model, nn.Conv2d, image_size_of(model_name)):
        assert isinstance(module, nn.Conv2d)
        pairs = {"kernel": module.kernel_size, "stride": module.stride, "padding": module.padding}
        shape: Row = {
            "role": role(model, name), "in_channels": c, "out_channels": module.out_channels, "height": h, "width": w,
            **{key: equal_pair(model_name, name, pair) for key, pair in pairs.items()},
            "dilation": equal_pair(model_name, name, module.dilation), "groups": module.groups,
        }  # fmt: skip
        row = rows.setdefault(tuple(shape.values()), {"name": name, "count": 0, **shape})
        row["count"] = int(row["count"]) + 1
    return list(rows.values())


def _csv(columns: tuple[str, ...], rows: list[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def csv_text(model_name: str) -> str:
    """The whole CSV file of one model's units."""
    return _csv(COLUMNS, units(model_name))


def conv_csv_text(model_name: str) -> str:
    """The whole CSV file of one model's convolutions."""
    return _csv(CONV_COLUMNS, convolutions(model_name))


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    files = {f"{name}.csv": csv_text(name) for name in MODELS}
    files |= {f"conv-{name}.csv": conv_csv_text(name) for name in CONV_MODELS}
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.splitlines()) - 1} rows")


if __name__ == "__main__":
    main()
