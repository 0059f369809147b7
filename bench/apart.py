"""A contestant of bench/models.py in a process of its own, as a user would run it; the parent asks it for steps.

In one process the contestants share a heap. What one of them keeps there makes the other's large blocks come from
memory that is already mapped, and eager PyTorch, whose blocks otherwise go back to the system at every step, looks
better than it is alone. They still take turns, so slow minutes of the machine cancel.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from models import Setting

_DONE = "done"


class Apart:
    """Call it for one training step; `close` ends its process."""

    def __init__(self, setting: Setting, side: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, vars(setting), side, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # a child that dies then ends `recv` with EOFError

    def __call__(self) -> None:
        self._connection.send(None)
        answer = self._connection.recv()
        if answer != _DONE:
            raise RuntimeError(answer)

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, fields: dict[str, object], side: str, threads: int) -> None:
    from models import Setting, build, step_of

    torch.set_num_threads(threads)
    setting = Setting(**fields)  # type: ignore[arg-type]
    model, x, target = build(setting)
    step = step_of(model, x, target, side, setting.dtype)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        step()
        connection.send(_DONE)
