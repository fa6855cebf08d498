"""What the tests of a whole CUDA device share. They take their device from the fixture ``device``.

    PGN_FAST_REHEARSE=1 pytest tests/test_on_cuda_*.py

runs them on a CPU, where stand-ins take the place of graphs: for mistakes in the tests, and in the
Python around the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from graph_stand_in import StandIn
from torch import Tensor

from pgn_fast.backbone import cache
from pgn_fast.cuda_graphs import record


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 products in float32: TF32 has 10 bits."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


@pytest.fixture
def graphs(device, monkeypatch) -> None:
    """Graphs are used: those of the device, or stand-ins in a rehearsal."""
    monkeypatch.delenv("PGN_FAST_CUDA_GRAPHS", raising=False)
    if device.type == "cpu":
        monkeypatch.setattr(record, "recorder_for", lambda device: StandIn())
        monkeypatch.setattr(cache, "copies_unsupported_reason", lambda backbone: "as on a GPU")


@contextmanager
def without_graphs() -> Iterator[None]:
    """Every step is eager."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "recorder_for", lambda device: None)
        yield


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value."""
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    assert bool(a.isfinite().all())
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def is_on(device: torch.device, *tensors: Tensor) -> bool:
    return all(t.device.type == device.type for t in tensors)
