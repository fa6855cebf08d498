"""What the kept tokens of an image depend on, as keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import __version__
from .config import TrainConfig
from .loader import Samples, Unreadable, collate, pixels_to_keep, train_transform
from .split import FolderImages, Relabeled
from .token_store import row_key

FORMAT = 1
_READERS = 8  # threads

Key = tuple[int, int]  # view, position in the split


class Changing(Exception):
    """Images, or weights, that cannot be found again by what they are."""


class _Reads:
    """A configuration that writes down which of its fields somebody asks for."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self.found = config, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        value = self.found[name] = getattr(self._config, name)
        return value


def describe(
    config: TrainConfig, pixels: dict[str, Any], seed: int | None, augmented: bool
) -> dict[str, Any]:
    """Everything that decides an image's tokens, beside the backbone and the image's bytes.

    Args:
        pixels: the preprocessing, by timm's names.
        seed: of the training transform; None: it is evaluation's.
        augmented: whether the transform is random.
    """
    reads: Any = _Reads(config)
    if seed is not None:
        train_transform(reads, pixels)
        pixels_to_keep(reads, pixels)
    packages = ("torch", "torchvision", "timm", "pillow", "numpy")
    return {
        "format": FORMAT,
        "versions": {"pgn_fast": __version__} | {name: _version(name) for name in packages},
        "pixels": dict(pixels),
        "transform": "evaluation" if seed is None else reads.found,
        "seed": seed if augmented else None,
        "amp": config.amp_dtype if config.amp else None,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Digests:
    """The keys of a split's images, by digests of their bytes as they are when a run begins.

    Args:
        samples: the images and what becomes of them.
        augmented: whether view and place in the data set decide that, too.
        workers: processes that open images for ``images``.
    """

    def __init__(self, samples: Samples, augmented: bool, workers: int) -> None:
        self.samples, self.augmented, self.workers = samples, augmented, workers
        split = samples.split
        self._known = split.images.labels
        files = _are_files(split.images)
        with ThreadPoolExecutor(_READERS if files else 1) as pool:
            self._found = list(pool.map(lambda i: image_digest(split.images, i), split.indices))
        self._keys: dict[Key, bytes] = {}

    def of(self, key: Key) -> bytes:
        """By which the tokens of a sample are found."""
        if key not in self._keys:
            place = (key[0], self.index(key)) if self.augmented else ()
            self._keys[key] = row_key(self._found[key[1]][0], *place)
        return self._keys[key]

    def label(self, key: Key) -> Any:
        """The label of a sample."""
        label = self._found[key[1]][1]
        return self._known[self.index(key)] if label is None else label

    def index(self, key: Key) -> int:
        """The place of a sample in the data set."""
        return int(self.samples.split.indices[key[1]])

    def images(self, chunks: list[list[Key]]) -> Iterator[tuple[list[Key], Tensor, dict[Key, str]]]:
        """Keys, the images that could be read, and why others could not.

        Raises:
            Changing: an image is not the one that its digest was taken of.
        """
        loader: Any = DataLoader(
            _Again(self.samples),
            batch_sampler=chunks,
            num_workers=min(self.workers, len(chunks)),
            collate_fn=_pairs,
            generator=torch.Generator().manual_seed(0),
        )
        for keys, (samples, digests) in zip(chunks, loader, strict=True):
            why = {}
            for key, sample, digest in zip(keys, samples, digests, strict=True):
                if isinstance(sample, Unreadable):
                    why[key] = sample.message
                elif digest != self._found[key[1]][0]:
                    name = self.samples.split.images.name(self.index(key))
                    raise Changing(f"{name} was another image when it was opened again")
            yield keys, collate(samples).images, why


def _pairs(found: list[tuple[Any, str]]) -> tuple[list[Any], list[str]]:
    return [sample for sample, _ in found], [digest for _, digest in found]


class _Again(Dataset):
    """Samples, each with the digest of its image as it is now."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Any, str]:
        split = self.samples.split
        sample = self.samples[key]
        return sample, image_digest(split.images, split.indices[key[1]])[0]


def _inner(images: Any) -> Any:
    return _inner(images.images) if isinstance(images, Relabeled) else images


def _are_files(images: Any) -> bool:
    """Whether these are files whose labels are known without opening them."""
    return isinstance(_inner(images), FolderImages) and images.labels is not None


def image_digest(images: Any, index: int) -> tuple[str, Any]:
    """SHA-256 of a file's bytes, or of the pixels that a data set gives, and in that case their
    label; of what cannot be opened, the kind of error."""
    found = hashlib.sha256()
    try:
        if _are_files(images):
            found.update(_inner(images).paths[index].read_bytes())
            return found.hexdigest(), None
        image, label = images.open(index)
    # other people's data sets answer damaged images with nearly every kind of exception
    except Exception as error:
        return f"unreadable: {type(error).__name__}", None
    if isinstance(image, Tensor):
        found.update(f"{image.dtype} {tuple(image.shape)}".encode())
        found.update(image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    else:
        found.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return found.hexdigest(), label
