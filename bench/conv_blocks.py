"""Whole residual blocks, forward and backward, fused against stock: `python bench/conv.py --blocks`."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import timing
import torch
from conv_cases import SHAPES, is_stock
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import testing

sys.path.insert(0, str(SHAPES))
import derive

Row = dict[str, object]

# fp32: of fused against eager. bf16: both against eager fp32, and fused may be this much further away than eager bf16.
TOLERANCE = 1e-2
BF16_FACTOR, BF16_SLACK, BF16_MOST = 1.5, 1e-2, 0.3


@dataclass(frozen=True)
class Block:
    """One distinct residual block of a model: named after the first, with the module on the meta device."""

    name: str
    count: int
    channels: int
    height: int
    width: int
    module: nn.Module

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return f"{kind} {self.channels}x{self.height}x{self.width}" + ("" if self._same() else f" /{self._stride()}")

    def _stride(self) -> int:
        return int(self.module.stride)  # type: ignore[arg-type]

    def _same(self) -> bool:
        return getattr(self.module, "downsample", None) is None

    def macs(self) -> int:
        """Multiply-adds of the convolutions for one image."""
        return sum(extent * conv.weight[0].numel() for conv, extent in outputs(self))


def outputs(block: Block) -> list[tuple[nn.Conv2d, int]]:
    """Each convolution of a block with the number of elements it puts out for one image."""
    found: list[tuple[nn.Conv2d, int]] = []

    def hook(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        found.append((module, output[0].numel()))

    module = copy.deepcopy(block.module)
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.register_forward_hook(hook)
    module(torch.empty(2, block.channels, block.height, block.width, device="meta"))
    return found


def load(model_name: str) -> list[Block]:
    """The distinct residual blocks of a model."""
    blocks: dict[tuple[object, ...], Block] = {}
    model = derive.build(model_name)
    kinds = (fr.nn.BasicBlock, fr.nn.Bottleneck)
    for name, module, (c, h, w) in derive.input_shapes(model, kinds, derive.image_size_of(model_name)):
        key = (type(module), c, h, w, str(module))
        found = blocks.get(key)
        blocks[key] = replace(found, count=found.count + 1) if found else Block(name, 1, c, h, w, module)
    return list(blocks.values())


def build(block: Block) -> nn.Module:
    """The block with weights, in training mode and channels_last."""
    module = copy.deepcopy(block.module).to_empty(device="cpu")
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    return module.train().to(memory_format=torch.channels_last)


class Case:
    """One block at one batch and dtype."""

    def __init__(self, block: Block, batch: int, dtype: str) -> None:
        self.block, self.dtype = block, dtype
        shape = (batch, block.channels, block.height, block.width)
        drawn = torch.randn(shape).relu().to(timing.DTYPES[dtype])
        self.x = drawn.to(memory_format=torch.channels_last).requires_grad_()
        self.modules = {"own": build(block)}
        for side in ("aten", "exact"):
            self.modules[side] = copy.deepcopy(self.modules["own"])
        with fr.nn.stock(), torch.no_grad():
            self.g = torch.randn_like(self._forward("aten"))

    def _forward(self, side: str) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bf16" and side != "exact"):
            y: Tensor = self.modules[side](self.x.float() if side == "exact" else self.x)
        return y

    def step(self, side: str) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward of one contestant: "own", "aten", or "exact", which is ATen's in fp32."""
        operands = [self.x, *self.modules[side].parameters()]
        context = nullcontext if side == "own" else fr.nn.stock

        def run() -> tuple[Tensor, ...]:
            with context():
                y = self._forward(side)
                return (y.detach(), *torch.autograd.grad(y, operands, self.g.to(y.dtype)))

        return run


def refuse_stock(what: str, case: Case, options: argparse.Namespace) -> str:
    """Exits when our side's step runs ATen's convolutions or batch norms, unless that is allowed.

    Returns:
        How the block runs: "one operator", or "stages" of several.
    """
    names = timing.events(case.step("own"))
    stock = sorted({name for name in names if is_stock(name)})
    if not options.allow_stock and (stock or not any(name.startswith("fused_resnet::") for name in names)):
        reason = ", ".join(stock) or "no operator of ours"
        raise SystemExit(f"{what}: our side runs {reason} (--allow-stock times it anyway)")
    convs = sum(isinstance(child, nn.Conv2d) for child in case.modules["own"].modules())
    return "one operator" if names.count("fused_resnet::conv2d_norm_forward") == convs else "stages"


def flat(results: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The output, and all gradients as one vector."""
    return results[0], torch.cat([gradient.flatten().float() for gradient in results[1:]])


def verify(what: str, case: Case) -> dict[str, float]:
    """Relative errors of output and gradients; exits if ours are too large."""
    own, aten, exact = (flat(case.step(side)()) for side in ("own", "aten", "exact"))
    errors = {}
    for index, key in enumerate(("output", "gradient")):
        tolerance = TOLERANCE
        if case.dtype == "bf16":
            errors[f"aten_{key}"] = timing.relative_error(aten[index], exact[index])
            tolerance = min(BF16_FACTOR * errors[f"aten_{key}"] + BF16_SLACK, BF16_MOST)
        errors[f"own_{key}"] = timing.verify(f"{what} {key}", [own[index]], [exact[index]], tolerance)
    return errors


def measure(block: Block, dtype: str, options: argparse.Namespace, progress: timing.Progress) -> Row | None:
    """Verifies and times one block; None on a dry run."""
    what = f"{block.name} {block} {dtype}"
    progress.begin(what)
    case = Case(block, options.batch, dtype)
    runs_as = refuse_stock(what, case, options)
    errors = verify(what, case)
    if options.dry:
        progress.advance(options.rounds)
        return None
    comparison = testing.interleave(
        {side: case.step(side) for side in ("aten", "own")}, rounds=options.rounds,
        clock=timing.CLOCKS[options.clock], on_round=progress.advance,
    )  # fmt: skip
    flops = 3 * 2 * options.batch * block.macs()  # forward, data gradient, weight gradient
    row: Row = {
        "name": block.name, "pass": "forward and backward", "count": block.count, "block": str(block), "dtype": dtype,
        "layout": "channels_last", "batch": options.batch, "shape": list(case.x.shape), "flops": flops,
        "runs_as": runs_as,
        "error": {key: float(f"{value:.3g}") for key, value in errors.items()},
        "speedup": comparison.ratio("aten", "own").to_json(),
    }  # fmt: skip
    for side in ("own", "aten"):
        row[f"{side}_seconds"] = comparison.time(side).to_json()
        row[f"{side}_gflop_per_s"] = round(flops / comparison.time(side).median / 1e9, 2)
        row[f"{side}_page_faults"] = comparison.page_faults(side)
    progress.say(line(row))
    return row


def line(row: Row) -> str:
    """One result as a line of text."""
    speedup, own, aten = row["speedup"], row["own_seconds"], row["aten_seconds"]
    assert isinstance(speedup, dict)
    assert isinstance(own, dict)
    assert isinstance(aten, dict)
    return (
        f"{row['name']:<12}{row['block']:<28}{row['dtype']:<5}own {own['median'] * 1e3:8.2f} ms  "
        f"stock {aten['median'] * 1e3:8.2f} ms  {speedup['median']:5.2f}x [{speedup['q1']:.2f}, {speedup['q3']:.2f}]  "
        f"own {row['own_gflop_per_s']:7.1f} GFLOP/s" + ("" if row["runs_as"] == "one operator" else "  (in stages)")
    )


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Sums over the model, time x count, of each dtype; the stock time is ours times the median ratio."""
    result: list[Row] = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        group = [row for row in rows if row["dtype"] == dtype]
        own = [int(str(r["count"])) * float(r["own_seconds"]["median"]) for r in group]  # type: ignore[index]
        aten = [t * float(r["speedup"]["median"]) for t, r in zip(own, group, strict=True)]  # type: ignore[index]
        result.append(
            {
                "name": "all blocks", "dtype": dtype, "own_seconds": float(f"{sum(own):.5g}"),
                "aten_seconds": float(f"{sum(aten):.5g}"), "speedup": round(sum(aten) / sum(own), 4),
            }
        )  # fmt: skip
    return result


def print_summary(summary: Sequence[Row]) -> None:
    """The sums as lines."""
    print()
    for row in summary:
        print(
            f"all blocks, weighted by count, {row['dtype']}: own {row['own_seconds'] * 1e3:.1f} ms, "  # type: ignore[operator]
            f"stock {row['aten_seconds'] * 1e3:.1f} ms, {row['speedup']:.2f}x"  # type: ignore[operator]
        )


def run(options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Rows and summary of the blocks that the options ask for."""
    blocks = load(options.model)
    known = [block.name for block in blocks]
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        raise SystemExit(f"{options.model} has no block {', '.join(unknown)}, only {', '.join(known)}")
    if options.only:
        blocks = [block for block in blocks if block.name in options.only]
    if options.max_size:
        size = options.max_size
        blocks = [replace(b, height=min(b.height, size), width=min(b.width, size)) for b in blocks]
    progress = timing.Progress(len(blocks) * len(options.dtype) * options.rounds)
    found = [measure(block, dtype, options, progress) for dtype in options.dtype for block in blocks]
    progress.close()
    rows = [row for row in found if row is not None]
    return rows, summarise(rows)
