"""The ``measure`` fixture: one benchmark with everything that explains its number.

``pytest bench/ --benchmark-only`` measures the default cases, ``--full`` all of them, and
``--benchmark-disable`` runs each default case once at its smallest size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from machine import DEVICE, machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="measure every size, not the usual few")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: measured with --full alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="one of the many sizes of --full"))


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether cases only have to run, not to be timed: use the smallest sizes."""
    return bool(request.config.getoption("--benchmark-disable"))


@pytest.fixture
def measure(benchmark: Any, quick: bool) -> Callable[..., None]:
    """``measure(run, group=..., flops=..., bytes=..., **facts)``: time ``run()``.

    Rounds are started by a warm-up and ended by a synchronization. ``flops`` and ``bytes`` are the
    least that the task needs (each tensor once), not what an implementation happens to do.
    """

    def timed(
        run: Callable[[], object], *, group: str, flops: float, bytes: float, **facts: Any
    ) -> None:
        def once() -> None:
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.extra_info.update(machine(), flops=flops, bytes=bytes, **facts)
        if quick:
            benchmark(once)  # disabled: runs once
            return
        for _ in range(3):
            once()
        benchmark.pedantic(once, rounds=rounds_for(once), warmup_rounds=1)

    return timed


def rounds_for(once: Callable[[], object], seconds: float = 0.4) -> int:
    """As many rounds as fit into ``seconds``, between 5 and 2000."""
    start = time.perf_counter()
    once()
    return int(min(2000, max(5, seconds / max(time.perf_counter() - start, 1e-6))))


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
