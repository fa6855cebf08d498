"""Everything that only a GPU can tell about this library, in one call of nine minutes.

    python bench/gpu.py [--json FILE] [--budget SECONDS] [--only STEP ...] [--dry-run]

Builds, runs every kernel once; then, side by side, what times nothing: the tests that touch a GPU
and the memory and race checks of compute-sanitizer. Then it measures what this machine can do at
all (copy, GEMM), the peers that have to be compiled, which is done side by side before they are
timed in turn, holds the kernels to float64 at full size, and times whole models eager and as CUDA
graphs and every op beside eager PyTorch, each figure with its error against float64, whether two
runs give the same bits, and the share of the ceiling that binds it; last, what ``pgn-fast
autotune`` finds. Each step is a process of its own with a time limit, each compiled peer too: one
that hangs or dies costs its own results.
The JSON is written after every step; "assumptions" in it stands beside the figures that the design
had to guess. Its figures as rows (rows.py) are in the file of the same name that ends in .jsonl.

``--dry-run`` walks through the same steps on the CPU with tiny shapes: every measurement's code
runs, the sanitizers' problems by Triton's interpreter; it builds nothing and runs no test.
Exit code: 0 if every step passed, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import gpu_common  # noqa: E402
import gpu_steps  # noqa: E402
import rows  # noqa: E402

from pgn_fast.ops import dispatch  # noqa: E402

DEVICE_TESTS = (*(f"test_{op}" for op in dispatch.OPS), "test_prompt*", "test_triton_[km]*")


class Step(NamedTuple):
    """A part of the run that passes or fails by itself."""

    name: str
    seconds: int  # never longer
    commands: Callable[[Path], list[list[str]]]  # from the file where its results belong
    each: float = float("inf")  # seconds for one command
    timed: bool = True  # what times nothing runs beside its neighbors of that kind
    waits: bool = False  # its commands get ready side by side, and are timed in turn


class Outcome(NamedTuple):
    status: str  # "passed", "failed" or "timed out"
    seconds: float
    output: str  # the end of what it printed


def _measure(*names: str) -> Callable[[Path], list[list[str]]]:
    script = str(HERE / "gpu_steps.py")
    return lambda part: [[sys.executable, script, name, str(part)] for name in names]


def _compiled(part: Path) -> list[list[str]]:
    """Each with a file of its own: they run side by side until they are ready."""
    files = [part.with_name(f"{part.stem}-{name}.part") for name in gpu_steps.COMPILED]
    named = zip(gpu_steps.COMPILED, files, strict=True)
    return [[*_measure(name)(file)[0], "--waits"] for name, file in named]


def _build(part: Path) -> list[list[str]]:
    install = ["install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    return [[sys.executable, "-m", "pip", *install]]


def _tests(kind: str) -> Callable[[Path], list[list[str]]]:
    """The "ops" by their own files, or "users": what is marked to need a GPU, in any file."""

    def commands(part: Path) -> list[list[str]]:
        tests = ROOT / "tests"
        files = {f for name in DEVICE_TESTS for f in tests.glob(f"{name}.py")}
        marks = []
        if kind == "users":
            files = {f for f in tests.glob("test_*.py") if "mark.gpu" in f.read_text()}
            marks = ["-m", "gpu"]
        pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        pytest += ["--continue-on-collection-errors"]  # a test package may be missing there
        if importlib.util.find_spec("xdist"):
            # a new Triton kernel takes seconds to compile
            pytest += ["-n", str(max(1, min(16, os.cpu_count() or 1) // 2))]
        return [[*pytest, *marks, *sorted(map(str, files))]]

    return commands


# names of our kernels: mangled with the namespace in C++, the functions' own in Triton
OUR_KERNELS = r"pgn_fast|^_[a-z_]+_kernel"


SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def _sanitizer(tool: str) -> Callable[[Path], list[list[str]]]:
    def commands(part: Path) -> list[list[str]]:
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        flags = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        # ours alone: cuBLAS under a sanitizer takes minutes. Who wrote what initcheck finds read
        # must be watched too
        if tool != "initcheck":
            flags += ["--kernel-name", f"kns={OUR_KERNELS}"]
        return [[found, *flags, *_measure("small")(part)[0]]]

    return commands


# By worth: what is cut off at the end of the budget is what matters least. The limits sum to it.
STEPS = [
    Step("build", 90, _build),
    Step("smoke", 40, _measure("small"), timed=False),
    Step("tests of ops", 100, _tests("ops"), timed=False),
    Step("tests of users' calls", 100, _tests("users"), timed=False),
    *(Step(tool, 100, _sanitizer(tool), timed=False) for tool in SANITIZERS),
    Step("ceilings", 10, _measure("ceilings")),
    Step("compiled peers", 100, _compiled, each=8, waits=True),
    Step("full size", 20, _measure("full_size")),
    Step("models", 90, _measure("models")),
    Step("prompt_attention", 30, _measure("prompt_attention")),
    Step("prompted_patch_embed", 15, _measure("prompted_patch_embed")),
    Step("mix_prompts", 15, _measure("mix_prompts")),
    Step("other ops", 10, _measure("other_ops")),
    Step("gemm", 10, _measure("gemm")),
    Step("sdpa", 10, _measure("sdpa")),
    Step("autotune", 40, _measure("autotune")),
]
BUDGET = 540.0


def in_turn(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in groups that run one after the other; those of one group run side by side."""
    groups: list[list[Step]] = []
    for timed, neighbors in groupby(steps, lambda step: step.timed):
        members = list(neighbors)
        groups += [[step] for step in members] if timed else [members]
    return groups


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """A command in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(HERE)])}
    if "--tiny" in command:
        environment["TRITON_INTERPRET"] = "1"  # the Triton kernels on the CPU
    if "--waits" in command:
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # the others want cores, too
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float, begin: float, said: str = "") -> Outcome:
    """Wait for a command, and end its whole group when time is up."""
    try:
        output, _ = process.communicate("\n", timeout=max(seconds, 0.1))
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "timed out"
    kept = 2_000 if status == "passed" else 60_000
    return Outcome(status, time.monotonic() - begin, (said + output)[-kept:])


def run_command(command: Sequence[str], seconds: float) -> Outcome:
    """Run one command, no longer than ``seconds``."""
    begin = time.monotonic()
    try:
        process = start(command)
    except OSError as error:
        return Outcome("failed", 0.0, str(error))
    return finish(process, seconds, begin)


def run_in_turn(commands: Sequence[Sequence[str]], seconds: float, each: float) -> list[Outcome]:
    """Start all commands; when all are ready, or three quarters of the time are over, let those
    that are go on one by one. Their seconds are those of their turns."""
    end = time.monotonic() + seconds
    processes = [start(command) for command in commands]
    said: list[list[str]] = [[] for _ in processes]

    def until_ready(i: int) -> bool:
        assert processes[i].stdout is not None
        for line in processes[i].stdout:
            said[i].append(line)
            if line.strip() == gpu_common.READY:
                return True
        return False  # it died

    pool = ThreadPoolExecutor(len(processes))
    watched = [pool.submit(until_ready, i) for i in range(len(processes))]
    wait(watched, timeout=0.75 * seconds)
    ready = [future.done() and future.result() for future in watched]
    for process, is_ready in zip(processes, ready, strict=True):
        if not is_ready and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    pool.shutdown()
    outcomes = []
    for i, process in enumerate(processes):
        begin = time.monotonic()
        outcome = finish(process, min(each, end - begin), begin, "".join(said[i]))
        if not ready[i] and process.returncode == -signal.SIGKILL:
            outcome = outcome._replace(status="timed out")
        outcomes.append(outcome)
    return outcomes


def run_step(step: Step, seconds: float, part: Path) -> Outcome:
    """Run a step's commands one after the other, also after one that failed."""
    begin = time.monotonic()
    limit = min(step.seconds, seconds)
    outcomes: list[Outcome] = []
    if step.waits:
        outcomes = run_in_turn(step.commands(part), limit, step.each)
    for command in [] if step.waits else step.commands(part):
        left = limit - (time.monotonic() - begin)
        if left < 2:
            outcomes.append(Outcome("timed out", 0.0, f"not reached: {' '.join(command)}"))
        else:
            outcomes.append(run_command(command, min(left, step.each)))
    worst = next((o.status for o in outcomes if o.status != "passed"), "passed")
    output = "\n".join(o.output for o in outcomes)
    return Outcome(worst, time.monotonic() - begin, output)


def rehearse_step(step: Step, seconds: float, part: Path) -> Outcome:
    """The same step without a GPU: its measurements in tiny sizes, in this process, but for the
    Triton kernels, whose interpreter is chosen before they are imported. Building, testing and the
    sanitizers, whose program the smoke step has run, are only named."""
    commands = step.commands(part)
    script = str(HERE / "gpu_steps.py")
    if commands[0][1] != script:
        return Outcome("passed", 0.0, "would run: " + " ".join(commands[0]))
    names = [command[2] for command in commands]
    if "small" in names:
        return run_command([*commands[0], "--tiny"], seconds)
    begin = time.monotonic()
    try:
        for name in names:
            gpu_steps.measure(name, part, tiny=True)
    except Exception as error:
        return Outcome("failed", time.monotonic() - begin, repr(error))
    return Outcome("passed", time.monotonic() - begin, "")


def add_shares(report: dict[str, Any]) -> None:
    """Give every measured figure its rates and its share of the ceiling that binds it."""
    copy, gemm = report.get("bytes_per_second"), report.get("flops_per_second")
    for figure in report["figures"]:
        seconds = figure["ms"] / 1e3
        figure["bytes_per_second"] = figure["bytes"] / seconds
        figure["flops_per_second"] = figure["flops"] / seconds
        if copy and gemm:
            floor = max(figure["bytes"] / copy, figure["flops"] / gemm)
            figure["share_of_ceiling"] = floor / seconds


def assumptions(report: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What the design assumed of an H200, and the median of what was measured here."""
    measured: dict[str, list[float]] = {}
    for figure in report["figures"]:
        if figure.get("informs") and "share_of_ceiling" in figure:
            measured.setdefault(figure["informs"], []).append(figure["share_of_ceiling"])
    median = lambda values: sorted(values)[len(values) // 2] if values else None
    found: dict[str, dict[str, float | None]] = {
        name: {"assumed": assumed, "measured": median(measured.get(name, []))}
        for name, assumed in gpu_steps.ASSUMED_SHARES.items()
    }
    for name, assumed in gpu_steps.ASSUMED_RATES.items():
        found[name] = {"assumed": assumed, "measured": report.get(name)}
    return found


def run(
    steps: Sequence[Step],
    budget: float,
    path: Path,
    execute: Callable[[Step, float, Path], Outcome],
) -> dict[str, Any]:
    """Run the steps within ``budget`` seconds; the report is on disk after every one of them."""
    begin = time.monotonic()
    report: dict[str, Any] = {"environment": gpu_common.environment(), "steps": {}}
    report |= {"figures": [], "errors": []}

    def attempt(step: Step) -> tuple[Step, Outcome, dict[str, Any]]:
        left = budget - (time.monotonic() - begin)
        part = path.with_name(f"{path.stem}-{step.name.replace(' ', '-')}.part")
        part.unlink(missing_ok=True)
        outcome = execute(step, left, part) if left > 5 else Outcome("no time left", 0.0, "")
        found: dict[str, Any] = {}
        for file in sorted(path.parent.glob(f"{part.stem}*.part")):
            results = json.loads(file.read_text())  # also what was measured before a step died
            for collected in ("figures", "errors"):
                results[collected] = found.get(collected, []) + results.get(collected, [])
            found |= results
            file.unlink()
        return step, outcome, found

    for group in in_turn(steps):
        with ThreadPoolExecutor(len(group)) as pool:
            for step, outcome, results in pool.map(attempt, group):
                for collected in ("figures", "errors"):
                    report[collected] += results.pop(collected, [])
                report.update(results)
                report["steps"][step.name] = outcome._asdict()
                print(f"{step.name:24s}{outcome.status:14s}{outcome.seconds:7.1f} s", flush=True)
                if outcome.status != "passed":
                    print(outcome.output[-1500:], flush=True)
        add_shares(report)
        report["assumptions"] = assumptions(report)
        path.write_text(json.dumps(report, indent=1) + "\n")
        rows.write(path.with_suffix(".jsonl"), as_rows(report))
    return report


def as_rows(report: dict[str, Any]) -> Iterable[rows.Row]:
    """Every time, and the peaks of memory, in the one schema of stored figures."""
    explains = ("flops", "bytes", "share_of_ceiling", "error", "repeats", "cuda_graph")
    for figure in report["figures"]:
        facts = {key: figure[key] for key in explains if figure.get(key) is not None}
        yield rows.Row(
            *("gpu", figure["group"], figure["name"], figure["ms"] / 1e3),
            spread=figure["spread"],
            rounds=figure["rounds"],
            dtype=figure["dtype"],
            facts=facts,
        )
    for case, value in report.get("peak_bytes", {}).items():
        group, _, name = case.partition(" by ")
        yield rows.Row("gpu", f"{group}, peak memory of a training step", name, value, "bytes")


def print_figures(report: dict[str, Any]) -> None:
    for error in report["errors"]:
        print(error)
    for figure in report["figures"]:
        share, error = figure.get("share_of_ceiling"), figure.get("error")
        print(
            f"{figure['group']:64s}{figure['name']:24s}{figure['ms']:10.4f} ms"
            + (f"  error {error:.1e}" if error is not None else "")
            + ("  NOT THE SAME TWICE" if figure.get("repeats") is False else "")
            + (f"{share:7.0%} of the ceiling" if share else "")
        )
    for group, lines in report.get("graphs", {}).items():
        print(f"{group}: {'; '.join(lines)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/gpu.py")
    names = [step.name for step in STEPS]
    parser.add_argument("--json", type=Path, help="default: bench/results/gpu_DEVICE_torchV.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all steps")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("bench/gpu.py needs a CUDA device and torch sees none; try --dry-run.")
        return 2
    device = "dry-run" if arguments.dry_run else torch.cuda.get_device_name().replace(" ", "-")
    path = arguments.json or HERE / f"results/gpu_{device}_torch{torch.__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if step.name in arguments.only]
    report = run(steps, arguments.budget, path, rehearse_step if arguments.dry_run else run_step)
    print_figures(report)
    print(f"written: {path}")
    return 0 if all(s["status"] == "passed" for s in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
