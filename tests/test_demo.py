"""The demonstration: its images, its pretraining, its packaged backbone, its table."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict

import pretrain_demo as pretrain
import pytest
import torch
from procedural import FAMILIES, NUM_CLASSES, ProceduralImages
from safetensors.torch import load_file

from pgn_fast import cli
from pgn_fast.backbone.load import load_backbone
from pgn_fast.demo import WEIGHTS, backbone, build, experiment, pretraining_record
from pgn_fast.demo.recipes import RECIPES, Recipe, Result
from pgn_fast.demo.report import Report, differences
from pgn_fast.errors import UserError


def test_images_are_a_function_of_seed_and_step():
    first, again = ProceduralImages(3).batch(7, 96), ProceduralImages(3).batch(7, 96)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.masks, again.masks)
    for other in (ProceduralImages(4).batch(7, 96), ProceduralImages(3).batch(8, 96)):
        assert not torch.equal(first.images, other.images)


def test_images_are_images():
    batch = ProceduralImages(0).batch(0, 512)
    assert batch.images.shape == (512, 3, 32, 32) and batch.masks.shape == (512, 32, 32)
    for values in (batch.images, batch.masks):
        assert values.min() >= 0 and values.max() <= 1
    # every family is there, in its share
    ends = torch.tensor(list(FAMILIES.values())).cumsum(0)
    counts = torch.bincount(torch.bucketize(batch.labels, ends, right=True), minlength=4)
    assert ends[-1] == NUM_CLASSES
    expected = 512 * torch.tensor(list(FAMILIES.values())) / NUM_CLASSES
    assert (counts - expected).abs().max() < 50
    # an object is never empty, and every image shows something
    assert (batch.masks.flatten(1).amax(1) > 0.5).float().mean() > 0.97
    assert batch.images.flatten(1).std(1).min() > 0.01


@pytest.mark.parametrize("size", [1, 3])
def test_small_batches_lack_whole_families(size):
    assert ProceduralImages(0).batch(1, size).images.shape == (size, 3, 32, 32)


def test_masks_are_cut_as_the_backbone_cuts_images():
    masks = torch.arange(32 * 32).view(1, 32, 32)
    cut = pretrain.patches(masks)
    assert cut.shape == (1, 16, 64)
    # the sixth patch is in the second row and second column of the grid
    assert torch.equal(cut[0, 5].view(8, 8), masks[0, 8:16, 8:16])


def test_the_learning_rate_warms_up_and_ends_at_zero():
    straight = pretrain.Settings(steps=40, warmup_steps=10, cosine_steps=10**9, cooldown_steps=8)
    rates = [straight.rate(step) / straight.lr for step in range(41)]
    assert rates[0] == pytest.approx(0.1) and rates[9:33] == pytest.approx([1.0] * 24)
    assert rates[36] == pytest.approx(0.5) and rates[40] == 0.0
    curved = pretrain.Settings(steps=60, warmup_steps=10, cosine_steps=110, cooldown_steps=0)
    # half way to the cosine's own end, then not cooled
    assert curved.rate(60 - 1) / curved.lr == pytest.approx(0.5, abs=0.02)


def test_a_killed_pretraining_continues_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT", range(1 << 40, (1 << 40) + 1))
    settings = pretrain.Settings(steps=4, batch_size=16, warmup_steps=2)
    pretrain.pretrain(settings, tmp_path / "whole", log_every=2, show=False)
    pretrain.export(settings, tmp_path / "whole", log_every=2)

    real, seen = pretrain.NameAndDraw.__call__, []

    def loss(self, logits, targets):
        seen.append(targets)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(self, logits, targets)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.NameAndDraw, "__call__", loss)
        pretrain.pretrain(settings, tmp_path / "killed", log_every=2, show=False)
    pretrain.pretrain(settings, tmp_path / "killed", log_every=2, show=False)
    pretrain.export(settings, tmp_path / "killed", log_every=2)

    once, twice = (load_file(tmp_path / name / WEIGHTS.name) for name in ("whole", "killed"))
    assert once.keys() == build().state_dict().keys()
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name
    log = json.loads((tmp_path / "whole" / "demo_vit.json").read_text())["log"]
    assert [row["step"] for row in log] == [2, 4] and log[0]["images"] == 32
    assert log[-1]["lr"] == pytest.approx(settings.rate(3), abs=1e-8)
    # every step has images of its own, and a seed has its own
    assert not any(torch.equal(seen[0], other) for other in seen[1:])

    with pytest.raises(UserError, match="has `seed` = 0, now 1 is asked for"):
        pretrain.pretrain(
            pretrain.Settings(steps=4, batch_size=16, seed=1), tmp_path / "killed", log_every=2
        )


def test_the_pretrainings_loss_is_its_definition():
    settings = pretrain.Settings()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, NUM_CLASSES + 1024, generator=generator)
    rules = torch.tensor([4, 200, 9])
    masks = torch.rand(3, 1024, generator=generator)
    targets = torch.cat([rules[:, None], masks], dim=1)
    naming = torch.nn.functional.cross_entropy(
        logits[:, :NUM_CLASSES], rules, label_smoothing=settings.label_smoothing
    )
    drawing = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, NUM_CLASSES:], masks)
    expected = 3 * (naming + settings.mask_weight * drawing)
    torch.testing.assert_close(pretrain.NameAndDraw(settings)(logits, targets), expected)


def test_packaged_backbone_fits_its_record():
    assert WEIGHTS.stat().st_size <= 6_000_000
    record = pretraining_record()
    frozen = load_backbone("pgn_demo_vit")
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert record["parameters"] == sum(p.numel() for p in frozen.parameters())
    assert 1_000_000 <= record["parameters"] <= 2_000_000
    # the script's defaults are the recipe of the packaged weights
    assert record["settings"] == asdict(pretrain.Settings())
    assert record["log"][-1]["step"] == record["settings"]["steps"]
    assert record["log"][-1]["cpu_seconds"] == record["cpu_seconds"] < 3600
    assert frozen(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert frozen.pretrained_cfg["input_size"] == (3, 32, 32)


def test_packaged_backbone_has_learned_something():
    """Nearest class mean on digits: the frozen features against those of a fresh model."""
    data = experiment.load("validation", seed=0)

    @torch.no_grad()
    def nearest_mean(model: torch.nn.Module) -> float:
        train, test = model(data.train_images), model(data.test_images)
        means = torch.stack([train[data.train_labels == c].mean(0) for c in range(10)])
        nearest = torch.cdist(test, means).argmin(1)
        return (nearest == data.test_labels).float().mean().item()

    torch.manual_seed(0)
    assert nearest_mean(backbone()) > nearest_mean(build().eval()) + 0.1


def test_splits_keep_the_test_images_apart():
    def rows(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    test, other_seed = experiment.load("test", seed=0), experiment.load("test", seed=1)
    assert torch.equal(test.test_images, other_seed.test_images)
    assert (len(test.train_labels), len(test.test_labels)) == (1000, 797)
    counts = torch.bincount(test.train_labels) / torch.bincount(
        torch.cat([test.train_labels, test.test_labels])
    )
    assert (counts - 1000 / 1797).abs().max() < 0.01
    for seed in range(3):
        validation = experiment.load("validation", seed)
        assert (len(validation.train_labels), len(validation.test_labels)) == (800, 200)
        carved = rows(validation.train_images) | rows(validation.test_images)
        assert carved == rows(test.train_images)
        assert not carved & rows(test.test_images)
    with pytest.raises(ValueError, match="known: test, validation"):
        experiment.load("holdout")


def test_augmentation_stays_close_and_in_range():
    images = experiment.load("validation").train_images[:32]
    turned = experiment.augment(images, torch.Generator().manual_seed(0))
    again = experiment.augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(turned, again) and turned.shape == images.shape
    assert turned.min() >= -1 - 1e-5 and turned.max() <= 1 + 1e-5
    # shifted by pixels, not lost: the ink stays, within a fifth on average
    ink = (turned + 1).mean() / (images + 1).mean()
    assert 0.8 < ink < 1.2


def results(method: str, correct: list[int]) -> list[Result]:
    return [
        Result(method, seed, right, 200, 10, 1.0 + seed, 5_000_000 + seed, 2, [1.0])
        for seed, right in enumerate(correct)
    ]


def test_report_counts_right():
    recipes = {name: Recipe(name, 1.0, 0.0, 1) for name in ("a", "b", "c")}
    runs = results("a", [180, 182, 184]) + results("b", [190, 190, 190])
    runs += results("c", [186, 190, 196])
    report = Report("test", recipes, runs, total_seconds=9.0)
    row = report.rows[0]
    assert (row.top1_mean, row.top1_sd) == (pytest.approx(91.0), pytest.approx(1.0))
    assert (row.seconds_mean, row.peak_bytes) == (2.0, 5_000_002)
    to_b, to_c = differences(report)
    assert to_b == "b - a: +4.00 points, beyond the noise of the seeds (2 × 0.58)"
    assert "c - b: +0.33 points, within" in to_c


def test_demo_end_to_end(tmp_path, capsys):
    record = tmp_path / "results/demo.json"
    assert (
        cli.main(["demo", "--quick", "--output", f"{tmp_path}/out", "--record", f"{record}"]) == 0
    )
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out/demo.json").read_text())
    assert content == json.loads(record.read_text())
    for plot in ("accuracy.png", "learning_curves.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")

    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == list(RECIPES)
    head = 128 * 10 + 10
    prompts = {method: RECIPES[method].options.get("num_prompts", 0) for method in rows}
    assert rows["linear"]["trained_parameters"] == head
    assert rows["vpt-shallow"]["trained_parameters"] == head + 128 * prompts["vpt-shallow"]
    assert rows["vpt-deep"]["trained_parameters"] == head + 6 * 128 * prompts["vpt-deep"]
    for method, row in rows.items():
        assert RECIPES[method].label in printed
        runs = [run for run in content["results"] if run["method"] == method]
        assert [run["images"] for run in runs] == [797]
        assert row["top1_mean"] == pytest.approx(
            statistics.mean(100 * run["correct"] / run["images"] for run in runs)
        )
        assert row["top1_sd"] is None
        assert row["seconds_mean"] > 0 and row["peak_bytes"] > 1_000_000
    # even one pass over the digits beats guessing
    assert rows["linear"]["top1_mean"] > 30


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--seeds", "few"], ["--split", "train"]])
def test_bad_arguments_are_one_line(words, capsys):
    assert cli.main(["demo", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words[0] in error
