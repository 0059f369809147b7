"""Runs bad-input cases: reads one name a line, answers one JSON object a line. A crash ends the process, so whoever
asked knows which case it was.

Run as ``python -m tests.bad_input.worker``.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback
from typing import Any

import torch
from torch import Tensor

from tests.bad_input.registry import State, load_all


def _snapshot(state: State) -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {"": state.detach().clone()} if state.device.type == "cpu" else {}
    return {name: value.detach().clone() for name, value in state.state_dict().items()}


def _changed(before: dict[str, Tensor], state: State) -> list[str]:
    now = _snapshot(state)
    if before.keys() != now.keys():
        return ["keys"]
    return [
        name
        for name, value in before.items()
        if value.shape != now[name].shape or not torch.equal(value.nan_to_num(123.0), now[name].nan_to_num(123.0))
    ]


def _run(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    trial = load_all()[name].build()
    before = {key: _snapshot(value) for key, value in trial.state.items()}
    answer: dict[str, Any] = {"name": name, "raised": None}
    try:
        answer["result"] = repr(trial.call())[:200]
    except BaseException as error:
        answer["raised"] = [cls.__name__ for cls in type(error).__mro__]
        answer["message"] = str(error)
        answer["trace"] = traceback.format_exc()[-2000:]
    answer["changed"] = [
        f"{key}.{part}".rstrip(".") for key, value in trial.state.items() for part in _changed(before[key], value)
    ]
    return answer


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(2)
    for line in sys.stdin:
        answer = json.dumps(_run(line.strip()))
        print(f"answer {answer}", flush=True)  # the prefix tells it from what a case prints


if __name__ == "__main__":
    main()
