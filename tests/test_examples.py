"""The examples: each trainer leads to the plain loop's adapter, on two processes if it can."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pgn_fast.adapters import read_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"
# example -> (processes, the package that it needs)
RUNS = {
    "ddp": (2, None),
    "accelerate_loop": (2, "accelerate"),
    "fsdp2": (2, None),
    "hf_trainer": (1, "transformers"),
    "lightning_module": (1, "lightning"),
    "timm_parts": (1, None),
}


def run(name, folder, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(EXAMPLES / f"{name}.py"), str(folder / name)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_adapter(folder / name)[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run("plain_loop", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", RUNS)
def test_equals_the_plain_loop(name, plain, tmp_path):
    processes, package = RUNS[name]
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = run(name, tmp_path, processes)
    assert found.keys() == plain.keys()
    for tensor, expected in plain.items():
        assert torch.allclose(found[tensor], expected, atol=1e-5), tensor
    if name == "lightning_module":
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=False)
        saved = {n.removeprefix("model.") for n in checkpoint["state_dict"]}
        assert saved == {*plain, "_extra_state"}
    if name == "hf_trainer":
        file = tmp_path / f"{name}-checkpoints" / "checkpoint-2" / "model.safetensors"
        assert safetensors.torch.load_file(file).keys() == {*plain, "_extra_state"}


def test_the_plain_loop_trains(plain):
    assert plain["prompter.prompts"].abs().sum() > 0 and len(plain) >= 3
