"""Bad input ends in an error that names operator, argument, expected and got; nothing changes, nothing crashes.

Each case runs in a worker process that is replaced when a case kills it, so a crash fails its case and not the run.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fused_resnet as fr
from tests.bad_input.registry import BadCase, load_all

ROOT = Path(__file__).parents[2]
SECONDS = 120.0
CASES = load_all()


class _Worker:
    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, name: str) -> dict[str, Any]:
        """The worker's answer, or how it died."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.bad_input.worker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(name + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(SECONDS):
                line = process.stdout.readline()
                if not line:
                    return self._died(f"the process died with code {process.wait()}")
                if line.startswith("answer "):
                    answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
                    return answer
        process.kill()
        return self._died(f"no answer within {SECONDS:.0f} seconds")

    def _died(self, how: str) -> dict[str, Any]:
        process, self._process = self._process, None
        assert process is not None
        _, stderr = process.communicate()
        return {"crash": f"{how}\n{stderr[-2000:]}"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def worker() -> Iterator[_Worker]:
    worker = _Worker()
    yield worker
    worker.close()


def _judge(case: BadCase, answer: dict[str, Any]) -> str | None:
    """What is wrong with the answer, or None."""
    if "crash" in answer:
        return f"crashed: {answer['crash']}"
    if answer["changed"] and not (case.may_succeed and answer["raised"] is None):
        return f"changed {', '.join(answer['changed'])}; message: {answer.get('message')}"
    if answer["raised"] is None:
        return None if case.may_succeed else f"no error, but {answer['result']}"
    if not set(case.raises) & set(answer["raised"]):
        return f"raised {answer['raised'][0]}, expected {' or '.join(case.raises)}: {answer['trace']}"
    missing = [word for word in case.words if word.lower() not in answer["message"].lower()]
    if missing:
        return f"the message lacks {missing}: {answer['message']}"
    return None


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, worker: _Worker) -> None:
    case = CASES[name]
    if case.needs_extension and not fr.is_available():
        pytest.skip("on the stock path the errors are stock PyTorch's")
    wrong = _judge(case, worker.ask(name))
    assert wrong is None, f"{name}: {wrong}"
