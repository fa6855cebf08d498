"""Tables and the plot of cost against P from what bench_models.py measured.

    pytest bench/bench_models.py --benchmark-json=bench/results/models_cpu_torch-2.15.json
    python bench/report_models.py bench/results/models_cpu_torch-2.15.json [--plot cost.svg]

Prints Markdown: our speed-up over each peer, and where the time goes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PEERS = ("timm", "timm compiled", "official", "full fine-tuning", "linear probe", "ours, packed")


def speedups(figures: list[dict[str, Any]], mode: str) -> str:
    rows = [f"| {mode} | ours, ms | " + " | ".join(PEERS) + " | of GEMM peak |"]
    rows.append("| --- " * (len(PEERS) + 3) + "|")
    for figure in figures:
        if figure["mode"] != mode:
            continue
        ratios = (figure["speedup"].get(peer) for peer in PEERS)
        cells = " | ".join("" if r is None else f"{r:.2f}×" for r in ratios)
        ours = 1000 * figure["medians"]["ours"]
        share = figure["share_of_gemm_peak"]
        rows.append(f"| {figure['case']} | {ours:.0f} | {cells} | {share:.0%} |")
    return "\n".join(rows)


def cost_of_prompts(benchmarks: list[dict[str, Any]]) -> str:
    """Our step at each P over that at P=1, measured alternating on one backbone."""
    ratios = next(
        (b["extra_info"]["of P=1"] for b in benchmarks if "of P=1" in b["extra_info"]), {}
    )
    return "  ".join(f"{name}: {ratio:.3f}" for name, ratio in ratios.items())


def where_time_goes(figures: list[dict[str, Any]]) -> str:
    rows = ["| step | matrix products | attention | everything else |", "| --- | --- | --- | --- |"]
    for figure in figures:
        for who, shares in figure.get("where_time_goes", {}).items():
            cells = " | ".join(f"{share:.0%}" for share in shares.values())
            rows.append(f"| {figure['case']} {figure['mode']}, {who} | {cells} |")
    return "\n".join(rows)


def plot_cost(figures: list[dict[str, Any]], path: Path) -> None:
    """A training step's time against the number of prompts: flat for us."""
    from matplotlib.figure import Figure

    deep = [f for f in figures if f["case"].startswith("deep-base/16") and f["mode"] == "train"]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in ("timm", "timm compiled", "ours"):
        points = sorted(
            (int(f["case"].split("-P")[1].split("-")[0]), f["medians"][name])
            for f in deep
            if name in f["medians"]
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="prompt tokens per layer", ylabel="training step, s", ylim=(0, None))
    axes.set_title("VPT-Deep, ViT-B/16")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    benchmarks = json.loads(args.json.read_text())["benchmarks"]
    figures = [b["extra_info"] for b in benchmarks if "speedup" in b["extra_info"]]
    tables = speedups(figures, "train"), speedups(figures, "infer"), where_time_goes(figures)
    print(*tables, cost_of_prompts(benchmarks), sep="\n\n")
    if args.plot:
        plot_cost(figures, args.plot)


if __name__ == "__main__":
    main()
