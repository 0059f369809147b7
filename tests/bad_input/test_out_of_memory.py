"""Out of memory, and sizes beyond 2^31: a clean error with the state intact, or the right result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_resnet as fr

ROOT = Path(__file__).parents[2]
BATCH_NORM_OPS = (
    "batch_norm_act",
    "residual",
    "dual_batch_norm_act",
    "batch_norm_act_max_pool",
    "batch_norm_act_conv",
    "autocast batch_norm_act_conv",  # x is wider than what the convolution computes in
)

# For one operator after another: the process limits its own address space to what it has plus 24 MiB, then calls until
# the blocks that the memory pool still holds are used up. Before that to 3 GiB, so that the pool takes small pieces.
# What fails for want of memory must be an exception, and leave the statistics as they were.
PROGRAM = """
import json, resource, sys
import torch
import fused_resnet as fr

torch.set_num_threads(2)
c = 8
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
weight, bias = torch.ones(c, requires_grad=True), torch.zeros(c, requires_grad=True)
conv_weight = torch.randn(c, c, 3, 3)
state = {n: torch.full((c,), 0.5) for n in ("mean", "var", "residual_mean", "residual_var")}

def call(op, x):
    first = (x, state["mean"], state["var"], weight, bias)
    if op == "batch_norm_act":
        return fr.ops.batch_norm_act(*first, training=True, act="silu")
    if op == "residual":
        return fr.ops.batch_norm_act(*first, residual=x, training=True)
    if op == "dual_batch_norm_act":
        return fr.ops.dual_batch_norm_act(*first, x, state["residual_mean"], state["residual_var"], training=True)
    if op == "batch_norm_act_max_pool":
        return fr.ops.batch_norm_act_max_pool(*first, training=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=op.startswith("autocast")):
        return fr.ops.batch_norm_act_conv(*first, conv_weight, padding=1, training=True)

def until_it_fails(f):
    kept = []
    for _ in range(100):
        before = {n: t.clone() for n, t in state.items()}
        try:
            kept.append(f())
        except (RuntimeError, MemoryError) as error:
            changed = [n for n, t in state.items() if not torch.equal(t, before[n])]
            return f"{type(error).__name__} {error}", changed, kept
    return "no error", [], kept

def limit(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))

limit(3 << 30)
x = torch.randn(16, c, 512, 512, requires_grad=True)  # 128 MiB
for op in sys.argv[1:]:
    small = call(op, torch.randn(2, c, 8, 8, requires_grad=True))
    small.backward(torch.ones_like(small))  # the threads, and what torch imports at the first such call, are there now
    y = call(op, x)
    gradient = torch.ones_like(y)
    limit(24 << 20)
    forward, changed, kept = until_it_fails(lambda: call(op, x))
    _, _, more = until_it_fails(lambda: fr.ops.add_act(x.detach(), x.detach()))  # what the failed call gave back
    try:
        y.backward(gradient)
    except (RuntimeError, MemoryError) as error:
        backward = f"{type(error).__name__} {error}"
    else:
        backward = "no error"
    limit(3 << 30)
    del y, gradient, kept, more
    again = bool(call(op, torch.randn(2, c, 8, 8)).isfinite().all())
    print(json.dumps({"op": op, "changed": changed, "again": again, "forward": forward, "backward": backward}))
"""


@pytest.mark.usefixtures("needs_extension")
def test_out_of_memory() -> None:
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("reads the process's size from /proc")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-u", "-c", PROGRAM, *BATCH_NORM_OPS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    survived = [answer["op"] for answer in answers]
    assert done.returncode == 0, f"died with {done.returncode} after {survived}: {done.stderr[-2000:]}"
    assert survived == list(BATCH_NORM_OPS)
    for answer in answers:
        assert not answer["changed"], answer
        assert answer["again"], answer
        assert "memory" in answer["forward"].lower(), answer
        assert "memory" in answer["backward"].lower(), answer


@pytest.mark.usefixtures("needs_extension")
def test_a_tensor_that_no_machine_holds() -> None:
    x = torch.zeros(1).expand(2**18, 64, 2**12, 2**12)  # 2^48 elements, one of them in memory
    mean, var = torch.zeros(64), torch.ones(64)
    for training in (True, False):
        for call in (fr.ops.batch_norm_act, fr.ops.batch_norm_act_max_pool):
            with pytest.raises(RuntimeError, match=r"(?i)memory|too large|overflow"):
                call(x, mean, var, training=training)
    with pytest.raises(RuntimeError, match=r"(?i)memory|too large|overflow"):
        fr.ops.add_act(x, x)
    assert torch.equal(mean, torch.zeros(64))
    assert torch.equal(var, torch.ones(64))


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.usefixtures("needs_extension")
def test_more_than_two_to_the_31_elements(channels_last: bool) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 20 << 30:
        pytest.skip(f"needs 20 GiB of free memory, {free >> 30} are")
    shape = (2, 33, 2**15, 1025)  # 2.2e9 elements of two bytes
    x = torch.zeros(shape, dtype=torch.bfloat16)
    if channels_last:
        x = x.view(2, 2**15, 1025, 33).permute(0, 3, 1, 2)
    x[-1, -1, -1, -1] = 3.0
    x[0, 0, 0, 0] = 2.0
    mean, var = torch.zeros(33), torch.ones(33)
    y = fr.ops.batch_norm_act(x, mean, var, training=False, eps=1e-12)
    assert y[-1, -1, -1, -1] == 3.0
    assert y[0, 0, 0, 0] == 2.0
    assert torch.count_nonzero(y) == 2
    del y
    fr.ops.batch_norm_act(x, mean, var, training=True, momentum=1.0)
    count = x.numel() // 33
    assert mean[0].item() == pytest.approx(2.0 / count, rel=1e-5)
    assert var[-1].item() == pytest.approx(9.0 / count, rel=1e-4)
