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
BATCH_NORM_OPS = ("batch_norm_act", "residual", "dual_batch_norm_act", "batch_norm_act_max_pool", "batch_norm_act_conv")

# The process limits its own address space to what it has plus 24 MiB, then calls until the blocks that the memory pool
# still holds are used up. What fails for want of memory must be an exception, and leave the statistics as they were.
PROGRAM = """
import json, resource, sys
import torch
import fused_resnet as fr

op = sys.argv[1]
torch.set_num_threads(2)
c = 8
weight, bias = torch.ones(c, requires_grad=True), torch.zeros(c, requires_grad=True)
conv_weight = torch.randn(c, c, 3, 3)
state = {n: torch.full((c,), 0.5) for n in ("mean", "var", "residual_mean", "residual_var")}

def call(x):
    first = (x, state["mean"], state["var"], weight, bias)
    if op == "batch_norm_act":
        return fr.ops.batch_norm_act(*first, training=True, act="silu")
    if op == "residual":
        return fr.ops.batch_norm_act(*first, residual=x, training=True)
    if op == "dual_batch_norm_act":
        return fr.ops.dual_batch_norm_act(*first, x, state["residual_mean"], state["residual_var"], training=True)
    if op == "batch_norm_act_max_pool":
        return fr.ops.batch_norm_act_max_pool(*first, training=True)
    return fr.ops.batch_norm_act_conv(*first, conv_weight, padding=1, training=True)

y = call(torch.randn(2, c, 8, 8, requires_grad=True))
y.backward(torch.ones_like(y))  # the threads, and what torch imports at the first such call, are there now
x = torch.randn(16, c, 512, 512, requires_grad=True)  # 128 MiB
y = call(x)
gradient = torch.ones_like(y)
pages = int(open("/proc/self/statm").read().split()[0])
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (24 << 20), hard))
kept, forward, backward = [], "no error", "no error"
for _ in range(100):
    before = {n: t.clone() for n, t in state.items()}
    try:
        kept.append(call(x))
    except (RuntimeError, MemoryError) as error:
        forward = f"{type(error).__name__} {error}"
        break
changed = [n for n, t in state.items() if not torch.equal(t, before[n])]
try:
    y.backward(gradient)
except (RuntimeError, MemoryError) as error:
    backward = f"{type(error).__name__} {error}"
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
again = call(torch.randn(2, c, 8, 8)).isfinite().all()
print(json.dumps({"changed": changed, "again": bool(again), "forward": forward, "backward": backward}))
"""


@pytest.mark.parametrize("op", BATCH_NORM_OPS)
@pytest.mark.usefixtures("needs_extension")
def test_out_of_memory(op: str) -> None:
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("reads the process's size from /proc")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, op],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"died with {done.returncode}: {done.stderr[-2000:]}"
    answer = json.loads(done.stdout)
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
