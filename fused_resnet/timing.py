"""Honest timing on a machine that is never quiet.

Contestants are called in turn, round after round, in one process; what counts is the ratio inside a round, and the
median of those ratios with its quartiles. A slow minute slows every contestant of its rounds alike.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import profiler_legacy

from fused_resnet import _extension

__all__ = [
    "BatchNormCalls",
    "Comparison",
    "Spread",
    "count_batch_norms",
    "cpu_model",
    "interleave",
    "kernels_in_use",
    "last_level_cache_bytes",
    "machine",
    "page_faults",
    "training_step",
]

# A sample shorter than this is mostly the clock and the call: calls are repeated until one lasts as long.
MIN_SAMPLE_SECONDS = 0.005

_STOCK_BATCH_NORMS = frozenset(
    {
        "aten::native_batch_norm",
        "aten::_native_batch_norm_legit",
        "aten::_native_batch_norm_legit_no_training",
        "aten::_batch_norm_with_update",
        "aten::_batch_norm_no_update",
        "aten::cudnn_batch_norm",
    }
)
_FUSED_BATCH_NORMS = frozenset(
    {
        "fused_resnet::batch_norm_act_forward",
        "fused_resnet::batch_norm_act_max_pool_forward",
        # A convolution with the batch norm before or behind it. In whole blocks each has one behind it, the last one's
        # too, so batch_norm_act_add, which ends them, would count it twice.
        "fused_resnet::conv2d_norm_forward",
    }
)


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of a list of numbers."""

    median: float
    q1: float
    q3: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of `values`, which must not be empty."""
        if len(values) == 1:
            return Spread(*[values[0]] * 5)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, q1, q3, min(values), max(values))

    def to_json(self) -> dict[str, float]:
        """A JSON object of the five numbers."""
        return {key: float(f"{getattr(self, key):.6g}") for key in ("median", "q1", "q3", "low", "high")}


@dataclass(frozen=True)
class Comparison:
    """What `interleave` measured: for each contestant its seconds per call and page faults per call, one per round."""

    seconds: Mapping[str, Sequence[float]]
    faults: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def time(self, name: str) -> Spread:
        """Seconds per call of one contestant."""
        return Spread.of(self.seconds[name])

    def ratio(self, baseline: str, name: str) -> Spread:
        """Spread of baseline / name, round by round: above 1, `name` is faster."""
        return Spread.of([b / n for b, n in zip(self.seconds[baseline], self.seconds[name], strict=True)])

    def page_faults(self, name: str) -> float:
        """Median page faults of one call."""
        return statistics.median(self.faults[name])


def page_faults() -> int:
    """Page faults of this process until now that needed no disk; 0 where the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    faults = page_faults()
    start = clock()
    for _ in range(repeats):
        call()
    stop = clock()
    return (stop - start) / repeats, (page_faults() - faults) / repeats


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[], None] | None = None,
) -> Comparison:
    """Calls the contestants in turn and times each call.

    Every round starts with another contestant, so that none always follows the same neighbour. All contestants are
    repeated equally often within a sample. The garbage collector rests meanwhile.

    Args:
        contestants: name to function without arguments; what it returns is dropped at once.
        rounds: samples of each contestant, at least 1.
        warmup: untimed calls of each, at least 1.
        clock: seconds; with one thread on a busy machine `time.process_time` leaves out what others took.
        on_round: called after each round, outside the timed parts.

    Returns:
        Seconds and page faults per call of each contestant and round.

    Raises:
        ValueError: no contestant, or a count below 1.
    """
    if not contestants:
        raise ValueError("interleave: expected at least one contestant, got none")
    if rounds < 1 or warmup < 1:
        raise ValueError(f"interleave: expected rounds and warmup >= 1, got {rounds} and {warmup}")
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        slowest = 0.0
        for name in names:
            warm = [_sample(contestants[name], 1, clock)[0] for _ in range(warmup)]
            slowest = max(slowest, warm[-1])
        repeats = max(1, round(MIN_SAMPLE_SECONDS / max(slowest, 1e-9)))
        for index in range(rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                elapsed, faulted = _sample(contestants[name], repeats, clock)
                seconds[name].append(elapsed)
                faults[name].append(faulted)
            if on_round is not None:
                on_round()
    return Comparison(seconds, faults)


@dataclass(frozen=True)
class BatchNormCalls:
    """How many batch normalisation calls of a run were fused, and how many were PyTorch's own."""

    fused: int
    stock: int
    stock_operators: Mapping[str, int] = field(default_factory=dict)  # which of PyTorch's own: "aten::cudnn_batch_norm"


def count_batch_norms(call: Callable[[], object]) -> BatchNormCalls:
    """Runs `call` once under the profiler and counts the forward batch normalisations it executed."""
    # The old profiler, because torch.profiler logs two lines to standard error at every use.
    with profiler_legacy.profile() as profile:
        call()
    names = [event.name for event in profile.function_events or ()]
    stock = Counter(name for name in names if name in _STOCK_BATCH_NORMS)
    fused = sum(name in _FUSED_BATCH_NORMS for name in names)
    return BatchNormCalls(fused, stock.total(), dict(stock))


def training_step(
    model: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    x: Tensor,
    target: Tensor,
    *,
    bf16: bool = False,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Callable[[], Tensor]:
    """A whole training step as a function: forward, cross-entropy, backward, SGD with momentum and weight decay.

    Args:
        model: maps `x` to logits; a module or a compiled one.
        parameters: what the optimiser updates.
        x: images, shape `(N, 3, H, W)`.
        target: class numbers, shape `(N,)`.
        bf16: run forward and loss under bfloat16 autocast.
        context: entered around every step.

    Returns:
        The step; it returns the loss, detached, and leaves the gradients in place.
    """
    # A rate so small that the weights of both contestants stay what was verified, however many rounds are timed.
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    device = x.device.type

    def step() -> Tensor:
        with context():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return loss.detach()

    return step


def cpu_model() -> str:
    """The processor's name as the operating system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows a name too
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int | None:
    """Size of the last-level cache that this process's first CPU sees; None where the system does not tell."""
    best: tuple[int, int] | None = None
    for index in range(8):
        folder = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        try:
            with open(f"{folder}/level", encoding="ascii") as file:
                level = int(file.read())
            with open(f"{folder}/size", encoding="ascii") as file:
                size = file.read().strip()
        except (OSError, ValueError):
            break
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
        best = max(best or (0, 0), (level, int(size.rstrip("KMG")) * scale))
    return best[1] if best else None


def kernels_in_use() -> dict[str, str]:
    """The kernel that dispatch picks for each operator, pass and dtype, such as "batch_norm apply bfloat16"."""
    if not _extension.available():
        return {}
    extension = _extension.extension()
    levels = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
    highest = levels.index(extension.current_isa())
    chosen: dict[str, tuple[int, str]] = {}
    for row in extension.kernel_table():
        key, level = f"{row['op']} {row['pass']} {row['dtype']}", levels.index(row["isa"])
        if level <= highest:
            chosen[key] = max(chosen.get(key, (-1, "")), (level, row["name"]))
    return {key: name for key, (_, name) in chosen.items()}


def machine() -> dict[str, object]:
    """What a reader needs to judge a number: processor, threads, versions. JSON-ready."""
    import fused_resnet

    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return {
        "cpu": cpu_model(),
        "cpus": len(affinity) if affinity is not None else os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_resnet": fused_resnet.__version__,
        "fused_available": fused_resnet.is_available(),
        "kernels": kernels_in_use(),
        "build": {key: _plain(value) for key, value in fused_resnet.build_info().items()},
    }


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return str(value)
