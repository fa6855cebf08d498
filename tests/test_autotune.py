"""Kernels that are wrong, hang, crash or are slow: each is found out, in a process of its own."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from small_world import tiny_vit

import pgn_fast
from pgn_fast import _native, autotune
from pgn_fast.autotune import cases
from pgn_fast.cli import main
from pgn_fast.ops import dispatch, measured

pytestmark = pytest.mark.skipif(_native.cpu_missing is not None, reason="no CPU kernels")

SMALL = cases.Sizes(B=1, D=24, h=3, patch=8, image=16, P=3, K=8)
CPU = torch.device("cpu")

# what stands in for the kernel of mix_prompts in the worker's process
SABOTAGE = {
    "wrong": "lambda x, y, a: reference.mix_prompts(x, y, a) * 1.01",
    "stale": "lambda x, y, a: torch.empty(*x.shape[:2], y.shape[1]).fill_(float('nan'))",
    "restless": "lambda x, y, a: reference.mix_prompts(x, y, a) * (1 + 1e-7 * next(count))",
    "hangs": "lambda x, y, a: time.sleep(600)",
    "crashes": "lambda x, y, a: os.abort()",
    "slow": "lambda x, y, a: (time.sleep(0.3), reference.mix_prompts(x, y, a))[1]",
}
WORKER = """
import itertools, os, sys, time
import torch
from pgn_fast import reference
from pgn_fast.autotune import worker
from pgn_fast.ops import dispatch
count = itertools.count()
real, fake = dispatch._kernel, {fake}
dispatch._kernel = lambda backend, op: fake if (backend, op) == ("cpu", "mix_prompts") else (
    real(backend, op))
worker.ROUNDS = 3
sys.exit(worker.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of the test's own, and nothing remembered before or after it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "pgn_fast/autotune"
    forget()


def forget() -> None:
    for cached in (measured._load, dispatch._resolve, dispatch._select):
        cached.cache_clear()


def tried(monkeypatch, fake: str, seconds: float = 60.0) -> dict:
    code = WORKER.format(fake=fake)
    monkeypatch.setattr(autotune, "command", lambda words: [sys.executable, "-c", code, *words])
    return autotune._try("mix_prompts", "cpu", torch.float32, CPU, SMALL, seconds)


@pytest.mark.parametrize(
    "bug, reason",
    [
        ("wrong", "wrong numbers: error 1"),
        ("stale", "wrong numbers: error inf"),
        ("restless", "two runs on the same inputs differ"),
        ("crashes", "crashed, exit code -6"),
    ],
)
def test_a_faulty_kernel_is_barred_for_its_reason(monkeypatch, bug, reason):
    row = tried(monkeypatch, SABOTAGE[bug])
    assert row["verdict"] == "barred" and reason in row["reason"], row


def test_a_kernel_that_hangs_is_barred_when_its_time_is_up(monkeypatch):
    row = tried(monkeypatch, SABOTAGE["hangs"], seconds=20)
    assert row == {"verdict": "barred", "reason": "no answer within 20 s"}


def test_a_kernel_that_had_only_what_was_left_of_the_minutes_is_not_barred(monkeypatch):
    monkeypatch.setattr(
        autotune, "command", lambda words: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    row = autotune._try("mix_prompts", "cpu", torch.float32, CPU, SMALL, 1.0, whole=False)
    assert row["verdict"] == "not reached" and "within 1 s" in row["reason"], row


def test_a_right_but_slow_kernel_is_not_preferred(monkeypatch):
    row = tried(monkeypatch, SABOTAGE["slow"])
    assert row["verdict"] == "slower" and row["speedup"] < 1, row
    assert row["error"] <= 2 * row["plain_error"] + 1e-6


def result(**changes):
    known = {"op": "mix_prompts", "backend": "cpu", "dtype": "float32", "verdict": "preferred"}
    return known | {"reason": "2.00x", "speedup": 2.0} | changes


def keep(*rows) -> None:
    measured.save(CPU, {"measured_at": "now", "model": "a model", "results": list(rows)})
    forget()


def chosen(op: str = "mix_prompts", dtype: torch.dtype = torch.float32) -> str:
    return dispatch.resolve(op, CPU, (dtype,))[0]


def test_without_a_file_the_shipped_preference_counts():
    assert chosen() == "cpu"
    assert "nothing measured" in measured.summary(CPU)[0]


def test_what_was_slower_here_is_not_chosen_and_the_rest_is_as_shipped():
    keep(result(verdict="slower", speedup=0.5))
    assert chosen() == "reference"
    assert chosen("prompt_attention") == "cpu"
    assert chosen(dtype=torch.bfloat16) == "cpu"  # not measured
    assert any("mix_prompts float32 cpu: slower" in line for line in measured.summary(CPU))


def test_what_won_here_is_chosen():
    keep(result())
    assert chosen() == "cpu"


def test_a_barred_backend_is_refused_by_name_and_says_how_to_insist(monkeypatch):
    keep(result(verdict="barred", reason="wrong numbers", speedup=None))
    assert chosen() == "reference"
    tensors = torch.randn(1, 2, 3), torch.randn(3, 4)
    from pgn_fast import ops

    with pytest.raises(RuntimeError, match=r"autotune barred it on this device \(wrong numbers"):
        ops.mix_prompts(*tensors, backend="cpu")
    monkeypatch.setenv("PGN_FAST_PREFERENCE", "off")
    forget()
    ops.mix_prompts(*tensors, backend="cpu")


@pytest.mark.parametrize("field", ["device", "torch", "kernels", "triton"])
def test_a_file_for_anything_else_is_not_looked_at(cache, field):
    keep(result(verdict="slower"))
    (path,) = cache.iterdir()
    content = json.loads(path.read_text())
    content["key"][field] = "another"
    path.write_text(json.dumps(content))
    forget()
    assert chosen() == "cpu"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"key": 1, "results": 2}', "\x00"])
def test_a_damaged_file_is_no_file(cache, content):
    keep(result(verdict="slower"))
    (path,) = cache.iterdir()
    path.write_text(content)
    forget()
    assert chosen() == "cpu"


def test_a_whole_model_that_is_slower_keeps_the_defaults_and_what_is_barred():
    rows = [result(verdict="slower", speedup=0.5), result(op="add_layer_norm", verdict="barred")]
    whole = {"verdict": "slower", "reason": "2 ms a step by what won, 1 ms by the defaults"}
    kept = {"measured_at": "now", "model": "a model", "results": rows}
    measured.save(CPU, {**kept, "whole_model": whole})
    forget()
    assert chosen() == "cpu"
    assert chosen("add_layer_norm") == "reference"
    assert any("the whole model: 2 ms a step" in line for line in measured.summary(CPU))
    measured.save(CPU, {**kept, "whole_model": whole | {"verdict": "kept"}})
    forget()
    assert chosen() == "reference"


@pytest.mark.parametrize("times, verdict", [
    ((3.0, 2.0), "kept"),
    ((2.0, 3.0), "slower"),
    ((2.0, None), "slower"),
    ((None, 2.0), "not reached"),
])  # fmt: skip
def test_one_comparison_of_whole_models_decides(monkeypatch, times, verdict):
    default, tuned = times
    asked = []

    def run(words, seconds, changes):
        asked.append((words[2], changes["PGN_FAST_PREFERENCE"]))
        found = default if changes["PGN_FAST_PREFERENCE"] else tuned
        return (1, "broken") if found is None else (0, f"a warning\n{found}\n")

    monkeypatch.setattr(autotune, "run", run)
    found = {"results": [result(verdict="slower", speedup=0.5)]}
    whole = autotune._whole_model(CPU, SMALL, found, 100.0)
    assert whole["verdict"] == verdict and "reason" in whole
    assert asked[0] == ("pgn_fast.autotune.whole_model", "off")


def test_whole_models_are_not_compared_where_the_defaults_won():
    assert autotune._whole_model(CPU, SMALL, {"results": [result()]}, 100.0) is None


def test_the_whole_model_runs_by_what_was_found(monkeypatch):
    """For real, with a choice that differs from the default."""
    monkeypatch.setattr(autotune, "WHOLE_ROUNDS", 1)
    found = {"measured_at": "now", "model": "m", "results": [result(verdict="slower", speedup=0.5)]}
    whole = autotune._whole_model(CPU, SMALL, found, 100.0)
    assert whole["verdict"] in ("kept", "slower") and whole["ms"] > 0 and whole["default_ms"] > 0


def test_explain_says_what_was_measured_and_what_is_a_default():
    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=1)
    assert "kernels: nothing measured here, defaults; run: pgn-fast autotune" in model.explain()
    keep(result(), result(op="add_layer_norm", verdict="barred", reason="hangs", speedup=None))
    text = model.explain()
    assert (
        "kernels: measured now with a model; mix_prompts cpu: preferred (2.00x eager PyTorch); "
        in (text)
    )
    assert "add_layer_norm cpu: barred (hangs); all others by default" in text


def test_time_that_is_up_is_said():
    results = autotune.autotune(CPU, sizes=SMALL, minutes=0.0, tell=lambda line: None)
    assert {row["verdict"] for row in results["results"]} == {"not reached"}
    keep(*results["results"])
    assert chosen() == "cpu"


def test_the_command_measures_keeps_and_exports(monkeypatch, tmp_path, capsys, cache):
    monkeypatch.setattr(autotune, "OPS", ("mix_prompts",))
    monkeypatch.setitem(autotune.DTYPES, "cpu", (torch.float32,))
    exported = tmp_path / "here.json"
    words = ["autotune", "--device", "cpu", "--model", "vit_tiny_patch16_224", "-b", "1"]
    assert main([*words, "--export", str(exported)]) == 0
    assert "mix_prompts float32 cpu: " in capsys.readouterr().out
    (row,) = json.loads(exported.read_text())["results"]
    assert row["verdict"] in ("preferred", "slower") and row["ms"] > 0
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["results"] == [row]


@pytest.mark.parametrize(
    "words", [["--device", "cuda"], ["--minutes", "0"], ["--model", "resnet18"], ["-b", "0"]]
)
def test_what_makes_no_sense_is_one_line(words, capsys):
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main(["autotune", *words]) == 2
    assert capsys.readouterr().err.startswith("pgn-fast autotune: error: ")
