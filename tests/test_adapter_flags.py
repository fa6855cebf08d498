"""``--model``, ``--model-kwargs`` and ``--pretrained-path`` of commands that take an adapter."""

from __future__ import annotations

import csv

import pytest
import safetensors.torch
import torch
from small_world import MODEL, SIZES, tiny_vit, write_images

import pgn_fast
from pgn_fast.adapters import read_adapter
from pgn_fast.backbone.load import load_backbone
from pgn_fast.cli import main


@pytest.fixture
def world(tmp_path):
    """An adapter on a small timm model whose weights are in a file of its owner's."""
    for seed in (0, 1):
        state = tiny_vit(seed).state_dict()
        safetensors.torch.save_file(state, tmp_path / f"w{seed}.safetensors")
    overlay = {"file": str(tmp_path / "w0.safetensors"), "custom_load": False}
    backbone = load_backbone(MODEL, pretrained_cfg_overlay=overlay, **SIZES)
    model = pgn_fast.VPT(backbone, 3, num_prompts=2).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "tasks" / "pets", class_names=["a", "b", "c"])
    config = read_adapter(tmp_path / "tasks" / "pets")[0]
    assert config["base_model_kwargs"]["img_size"] == [16, 16]
    assert config["base_model_weights"] == "w0.safetensors"
    write_images(tmp_path / "new", 1)
    write_images(tmp_path / "data", 2, ("a", "b", "c"))
    return tmp_path


def predict(world, *words):
    given = [world / "tasks" / "pets", world / "new", "--device", "cpu", "-j", "0", "--logits"]
    return main(["predict", *map(str, [*given, "--output", world / "p.csv", *words])])


def logits(world):
    with open(world / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return torch.tensor([[float(row[f"logit_{c}"]) for c in "abc"] for row in rows])


def test_the_file_is_asked_for_where_the_adapter_names_one(world, capsys):
    for words in (
        ["predict", str(world / "tasks" / "pets"), str(world / "new")],
        ["eval", str(world / "tasks" / "pets"), str(world / "data")],
    ):
        assert main([*words, "--device", "cpu", "-j", "0"]) == 2
        assert "weights of its owner" in capsys.readouterr().err
    assert predict(world, "--model-kwargs", "img_size=16") == 2
    error = capsys.readouterr().err
    assert "w0.safetensors" in error and "--pretrained-path FILE" in error


def test_the_recorded_settings_are_used_with_the_file(world):
    assert predict(world, "--pretrained-path", world / "w0.safetensors") == 0
    first = logits(world)
    # named in full, it is the same
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    words = ["--model", MODEL, "--pretrained-path", world / "w0.safetensors", "--model-kwargs"]
    assert predict(world, *words, *sizes) == 0
    assert torch.equal(logits(world), first)
    with pytest.warns(UserWarning, match="its weights .* are others than those of the training"):
        assert predict(world, "--pretrained-path", world / "w1.safetensors") == 0
    assert not torch.equal(logits(world), first)


def test_eval_and_verify_take_them_too(world, capsys):
    words = ["--pretrained-path", str(world / "w0.safetensors"), "--device", "cpu", "-j", "0"]
    adapter = str(world / "tasks" / "pets")
    assert main(["eval", adapter, str(world / "data"), *words]) == 0
    assert main(["verify", adapter, *words]) == 0
    assert "as recorded" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["tasks", "tasks/pets"])
def test_serve_and_tasks_hold_the_weights_against_the_training(world, place, monkeypatch, capsys):
    seen = {}

    def run_server(served, settings, **where):
        seen.update(served=served)

    monkeypatch.setattr("pgn_fast.serve.server.run_server", run_server)
    words = ["serve", str(world / place), "--device", "cpu"]
    assert main(words) == 2
    assert "weights of its owner" in capsys.readouterr().err
    assert main([*words, "--pretrained-path", str(world / "w0.safetensors")]) == 0
    assert list(seen["served"].tasks()) == ["pets"] and seen["served"].name == MODEL
    assert main([*words, "--pretrained-path", str(world / "w1.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "pets" in error and error.count("digest ") >= 2
    with pytest.warns(UserWarning, match="others than those of the training"):
        other = [*words, "--pretrained-path", str(world / "w1.safetensors")]
        assert main([*other, "--no-strict-backbone"]) == 0
