"""Turn the JSON of ``pytest bench/bench_ops.py --benchmark-json=FILE`` into a table and a plot.

    python bench/report.py bench/results/FILE.json [--plot FILE.png]

Prints Markdown: for each case the medians, our backends' ratio to the faster of eager and
torch.compile, and what part of it is arithmetic or memory traffic.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

PLAIN = ("eager", "compile")


def load(path: Path) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, Any]]:
    """(group -> contender -> benchmark, facts of the machine) of one stored run."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for benchmark in benchmarks:
        if "contender" in benchmark["extra_info"]:
            groups[benchmark["group"]][benchmark["extra_info"]["contender"]] = benchmark
    if not groups:
        raise SystemExit(f"{path} holds no benchmark of the ops: run pytest bench/bench_ops.py")
    return dict(groups), benchmarks[0]["extra_info"]


def median(benchmark: dict[str, Any]) -> float:
    return benchmark["stats"]["median"]


def ratios(group: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Speed of each of our backends over the faster way of writing it in plain torch."""
    plain = [median(b) for name, b in group.items() if name in PLAIN]
    if not plain:
        return {}
    return {n: min(plain) / median(b) for n, b in group.items() if n not in PLAIN}


def table(groups: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    lines = [
        "| op and size | eager | compile | ours | ratio | GFLOP/s | GB/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, group in groups.items():
        for backend, ratio in ratios(group).items():
            plain = [_time(group[p]) if p in group else "" for p in PLAIN]
            facts, seconds = group[backend]["extra_info"], median(group[backend])
            lines.append(
                f"| {name} | {plain[0]} | {plain[1]} | {_time(group[backend])} ({backend}) | "
                f"**{ratio:.2f}** | {facts['flops'] / seconds / 1e9:.0f} | "
                f"{facts['bytes'] / seconds / 1e9:.1f} |"
            )
    return lines


def _time(benchmark: dict[str, Any]) -> str:
    seconds = median(benchmark)
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def plot(groups: dict[str, dict[str, dict[str, Any]]], facts: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    bars = [
        (f"{name} ({backend})", ratio)
        for name, group in groups.items()
        for backend, ratio in ratios(group).items()
    ][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh([label for label, _ in bars], [ratio for _, ratio in bars], color="tab:blue")
    axes.axvline(1, color="black", linewidth=1)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("speed over the faster of eager and torch.compile")
    axes.set_title(_caption(facts), fontsize=9)
    figure.savefig(path, dpi=120)


def _caption(facts: dict[str, Any]) -> str:
    return f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON written by --benchmark-json")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    groups, facts = load(arguments.results)
    print(f"{_caption(facts)}; medians.\n", *table(groups), sep="\n")
    if arguments.plot:
        plot(groups, facts, arguments.plot)


if __name__ == "__main__":
    main()
