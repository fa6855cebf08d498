"""Shards of webdataset: each image once, and a run that goes on within an epoch."""

from __future__ import annotations

import json

import pytest
import torch
from small_world import MODEL, tiny_vit_kwargs, write_images

from pgn_fast.adapters import read_adapter
from pgn_fast.errors import UserError
from pgn_fast.train import checkpoints, loop
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.data import load_splits
from pgn_fast.train.loader import make_loader, train_transform
from pgn_fast.train.stream import StreamPosition

PIXELS = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
}


def write_shards(root, shards=3, per_shard=8):
    webdataset = pytest.importorskip("webdataset")
    write_images(root / "images", shards * per_shard // 3)
    files = sorted((root / "images").glob("*/*.png"))
    names = [f"data-train-{n:04d}.tar" for n in range(shards)]
    for n, name in enumerate(names):
        with webdataset.TarWriter(str(root / name)) as tar:
            for i, file in enumerate(files[n::shards]):
                label = ["blue", "green", "red"].index(file.parent.name)
                tar.write({"__key__": f"{i:04d}", "png": file.read_bytes(), "cls": str(label)})
    about = {"name": "train", "num_samples": len(files), "filenames": names}
    about["shard_lengths"] = [per_shard] * shards
    (root / "_info.json").write_text(json.dumps({"splits": {"train": about}}))


def test_every_image_comes_once(tmp_path):
    write_shards(tmp_path, shards=1, per_shard=12)
    options = {"data": "wds/data", "data_dir": str(tmp_path), "num_classes": 3, "batch_size": 4}
    splits = load_splits(TrainConfig.make(**options))
    assert splits.train.streamed and len(splits.train) == 12 and splits.validation is None
    transform = train_transform(TrainConfig.make(), PIXELS)
    loader = make_loader(splits.train, transform, 4, seed=1)
    position = StreamPosition(loader, 1)
    position.set(0, 0)
    labels = [label for batch in loader for label in batch.labels.tolist()]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(UserError, match="go on within an epoch with torchdata"):
        position.set(0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_go_on_within_an_epoch_to_the_bit(tmp_path, monkeypatch, workers):
    """Stopped in the middle of the second epoch, in the order and augmentation of the whole run."""
    pytest.importorskip("torchdata")
    write_shards(tmp_path)
    tiny_vit_kwargs(tmp_path)
    config = TrainConfig.make(
        data="wds/data",
        data_dir=str(tmp_path),
        num_classes=3,
        model=MODEL,
        model_kwargs=tiny_vit_kwargs(tmp_path),
        method="vpt-shallow",
        num_prompts=2,
        batch_size=4,
        epochs=3,
        workers=workers,
        recovery_interval=2,
        val_fraction=0,
        head_init="zero",
    )
    device = torch.device("cpu")
    loop.train(config, tmp_path / "whole", device=device, show=False)
    real, calls = checkpoints.save, iter(range(1, 100))

    def save(output, state):
        real(output, state)
        if next(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save", save)
        loop.train(config, tmp_path / "torn", device=device, show=False)
    position = checkpoints.load(tmp_path / "torn")["processes"][0]["position"]
    assert position["epoch"] == 1 and position["batch"] > 0
    loop.train(config, tmp_path / "torn", device=device, resume=True, show=False)
    one, two = (read_adapter(tmp_path / name / "last")[1] for name in ("whole", "torn"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_checkpoints_within_an_epoch_need_torchdata(tmp_path, monkeypatch):
    write_shards(tmp_path)
    monkeypatch.setattr("pgn_fast.train.source.resumes_within", lambda: False)
    options = {"data": "wds/data", "data_dir": str(tmp_path), "num_classes": 3}
    config = TrainConfig.make(**options, recovery_interval=2, method="linear")
    with pytest.raises(UserError, match=r"`recovery_interval`.*pip install 'pgn_fast\[wds\]'"):
        loop.train(config, tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()
