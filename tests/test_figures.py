"""Figures that people read come from stored rows, and from nowhere else."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("report")


def test_pages_show_what_the_rows_say(report):
    kept = report.rows.read()
    for page in report.PAGES:
        text = page.read_text()
        assert report.fill_blocks(text, kept) == text, (
            f"{page.name} is out of date: python bench/report.py --write"
        )


def test_no_measured_figure_stands_outside_a_block(report):
    """Speed-ups, times, rates and memory in README's prose would be held by nothing."""
    text = re.sub(
        r"<!-- figures: .*?<!-- end -->", "", (report.ROOT / "README.md").read_text(), flags=re.S
    )
    measured = re.compile(r"\d[\d.,]*\s?(?:×(?! \d)|ms\b|µs\b|images/s|GFLOP/s|MiB\b)")
    assert measured.findall(text) == []


def test_rows_tell_what_they_were_measured_on(report):
    for path in sorted(report.rows.RESULTS.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines, path
        for line in lines:
            assert line["value"] >= 0 and line["contender"] and line["case"]
            told = line["machine"]
            assert all(told[key] for key in ("device", "threads", "torch", "commit")), line


def test_ratios_are_against_the_fastest_honest_peer(report):
    Row = report.Row
    case = lambda who, value: Row("ops", "op forward, B=1", who, value, machine={"device": "a"})
    kept = [case("eager", 4.0), case("compile", 3.0), case("cpu", 1.5), case("cuda", 6.0)]
    title, line = report.closing_table(kept)
    assert title == "by op"
    assert line.split() == [
        "2.00x",
        "op",
        "forward,",
        "B=1:",
        "1.50",
        "s",
        "(compile:",
        "3.00",
        "s)",
    ]
    assert report.per_op(kept)[2:] == ["| op forward | 2.00× |"]
    assert report.closing_table(kept[:2]) == report.closing_table(kept[2:]) == []


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.00006431, "s", "64 µs"),
        (0.01193, "s", "11.9 ms"),
        (1.494, "s", "1.49 s"),
        (2**20 * 283, "bytes", "283 MiB"),
        (4033.2, "images/s", "4,033 images/s"),
        (2.849, "ratio", "2.85×"),
    ],
)
def test_figures_are_written_as_people_do(report, value, unit, text):
    assert report.figure(report.Row("ops", "x", "y", value, unit, machine={})) == text


def test_gpu_tables_show_ours_over_the_fastest_peer(report):
    machine = {"device": "a GPU", "torch": "2.11.0", "cuda": "13.0"}

    def kept(case, seconds):
        row = lambda who, s: report.Row("gpu", case, who, s, dtype="bfloat16", machine=machine)
        return [row(who, s) for who, s in seconds.items()]

    step = {"timm": 0.010, "pgn_fast": 0.006, "pgn_fast, triton": 0.005}
    step |= {"timm, torch.compile": 0.008}
    attention = {"cat, flash": 3e-5, "cat, cudnn": 2e-5, "triton": 1e-5}
    users = {"eager": 0.02, "pgn_fast.capture": 0.005}
    found = kept("VPT vit_base_patch16_224, B=8, training step", step)
    found += kept("prompt_attention, forward", attention)
    found += kept("VPT vit_base_patch16_224, B=8, step with its optimizer", users)
    *_, line = report.BLOCKS["gpu_models"](found)
    assert line == (
        "| VPT-Deep B/16, B=8, training step | 10 ms | 8 ms | 6 ms |  | 5 ms | 2.00× | 1.60× |"
    )
    *_, line = report.BLOCKS["gpu_ops"](found)
    assert line == "| prompt_attention, forward | 20 µs | cat, cudnn | 10 µs | 2.00× |  |  |"
    *_, line = report.BLOCKS["gpu_graphs"](found)
    assert line == "| VPT-Deep B/16, B=8, step with its optimizer | 20 ms | 5 ms | 4.00× |"
    assert report.BLOCKS["gpu_ops"]([]) == ["Nothing has been measured yet."]


def test_accuracy_on_photos_stands_against_blocks_and_shared_runs_tell_no_time(report):
    def kept(name, parameters, **more):
        facts = {"interval": 1.0, "trained parameters": parameters, "seconds": 9.0}
        facts |= {"peak bytes": 2e6, "validation": 71.0} | more
        return report.Row(
            "real", "x", name, 70.0, "%", rounds=5, facts=facts, machine={"device": "a"}
        )

    found = [
        kept("linear", 5, **{"runs side by side": 16}),
        kept("VPT-Deep, P=10", 90),
        kept("VPT-Deep in the last 1, P=10", 10),
        kept("VPT-Deep in the last 4, P=10", 40),
        kept("PGN, P=8", 7),
    ]
    assert [line.split(" | ")[0] for line in report.BLOCKS["real_blocks"](found)[2:]] == [
        "| none (linear)",
        "| the last",
        "| the last 4",
        "| all 12",
    ]
    heading, _, linear, deep, *_ = report.BLOCKS["real"](found)
    assert "seconds" in heading and "seconds" not in report.BLOCKS["real"](found[:1])[0]
    assert linear == "| linear | 5 | 70.0 ± 1.0 | 71.0 | 5 |  | 2 |"
    assert deep == "| VPT-Deep, P=10 | 5 | 70.0 ± 1.0 | 71.0 | 90 | 9 | 2 |"
