"""report.html: one file, nothing to load, made from the same figures as report.json."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from fused_resnet.train.data import InMemory, Split
from fused_resnet.train.demo import svg
from fused_resnet.train.demo.style import STYLE
from fused_resnet.train.demo.svg import TIMES
from fused_resnet.train.progress import clock

_SAMPLE = 42
_LEAST_CERTAIN = 18
# The loss of one batch of 64 jumps about: the curve is its mean over half an epoch.
_SMOOTHING = 0.5


def render(report: dict[str, Any], test: Split) -> str:
    """The whole page."""
    body = [_head(report), _cards(report), _learning(report), _gain(report), _reading(report, test), _method(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fused_resnet demo</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _head(r: dict[str, Any]) -> str:
    warning = ""
    if not r["fused_available"]:
        warning = (
            '<p class="warn"><b>Both runs below are stock PyTorch.</b> This installation has no fused kernels, so '
            f"there is no gain to see: {escape(str(r['why_unavailable']))}</p>"
        )
    return (
        "<h1>A ResNet learns to read digits, fused and stock</h1>"
        f'<p class="lead">The network <b>{escape(_network(r))}</b> ({r["parameters"]:,} parameters) was trained '
        f"twice on {r['train_images']:,} real handwritten digits: once with the fused kernels of fused_resnet, once "
        "with stock PyTorch. Same seed, same first weights, same images in the same order. It was then asked to read "
        f"{r['test_images']:,} digits it had never seen.</p>{warning}"
    )


def _cards(r: dict[str, Any]) -> str:
    accuracy, stock_accuracy = r["fused"]["test_accuracy"][-1], r["stock"]["test_accuracy"][-1]
    missed = sum(p != label for p, label in zip(r["predictions"], r["labels"], strict=True))
    speed, memory = r["speedup"], r["memory_ratio"]
    fused_peak, stock_peak = (_megabytes(r[side]["peak_memory_bytes"]) for side in ("fused", "stock"))
    apart = r["first_loss_difference"]
    agreement = f"differ by less than {_round_up(apart)}" if apart else "are equal to the last bit"
    cards = [
        (
            f"{accuracy:.1%}",
            "of unseen digits read right",
            f"{r['test_images'] - missed} of {r['test_images']}; stock PyTorch: {stock_accuracy:.1%}",
        ),
        (
            f"{speed['median']:.2f}{TIMES}",
            "as fast as stock PyTorch",
            f"median over {len(speed['per_epoch'])} epochs; {speed['low']:.2f} to {speed['high']:.2f}",
        ),
        (
            f"{memory:.2f}{TIMES}",
            "the memory of stock PyTorch",
            f"{fused_peak} instead of {stock_peak} at the peak",
        ),
        (
            f"{r['same_predictions']:.1%}",
            "read alike by both networks",
            f"their first losses {agreement}",
        ),
    ]
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{big}</b><span>{text}</span><small>{small}</small></div>'
            for big, text, small in cards
        )
        + "</div>"
    )


def _learning(r: dict[str, Any]) -> str:
    epochs = len(r["fused"]["test_accuracy"])
    curves = {side: _smooth(r[side]["step_loss"], epochs) for side in ("stock", "fused")}
    values = [y for _, ys in curves.values() for y in ys]
    loss_axis = svg.Axis(max(min(values) * 0.8, 1e-5), max(values) * 1.2, "loss", lambda v: f"{v:.3g}", log=True)
    loss = svg.line_chart(
        [svg.Series(side, side, *curves[side]) for side in ("stock", "fused")],
        loss_axis,
        x_high=epochs,
        x_label="epoch",
        title="Training loss of both runs",
    )
    at = [epoch + 1.0 for epoch in range(epochs)]
    lowest = min(min(r[side]["test_accuracy"]) for side in ("stock", "fused"))
    # From a round value below the worst epoch up to 100%.
    low = min(0.9, int(lowest * 10) / 10)
    accuracy = svg.line_chart(
        [svg.Series(side, side, at, r[side]["test_accuracy"], marks=True) for side in ("stock", "fused")],
        svg.Axis(low, 1.0, "accuracy", lambda v: f"{v:.1%}".replace(".0%", "%")),
        x_high=epochs,
        x_label="epoch",
        title="Accuracy on unseen digits of both runs",
    )
    return (
        "<h2>Is it right?</h2><p class='soft'>Fusing must change the speed, not the learning: the thin blue line "
        "should run inside the broad orange one, apart from rounding, which grows as training goes on.</p>"
        + _legend()
        + '<div class="pair">'
        + _figure("Training loss", "How wrong it is on what it learns from (logarithmic; lower is better).", loss)
        + _figure("Accuracy on unseen digits", "Share of the test digits read right after each epoch.", accuracy)
        + "</div>"
    )


def _gain(r: dict[str, Any]) -> str:
    speed = {side: r[side]["median_images_per_second"] for side in ("fused", "stock")}
    memory = {side: r[side]["peak_memory_bytes"] for side in ("fused", "stock")}
    throughput = svg.bars(
        [(side, side, speed[side], f"{speed[side]:,.0f} img/s") for side in ("fused", "stock")],
        title="Images per second",
    )
    peak = svg.bars(
        [(side, side, memory[side], _megabytes(memory[side])) for side in ("fused", "stock")], title="Peak memory"
    )
    ratios = svg.ratio_chart(r["speedup"]["per_epoch"], r["speedup"]["median"], title="Speed-up in each epoch")
    threads = r["machine"]["threads"]
    return (
        "<h2>What did fusion gain?</h2><p class='soft'>The two trainings took turns step by step on the same "
        f"{threads} thread{'s' if threads != 1 else ''}, so a slow moment of the machine slowed both alike.</p>"
        '<div class="pair"><div style="display:grid;gap:16px">'
        + _figure("Training speed", "Images per second, median epoch; longer is better.", throughput)
        + _figure(
            "Peak memory",
            "Of training, beyond Python and the data; shorter is better.",
            peak,
        )
        + "</div>"
        + _figure("Speed-up, epoch by epoch", "How many times as fast the fused run was in each epoch.", ratios)
        + "</div>"
    )


def _reading(r: dict[str, Any], test: Split) -> str:
    matrix = svg.matrix(r["confusion"], r["classes"], title="Confusion matrix of the fused network")
    pairs = list(zip(r["labels"], r["predictions"], strict=True))
    missed = [i for i, (label, prediction) in enumerate(pairs) if label != prediction]
    right = [i for i, (label, prediction) in enumerate(pairs) if label == prediction]
    doubtful = sorted(right, key=lambda i: r["confidences"][i])[:_LEAST_CERTAIN]
    rest = sorted(set(right) - set(doubtful))
    sample = rest[:: max(1, len(rest) // _SAMPLE)][:_SAMPLE]
    hard = _digits(r, test, f"Every mistake ({len(missed)})" if missed else "No mistakes", missed)
    hard += _digits(r, test, "Right, but least certain", doubtful)
    return (
        "<h2>What does it read?</h2><p class='soft'>The fused network on the test digits. Below each picture: what the "
        "network reads, and how sure it is.</p>"
        '<div class="pair">'
        + _figure("Confusion matrix", "Every test digit: its row is what it is, its column what was read.", matrix)
        + f"<figure>{hard}</figure></div>"
        + f"<figure class='wide'>{_digits(r, test, 'A sample of the rest', sample)}</figure>"
    )


def _digits(r: dict[str, Any], test: Split, title: str, chosen: Sequence[int]) -> str:
    return f"<h3>{title}</h3><div class='digits'>" + "".join(_digit(r, test, i) for i in chosen) + "</div>"


def _digit(r: dict[str, Any], test: Split, index: int) -> str:
    label, prediction, sure = r["labels"][index], r["predictions"][index], r["confidences"][index]
    names = r["classes"]
    picture = png(test.images[index, 0]) if isinstance(test, InMemory) else ""
    truth = "" if label == prediction else f"<br>is a {escape(names[label])}"
    kind = "digit" if label == prediction else "digit miss"
    return (
        f'<div class="{kind}"><img src="{picture}" alt="a handwritten {escape(names[label])}">'
        f"<b>{escape(names[prediction])}</b> {sure:.0%}{truth}</div>"
    )


def _method(r: dict[str, Any]) -> str:
    o, machine = r["options"], r["machine"]
    fused_units = f"{r['units_fused']} of the network's {r['units']} units ran fused"
    rows = [
        (
            "Data",
            f"{r['data']}: {r['train_images']:,} training and {r['test_images']:,} test images, the same share of "
            f"every digit in both; resized to 32 {TIMES} 32; training images are shifted at random by up to "
            f"{r['augmentation']['shift']} pixels",
        ),
        (
            "Training",
            f"{o['epochs']} epochs of SGD, batch {o['batch_size']}, momentum {o['momentum']}, highest learning rate "
            f"{o['lr']} with {o['warmup_epochs']:g} epoch of warm-up and a cosine, weight decay {o['weight_decay']}, "
            f"seed {o['seed']}",
        ),
        (
            "Fused",
            f"{fused_units}; kernels for {machine['build'].get('cpu_isa') or 'no instruction set'}. Convolutions are "
            "PyTorch's own; the batch norm, activation and residual add around them are fused",
        ),
        (
            "Speed",
            "time of whole training steps (loading, augmentation, forward, backward, update), one step of each side in "
            "turn, the first of the two changing every time; the ratio is taken within each epoch, then the median",
        ),
        (
            "Memory",
            "largest growth of the process's resident memory over its first steps, from the moment network and data "
            "are ready, in a fresh process for each side",
        ),
        (
            "Machine",
            f"{machine['cpu']}, {machine['threads']} threads, {machine['system']}; PyTorch {machine['torch']}, Python "
            f"{machine['python']}, fused_resnet {machine['fused_resnet']}",
        ),
        ("Time", f"{clock(r['seconds'])} for everything, both trainings together"),
    ]
    table = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return (
        f"<h2>How it was measured</h2><figure><table>{table}</table></figure>"
        "<p class='soft' style='margin-top:12px'>All figures are in <code>report.json</code> beside this page.</p>"
    )


def png(image: Tensor) -> str:
    """An (H, W) uint8 image as a data URI: a greyscale PNG, written by hand because it is that simple."""
    height, width = image.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), image], 1)  # each row begins with its filter: none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(rows.flatten().tolist()), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _smooth(losses: Sequence[float], epochs: int) -> tuple[list[float], list[float]]:
    per_epoch = max(1, len(losses) // epochs)
    window = max(1, round(per_epoch * _SMOOTHING))
    xs, ys = [], []
    for end in range(1, len(losses) + 1):
        part = losses[max(0, end - window) : end]
        xs.append(end / per_epoch)
        ys.append(sum(part) / len(part))
    return xs, ys


def _figure(title: str, caption: str, content: str) -> str:
    return f"<figure><h3>{title}</h3><figcaption>{caption}</figcaption>{content}</figure>"


def _legend() -> str:
    return (
        '<div class="legend"><span><i class="fused"></i>fused</span>'
        '<span><i class="stock"></i>stock PyTorch</span></div>'
    )


def _network(r: dict[str, Any]) -> str:
    name = str(r["network"]).rpartition(".")[2]
    return name.replace("resnet", "ResNet-") if name.startswith("resnet") else name


def _round_up(value: float) -> str:
    """The next power of ten, as a plain decimal: 0.00000024 is shown as 0.000001."""
    return f"{10.0 ** math.ceil(math.log10(value)):.15f}".rstrip("0").rstrip(".")


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB"
