"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter, which must be
chosen before anything imports triton (timm does). With one, float32 is float32 everywhere: torch
lets cuDNN's convolutions round it to TF32 unless it is told not to."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
REHEARSES = os.environ.get("PGN_FAST_REHEARSE") == "1"
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    torch.backends.cudnn.allow_tf32 = False
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    # else each worker takes every core for its float64 references
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # see on_device.py
        rehearsed = REHEARSES and "device" in getattr(item, "fixturenames", ())
        # by its marker: among the keywords is also the name of every folder above the file
        if item.get_closest_marker("gpu") and not (HAS_GPU or rehearsed):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
