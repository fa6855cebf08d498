"""What every benchmark shares: timing, stored rows, a line as each case ends, a closing table.

pytest bench/ --benchmark-only                  the chosen cases, a few minutes on two cores
PGN_FAST_BENCH=all pytest bench/ --benchmark-only      every case
pytest bench/ --benchmark-only --rows FILE.jsonl       keep the figures (see rows.py)
pytest bench/ --benchmark-disable                      run each case once, as small as can be
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report
import rows
import torch
from rows import DEVICE, Row

ALL = os.environ.get("PGN_FAST_BENCH") == "all"
_measured = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="write the figures as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: measured with PGN_FAST_BENCH=all alone")
    config.stash[_measured] = []
    config.option.benchmark_quiet = True  # the closing table says what its tables say


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ALL:
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="measured with PGN_FAST_BENCH=all"))


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether cases only have to run, not to be timed: use the smallest sizes."""
    return bool(request.config.getoption("--benchmark-disable"))


@pytest.fixture
def record(request: pytest.FixtureRequest, quick: bool) -> Callable[[Row], None]:
    """``record(row)``: keep a figure, and print it."""

    def keep(row: Row) -> None:
        if quick:
            return
        request.config.stash[_measured].append(row)
        terminal = request.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"{row.case}: {row.contender} {report.figure(row)}")

    return keep


@pytest.fixture
def measure(benchmark: Any, quick: bool, record: Callable[[Row], None]) -> Callable[..., None]:
    """``measure(run, suite=..., case=..., contender=..., flops=..., bytes=...)``: time ``run()``.

    Rounds are started by a warm-up and ended by a synchronization. ``flops`` and ``bytes`` are the
    least that the task needs (each tensor once), not what an implementation happens to do.
    """

    def timed(
        run: Callable[[], object],
        *,
        suite: str,
        case: str,
        contender: str,
        dtype: torch.dtype | None = None,
        **facts: Any,
    ) -> None:
        def once() -> None:
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        if quick:
            benchmark(once)  # disabled: runs once
            return
        for _ in range(3):
            once()
        benchmark.pedantic(once, rounds=rounds_for(once), warmup_rounds=1)
        seconds = benchmark.stats.stats.data
        record(
            Row(
                suite,
                case,
                contender,
                statistics.median(seconds),
                spread=rows.spread(seconds),
                rounds=len(seconds),
                dtype=None if dtype is None else str(dtype).removeprefix("torch."),
                facts=facts,
            )
        )

    return timed


def rounds_for(once: Callable[[], object], seconds: float = 0.4) -> int:
    """As many rounds as fit into ``seconds``, between 5 and 2000."""
    start = time.perf_counter()
    once()
    return int(min(2000, max(5, seconds / max(time.perf_counter() - start, 1e-6))))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash[_measured]
    if not measured:
        return
    terminalreporter.section("ours against the fastest honest peer")
    for line in report.closing_table(measured):
        terminalreporter.write_line(line)
    if path := config.getoption("--rows"):
        rows.write(path, measured)
        terminalreporter.write_line(f"{len(measured)} rows written to {path}")


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
