"""The paper's table with ours beside it."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._files import write_files
from ..protocols import DATA_SETS, DataSet
from .work import Result

_NUMBERS = Path(__file__).with_name("paper_numbers.json")


@functools.cache
def paper_numbers(paper: str) -> dict[str, Any]:
    """What is known of a paper's table, with its source: ``numbers[method][data set]``."""
    content: dict[str, Any] = json.loads(_NUMBERS.read_text(encoding="utf-8"))[paper]
    return content


def write_tables(
    output: Path, paper: str, method: str, results: Mapping[str, Result | None]
) -> str:
    """Write the table of a suite and a method into ``output``, as Markdown and as JSON.

    Data sets of earlier calls stay in it.

    Args:
        results: data set of one suite -> what its final runs reached; None: not run yet.

    Returns:
        The table, as Markdown, and where it is.
    """
    suite = DATA_SETS[next(iter(results))].suite
    name = suite if suite == method else f"{suite}-{method}"
    rows = _earlier(output / f"{name}.json")
    rows |= {data: result for data, result in results.items() if result or data not in rows}
    rows = {data: rows[data] for data in DATA_SETS if data in rows}
    text = _markdown(paper_numbers(paper), method, rows) + f"\nIn {output / name}.md and .json.\n"
    content = {
        "paper": paper,
        "method": method,
        "rows": {data: result and result._asdict() for data, result in rows.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    write_files(
        {
            output / f"{name}.md": text.encode(),
            output / f"{name}.json": (json.dumps(content, indent=2) + "\n").encode(),
        }
    )
    return text


def _earlier(path: Path) -> dict[str, Result | None]:
    """The rows of a table that was written before."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {data: row and Result(**row) for data, row in rows.items() if data in DATA_SETS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _markdown(about: Mapping[str, Any], method: str, rows: Mapping[str, Result | None]) -> str:
    published = about["numbers"].get(method, {})
    lines = ["| data set | paper | ours | runs |", "| --- | ---: | ---: | ---: |"]
    for group, members in _groups(list(rows)).items():
        for row in members:
            result = rows[row.name]
            scores = result.scores if result else []
            lines.append(
                f"| {row.name} | {_number(published.get(row.name))} | {_mean(scores)} | "
                f"{len(scores)}{_stopped(result)}{_counted(row, result)} |"
            )
        if group and (line := _group_mean(group, members, published, rows)):
            lines.append(line)
    tables = "; ".join(f"{suite}: {where}" for suite, where in about["tables"].items())
    lines += [
        "",
        f"{about['metric'].capitalize()}; ours: mean ± standard deviation over runs.",
        f"Paper: {about['paper']}; {tables or 'no table'}; {about['backbone']}.",
        f"Not given: {about['left_out']}.",
    ]
    return "\n".join(lines) + "\n"


def _groups(names: Sequence[str]) -> dict[str, list[DataSet]]:
    found: dict[str, list[DataSet]] = {}
    for name in names:
        found.setdefault(DATA_SETS[name].group, []).append(DATA_SETS[name])
    return found


def _group_mean(
    group: str,
    members: Sequence[DataSet],
    published: Mapping[str, float],
    results: Mapping[str, Result | None],
) -> str | None:
    """The mean of a group of VTAB's, where all of it is there."""
    whole = [row for row in DATA_SETS.values() if row.group == group]
    if len(members) != len(whole):
        return None
    paper = [published[row.name] for row in whole if row.name in published]
    ours = [r.scores for row in whole if (r := results[row.name]) and r.scores]
    mean = f"{statistics.mean(paper):.1f}" if len(paper) == len(whole) else "–"
    own = f"{statistics.mean(map(statistics.mean, ours)):.1f}" if len(ours) == len(whole) else "–"
    return f"| **mean of {group}** | {mean} | {own} | |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _mean(scores: Sequence[float]) -> str:
    if not scores:
        return "–"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def _stopped(result: Result | None) -> str:
    return f" ({len(result.stopped)} diverged)" if result and result.stopped else ""


def _counted(row: DataSet, result: Result | None) -> str:
    """Where ours is of other test images than the paper's: some are missing, or more are there."""
    if not result or result.images in (0, row.sizes.test):
        return ""
    return f" (of {result.images} test images; published: {row.sizes.test})"
