"""Contestants of bench/inference.py take turns, in this process or in one of their own, and are timed.

They bring different thread pools: PyTorch and ours OpenMP, OpenVINO TBB, ONNX Runtime its own. Threads that have run
out of work spin for some milliseconds before they sleep, and would take a core from the contestant that follows. So a
turn begins with a pause that is longer, and, where calls are short, with one that is not counted: it wakes its own
threads.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import peak_memory
import torch
from contestants import CONTESTANTS, Call, Setting, images
from torch import Tensor

from fused_resnet import testing

PAUSE_SECONDS = 0.03
TURN_SECONDS = 0.1  # a turn lasts at least as long, of the slowest contestant
SERVED = 4  # calls over which memory is taken


class Player(Protocol):
    """What takes turns."""

    def sample(self, repeats: int) -> float:
        """Seconds for each of some calls."""


def _sample(call: Call, repeats: int) -> float:
    time.sleep(PAUSE_SECONDS)
    if repeats > 1:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class Here:
    """A contestant in this process."""

    def __init__(self, name: str, path: Path, setting: Setting) -> None:
        self.call = CONTESTANTS[name].load(path, setting, images(setting))

    def sample(self, repeats: int) -> float:
        """Seconds for each of some calls."""
        return _sample(self.call, repeats)


class Apart:
    """A contestant in a process of its own, as it would be deployed.

    Attributes:
        logits: its first answer.
        start_seconds: from the file, which lies in the system's cache, to that answer; imports are done before.
        peak_bytes: most memory until it has served some calls, less what it held after the imports.
        serving_bytes: the same, once it is loaded and serves.
    """

    def __init__(self, name: str, path: Path, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, path, setting), daemon=True)
        self._process.start()
        theirs.close()  # a child that dies then ends `recv` with EOFError
        try:
            logits, self.start_seconds, self.peak_bytes, self.serving_bytes = self._connection.recv()
        except EOFError:
            raise SystemExit(f"{setting}: {name} failed in its own process, see above") from None
        self.logits: Tensor = torch.from_numpy(logits)

    def sample(self, repeats: int) -> float:
        """Seconds for each of some calls, measured over there."""
        self._connection.send(repeats)
        return float(self._connection.recv())

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, name: str, path: Path, setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    contestant, x = CONTESTANTS[name], images(setting)
    contestant.why_missing(setting.dtype)  # imports
    peak_memory.forget_earlier_peak()
    before = peak_memory.status("VmRSS")
    start = time.perf_counter()
    call = contestant.load(path, setting, x)
    logits = call().float().numpy().copy()
    seconds = time.perf_counter() - start
    for _ in range(SERVED):
        call()
    whole = peak_memory.status("VmHWM")
    peak_memory.forget_earlier_peak()
    for _ in range(SERVED):
        call()
    serving = peak_memory.status("VmHWM")
    known = before is not None and whole is not None and serving is not None
    connection.send((logits, seconds, whole - before if known else None, serving - before if known else None))
    while True:
        try:
            repeats = connection.recv()
        except EOFError:
            return
        connection.send(_sample(call, repeats))


def take_turns(players: Mapping[str, Player], rounds: int, on_round: Callable[[], None]) -> testing.Comparison:
    """Every round starts with another player; all make equally many calls in a turn."""
    names = list(players)
    slowest = max(players[name].sample(1) for name in names for _ in range(2))
    repeats = max(1, math.ceil(TURN_SECONDS / slowest))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(players[name].sample(repeats))
            on_round()
    finally:
        gc.enable()
    return testing.Comparison(seconds)
