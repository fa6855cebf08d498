"""The tables of docs/training.md on photos, from the rows of bench/real_images.py."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rows import Row

# (machine, dtype, case) -> contender -> row
Groups = Mapping[tuple[str, str, str], Mapping[str, Row]]


def table(found: Groups) -> list[str]:
    """Accuracy on photos, with what seeds and test images leave open, and its cost."""
    # of runs that shared a machine the seconds say nothing
    alone = lambda row: row.facts.get("runs side by side", 1) == 1
    timed = any(alone(row) for group in found.values() for row in group.values())
    names = ["seeds", "top-1 (%)", "validation (%)", "trained parameters"]
    names += ["seconds"] * timed + ["peak memory (MB)"]
    lines = [f"| method | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for group in found.values():
        for name, row in group.items():
            f = row.facts
            cells = [str(row.rounds), _top1(row), f"{f['validation']:.1f}"]
            cells.append(f"{f['trained parameters']:,}")
            if timed:
                cells.append(f"{f['seconds']:.0f}" if alone(row) else "")
            cells.append("" if f["peak bytes"] is None else f"{f['peak bytes'] / 1e6:.0f}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def blocks(found: Groups) -> list[str]:
    """Accuracy on photos against the number of blocks, from the last one down, with prompts."""
    lines = ["| blocks with prompts | top-1 (%) | trained parameters |", "| --- | ---: | ---: |"]
    for group in found.values():
        places = {"linear": "none (linear)", "VPT-Deep, P=10": "all 12"}
        for name in group:
            if match := re.fullmatch(r"VPT-Deep in the last (\d+), P=10", name):
                places[name] = f"the last {match[1]}" if match[1] != "1" else "the last"
        # so many prompts, so many parameters
        rows_of = sorted(
            (group[name] for name in places if name in group),
            key=lambda row: row.facts["trained parameters"],
        )
        for row in rows_of:
            about = f"{places[row.contender]} | {_top1(row)}"
            lines.append(f"| {about} | {row.facts['trained parameters']:,} |")
    return lines


def _top1(row: Row) -> str:
    spread = row.facts["interval"]
    return f"{row.value:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
