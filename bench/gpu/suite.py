"""Runs the tests marked `gpu` until they are done or the time is up, and writes what became of each as JSON.

The files that say most come first. Options that this script does not know go to pytest.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpu import common
from gpu.common import Row

TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"
FIRST = ("build", "blocks", "streams", "graphs", "memory", "errors", "reproducible", "compile", "operators")


def files() -> list[str]:
    """The test files in order."""
    rank = {f"test_{name}.py": index for index, name in enumerate(FIRST)}
    return [str(path) for path in sorted(TESTS.glob("test_*.py"), key=lambda p: (rank.get(p.name, len(rank)), p.name))]


class Recorder:
    """A pytest plugin: outcomes by test file, and a stop when the time is up."""

    def __init__(self, deadline: common.Deadline) -> None:
        self._deadline = deadline
        self.outcomes: dict[str, Counter[str]] = {}
        self.failures: list[Row] = []
        self.skips: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.collected = 0
        self.out_of_time = False
        self._session: pytest.Session | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected, self._session = len(session.items), session

    def pytest_runtest_logstart(self, nodeid: str, location: object) -> None:  # noqa: ARG002  # pytest's signature
        self.outcomes.setdefault(nodeid.partition("::")[0], Counter())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if self._deadline.left() <= 0:
            self.out_of_time = True
            item.session.shouldstop = "the time of this step is up"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration  # type: ignore[assignment]  # a Counter counts floats too
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[file][report.outcome] += 1
        if report.outcome == "failed":
            if "CUDA error" in str(report.longrepr) and self._session is not None:
                self._session.shouldstop = "after a CUDA error nothing in this process works"
            message = str(report.longrepr).strip().splitlines()[-1:] or [""]
            self.failures.append({"name": report.nodeid, "when": report.when, "message": message[0][:500]})
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.skips[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def rows(self) -> list[Row]:
        """One row for each file."""
        return [
            {"name": Path(file).stem, **counts, "seconds": round(self.seconds[file], 2)}
            for file, counts in self.outcomes.items()
        ]

    def total(self) -> Row:
        """All files together."""
        counts = sum(self.outcomes.values(), Counter())
        ran = sum(counts.values())
        row: Row = {"name": "total", "collected": self.collected, "not_run": self.collected - min(ran, self.collected)}
        return row | {key: counts[key] for key in ("passed", "failed", "skipped")} | {"why_skipped": dict(self.skips)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = common.parser(__doc__, seconds=140)
    parser.add_argument("tests", nargs="*", help="files or names of tests (default: all of tests/gpu)")
    options, rest = parser.parse_known_args(arguments)
    where = common.device(options)
    recorder = Recorder(common.Deadline(options.seconds))
    on = [] if options.device == "cuda" else ["--gpu-tests-on", options.device]
    command = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", *on, *rest]
    status = pytest.main([*(options.tests or files()), *command], plugins=[recorder])
    report = common.Report("tests", options, where)
    report.rows = recorder.rows()
    total = recorder.total()
    report.failed = status != pytest.ExitCode.OK or recorder.out_of_time or not total["passed"]
    return report.close([total, *recorder.failures])


if __name__ == "__main__":
    sys.exit(main())
