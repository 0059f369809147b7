"""A training killed (SIGKILL) again and again, at any instant, ends with the same losses, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train import files

KILLS = 8
EPOCHS, STEPS_PER_EPOCH = 4, 8

# Imports once, then forks a child for every trial: most of a trial is training, and kills hit training, not importing.
# (Nothing parallel has run before the fork, so the child may use its threads.)
DRIVER = """
import json, os, random, signal, sys, time
from fused_resnet import cli

line, kills, seed = json.loads(sys.argv[1])
rng = random.Random(seed)
log = line[line.index("--out") + 1] + "/steps.csv"

def log_size():
    return os.path.getsize(log) if os.path.exists(log) else 0

def run(extra, kill):
    child = os.fork()
    if child == 0:
        os._exit(cli.main(line + extra))
    if kill:
        # Not before the first steps of this trial: the kills should hit training.
        size = log_size()
        while log_size() <= size:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        time.sleep(rng.random() * kill)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

codes = [run(["--resume"], kill) for kill in kills]
codes.append(run(["--resume"], 0))
print(json.dumps(codes))
"""


def _train(arguments: list[str], kills: list[float], seed: int) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, json.dumps([["train", *arguments], kills, seed])],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes


def _without_times(table: Path) -> list[list[str]]:
    # The last two columns of epochs.csv are speed and seconds.
    return [row.split(",")[:6] for row in table.read_text().splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_instants(tmp_path: Path) -> None:
    data = files.write_idx(tmp_path / "data", train=4 * STEPS_PER_EPOCH, test=8, side=8)
    common = ["--model", "cifar.resnet20", "--data", str(data), "--size", "8", "--batch-size", "4", "--threads", "1"]
    common += ["--epochs", str(EPOCHS), "--checkpoint-every", "1", "--shift", "1", "--quiet"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begin = time.monotonic()
    assert _train([*common, "--out", str(whole)], [], 0) == [0]
    # Kills come within about a step of a trial's first ones, wherever in a step or a checkpoint that may be.
    step = (time.monotonic() - begin) / (EPOCHS * STEPS_PER_EPOCH)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")
    codes = _train([*common, "--out", str(cut)], [min(step, 0.3)] * KILLS, seed)
    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 3
    assert (cut / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    assert _without_times(cut / "epochs.csv") == _without_times(whole / "epochs.csv")
    assert len((cut / "steps.csv").read_text().splitlines()) == 1 + EPOCHS * STEPS_PER_EPOCH
