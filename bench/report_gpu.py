"""The tables of what bench/gpu.py measured: ours beside the fastest that anything else reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rows import Row

KERNELS = ("triton", "cuda")
Group = dict[str, Row]
Groups = dict[tuple[str, str, str], Group]
MODES = (", training step", ", inference")


def is_ours(name: str) -> bool:
    return name in KERNELS or name.startswith("pgn_fast")


def fastest(group: Group, wanted: Callable[[str], bool]) -> Row | None:
    times = [row for name, row in group.items() if row.unit == "s" and wanted(name)]
    return min(times, key=lambda row: row.value, default=None)


def machines(found: Groups) -> dict[tuple[str, str], dict[str, Group]]:
    """(device, dtype) -> case -> contender -> row."""
    by_machine: dict[tuple[str, str], dict[str, Group]] = {}
    for (device, dtype, case), group in found.items():
        by_machine.setdefault((device, dtype), {})[case] = group
    return by_machine


def title(device: str, dtype: str, group: Group) -> list[str]:
    facts: dict[str, Any] = next(iter(group.values())).machine
    return [f"**{device}, {dtype}, torch {facts['torch']}, CUDA {facts['cuda']}**", ""]


def over(ours: Row, peer: Row | None) -> str:
    return f"{peer.value / ours.value:.2f}×" if peer else ""


def models(found: Groups, figure: Callable[[Row], str]) -> list[str]:
    """A step of each, all as CUDA graphs, and how many times as fast Triton's kernels make it as
    timm's blocks are, eager and compiled."""
    lines: list[str] = []
    for (device, dtype), cases in machines(found).items():
        wanted = {c: g for c, g in cases.items() if c.endswith(MODES) and "pgn_fast, triton" in g}
        if not wanted:
            continue
        lines += [
            *title(device, dtype, next(iter(wanted.values()))),
            "| step | timm | timm compiled | ours, eager PyTorch | ours, CUDA C++ | ours, Triton "
            "| over timm | over compiled |",
            "| --- |" + " ---: |" * 7,
        ]
        for case, group in wanted.items():
            eager = "pgn_fast, reference" if "pgn_fast, reference" in group else "pgn_fast"
            names = ("timm", "timm, torch.compile", eager, "pgn_fast, cuda", "pgn_fast, triton")
            cells = [figure(group[name]) if name in group else "" for name in names]
            cells += [over(group["pgn_fast, triton"], group.get(name)) for name in names[:2]]
            lines.append(f"| {_in_words(case)} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1] or ["Nothing has been measured yet."]


def graphs(found: Groups, figure: Callable[[Row], str]) -> list[str]:
    """Whole steps with their optimizer: with a launch for each kernel, and replayed."""
    lines = ["| step | launched | one CUDA graph | ratio |", "| --- | ---: | ---: | ---: |"]
    for (_, _, case), group in found.items():
        if "pgn_fast.capture" in group and "eager" in group:
            ours, eager = group["pgn_fast.capture"], group["eager"]
            cells = f"{figure(eager)} | {figure(ours)} | {over(ours, eager)}"
            lines.append(f"| {_in_words(case)} | {cells} |")
    return lines


def _in_words(case: str) -> str:
    """ "VPT vit_base_patch16_224, B=64, P=50, inference" as people say it."""
    method, _, rest = case.partition(" ")
    name = {"VPT": "VPT-Deep"}.get(method, method)
    return f"{name} {rest}".replace("vit_base_patch", "B/").replace("_224", "")


def ops(found: Groups, figure: Callable[[Row], str]) -> list[str]:
    """Each kernel over the fastest of eager PyTorch, torch's attention kernels and
    torch.compile."""
    lines: list[str] = []
    for (device, dtype), cases in machines(found).items():
        wanted = {c: g for c, g in cases.items() if any(k in g for k in KERNELS)}
        wanted = {c: g for c, g in wanted.items() if fastest(g, lambda name: not is_ours(name))}
        if not wanted:
            continue
        lines += [
            *title(device, dtype, next(iter(wanted.values()))),
            "| op and size | fastest peer | | Triton | ratio | CUDA C++ | ratio |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for case, group in wanted.items():
            peer = fastest(group, lambda name: not is_ours(name))
            assert peer is not None
            cells = [figure(peer), peer.contender]
            for name in KERNELS:
                cells += (
                    [figure(group[name]), over(group[name], peer)] if name in group else ["", ""]
                )
            lines.append(f"| {case} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1] or ["Nothing has been measured yet."]
