"""bench/gpu.py without a GPU: its error, its rehearsal, and what it does with steps that fail."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


def test_the_limits_of_the_steps_fit_the_budget(gpu):
    longest = [max(step.seconds for step in group) for group in gpu.in_turn(gpu.STEPS)]
    assert sum(longest) <= gpu.BUDGET <= 540


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so_and_stops(gpu, capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().out == (
        "bench/gpu.py needs a CUDA device and torch sees none; try --dry-run.\n"
    )


def test_rehearsal_walks_through_every_step(gpu, tmp_path):
    path = tmp_path / "report.json"
    assert gpu.main(["--dry-run", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {name: step["status"] for name, step in report["steps"].items()} == {
        step.name: "passed" for step in gpu.STEPS
    }
    assert report["errors"] == []
    groups = {figure["group"].split()[0] for figure in report["figures"]}
    ops = {"mix_prompts", "prompted_patch_embed", "prompt_attention", "add_layer_norm"}
    assert groups == {"gemm", "sdpa", "VPT", "full", *ops}
    for figure in report["figures"]:
        assert figure["ms"] > 0
        if "with its optimizer" not in figure["group"]:
            assert figure["error"] < 1e-4 and figure["repeats"], figure
    names = {figure["name"] for figure in report["figures"]}
    assert {"timm", "pgn_fast", "pgn_fast.capture", "timm, torch.compile"} <= names
    assert set(report["assumptions"]) == {
        *gpu.gpu_steps.ASSUMED_SHARES,
        *gpu.gpu_steps.ASSUMED_RATES,
    }
    assert report["autotune"]["results"]
    assert not list(tmp_path.glob("*.part"))
    kept = gpu.rows.read(path.with_suffix(".jsonl"))
    assert [row.value * 1e3 for row in kept] == pytest.approx([f["ms"] for f in report["figures"]])
    assert {(row.suite, row.unit, row.dtype) for row in kept} == {("gpu", "s", "float32")}


@pytest.mark.parametrize(
    "command, status, output",
    [
        (python("print('fine')"), "passed", "fine\n"),
        (python("raise SystemExit('broken')"), "failed", "broken\n"),
        (python("import time; print('begun', flush=True); time.sleep(60)"), "timed out", "begun\n"),
        (["no-such-program"], "failed", "[Errno 2] No such file or directory: 'no-such-program'"),
    ],
)
def test_command_outcomes(gpu, command, status, output):
    outcome = gpu.run_command(command, seconds=2)
    assert (outcome.status, outcome.output) == (status, output)
    assert outcome.seconds < 20


def test_a_failing_step_costs_only_itself(gpu, tmp_path):
    path = tmp_path / "report.json"
    half_done = "open({!r}, 'w').write('{}'); raise SystemExit(3)"
    part = json.dumps({"figures": [figure(gpu)], "flops_per_second": 2e12})
    steps = [
        gpu.Step("dies", 5, lambda p: [python(half_done.format(str(p), part))]),
        gpu.Step("hangs", 1, lambda p: [python("import time; time.sleep(60)")]),
        gpu.Step("works", 5, lambda p: [python("pass")]),
    ]
    gpu.run(steps, 60, path, gpu.run_step)
    report = json.loads(path.read_text())
    statuses = {name: step["status"] for name, step in report["steps"].items()}
    assert statuses == {"dies": "failed", "hangs": "timed out", "works": "passed"}
    assert report["figures"][0]["group"] == "a gemm" and report["flops_per_second"] == 2e12


def test_what_times_nothing_runs_side_by_side_and_all_else_alone(gpu, tmp_path):
    untimed = [gpu.Step(name, 20, lambda p: [python("pass")], timed=False) for name in "bc"]
    timed = [gpu.Step(name, 20, lambda p: [python("pass")]) for name in "ade"]
    steps = [timed[0], *untimed, *timed[1:]]
    groups = [[step.name for step in group] for group in gpu.in_turn(steps)]
    assert groups == [["a"], ["b", "c"], ["d"], ["e"]]
    meeting = threading.Barrier(2, timeout=20)

    def execute(step, seconds, part):
        if not step.timed:
            meeting.wait()  # raises unless both are here at once
        return gpu.Outcome("passed", 0.0, "")

    report = gpu.run(steps, 60, tmp_path / "report.json", execute)
    assert [step["status"] for step in report["steps"].values()] == ["passed"] * 5


def test_commands_that_wait_get_ready_together_and_run_in_turn(gpu, tmp_path):
    """Each says when its turn begins and ends; one dies, and one is never ready."""
    ready = f"print({gpu.gpu_common.READY!r}, flush=True); input()"
    turn = f"{ready}; from time import *; print(time()); sleep(0.3); print(time())"
    commands = [python(turn), python("raise SystemExit('died')"), python(turn)]
    *found, late = gpu.run_in_turn([*commands, python("import time; time.sleep(60)")], 8, 4)
    assert [outcome.status for outcome in found] == ["passed", "failed", "passed"]
    assert late.status == "timed out" and "died" in found[1].output
    turns = [[float(line) for line in found[i].output.split()[-2:]] for i in (0, 2)]
    assert turns[0][0] < turns[0][1] < turns[1][0] < turns[1][1]


def test_what_waits_is_timed_at_its_turn(gpu, tmp_path, monkeypatch):
    bench = gpu.gpu_common.Bench(tmp_path / "part", tiny=True, waits=True)
    calls = []
    bench.record("a group", "one", lambda: calls.append(1) or torch.ones(1))
    assert bench.report["figures"] == [] and calls
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    bench.take_turn()
    assert [figure["name"] for figure in bench.report["figures"]] == ["one"]


def test_steps_without_time_are_named_as_such(gpu, tmp_path):
    step = gpu.Step("late", 5, lambda p: [python("pass")])
    report = gpu.run([step], 1, tmp_path / "report.json", gpu.run_step)
    assert report["steps"]["late"]["status"] == "no time left"


def test_a_command_that_hangs_leaves_time_for_the_next(gpu, tmp_path):
    hangs, works = python("import time; time.sleep(60)"), python("print('reached')")
    step = gpu.Step("many", 20, lambda part: [hangs, works], each=1)
    outcome = gpu.run_step(step, 20, tmp_path / "part")
    assert outcome.status == "timed out" and "reached" in outcome.output
    step = gpu.Step("many", 1, lambda part: [works])
    assert gpu.run_step(step, 20, tmp_path / "part").output.startswith("not reached: ")


def test_a_figure_that_is_wrong_or_restless_says_so(gpu, tmp_path):
    bench = gpu.gpu_common.Bench(tmp_path / "part", tiny=True)
    x = torch.ones(3)
    bench.record("a group", "wrong", lambda: x * 1.5, truth=[x.double()])
    bench.record("a group", "restless", lambda: torch.rand(3))
    bench.record("a group", "fails", lambda: x.view(2, 2))
    wrong, restless = json.loads((tmp_path / "part").read_text())["figures"]
    assert wrong["error"] == pytest.approx(0.5) and wrong["repeats"]
    assert not restless["repeats"] and restless["error"] is None
    (error,) = bench.report["errors"]
    assert error.startswith("a group, fails: RuntimeError: ")


def test_the_sanitizers_look_at_every_kernel_of_ours_and_at_no_other(gpu):
    """In C++ by the namespace that is part of every mangled name, in Triton by the function."""
    pattern = re.compile(gpu.OUR_KERNELS)
    sources = (Path(__file__).parents[1] / "kernels/pgn_triton").glob("*.py")
    text = "".join(path.read_text() for path in sources)
    triton = re.findall(r"@triton\.jit\ndef (_\w*kernel)\(", text)
    assert len(triton) >= 13 and all(map(pattern.search, triton))
    assert pattern.search("_ZN8pgn_fast4cuda16mix_prompts_kernelI6__halfEEvNS0_10MixPromptsEb")
    for other in (
        "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEEEEviT0_T1_",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
    ):
        assert not pattern.search(other)


def figure(gpu, **changes):
    known = {"group": "a gemm", "name": "torch", "ms": 2.0, "flops": 1e9, "bytes": 1e9}
    known |= {"spread": 0.1, "rounds": 25, "dtype": "bfloat16"}
    return known | {"informs": "gemm"} | changes


def test_shares_are_of_the_ceiling_that_binds(gpu):
    report = {
        "bytes_per_second": 1e12,
        "flops_per_second": 1e15,
        "figures": [figure(gpu), figure(gpu, flops=1.8e12, ms=3.6)],
    }
    gpu.add_shares(report)
    by_bytes, by_flops = report["figures"]
    assert by_bytes["share_of_ceiling"] == pytest.approx(0.5)
    assert by_flops["share_of_ceiling"] == pytest.approx(0.5)
    assert by_bytes["bytes_per_second"] == pytest.approx(5e11)
    found = gpu.assumptions(report)
    assert found["gemm"] == {"assumed": 0.82, "measured": pytest.approx(0.5)}
    assert found["elementwise"]["measured"] is None
    assert found["bytes_per_second"] == {"assumed": 4.3e12, "measured": 1e12}
