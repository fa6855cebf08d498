"""torchrun as people start it: its processes share a prediction, and a run outlives one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_world import MODEL, tiny_vit_kwargs, write_images

from pgn_fast.adapters import read_adapter
from pgn_fast.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_images(root / "data", 8)
    tiny_vit_kwargs(root)
    return root


def flags(world, *more):
    kwargs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(world).items()]
    return [
        *("train", world / "data", "--model", MODEL, "--model-kwargs", *kwargs),
        *("--method", "vpt-shallow", "--num-prompts", "2", "-b", "2", "-j", "0"),
        *("--device", "cpu", *more),
    ]


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", "2", *map(str, words)],
        # without the second, torchrun's restarts meet the addresses of the processes before
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_shares_a_prediction(world, tmp_path):
    run = tmp_path / "run"
    assert main([*map(str, flags(world, "--epochs", "1", "--output", run))]) == 0
    words = ["predict", str(run), str(world / "data"), "--device", "cpu"]
    process = torchrun("-m", "pgn_fast", *words, "--output", tmp_path / "two.csv")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert main([*words, "--output", str(tmp_path / "one.csv")]) == 0
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


@pytest.mark.slow
def test_a_run_outlives_a_process_that_is_killed(world, tmp_path):
    """torchrun starts the processes again, and ``--resume`` finds what was done."""
    more = ["--prompt-dropout", "0.2", "--epochs", "12", "--log-interval", "1"]
    words = flags(world, *more, "--recovery-interval", "2", "--resume", "--output")
    process = torchrun("--max-restarts", "1", "-m", "pgn_fast", *words, tmp_path / "torn")
    checkpoint, lock = (tmp_path / "torn" / name for name in ("checkpoint.pt", ".lock"))
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert "continues at epoch" in printed
    whole = torchrun("-m", "pgn_fast", *words, tmp_path / "whole")
    assert whole.wait(timeout=240) == 0
    one, two = (read_adapter(tmp_path / name / "last")[1] for name in ("whole", "torn"))
    assert all(torch.equal(one[key], two[key]) for key in one)
