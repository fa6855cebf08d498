"""Tables, README's blocks and the plot from stored rows (see rows.py).

    python bench/report.py                          every table, from bench/results/*.jsonl
    python bench/report.py FILE.jsonl ...           from these files
    python bench/report.py --write                  write the pages' blocks and their picture

A block of a page in PAGES begins with ``<!-- figures: NAME -->`` and ends with
``<!-- end -->``; what is between them is written here and nowhere else (tests/test_figures.py).
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import report_gpu
import report_real
import rows
from rows import Row

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *(DOCS / f"{page}.md" for page in ("performance", "training", "demo")))
PLAIN = ("eager", "compile")
PEERS = ("timm", "timm compiled", "official")
PICTURE = DOCS / "pictures/cost_of_prompts.svg"
Group = dict[str, Row]


def figure(row: Row) -> str:
    """A value with its unit, as people write it."""
    value = row.value
    if row.unit == "s":
        if value < 1e-5:
            return f"{value * 1e6:.2g} µs"
        if value < 1e-3:
            return f"{value * 1e6:.0f} µs"
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if row.unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if row.unit == "ratio":
        return f"{value:.2f}×"
    return f"{value:,.0f} {row.unit}" if value >= 100 else f"{value:.3g} {row.unit}"


def groups(kept: Iterable[Row], suite: str | None = None) -> dict[tuple[str, str, str], Group]:
    """(machine, dtype, case) -> contender -> row."""
    found: dict[tuple[str, str, str], Group] = defaultdict(dict)
    for row in kept:
        if suite in (None, row.suite):
            found[row.machine["device"], row.dtype or "", row.case][row.contender] = row
    return dict(found)


def ours_and_peer(group: Group) -> tuple[Row, Row] | None:
    """The row of this package and the fastest honest peer's, if the group has both."""
    peers = [r for name, r in group.items() if name in (*PLAIN, "timm", "timm compiled", "own")]
    ours = [r for name, r in group.items() if name in ("ours", "cpu", "triton", "cuda")]
    timed = all(r.unit == "s" for r in (*peers, *ours))
    if not (peers and ours and timed):
        return None
    return min(ours, key=lambda r: r.value), min(peers, key=lambda r: r.value)


def ratio_of(group: Group) -> float | None:
    """How many times as fast as the fastest honest peer ours is."""
    pair = ours_and_peer(group)
    return pair and pair[1].value / pair[0].value


def closing_table(kept: Iterable[Row]) -> list[str]:
    """By op, by model and by other task: how many times as fast ours is as the fastest peer."""
    kept = list(kept)
    lines = []
    for title, suite in {"by op": "ops", "by model": "models", "other tasks": None}.items():
        others = [row for row in kept if row.suite not in ("ops", "models")]
        found = []
        for (_, dtype, case), group in groups(kept if suite else others, suite).items():
            if pair := ours_and_peer(group):
                ours, peer = pair
                name = ", ".join(filter(None, (_step(case), dtype)))
                found.append(
                    f"{ratio_of(group):6.2f}x  {name}: {figure(ours)} "
                    f"({peer.contender}: {figure(peer)})"
                )
        lines += [title, *found] if found else []
    return lines


def per_op(kept: list[Row]) -> list[str]:
    """Every op and direction over the faster of eager and compiled torch: least and most."""
    ratios: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for (device, dtype, case), group in groups(kept, "ops").items():
        if (ratio := ratio_of(group)) is not None:
            ratios[case.partition(",")[0]][device, dtype].append(ratio)  # "mix_prompts forward"
    columns = list(dict.fromkeys(column for found in ratios.values() for column in found))
    heads = [f"{machine_name(device)}, {dtype}" for device, dtype in columns]
    lines = [f"| op | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(columns)]
    for name, found in ratios.items():
        cells = [_range(found[column]) if column in found else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _range(ratios: list[float]) -> str:
    """ "0.85×", "1.17× to 2.64×"."""
    least, most = f"{min(ratios):.2f}×", f"{max(ratios):.2f}×"
    return least if least == most else f"{least} to {most}"


def machine_name(device: str) -> str:
    """What people call a processor; clouds hide the model, family and model numbers do not."""
    generations = {
        "family 26": "Zen 5",
        "family 25 model 17": "Zen 4",
        "family 25 model 1": "Zen 3",
    }
    name, _, numbers = device.partition(", ")
    known = next((g for key, g in generations.items() if numbers.startswith(key)), None)
    return f"{name} ({known})" if known else device


def models_table(kept: list[Row]) -> list[str]:
    """Speed-ups of whole steps over the peers, for every machine and dtype."""
    lines = []
    by_machine: dict[tuple[str, str], dict[str, Group]] = defaultdict(dict)
    for (device, dtype, case), group in groups(kept, "models").items():
        if "ours" in group and "timm" in group:
            by_machine[device, dtype][case] = group
    for (device, dtype), cases in by_machine.items():
        facts = next(iter(cases.values()))["ours"].machine
        lines += [
            f"**{machine_name(device)}, {facts['threads']} threads, {dtype}, "
            f"torch {facts['torch']}**",
            "",
            "| step | ours | over timm | timm compiled | official | of GEMM peak | counted FLOPs |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for case, group in cases.items():
            ours = group["ours"].value
            cells = [f"{group[p].value / ours:.2f}×" if p in group else "" for p in PEERS]
            peak = f"{group['GEMM peak'].value:.0%}" if "GEMM peak" in group else ""
            flops = f"{group['counted FLOPs'].value:.2f}×" if "counted FLOPs" in group else ""
            lines.append(
                f"| {_step(case)} | {figure(group['ours'])} | "
                + " | ".join([*cells, peak, flops])
                + " |"
            )
        lines.append("")
    return lines[:-1]


README_STEPS = [
    f"{case} {mode}"
    for mode in ("train", "infer")
    for case in (
        *(f"deep-base/16-P{P}-B8" for P in (10, 50, 100, 200)),
        "pgn-base/32-P16-B16",
    )
]


def models_summary(kept: list[Row]) -> list[str]:
    """The chosen steps over timm eager and compiled, one column a machine and dtype."""
    found = groups(kept, "models")
    columns = list(dict.fromkeys((device, dtype) for device, dtype, _ in found))
    heads = [f"{machine_name(device)}, {dtype}" for device, dtype in columns]
    lines = [
        f"| step | {' | '.join(heads)} | counted FLOPs |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for case in README_STEPS:
        cells, flops = [], ""
        for device, dtype in columns:
            group = found.get((device, dtype, case), {})
            peers = [p for p in ("timm", "timm compiled") if p in group and "ours" in group]
            ratios = [f"{group[p].value / group['ours'].value:.2f}×" for p in peers]
            cells.append(" · ".join(ratios))
            flops = f"{group['counted FLOPs'].value:.2f}×" if "counted FLOPs" in group else flops
        lines.append(f"| {_step(case)} | {' | '.join(cells)} | {flops} |")
    return lines


def _step(case: str) -> str:
    """ "deep-base/16-P50-B8 train" as people say it."""
    match = re.fullmatch(r"(\w+)-(\w+)/(\w+)-P(\d+)-B(\d+) (\w+)", case)
    if match is None:
        return case
    method, size, patch, P, B, mode = match.groups()
    name = {"deep": "VPT-Deep", "shallow": "VPT-Shallow", "pgn": "PGN"}[method]
    vit = f"{size[0].upper()}/{patch.removesuffix('_clip')}"
    step = {"train": "training", "infer": "inference"}[mode]
    return f"{name} {vit}, P={P}, B={B}, {step}"


def ops_table(kept: list[Row]) -> list[str]:
    """Every op and size: eager, compiled, ours, and ours over the faster of the two."""
    lines = []
    by_machine: dict[tuple[str, str], dict[str, Group]] = defaultdict(dict)
    for (device, dtype, case), group in groups(kept, "ops").items():
        if ours_and_peer(group):
            by_machine[device, dtype][case] = group
    for (device, dtype), cases in by_machine.items():
        facts = next(iter(next(iter(cases.values())).values())).machine
        lines += [
            f"**{machine_name(device)}, {facts['threads']} threads, {dtype}, "
            f"torch {facts['torch']}**",
            "",
            "| op and size | eager | compiled | ours | ratio |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for case, group in cases.items():
            pair = ours_and_peer(group)
            assert pair is not None
            plain = [figure(group[p]) if p in group else "" for p in PLAIN]
            ratio = pair[1].value / pair[0].value
            lines.append(f"| {case} | {plain[0]} | {plain[1]} | {figure(pair[0])} | {ratio:.2f}× |")
        lines.append("")
    return lines[:-1]


def memory_table(kept: list[Row]) -> list[str]:
    """Peak memory of a step above model and batch, by plan."""
    plans = ("timm", "official", "fast", "balanced", "min")
    lines = [f"| | {' | '.join(plans)} |", "| --- |" + " ---: |" * len(plans)]
    for (_, _, case), group in groups(kept, "memory").items():
        cells = [
            f"{figure(group[p])} ({group[p].value / group['timm'].value:.2f})" if p in group else ""
            for p in plans
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def storage_table(kept: list[Row]) -> list[str]:
    """Bytes of 1, 24 and 1,000 tasks of each method, and how many backbones that is."""
    found = groups(kept, "storage")
    columns = {case: group for (_, _, case), group in found.items()}
    lines = [
        f"| | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for who in next(iter(columns.values())):
        cells = [
            f"{figure(group[who])} ({group[who].facts['of the backbone']:.2f})"
            for group in columns.values()
        ]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return lines


def plain_table(suite: str) -> Callable[[list[Row]], list[str]]:
    """Case, contender and the figure of each machine, of a suite whose rows have no peer."""

    def table(kept: list[Row]) -> list[str]:
        found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        for r in kept:
            if r.suite == suite:
                found[r.case, r.contender][machine_name(r.machine["device"])] = figure(r)
        if not found:
            return ["Nothing has been measured yet."]
        machines = list(dict.fromkeys(name for figures in found.values() for name in figures))
        lines = [
            f"| what | who | {' | '.join(machines)} |",
            "| --- | --- |" + " ---: |" * len(machines),
        ]
        for (case, who), figures in found.items():
            cells = [figures.get(name, "") for name in machines]
            lines.append(f"| {case} | {who} | {' | '.join(cells)} |")
        return lines

    return table


def cache_table(kept: list[Row]) -> list[str]:
    """A step from the files beside one from the images."""
    lines = [
        "| training step | uncached | cached | ratio | an image |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (_, _, case), group in groups(kept, "cache").items():
        ours, plain = group["ours"], group["uncached"]
        ratio, size = plain.value / ours.value, ours.facts["bytes an image"] / 1e3
        cells = f"{figure(plain)} | {figure(ours)} | {ratio:.2f}× | {size:.0f} kB"
        lines.append(f"| {case.removesuffix(', training step')} | {cells} |")
    return lines


def tune_table(kept: list[Row]) -> list[str]:
    """What a search found beside what was chosen by hand."""
    lines = ["| | rates | seeds | top-1 (%) | rate | decay |", "| --- | --- |" + " ---: |" * 4]
    for (_, _, case), group in groups(kept, "tune").items():
        for who, row in group.items():
            f = row.facts
            score = f"{row.value:.2f} ± {f['sd']:.2f}"
            lines.append(
                f"| {case} | {who} | {row.rounds} | {score} | {f['lr']:g} | {f['weight_decay']:g} |"
            )
    return lines


def demo_table(kept: list[Row]) -> list[str]:
    """Accuracy, size and cost of each method in the demonstration."""
    lines = [
        "| method | top-1 (%) | trained parameters | seconds | peak memory (MB) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (_, _, _), group in groups(kept, "demo").items():
        for name, row in group.items():
            f = row.facts
            lines.append(
                f"| {name} | {row.value:.2f} ± {f['sd']:.2f} | {f['trained parameters']:,} | "
                f"{f['seconds']:.1f} | {f['peak MB']:.0f} |"
            )
    return lines


BLOCKS: dict[str, Callable[[list[Row]], list[str]]] = {
    "demo": demo_table,
    "summary": models_summary,
    "models": models_table,
    "per_op": per_op,
    "memory": memory_table,
    "ops": ops_table,
    "tasks": plain_table("tasks"),
    "storage": storage_table,
    "cache": cache_table,
    "tune": tune_table,
    "input": plain_table("input"),
    "real": lambda kept: report_real.table(groups(kept, "real")),
    "real_blocks": lambda kept: report_real.blocks(groups(kept, "real")),
    "inversion": plain_table("inversion"),
    "server": plain_table("server"),
    "gpu_models": lambda kept: report_gpu.models(groups(kept, "gpu"), figure),
    "gpu_graphs": lambda kept: report_gpu.graphs(groups(kept, "gpu"), figure),
    "gpu_ops": lambda kept: report_gpu.ops(groups(kept, "gpu"), figure),
}


def fill_blocks(text: str, kept: list[Row]) -> str:
    """The text with every ``figures`` block rewritten."""

    def block(match: re.Match[str]) -> str:
        table = "\n".join(BLOCKS[match["name"]](kept))
        return f"<!-- figures: {match['name']} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- figures: (?P<name>\w+) -->.*?<!-- end -->", block, text, flags=re.S)


def plot_cost(kept: list[Row], path: Path) -> None:
    """A training step's time against the number of prompts, one panel a machine: ours is flat."""
    import matplotlib
    from matplotlib.figure import Figure

    pattern = re.compile(r"deep-base/16-P(\d+)-B8 train")
    machines: dict[str, dict[int, Group]] = defaultdict(dict)
    for (device, dtype, case), group in groups(kept, "models").items():
        if dtype == "float32" and (match := pattern.fullmatch(case)) and "ours" in group:
            machines[device][int(match[1])] = group
    picture = Figure(figsize=(1 + 4 * len(machines), 3.2), layout="constrained")
    panels = picture.subplots(1, len(machines), squeeze=False)[0]
    for axes, (device, deep) in zip(panels, machines.items(), strict=True):
        for name, label in (("timm", "timm"), ("timm compiled", "timm, compiled"), ("ours",) * 2):
            points = sorted((P, group[name].value) for P, group in deep.items() if name in group)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(xlabel="prompt tokens per layer", ylim=(0, None))
        axes.set_title(machine_name(device), fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training step (s)")
    panels[0].legend(loc="upper left")
    picture.suptitle("VPT-Deep, ViT-B/16, batch 8, float32, two CPU cores", fontsize=11)
    with matplotlib.rc_context({"svg.hashsalt": "pgn_fast"}):  # the same rows, the same file
        picture.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="JSON lines (default: all stored)")
    parser.add_argument("--write", action="store_true", help="write the pages' blocks and picture")
    arguments = parser.parse_args()
    kept = rows.read(*arguments.files)
    if arguments.write:
        for page in PAGES:
            page.write_text(fill_blocks(page.read_text(), kept))
        plot_cost(kept, PICTURE)
    else:
        for name, table in BLOCKS.items():
            print(f"## {name}\n", *table(kept), "", sep="\n")


if __name__ == "__main__":
    main()
