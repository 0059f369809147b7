"""The demo: two trainings in lock-step, the memory of each, the report."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from fused_resnet.train.demo import memory, page, results, side_by_side, svg
from fused_resnet.train.options import TrainOptions
from tests.train import files


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    data = files.write_idx(tmp_path_factory.mktemp("demo"), train=40, test=20, side=8)
    return TrainOptions(model="cifar.resnet20", data=str(data), size=8, epochs=3, batch_size=10, lr=0.05)


@pytest.fixture(scope="module")
def outcome(options: TrainOptions) -> side_by_side.Outcome:
    return side_by_side.train_both(options)


@pytest.fixture
def report(outcome: side_by_side.Outcome) -> dict[str, Any]:
    return results.collect(outcome, {"fused": 3 * 2**20, "stock": 5 * 2**20}, seconds=61.0)


def test_both_sides_begin_alike_and_see_the_same(outcome: side_by_side.Outcome) -> None:
    fused, stock = outcome.fused, outcome.stock
    assert len(fused.step_losses) == len(stock.step_losses) == 12
    assert fused.step_losses[0] == pytest.approx(stock.step_losses[0], rel=1e-4)
    assert stock.trainer.options.stock
    assert not fused.trainer.options.stock
    assert len(fused.evaluations) == len(fused.images_per_second) == 3


def test_figures(report: dict[str, Any], outcome: side_by_side.Outcome) -> None:
    assert json.loads(json.dumps(report)) == report
    ratios = [
        f / s for f, s in zip(report["fused"]["images_per_second"], report["stock"]["images_per_second"], strict=True)
    ]
    assert report["speedup"]["per_epoch"] == ratios
    assert report["speedup"]["median"] == sorted(ratios)[1]
    assert report["memory_ratio"] == 0.6
    assert sum(map(sum, report["confusion"])) == 20
    hits = sum(report["confusion"][i][i] for i in range(10))
    assert hits / 20 == report["fused"]["test_accuracy"][-1] == outcome.fused.evaluations[-1].accuracy
    assert report["units"] >= 10


def test_confusion() -> None:
    got = results.confusion(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 2]), 3)
    assert got == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


class _Outline(HTMLParser):
    VOID = frozenset(("meta", "img", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attrs:
            assert not (name in ("src", "href") and value and not value.startswith("data:")), f"the page loads {value}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(report: dict[str, Any], outcome: side_by_side.Outcome) -> None:
    html = page.render(report, outcome.dataset.test)
    outline = _Outline()
    outline.feed(html)
    assert outline.open == []
    assert outline.count["svg"] == 6
    assert outline.count["img"] == 20
    assert "http" not in html
    assert ("Both runs below are stock PyTorch" in html) == (not report["fused_available"])
    for picture in re.findall(r"<svg.*?</svg>", html):
        ElementTree.fromstring(picture)
        assert "nan" not in picture
    for number in (f"{report['fused']['test_accuracy'][-1]:.1%}", f"{report['speedup']['median']:.2f}", "5 MB"):
        assert number in html


def test_the_page_of_a_perfect_single_epoch(report: dict[str, Any], outcome: side_by_side.Outcome) -> None:
    for side in ("fused", "stock"):
        for name in ("test_accuracy", "images_per_second"):
            report[side][name] = [1.0]
        report[side]["step_loss"] = [0.5]
    report["speedup"] = {"per_epoch": [1.0], "median": 1.0, "low": 1.0, "high": 1.0}
    report["predictions"], report["first_loss_difference"] = report["labels"], 0.0
    html = page.render(report, outcome.dataset.test)
    assert "No mistakes" in html
    assert "equal to the last bit" in html


def test_png_is_readable() -> None:
    image = files.random_images(9, 7)
    data = base64.b64decode(page.png(image).partition(",")[2])
    with Image.open(io.BytesIO(data)) as read:
        assert read.mode == "L"
        assert read.tobytes() == image.numpy().tobytes()


def test_axes() -> None:
    log = svg.Axis(0.01, 3.0, "loss", str, log=True)
    assert log.ticks() == pytest.approx([0.01, 0.1, 1.0])
    assert svg.Axis(0.3, 3.0, "loss", str, log=True).ticks() == pytest.approx([0.5, 1.0, 2.0])
    assert log.fraction(0.01) == 0
    assert log.fraction(3.0) == 1
    linear = svg.Axis(0.1, 1.0, "accuracy", str)
    assert linear.ticks() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [svg.nice_step(x) for x in (0.9, 1.0, 1.1, 2.3, 3, 7)] == [1, 1, 2, 2.5, 5, 10]


USE_PEAK_GROWTH = """
import time
from fused_resnet.train.demo import memory
with memory.PeakGrowth() as peak:
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    begin = time.monotonic()  # nothing above lets go of the interpreter: now the watching thread gets its turn
    while peak.bytes < len(block) and time.monotonic() - begin < 10:
        time.sleep(0.001)
    del block
print(peak.bytes)
"""


def test_peak_growth_sees_what_was_allocated() -> None:
    # In a process of its own: the highest resident set of this one may be far above what is allocated here.
    command = [sys.executable, "-W", "ignore", "-c", USE_PEAK_GROWTH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 60 * 2**20 < int(done.stdout) < 200 * 2**20


def test_memory_is_measured_in_a_process_of_its_own(options: TrainOptions) -> None:
    peaks = memory.measure_both(options)
    # The gradients and the momentum of 270,000 fp32 parameters are 2.2 MB, and there is more.
    assert all(2 * 2**20 < peak < 2**30 for peak in peaks.values()), peaks


@pytest.mark.slow
def test_the_demo_reaches_98_percent(tmp_path: Path) -> None:
    from fused_resnet.train.demo.__main__ import main

    pytest.importorskip("sklearn")
    assert main(["--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    fused, stock = (report[side]["test_accuracy"][-1] for side in ("fused", "stock"))
    assert fused >= 0.98
    assert abs(fused - stock) < 0.015
    assert (tmp_path / "report.html").stat().st_size > 50_000
