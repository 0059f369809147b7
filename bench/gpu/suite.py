"""Runs the tests marked `gpu` until they are done or the time is up, and writes what became of each as JSON.

The files that say most come first, and the JSON is whole after every test: one that aborts the process, or has no end,
takes no result with it. Options that this script does not know go to pytest.
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

    def __init__(self, deadline: common.Deadline, report: common.Report) -> None:
        self._deadline, self._report = deadline, report
        self.outcomes: dict[str, Counter[str]] = {}
        self.failures: list[Row] = []
        self.skips: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.collected = 0
        self.out_of_time = self.left_out = False
        self._session: pytest.Session | None = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported, or skips itself as a whole, leaves no other trace."""
        if report.outcome != "passed":
            self.left_out = True
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            message = (reason.strip().splitlines() or [""])[-1]
            row = {"name": report.nodeid, "when": "collection", "message": f"{report.outcome} whole: {message}"[:500]}
            self.failures.append(row)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected, self._session = len(session.items), session
        self.write()

    def pytest_runtest_logfinish(self, nodeid: str, location: object) -> None:  # noqa: ARG002  # pytest's signature
        self.write()

    def write(self) -> None:
        """Writes what is known now."""
        self._report.rows = self.rows()
        self._report.write([self.total(), *self.failures])

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
    report = common.Report("tests", options, where)
    recorder = Recorder(common.Deadline(options.seconds), report)
    on = [] if options.device == "cuda" else ["--gpu-tests-on", options.device]
    command = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors", *on, *rest]
    status = pytest.main([*(options.tests or files()), *command], plugins=[recorder])
    report.rows = recorder.rows()
    total = recorder.total()
    bad = status != pytest.ExitCode.OK or recorder.out_of_time or recorder.left_out
    report.failed = bad or not total["passed"]
    return report.close([total, *recorder.failures])


if __name__ == "__main__":
    sys.exit(main())
