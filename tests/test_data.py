"""Where images come from: splits, errors, and randomness that no worker or restart disturbs."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from small_world import write_images

from pgn_fast.demo import experiment
from pgn_fast.digits import load_digits, stratified_split
from pgn_fast.errors import UserError
from pgn_fast.train import loader as loaders
from pgn_fast.train.classes import count_classes
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.data import carve_validation, image_files, load_splits
from pgn_fast.train.given import given_split
from pgn_fast.train.loader import EpochBatches, OrderedBatches, Samples, make_loader
from pgn_fast.train.split import FolderImages, Split

PIXELS = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def splits_of(data, **given):
    return load_splits(TrainConfig.make(data=str(data), **given))


def test_digits_come_in_a_fixed_split():
    splits = splits_of("digits")
    again = splits_of("digits", seed=7)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (900, 100, 797)
    assert list(splits.test.indices) == list(again.test.indices)
    assert list(splits.validation.indices) != list(again.validation.indices)
    parts = [*splits.train.indices, *splits.validation.indices, *splits.test.indices]
    assert sorted(parts) == list(range(1797))
    assert "carved by seed 42" in splits.validation.origin
    image, label = splits.train.images.open(0)
    assert (image.mode, image.size, label) == ("RGB", (8, 8), 0)
    # levels 0 ... 16 become 0 ... 255
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 79, 207, 143, 15, 0, 0]
    assert splits.train.images.pixels.max() == 255


def test_digits_are_split_as_in_the_demo():
    """An adapter of one is scored by the other: no test image of either is trained on by either."""
    splits, demo = splits_of("digits", val_fraction=0), experiment.load("test")
    labels = splits.train.images.labels
    train, test = load_digits().train, load_digits().test
    assert list(splits.train.indices) == sorted(train)
    assert list(splits.test.indices) == sorted(test)
    assert [labels[i] for i in train] == demo.train_labels.tolist()
    assert [labels[i] for i in test] == demo.test_labels.tolist()
    # bilinear enlargement of the 8 × 8 levels keeps their mean but for the border, in order
    means = torch.tensor([splits.train.images.pixels[i].mean() for i in test])
    enlarged = demo.test_images.mean(dim=(1, 2, 3))
    assert torch.corrcoef(torch.stack([means, enlarged]))[0, 1] > 0.9
    # the split that recorded results stand on
    digest = hashlib.sha256(json.dumps([train, test]).encode()).hexdigest()
    assert digest.startswith("b510a180f5b4a69a")


def test_flat_folder_is_carved_class_by_class(tmp_path):
    write_images(tmp_path, 10)
    splits = splits_of(tmp_path, val_fraction=0.3)
    labels = splits.train.images.labels
    assert splits.class_names == ["blue", "green", "red"] and splits.num_classes == 3
    assert [sum(labels[i] == c for i in splits.validation.indices) for c in range(3)] == [3, 3, 3]
    assert not {*splits.train.indices} & {*splits.validation.indices}
    assert len(splits.train) == 21 and splits.test is None
    assert list(splits_of(tmp_path, val_fraction=0.3).train.indices) == list(splits.train.indices)


def test_split_folders_are_used_as_they_are(tmp_path):
    for name, count in (("train", 4), ("val", 2), ("test", 3)):
        write_images(tmp_path / name, count)
    splits = splits_of(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (12, 6, 9)
    assert splits.validation.origin == f"folder {tmp_path / 'val'}"
    # a test folder is never carved from
    (tmp_path / "val").rename(tmp_path / "extra")
    carved = splits_of(tmp_path, val_fraction=0.25)
    assert carved.validation.images is carved.train.images and len(carved.test) == 9
    assert len(splits_of(tmp_path, val_split="extra").validation) == 6
    assert splits_of(tmp_path, val_fraction=0).validation is None


def test_one_image_of_a_class_stays_in_training(tmp_path):
    images = FolderImages([tmp_path / str(i) for i in range(5)], [0, 1, 1, 1, 1])
    train, validation = carve_validation(Split("train", "x", images, range(5)), 0.5, seed=1)
    assert 0 in train.indices and len(validation) == 2
    with pytest.raises(UserError, match="is no image"):
        carve_validation(Split("train", "x", images, range(5)), 0.01, seed=1)


def spoil_empty_class(root):
    (root / "yellow").mkdir()
    return r"class folder .*yellow has no image"


def spoil_stray_image(root):
    (root / "blue" / "0.png").rename(root / "lost.png")
    return r"1 image\(s\) lie directly in .*lost\.png"


def spoil_one_class(root):
    for name in ("green", "red"):
        for file in (root / name).iterdir():
            file.unlink()
        (root / name).rmdir()
    return r"has 1 class\(es\)"


def spoil_everything(root):
    for file in root.glob("*/*"):
        file.unlink()
    return "no image in"


def spoil_test_classes(root):
    write_images(root / "train", 2)
    write_images(root / "test", 2, ("blue", "green", "pink"))
    return r"differ in their classes, such as pink, red: 'pink' is none of the 3"


@pytest.mark.parametrize(
    "spoil",
    [spoil_empty_class, spoil_stray_image, spoil_one_class, spoil_everything, spoil_test_classes],
)
def test_bad_folders_are_refused(tmp_path, spoil):
    message = spoil(write_images(tmp_path, 3))
    with pytest.raises(UserError, match=message) as caught:
        splits_of(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data, given, message",
    [
        ("nowhere", {}, r"nowhere does not exist\. Give a folder"),
        ("torch/cifar11", {}, r"timm cannot open 'torch/cifar11'.*Unknown torchvision dataset"),
        ("torch/cifar10", {"data_dir": "nowhere"}, "download"),
        ("digits", {"num_classes": 5}, r"label \d of digits\[\d+\] is out of range for 5 classes"),
    ],
)
def test_data_that_are_not_there(data, given, message):
    with pytest.raises(UserError, match=message):
        splits_of(data, **given)


def test_negative_labels_are_out_of_range(tmp_path):
    images = FolderImages([tmp_path / "a.png", tmp_path / "b.png"], [0, -1])
    with pytest.raises(UserError, match=r"label -1 of .*b\.png is out of range"):
        count_classes(Split("train", "x", images, range(2), ["a", "b"]), None)


def test_a_number_of_classes_that_the_data_contradict(tmp_path):
    write_images(tmp_path, 2)
    with pytest.raises(UserError, match="has 3 classes, `num_classes` is 5: leave it out"):
        splits_of(tmp_path, num_classes=5)
    with pytest.raises(UserError, match="is out of range for 2 classes"):
        splits_of(tmp_path, num_classes=2)


def test_a_folder_needs_no_data_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos" / "pets", 2)
    for data in ("photos/pets", "digits"):
        with pytest.raises(UserError, match=f"`data_dir` elsewhere: .*{data} needs none"):
            splits_of(data, data_dir="elsewhere")


def test_an_unknown_policy_is_named():
    for aa in ("foo", "rand-foo9"):
        with pytest.raises(UserError, match=f"`aa` {aa}: timm cannot read .* rand-m9-mstd0.5"):
            loaders.train_transform(TrainConfig.make(aa=aa), PIXELS)
    assert loaders.train_transform(TrainConfig.make(aa="rand-m9-mstd0.5"), PIXELS)


def test_timm_data_sets_have_random_access(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 8)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = np.array([0x801, count], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    splits = splits_of("torch/mnist", data_dir=str(tmp_path), val_fraction=0.34)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (20, 10, 8)
    assert splits.num_classes == 10 and splits.class_names[3].startswith("3")
    batch = next(iter(make_loader(splits.test, loaders.eval_transform(PIXELS), 4)))
    assert batch.images.shape == (4, 3, 16, 16) and batch.labels.tolist() == [0, 1, 2, 3]


def test_unreadable_images_are_named_and_left_out(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "green" / "1.png").write_bytes(b"no image")
    whole = (tmp_path / "red" / "2.png").read_bytes()
    (tmp_path / "red" / "2.png").write_bytes(whole[:60])
    split = splits_of(tmp_path, val_fraction=0).train
    batches = list(make_loader(split, loaders.eval_transform(PIXELS), 4))
    unreadable = [name for batch in batches for name in batch.unreadable]
    assert sum(len(batch.labels) for batch in batches) == 7 and len(unreadable) == 2
    assert unreadable[0].startswith(str(tmp_path / "green" / "1.png"))
    assert unreadable[1].startswith(str(tmp_path / "red" / "2.png"))


def test_a_pass_can_begin_anywhere():
    batches = EpochBatches(22, 4, seed=3)
    batches.set_position(5)
    whole = list(batches)
    assert [len(b) for b in whole] == [4, 4, 4, 4, 4, 2] and len(batches) == 6
    assert sorted(i for b in whole for _, i in b) == list(range(22))
    for start in range(7):
        batches.set_position(5, start)
        assert list(batches) == whole[start:]
    batches.set_position(6)
    assert [i for b in batches for _, i in b] != [i for b in whole for _, i in b]
    # fewer images than a batch are one batch
    assert [len(b) for b in EpochBatches(3, 64, seed=0)] == [3]


def test_processes_share_the_images_out():
    alone = EpochBatches(24, 8, seed=1)
    both = [EpochBatches(24, 4, seed=1, rank=r, world=2) for r in range(2)]
    for together, *apart in zip(alone, *both, strict=True):
        assert together == [key for part in apart for key in part]
    ordered = [OrderedBatches(7, 2, r, 3) for r in range(3)]
    assert sorted(i for part in ordered for batch in part for _, i in batch) == list(range(7))


def test_augmentation_follows_seed_epoch_and_image_alone():
    split = splits_of("digits").train
    config = TrainConfig.make(scale=(0.3, 1), hflip=0.5, aa="rand-m9-mstd0.5", color_jitter=0.4)
    transform = loaders.train_transform(config, PIXELS)
    samples = Samples(split, transform, seed=1)
    torch.manual_seed(5)
    first = samples[(0, 10)][0]
    drawn = torch.rand(1)
    samples[(3, 1)]
    random.random(), np.random.rand()
    assert torch.equal(samples[(0, 10)][0], first)
    assert not torch.equal(samples[(1, 10)][0], first)
    assert not torch.equal(Samples(split, transform, seed=2)[(0, 10)][0], first)
    # and the model's own randomness does not notice
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_workers_change_nothing():
    split = splits_of("digits").validation
    transform = loaders.train_transform(TrainConfig.make(hflip=0.5, scale=(0.5, 1)), PIXELS)
    passes = []
    for workers in (0, 2):
        loader = make_loader(split, transform, 32, seed=4, workers=workers)
        images = []
        for epoch in range(2):
            loader.batch_sampler.set_position(epoch)
            images += [batch.images for batch in loader]
        passes.append(torch.cat(images))
    assert passes[0].shape == (2 * len(split), 3, 16, 16) and torch.equal(*passes)


def test_prediction_takes_files_and_folders(tmp_path):
    write_images(tmp_path, 2)
    found = image_files([tmp_path / "red", tmp_path / "blue" / "0.png"]).images
    assert [p.name for p in found.paths] == ["0.png", "0.png", "1.png"] and found.open(0)[1] == -1
    with pytest.raises(UserError, match="no file or folder named"):
        image_files([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in"):
        image_files([tmp_path / "empty"])


def test_stratified_split_keeps_the_proportions():
    labels = np.repeat(np.arange(4), [50, 30, 15, 5])
    for held_out in (0, 1, 20, 99, 100):
        rest, kept = stratified_split(labels, list(range(100)), held_out, seed=3)
        assert sorted([*rest, *kept]) == list(range(100)) and len(kept) == held_out
        expected = held_out * np.array([0.5, 0.3, 0.15, 0.05])
        assert np.abs(np.bincount(labels[kept], minlength=4) - expected).max() < 1
    assert rest == [] and kept != sorted(kept)
    assert stratified_split(labels, list(range(100)), 20, 3) != stratified_split(
        labels, list(range(100)), 20, 4
    )


def test_a_data_sets_own_augmentation_follows_from_seed_epoch_and_image():
    class Noisy:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return torch.rand(3, 4, 4), index

    def epochs(workers):
        loader = make_loader(given_split("train", Noisy()), None, 2, seed=5, workers=workers)
        for epoch in (0, 1):
            loader.batch_sampler.set_position(epoch)
            batches = list(loader)
            order = torch.cat([b.labels for b in batches]).argsort()
            yield torch.cat([b.images for b in batches])[order]

    (first, second), (again, other) = epochs(0), epochs(2)
    assert torch.equal(first, again) and torch.equal(second, other)
    assert not torch.equal(first, second)
