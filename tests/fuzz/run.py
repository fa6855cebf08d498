"""Throw damaged and hostile inputs at every edge of the package: ``make fuzz``.

    python tests/fuzz/run.py --count 10000 --seed 0
    python tests/fuzz/run.py --target adapters --only 1234    # one input again, with a traceback

Each input is made from one number, which is printed where it finds a fault. A fault is an exception
that the edge does not promise, an input that takes more than ``SECONDS``, or memory of more than
``MEGABYTES`` above idle. To add an edge, write a ``Target`` in a file of its own and list it in
``TARGETS``; ``tests/test_fuzz.py`` runs a few inputs of each in the suite.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

SECONDS = 30
MEGABYTES = 300
# name -> "module:class" of its target, and its share of the inputs
TARGETS: dict[str, tuple[str, float]] = {
    "adapters": ("fuzz.adapters:Adapters", 0.3),
    "official": ("fuzz.official:Official", 0.2),
    "images": ("fuzz.images:Images", 0.3),
    "http": ("fuzz.http_bodies:HttpBodies", 0.2),
}


class Fault(Exception):
    """An answer that the edge does not promise."""


class Target(Protocol):
    """An edge of the package. The constructor gets an empty folder, makes good inputs there, and
    calls the edge with one of them, so that all imports are done before memory is measured."""

    def __init__(self, folder: Path) -> None: ...

    def attempt(self, rng: random.Random) -> str:
        """Make one input from ``rng`` and give it to the edge.

        Returns:
            A word for the summary, such as "loaded" or "refused".

        Raises:
            Exception: what the edge must not raise; ``Fault`` for an answer that is wrong.
        """
        ...


class TooSlow(BaseException):
    """Raised in the middle of whatever takes too long; no ``except Exception`` catches it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise ``TooSlow`` in the body after so many seconds."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resident_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since ``forget_peak``) of this process, in MB; Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def forget_peak() -> None:
    """Reset VmHWM."""
    Path("/proc/self/clear_refs").write_text("5")


def load(name: str) -> Callable[[Path], Target]:
    """The class of the target of that name."""
    module, _, kind = TARGETS[name][0].partition(":")
    return getattr(importlib.import_module(module), kind)


def attempt(target: Target, seed: int, idle_mb: float) -> tuple[str, str | None]:
    """Run one input.

    Returns:
        The target's word, or "fault"; and what is wrong, or None.
    """
    forget_peak()
    wrong = None
    try:
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = target.attempt(random.Random(seed))
    except (Exception, TooSlow) as error:
        wrong = "".join(traceback.format_exception(error))[-3000:]
    grown = resident_mb("VmHWM") - idle_mb
    if wrong is None and grown > MEGABYTES:
        wrong = f"{grown:.0f} MB above idle"
    return ("fault", wrong) if wrong is not None else (outcome, None)


def fuzz(name: str, seeds: range, show: Callable[[str], None] = print) -> int:
    """Give a target one input for each seed; the number of faults."""
    with tempfile.TemporaryDirectory() as folder:
        target = load(name)(Path(folder))
        idle = resident_mb("VmRSS")
        outcomes: Counter[str] = Counter()
        began, most = time.perf_counter(), 0.0
        for seed in seeds:
            outcome, wrong = attempt(target, seed, idle)
            outcomes[outcome] += 1
            most = max(most, resident_mb("VmHWM") - idle)
            if wrong is not None:
                again = f"python tests/fuzz/run.py --target {name} --only {seed}"
                show(f"FAULT {name}, again by: {again}\n{wrong}")
    counts = ", ".join(f"{n} {word}" for word, n in sorted(outcomes.items()))
    show(
        f"{name}: seeds {seeds.start} to {seeds.stop - 1}: {counts}; at most {most:.0f} MB above "
        f"idle, {time.perf_counter() - began:.0f} s"
    )
    return outcomes["fault"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged and hostile inputs for every edge.")
    parser.add_argument("--target", choices=TARGETS, help="(all)")
    parser.add_argument("--count", type=int, default=10_000, help="inputs of all targets (10000)")
    parser.add_argument("--seed", type=int, help="the first input's (a random one, printed)")
    parser.add_argument("--only", type=int, metavar="SEED", help="this one input")
    args = parser.parse_args()
    names = [args.target] if args.target else list(TARGETS)
    whole = sum(TARGETS[name][1] for name in names)
    first = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    if args.only is not None:
        if args.target is None:
            parser.error("--only needs --target")
        return int(fuzz(args.target, range(args.only, args.only + 1)) > 0)
    print(f"--seed {first} --count {args.count}", flush=True)
    faults = 0
    for name in names:
        count = max(1, round(args.count * TARGETS[name][1] / whole))
        # a process each, so that one target's memory is not another's idle
        child = os.fork()
        if child == 0:
            found = fuzz(name, range(first, first + count), lambda line: print(line, flush=True))
            os._exit(int(found > 0))
        faults += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    print(f"{faults} of {len(names)} targets with faults")
    return int(faults > 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.modules["fuzz.run"] = sys.modules["__main__"]
    sys.exit(main())
