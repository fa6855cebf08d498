"""The command line: help that is quick, a whole round, and one readable line for what is wrong."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_world import MODEL, tiny_vit_kwargs, write_images

from pgn_fast import cli
from pgn_fast.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, a backbone, and an adapter that the command line trained on them."""
    root = tmp_path_factory.mktemp("world")
    for name, count in (("train", 6), ("test", 3)):
        write_images(root / "data" / name, count, seed=len(name))
    options = "--method vpt-deep --num-prompts 2 --epochs 2 --warmup-epochs 1 -b 6 --device cpu"
    output = root / "run"
    assert (
        main(["train", str(root / "data"), "--output", str(output), *options.split(), *model(root)])
        == 0
    )
    return root


def model(root):
    pairs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(root).items()]
    return ["--model", MODEL, "--model-kwargs", *pairs]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pgn_fast.cli import commands, main\n"
        "assert main(['--help']) == 0\n"
        "for name in commands(): assert main([name, '--help']) == 0, name\n"
        "heavy = {'torch', 'timm', 'numpy', 'torchvision', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pgn-fast train digits" in done.stdout


@pytest.mark.parametrize("name", cli.commands())
def test_every_command_teaches(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: pgn-fast {name}" in text
    module = __import__(f"pgn_fast.cli.{name}", fromlist=["HELP"])
    assert module.HELP in text and getattr(module, "EPILOG", "").strip()[:20] in text


def test_contracts_commands_are_there():
    assert {"train", "eval", "predict", "bench", "env"} <= set(cli.commands())
    modules = {p.stem for p in (ROOT / "pgn_fast/cli").glob("*.py") if not p.stem.startswith("_")}
    assert set(cli.commands()) == modules


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pgn_fast ")


def test_training_left_its_files(world):
    names = {p.name for p in (world / "run").iterdir()}
    assert {"best", "last", "checkpoint.pt", "history.csv", "summary.json"} <= names
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert "carved by seed 42" in summary["validation"]["split"]
    assert summary["test"]["split"].endswith("test")


def test_eval_scores_the_split_it_names(world, capsys):
    arguments = ["eval", str(world / "run/best"), str(world / "data"), "--device", "cpu"]
    score = world / "score.json"
    assert main([*arguments, "--results-file", str(score), *model(world)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("test: top-1 ") and "9 of 9 images" in line
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert json.loads(score.read_text())["top1"] == summary["test"]["top1"]
    assert main([*arguments, "--split", "train", *model(world)]) == 0
    assert "18 of 18 images" in capsys.readouterr().out
    # a folder without splits is scored whole
    arguments[2] = str(world / "data" / "test")
    assert main([*arguments, *model(world)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all: top-1 ")


def test_predict_writes_csv_and_json_lines(world, tmp_path, capsys):
    write_images(tmp_path / "new", 2)
    (tmp_path / "new" / "red" / "0.png").write_bytes(b"torn")
    arguments = ["predict", str(world / "run/best"), str(tmp_path / "new"), "--device", "cpu"]
    table = tmp_path / "out.csv"
    assert main([*arguments, "--output", str(table), *model(world)]) == 0
    error = capsys.readouterr().err
    assert "unreadable, left out: " in error and "5 of 6 images classified" in error
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and {r["class"] for r in rows} <= {"blue", "green", "red"}
    assert all(1 / 3 <= float(r["probability"]) <= 1 for r in rows)
    assert main([*arguments, "--format", "jsonl", "--topk", "9", *model(world)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [row["file"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        best = line["predictions"]
        assert len(best) == 3 and best[0]["class"] == row["class"]
        assert sum(p["probability"] for p in best) == pytest.approx(1, abs=1e-5)
    assert main([*arguments, "--topk", "2", *model(world)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "file,class1,probability1,class2,probability2"


def test_env_says_what_is_there_and_why_not(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in out
    backends = out.split("backends\n")[1].split("kernels measured")[0].splitlines()
    assert [line.split()[0] for line in backends] == ["reference", "cpu", "triton", "cuda"]
    assert all("available" in line or "missing: " in line for line in backends)


def test_bench_prints_a_table(world, capsys):
    words = ["bench", "--method", "vpt-deep", "--num-prompts", "2", "-b", "2", "--rounds", "1"]
    assert main([*words, "--device", "cpu", *model(world)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out[2:]] == [
        ["vpt-deep", "training"],
        ["vpt-deep", "inference"],
    ]


def test_a_newcomers_first_round(tmp_path, monkeypatch, capsys):
    """No model, no data and no folder named: the packaged backbone, the digits, runs/METHOD."""
    monkeypatch.chdir(tmp_path)
    options = "--method linear --epochs 2 --warmup-epochs 0 --lr 0.02"
    assert main(["train", *options.split()]) == 0
    assert "written to runs/linear" in capsys.readouterr().out
    assert main(["eval", "runs/linear/best"]) == 0
    score = capsys.readouterr().out.splitlines()[-1]
    assert score.startswith("test: top-1 ") and "797 of 797 images" in score
    # ten classes: chance is 10 %
    assert float(score.split()[2]) > 60


def complaint(capsys, arguments):
    """The one line that a command answers with; it must be the only one."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pgn-fast") and ": error: " in lines[0]
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "the following arguments are required: COMMAND"),
        ("tarin", "invalid choice: 'tarin'"),
        ("train --lr fast", "invalid float value: 'fast'"),
        ("train --lr -1", "--lr is -1.0; give > 0"),
        ("train nowhere", "nowhere does not exist"),
        ("train torch/nothing", "Unknown torchvision dataset nothing"),
        ("train --model vit_tyni_patch16_224", "no model named 'vit_tyni_patch16_224'; near it"),
        ("train --model swin_tiny_patch4_window7_224", "Swin attends inside windows"),
        ("train --num-prompts 0", "--num-prompts is 0"),
        ("train --backend cuda --device cpu", "backend='cuda' cannot run"),
        ("train --device tpu", "--device tpu: no such device"),
        ("train --resume nowhere", "--resume: no folder nowhere"),
        ("train --model-kwargs depth", "takes NAME=VALUE, got 'depth'"),
        ("train digits --data-dir x", "give one of them"),
        ("eval nowhere", "there is no folder nowhere"),
        ("eval nowhere digits --split dev", "digits has the splits train and test"),
        ("predict nowhere image.png", "no file or folder named image.png"),
        ("bench --rounds 0", "give 1 or more"),
        ("eval x -b 0", "-b/--batch-size: is 0; give 1 or more"),
        ("predict x y -j -1", "-j/--workers: is -1; give 0 or more"),
        ("predict x y -b many", "-b/--batch-size: invalid int value: 'many'"),
        ("predict x y --topk 0", "--topk: is 0; give 1 or more"),
        ("train --seed -1", "--seed is -1; give 0 or more"),
        ("train --aa foo", "--aa foo: timm cannot read this policy"),
        ("train --method vpt-shallow --backend cuda --device cpu", "backend='cuda' cannot run"),
    ],
)
def test_bad_arguments_get_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(capsys, words.split())


def test_classes_that_do_not_fit_get_one_line(world, tmp_path, capsys):
    adapter = world / "run/best"
    line = complaint(capsys, ["eval", adapter, "digits", *model(world)])
    assert "differ in their classes" in line and "'0' is none of the 3" in line
    write_images(tmp_path, 2, ("blue", "green", "pink"))
    line = complaint(capsys, ["eval", adapter, tmp_path, *model(world)])
    assert "'pink' is none of the 3" in line
    (tmp_path / "yellow").mkdir()
    assert "yellow has no image" in complaint(capsys, ["eval", adapter, tmp_path, *model(world)])
    line = complaint(capsys, ["train", world / "data", "--num-classes", "2"])
    assert "label 2 of" in line and "out of range for 2 classes" in line


def test_eval_hears_of_the_number_of_classes(world, capsys):
    words = ["eval", world / "run/best", world / "data", "--device", "cpu", *model(world)]
    assert main([*map(str, words), "--num-classes", "3"]) == 0
    line = complaint(capsys, [*words, "--num-classes", "4"])
    assert "has 3 classes, --num-classes is 4" in line
    assert "out of range for 2 classes" in complaint(capsys, [*words, "--num-classes", "2"])


def test_a_recipe_is_not_ignored_when_a_run_is_resumed(world, capsys):
    line = complaint(capsys, ["train", "--resume", world / "run", "--recipe", "vpt-official"])
    assert "has --head-init = 'probe', now 'official'" in line
    line = complaint(capsys, ["train", "--resume", world / "run", "--recipe", "pgn-official"])
    assert "has --method = 'vpt-deep', now 'pgn'" in line


def test_wrong_backbone_gets_one_line(world, capsys):
    words = ["eval", world / "run/best", world / "data", "--model", MODEL]
    line = complaint(capsys, [*words, "--model-kwargs", "pretrained=False", "depth=1"])
    assert "its depth is 1" in line and "with depth 2" in line


def test_a_finished_run_is_not_overwritten(world, capsys):
    line = complaint(capsys, ["train", world / "data", "--output", world / "run"])
    assert "holds a run already (checkpoint.pt). Add --resume" in line
    line = complaint(capsys, ["train", "--resume", world / "run", "--lr", "9"])
    assert "has --lr = 0.01, now 9.0" in line
    before = (world / "run/best/adapter_model.safetensors").read_bytes()
    assert main(["train", "--resume", str(world / "run"), "-j", "0"]) == 0
    assert (world / "run/best/adapter_model.safetensors").read_bytes() == before


def test_other_failures_say_what_is_kept(world, tmp_path, capsys, monkeypatch):
    from pgn_fast.errors import TrainingStopped
    from pgn_fast.train import loop

    for error, code, message in [
        (
            OSError(28, "No space left on device"),
            1,
            "No space left on device; files written before",
        ),
        (TrainingStopped("the loss is nan at step 7"), 1, "the loss is nan at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ]:

        def train(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(loop, "train", train)
        assert main(["train", "--output", str(tmp_path / "run")]) == code
        assert message in capsys.readouterr().err
