"""One run of bench/real_images.py, or a part of it, on photos that are in memory."""

from __future__ import annotations

import copy
import functools
import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch
from PIL import Image
from torch import Tensor, nn

import pgn_fast
from pgn_fast.backbone.schedule import Mixture
from pgn_fast.ops import mix_prompts
from pgn_fast.prompts.generator import PromptGenerator
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.data import carve_validation
from pgn_fast.train.given import GivenImages, given_split
from pgn_fast.train.loader import eval_transform, preprocessing, train_transform
from pgn_fast.train.loop import run, whole
from pgn_fast.train.methods import load_backbone_for
from pgn_fast.train.parts import Parts, assemble
from pgn_fast.train.run import Run
from pgn_fast.train.split import Splits

# of the training images, to choose rates by
HELD_OUT = 0.2


@pgn_fast.register_method("feature-pgn", training={"lr": 0.003})
class FeaturePrompts(pgn_fast.Prompter):
    """PGN's mixture of library tokens, computed from the backbone's own tokens at a block in the
    place of an image network: logits = W mean(tokens) + b, (P, K) of them."""

    reads_images = False

    def __init__(
        self, backbone: Any, *, num_prompts: int = 8, library_size: int = 64, block: int = 8
    ) -> None:
        super().__init__()
        width = backbone.embed_dim
        self.block, self.sizes = block, (num_prompts, library_size)
        self.norm = nn.LayerNorm(width)
        self.mixture = nn.Linear(width, num_prompts * library_size)
        self.token_library = nn.Parameter(0.02 * torch.randn(library_size, width))

    def schedule(self, images: Any) -> pgn_fast.PromptSchedule:
        def prompts(tokens: Tensor) -> Tensor:
            logits = self.mixture(self.norm(tokens).mean(dim=1)).unflatten(1, self.sizes)
            return logits.softmax(dim=-1) @ self.token_library

        return pgn_fast.PromptSchedule("append", {self.block: prompts})


@pgn_fast.register_method("pgn-deep", training={"lr": 0.005})
class DeepMixtures(pgn_fast.Prompter):
    """PGN in all blocks: one generator's mixtures, each block's out of a library of its own."""

    def __init__(self, backbone: Any, *, num_prompts: int = 8, library_size: int = 64) -> None:
        super().__init__()
        width, depth = backbone.embed_dim, len(backbone.blocks)
        sizes = {"num_prompts": num_prompts, "library_size": library_size}
        self.first = PromptGenerator(width, **sizes)
        self.deeper = nn.Parameter(0.02 * torch.randn(depth - 1, library_size, width))

    def schedule(self, images: Tensor) -> pgn_fast.PromptSchedule:
        library = self.first.library()
        logits = self.first.mixture_logits(images).to(library.dtype)
        entries: dict[int, Any] = {0: Mixture(logits, library)}
        entries |= {i: mix_prompts(logits, tokens) for i, tokens in enumerate(self.deeper, 1)}
        return pgn_fast.PromptSchedule("append", entries)


@dataclass(frozen=True)
class Order:
    """A run.

    Attributes:
        given: fields of ``TrainConfig``.
        folder: of the run; its answer is kept beside it, and found again.
        photos: an .npz of x_train (n, h, w, 3) uint8, y_train, x_test, y_test and classes.
        until: pause after so many epochs; the answer is the score of the validation images, a
            fifth of the training images. None: train on all of these to the end, and test.
        keep: leave the folder of a run that was tested, with its adapter.
    """

    given: dict[str, Any]
    folder: Path
    photos: Path
    device: str
    until: int | None = None
    keep: bool = False

    @property
    def answer(self) -> Path:
        end = "end" if self.until is None else f"epoch{self.until}"
        return self.folder.with_name(f"{self.folder.name}-{end}.json")


def carry_out(order: Order) -> dict[str, Any]:
    """Do it, or read what an earlier process has found."""
    try:
        kept = json.loads(order.answer.read_text())
        if kept["given"] == json.loads(json.dumps(order.given)):
            return kept
    except (OSError, ValueError, KeyError):
        pass
    order.folder.parent.mkdir(parents=True, exist_ok=True)
    config = TrainConfig.make(**order.given)
    # cuda alone is no device that can be made the current one
    device = torch.device("cuda:0" if order.device == "cuda" else order.device)
    peak = Peak(device)
    search = order.until is not None
    answer = run(
        config,
        order.folder,
        lambda: parts(order, config),
        device,
        order.folder.exists(),
        False,
        (lambda begun: score(begun, order.until)) if search else whole,
    )
    answer = {"given": order.given, **answer, "peak": peak.so_far(), "machine": rows.machine()}
    order.answer.write_text(json.dumps(answer, indent=1))
    if not (search or order.keep):
        shutil.rmtree(order.folder)
    return answer


def score(run: Run, epochs: int | None) -> dict[str, Any]:
    """Of the validation images after so many epochs."""
    last = run.fit(epochs).history[-1]
    return {"top1": last["validation_top1"], "loss": last["validation_loss"]}


def parts(order: Order, config: TrainConfig) -> Parts:
    """What ``pgn-fast train`` would work with, had the photos been files."""
    about = {name: order.given[name] for name in ("model", "model_kwargs", "pretrained_path")}
    backbone = copy.deepcopy(_backbone(json.dumps(about)))
    pixels = preprocessing(backbone, config)
    # of all that is not augmented the pixels are the same in every epoch
    transform = train_transform(config, pixels, normalize=False) if config.no_aug else None
    train = given_split("train", Photos(order.photos, "train", transform))
    validation = test = None
    if order.until is None:
        transform = eval_transform(pixels, normalize=False)
        test = given_split("test", Photos(order.photos, "test", transform))
    else:
        train = replace(train, images=ByClass(train.images.dataset, train.images.title))
        train, validation = carve_validation(train, HELD_OUT, config.seed)
    names = train.class_names
    assert names is not None
    return assemble(config, Splits(train, validation, test, len(names), names), backbone)


class ByClass(GivenImages):
    """Photos that are parted class by class."""

    @property
    def strata(self) -> list[int]:
        return self.dataset.targets


def write_photos(source: Path, target: Path, most: int | None) -> None:
    """The photos as one .npz, at most so many of a class in each part."""
    if source.suffix == ".npz":
        held = np.load(source)
        names, limits = held["classes"], (most, most)
        parts = {p: (held[f"x_{p}"], held[f"y_{p}"]) for p in ("train", "test")}
    else:
        from torchvision.datasets import CIFAR10

        sets = {p: CIFAR10(source, train=p == "train", download=True) for p in ("train", "test")}
        names, limits = np.array(sets["train"].classes), (most or 100, most or 200)
        parts = {p: (found.data, np.array(found.targets)) for p, found in sets.items()}
    content = {"classes": names}
    for (part, (images, labels)), each in zip(parts.items(), limits, strict=True):
        chosen = [np.flatnonzero(labels == c)[:each] for c in range(len(names))]
        places = np.sort(np.concatenate(chosen))
        content |= {f"x_{part}": images[places], f"y_{part}": labels[places].astype(np.int64)}
    np.savez(target, **content)


class Photos:
    """A data set of one part of an .npz: uint8 arrays (h, w, 3), or the bytes (3, H, W) that a
    transform without randomness makes of them."""

    def __init__(self, path: Path, part: str, transform: Any = None) -> None:
        held = _held(path)
        self.classes = [str(name) for name in held["classes"]]
        self.targets: list[int] = held[f"y_{part}"].tolist()
        self.images: Sequence[Any] = held[f"x_{part}"]
        if transform is not None:
            self.images = _transformed(path, part, transform)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]


@functools.cache
def _held(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return dict(found)


_made: dict[tuple[Path, str], list[Tensor]] = {}


def _transformed(path: Path, part: str, transform: Any) -> list[Tensor]:
    """Made once: the preprocessing of a study is one."""
    key = path, part
    if key not in _made:
        _made[key] = [transform(Image.fromarray(image)) for image in _held(path)[f"x_{part}"]]
    return _made[key]


@functools.cache
def _backbone(about: str) -> Any:
    """As it is loaded; runs take a copy to their device."""
    return load_backbone_for(TrainConfig.make(**json.loads(about)))


class Peak:
    """The most memory that was needed since it was made: a GPU's tensors, or on a CPU how much the
    process has grown (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()  # the last run's
        if device.type == "cuda":
            torch.cuda.init()  # the figures of a device that nobody has used cannot be reset
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            return
        # the kernel counts the highest resident memory again
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def so_far(self) -> int:
        """In bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # the kernel counts pages in batches: a process that has not grown may seem to have shrunk
        return max(0, _resident("VmHWM") - self._before)


def _resident(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
