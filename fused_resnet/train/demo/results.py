"""The demo's figures, as plain values: what report.json holds and report.html shows."""

from __future__ import annotations

import statistics
from typing import Any

from torch import Tensor

from fused_resnet import _extension
from fused_resnet.timing import machine
from fused_resnet.train.demo.side_by_side import Outcome, Side
from fused_resnet.train.options import plain


def collect(outcome: Outcome, peaks: dict[str, int], *, seconds: float) -> dict[str, Any]:
    """Everything there is to report."""
    fused, stock = outcome.fused, outcome.stock
    per_epoch = [f / s for f, s in zip(fused.images_per_second, stock.images_per_second, strict=True)]
    first, last = fused.evaluations[-1], stock.evaluations[-1]
    labels = outcome.dataset.test.labels
    return {
        "network": outcome.options.model,
        "parameters": sum(p.numel() for p in fused.trainer.model.parameters()),
        "data": outcome.dataset.name,
        "train_images": len(outcome.dataset.train),
        "test_images": len(outcome.dataset.test),
        "classes": list(outcome.dataset.classes),
        "options": plain(outcome.options),
        "augmentation": vars(outcome.dataset.augment),
        "fused_available": _extension.available(),
        "why_unavailable": _extension.why_unavailable(),
        "units_fused": outcome.explanation.fused,
        "units": len(outcome.explanation),
        "fused": _side(fused, peaks["fused"]),
        "stock": _side(stock, peaks["stock"]),
        "speedup": {
            "per_epoch": per_epoch,
            "median": statistics.median(per_epoch),
            "low": min(per_epoch),
            "high": max(per_epoch),
        },
        "memory_ratio": peaks["fused"] / max(1, peaks["stock"]),
        "same_predictions": float((first.predictions == last.predictions).double().mean()),
        "first_loss_difference": abs(fused.step_losses[0] - stock.step_losses[0]),
        "confusion": confusion(labels, first.predictions, len(outcome.dataset.classes)),
        "predictions": first.predictions.tolist(),
        "confidences": [round(c, 6) for c in first.confidences.tolist()],
        "labels": labels.tolist(),
        "machine": machine(),
        "seconds": seconds,
    }


def _side(side: Side, peak: int) -> dict[str, Any]:
    return {
        "step_loss": side.step_losses,
        "step_seconds": side.step_seconds,
        "train_loss": side.train_loss,
        "train_accuracy": side.train_accuracy,
        "test_loss": [e.loss for e in side.evaluations],
        "test_accuracy": [e.accuracy for e in side.evaluations],
        "images_per_second": side.images_per_second,
        "median_images_per_second": statistics.median(side.images_per_second),
        "peak_memory_bytes": peak,
    }


def confusion(labels: Tensor, predictions: Tensor, classes: int) -> list[list[int]]:
    """How many images of class `row` were taken for class `column`."""
    counts = (labels * classes + predictions).bincount(minlength=classes * classes)
    rows: list[list[int]] = counts.view(classes, classes).tolist()
    return rows


def sentence(report: dict[str, Any]) -> str:
    """The outcome in one sentence."""
    accuracy, stock_accuracy = (report[side]["test_accuracy"][-1] for side in ("fused", "stock"))
    read = f"{report['network']} reads {accuracy:.1%} of {report['test_images']} unseen digits right"
    if not report["fused_available"]:
        return f"{read}; both runs are stock PyTorch, because this installation has no fused kernels"
    return (
        f"{read} (stock PyTorch: {stock_accuracy:.1%}); fused, it trained {report['speedup']['median']:.2f} times as "
        f"fast with {report['memory_ratio']:.2f} times the memory"
    )
