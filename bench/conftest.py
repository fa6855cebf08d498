"""What every benchmark shares: timing, stored rows, a line as each case ends, a closing table.

pytest bench/ --benchmark-only                  the chosen cases, a few minutes on two cores
PGN_FAST_BENCH=all pytest bench/ --benchmark-only      every case
pytest bench/ --benchmark-only --rows FILE.jsonl       keep the figures (see rows.py)
pytest bench/ --benchmark-disable                      run each case once, as small as can be

A default run that takes longer than ``level.BUDGET`` begins no further case and says which it left.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import level
import pytest
import report
import rows
import torch
from models_common import alternate
from rows import Row

# ops and models come first: where time runs out, their ratios are there
ORDER = ("bench_ops", "bench_models")
_measured = pytest.StashKey[list[Row]]()
_began = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="write the figures as JSON lines")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark looks
def pytest_cmdline_main(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its table would be of what is timed here in its place


@pytest.hookimpl(trylast=True)  # when there is a terminal
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_measured] = []
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        terminal.showfspath = False  # every line names its case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", level.DTYPES, ids=level.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in ORDER)


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = time.monotonic() - _began
    timed = not item.config.getoption("--benchmark-disable")
    if timed and level.LEVEL == "chosen" and seconds > level.BUDGET:
        pytest.skip(f"{level.BUDGET:.0f} s are over; PGN_FAST_BENCH=all measures every case")


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots: every case has its own lines."""
    if report.skipped or (report.when == "call" and report.passed):
        return report.outcome, "", report.outcome.upper()
    return None


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
        dtype = f", {row.dtype}" if row.dtype else ""
        plugins = request.config.pluginmanager
        terminal, capture = map(plugins.get_plugin, ("terminalreporter", "capturemanager"))
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(f"{row.case}{dtype}: {row.contender} {report.figure(row)}")
            terminal.flush()

    return keep


@pytest.fixture
def measure(
    benchmark: Any, quick: bool, record: Callable[[Row], None]
) -> Callable[..., dict[str, float]]:
    """``measure({contender: run}, suite=..., case=..., dtype=..., **facts)``: time each ``run()``.

    Returns the contenders' median seconds. Their rounds alternate, so that whatever slows the
    machine down meets all of them alike; a round of a quick run is as many calls as fill 20 ms.
    ``facts`` such as flops and bytes are the least that the task needs (each tensor once), not what
    an implementation happens to do.
    """

    def timed(
        runs: Mapping[str, Callable[[], object]],
        *,
        suite: str,
        case: str,
        dtype: torch.dtype | None = None,
        **facts: Any,
    ) -> dict[str, float]:
        # tells the plugin that this is a benchmark; times are taken here, of all contenders
        benchmark.pedantic(lambda: None, rounds=1, iterations=1)
        first = alternate(runs, rounds=1, warm=True)
        if quick:
            return {}
        # a first call of seconds compiled nothing that counts; another is known after its second
        slow = all(times[0] > 2 for times in first.values())
        once = first if slow else alternate(runs, rounds=1, warm=True)
        calls = {who: max(1, int(0.02 / times[0])) for who, times in once.items()}
        longest = max(calls[who] * times[0] for who, times in once.items())
        rounds = min(15, max(2 if slow else 3, int(0.4 / longest)))
        seconds = alternate(runs, rounds, calls, warm=True)
        for who, times in seconds.items():
            record(
                Row(
                    suite,
                    case,
                    who,
                    statistics.median(times),
                    spread=rows.spread(times),
                    rounds=len(times) * calls[who],
                    dtype=None if dtype is None else level.name(dtype),
                    facts=facts,
                )
            )
        return {who: statistics.median(times) for who, times in seconds.items()}

    return timed


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
