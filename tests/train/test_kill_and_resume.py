"""A training killed (SIGKILL) again and again, at any instant, ends with the same losses, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import files

KILLS = 8
EPOCHS, STEPS_PER_EPOCH = 4, 6

# Imports once, then forks a child for every trial: most of a trial is training, and kills hit training, not importing.
# (Nothing parallel has run before the fork, so the child may use its threads.)
DRIVER = """
import json, os, random, signal, sys, time
from fused_resnet import cli

line, whole, cut, seed = json.loads(sys.argv[1])
rng = random.Random(seed)

def start(out):
    child = os.fork()
    if child == 0:
        os._exit(cli.main([*line, "--out", out, "--resume"]))
    return child

def log_size():
    return os.path.getsize(cut + "/steps.csv") if os.path.exists(cut + "/steps.csv") else 0

def killed(longest):
    child, size = start(cut), log_size()
    # Not before the first steps of this trial: the kills should hit training.
    while log_size() <= size:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    time.sleep(rng.random() * longest)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

begin = time.monotonic()
codes = [os.waitpid(start(whole), 0)[1]]
# Kills come within about a step of a trial's first ones, wherever in a step or a checkpoint that may be.
step = (time.monotonic() - begin) / STEPS
codes += [killed(min(step, 0.3)) for _ in range(KILLS)]
codes.append(os.waitpid(start(cut), 0)[1])
print(json.dumps([os.waitstatus_to_exitcode(code) for code in codes]))
"""


def _without_times(table: Path) -> list[list[str]]:
    # The last two columns of epochs.csv are speed and seconds.
    return [row.split(",")[:6] for row in table.read_text().splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_instants(tmp_path: Path) -> None:
    data = files.write_idx(tmp_path / "data", train=4 * STEPS_PER_EPOCH, test=8, side=8)
    line = f"train --model cifar.resnet20 --data {data} --size 8 --batch-size 4 --epochs {EPOCHS} --shift 1".split()
    line += ["--checkpoint-every", "1", "--threads", "1", "--quiet"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")
    driver = DRIVER.replace("KILLS", str(KILLS)).replace("STEPS", str(EPOCHS * STEPS_PER_EPOCH))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", driver, json.dumps([line, str(whole), str(cut), seed])],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    assert codes[0] == codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 3
    assert (cut / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    assert _without_times(cut / "epochs.csv") == _without_times(whole / "epochs.csv")
    assert len((cut / "steps.csv").read_text().splitlines()) == 1 + EPOCHS * STEPS_PER_EPOCH
