"""What frozen blocks make of an image is computed once, and read from disk from then on.

Where the prompts of a method enter the last blocks only, or nowhere, all that lies below depends on
the image alone. A run keeps it in files that are found by a digest of everything it was made from:
the backbone's weights and what it answers to fixed noise, the preprocessing, the image's own bytes,
and for augmented images seed, view and place in the data set. Any of them changed is another key,
so nothing stale is ever found.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._files import size_text
from ..backbone.digest import backbone_digest
from ..backbone.schedule import FrozenTokens
from ..backbone.watch import foreign_code
from ..errors import UserError
from ..images import UnreadableImage
from .config import TrainConfig
from .evaluation import Autocast
from .frozen_key import Changing, Digests, Key, describe
from .given_loader import GivenLoader
from .loader import Batch, EpochBatches, Samples, stack_labels
from .signals import Interrupted
from .split import Split
from .token_store import TokenStore, row_key

if TYPE_CHECKING:
    from .parts import Parts
    from .run import Run

# "auto" keeps nothing below this share of the blocks: reading would cost what it saves
_WORTH = 0.5
_SECONDS_BETWEEN_LINES = 30.0


def unsupported_reason(config: TrainConfig, model: Any, train: Split, processes: int) -> str | None:
    """Why a run recomputes its frozen blocks in every step; None where it need not."""
    if getattr(model, "frozen_blocks", 0) == 0:
        return f"with `method` {config.method} every block sees prompts, or is trained"
    if train.streamed or isinstance(train.images, GivenLoader):
        return "the images have no numbers to find them by"
    if config.mixup or config.cutmix or config.cutmix_minmax:
        return "`mixup` and `cutmix` make other images in every step"
    if config.torchcompile:
        return "`torchcompile` compiles the forward as a whole"
    if processes > 1:
        return "the run has several processes"
    if views_of(config, train) == 0:
        return "augmentation makes other images in every epoch; with `views` 4 four take turns"
    return foreign_code(model.backbone)


def views_of(config: TrainConfig, train: Split) -> int:
    """How many different images each training image becomes; 0: a new one in every epoch."""
    if config.no_aug or not _draws(config):
        return 1
    if config.views or train.streamed or isinstance(train.images, GivenLoader) or not len(train):
        return config.views
    try:
        first = train.images.open(train.indices[0])[0]
    except UnreadableImage:
        return 0  # of a file, which holds a picture
    return 1 if isinstance(first, Tensor) else 0  # tensors pass the transform untouched


def _draws(config: TrainConfig) -> bool:
    """Whether the training transform draws random numbers (digits: it does not)."""
    chances = (
        *(config.hflip, config.vflip, config.color_jitter, config.grayscale_prob),
        *(config.gaussian_blur_prob, config.reprob),
    )
    crops = (*config.scale, *config.ratio) != (1, 1, 1, 1)
    named = (config.aa, config.train_crop_mode) != (None, None)
    return crops or named or any(chances) or config.train_interpolation == "random"


class FrozenCache:
    """What a run keeps: a store for each way its images become the model's input.

    Attributes:
        reason: why nothing is kept; None where something is.
        rounding: the largest error of a stored number, of the largest token, where ``cache_dtype``
            is narrower than what is computed; else None.
    """

    def __init__(self, run: Run, parts: Parts) -> None:
        """Of a run that has its model, its data and its device.

        Raises:
            UserError: a folder is named, and nothing can be kept.
        """
        self.run, self.config, self.model = run, run.config, run.model
        self.autocast = Autocast(run.device, run.config.amp, run.config.amp_dtype)
        self.rounding: float | None = None
        self.reason: str | None
        self.auto = self.config.cache == "auto"
        self.own = self.auto and parts.keep is None
        self.root = (parts.keep or run.output / "frozen") if self.auto else Path(self.config.cache)
        self._facts: dict[str, Any] = {}
        if self.config.views and run.splits.train.streamed:
            raise UserError("`views`: streamed images have no numbers to choose a view by.")
        self.reason = "the objective may look at images"
        if parts.objective is None:
            self.reason = self._reason()

    def _reason(self) -> str | None:
        config, blocks = self.config, getattr(self.model, "frozen_blocks", 0)
        if config.cache == "off":
            return "`cache` is off"
        reason = unsupported_reason(
            config, self.model, self.run.splits.train, self.run.processes.world
        )
        if reason is None and not self.auto:
            return None
        if not self.auto:
            raise UserError(f"`cache` {config.cache}: nothing can be kept: {reason}.")
        if blocks < _WORTH * len(self.model.backbone.blocks):
            return "too few blocks are frozen below the prompts"
        if reason is not None:
            self._say(f"the frozen blocks run in every step: {reason}")
        elif config.epochs <= views_of(config, self.run.splits.train):
            return "no image is seen twice"
        return reason

    def keep(self, loader: Any) -> Any:
        """The loader's batches with tokens in the place of images, or the loader as it is, where
        nothing is kept, or the files cannot be written."""
        if self.reason is not None or not isinstance(getattr(loader, "dataset", None), Samples):
            return loader
        try:
            return self._filled(loader)
        except (OSError, Changing) as error:
            self.reason = str(error)
            self._say(f"goes on without a cache of the frozen blocks: {error}")
            return loader

    def close(self) -> None:
        """Remove what no other run may use."""
        if self.own and self._facts:
            shutil.rmtree(self.root, ignore_errors=True)

    @torch.no_grad()
    def below(self, images: Tensor) -> Tensor:
        """What the frozen blocks make of images, as in a step of the run."""
        training = self.model.training
        images = self.run.source.prepare(images.to(self.autocast.device))
        try:
            self.model.eval()
            with self.autocast():
                found: Tensor = self.model.below(images).tokens
        finally:
            self.model.train(training)
        return found

    def _say(self, text: str) -> None:
        if self.run.show:
            print(text)

    def _filled(self, loader: DataLoader) -> CachedLoader:
        samples, sampler = loader.dataset, loader.batch_sampler
        assert isinstance(samples, Samples)
        different = 1
        if isinstance(sampler, EpochBatches):
            different = views_of(self.config, self.run.splits.train)
        augmented, views = different > 1, min(different, self.config.epochs)
        digests = Digests(samples, augmented, loader.num_workers)
        size = sampler.batch_size  # type: ignore[union-attr]
        chunks = [
            [(view, i) for i in range(begin, min(begin + size, len(samples)))]
            for view in range(views)
            for begin in range(0, len(samples), size)
        ]
        store = self._store(samples, augmented)
        try:
            unreadable = self._fill(store, digests, chunks)
        except (OSError, Changing):
            if self.own:  # a full disk needs the room for what the run has yet to write
                shutil.rmtree(store.folder, ignore_errors=True)
            raise
        if isinstance(sampler, EpochBatches):
            sampler.views = different  # what was drawn once comes again, in every epoch
        return CachedLoader(self, sampler, store, digests, unreadable)

    def _store(self, samples: Samples, augmented: bool) -> TokenStore:
        """Where the tokens are of images that become input in this way."""
        pixels = self.run.pixels
        if not self._facts:
            generator = torch.Generator().manual_seed(0)
            found = self.below(torch.rand(2, *pixels["input_size"], generator=generator)).cpu()
            made = str(found.dtype).removeprefix("torch.")
            self._facts = {
                "weights": _weights(self.model.backbone),
                "answer to noise": row_key(found.view(torch.uint8).numpy().tobytes()).hex(),
                "block": self.model.frozen_blocks,
                "shape": list(found.shape[1:]),
                "computed in": made,
                "stored in": self.config.cache_dtype or made,
                "device": str(torch.cuda.get_device_name() if found.is_cuda else "cpu"),
            }
        about = self._facts | describe(self.config, pixels, samples.seed, augmented)
        dtype = getattr(torch, self._facts["stored in"])
        return TokenStore(self.root, self._facts["shape"], dtype, about)

    def _fill(self, store: TokenStore, digests: Digests, chunks: list[list[Key]]) -> dict[Key, str]:
        """Add what is missing; the messages of images that cannot be read.

        Raises:
            OSError: no room, or the folder cannot be written.
            Changing: an image was another one when it was opened again.
        """
        store.open()
        missing = sum(digests.of(key) not in store for chunk in chunks for key in chunk)
        if not missing:
            return {}
        store.check_room(missing)
        self.run.folder.create(self.config.as_dict())
        self._say(
            f"the frozen blocks run once for {missing:,} images, "
            f"{size_text(missing * store.row_bytes)} into {store.folder}"
        )
        waiting = iter([f"another run writes into {store.folder}; this one waits for it"])

        def waits() -> None:
            self._stop_where_asked(store)
            for line in waiting:
                self._say(line)

        unreadable: dict[Key, str] = {}
        with store.writing(waits):
            store.open()
            left = [[key for key in chunk if digests.of(key) not in store] for chunk in chunks]
            left = [chunk for chunk in left if chunk]
            last = time.perf_counter()
            for n, (keys, images, why) in enumerate(digests.images(left)):
                self._stop_where_asked(store)
                unreadable |= why
                if good := [digests.of(key) for key in keys if key not in why]:
                    store.add(good, self._rounded(store, self.below(images)))
                if time.perf_counter() - last > _SECONDS_BETWEEN_LINES:
                    last = time.perf_counter()
                    self._say(f"frozen blocks: {(n + 1) / len(left):.0%}")
        store.open()
        if self.rounding is not None:
            self._say(
                f"stored in {self._facts['stored in']}: numbers differ by at most "
                f"{self.rounding:.1e} of the largest"
            )
        return unreadable

    def _rounded(self, store: TokenStore, tokens: Tensor) -> Tensor:
        if store.dtype == tokens.dtype:
            return tokens
        stored = tokens.to(store.dtype)
        largest = tokens.abs().max()
        error = float((tokens - stored.to(tokens.dtype)).abs().max() / largest)
        if not error < 1:  # not finite
            raise OSError(
                f"tokens of {float(largest):.3g} do not fit into {self._facts['stored in']}; "
                "`cache_dtype` bfloat16 holds them"
            )
        self.rounding = max(self.rounding or 0.0, error)
        return stored

    def _stop_where_asked(self, store: TokenStore) -> None:
        if number := self.run.stop.number:
            raise Interrupted(
                f"stopped while the frozen blocks ran; what they have made is kept in "
                f"{store.folder}",
                "the same command",
                number,
            )

    def batch(
        self, store: TokenStore, digests: Digests, keys: list[Key], why: dict[Key, str]
    ) -> Batch:
        """A batch of these samples, without those that could not be read."""
        good = [key for key in keys if key not in why]
        tokens = store.read(map(digests.of, good)).to(getattr(torch, self._facts["computed in"]))
        if self.autocast.device.type == "cuda":
            tokens = tokens.pin_memory()
        return Batch(
            FrozenTokens(tokens, self._facts["block"]),  # type: ignore[arg-type]
            stack_labels([digests.label(key) for key in good]),
            torch.tensor([digests.index(key) for key in good], dtype=torch.int64),
            [why[key] for key in keys if key in why],
        )


class CachedLoader:
    """A loader's batches, in its order, with ``FrozenTokens`` in the place of images."""

    def __init__(
        self,
        cache: FrozenCache,
        sampler: Any,
        store: TokenStore,
        digests: Digests,
        unreadable: dict[Key, str],
    ) -> None:
        self.batch_sampler = sampler
        self._read = lambda keys: cache.batch(store, digests, keys, unreadable)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # one batch ahead: a slow disk is read beside the step
        with ThreadPoolExecutor(1) as thread:
            ahead = None
            for keys in self.batch_sampler:
                now, ahead = ahead, thread.submit(self._read, keys)
                if now is not None:
                    yield now.result()
            if ahead is not None:
                yield ahead.result()


def _weights(backbone: Any) -> str:
    try:
        return backbone_digest(backbone)
    except ValueError as error:  # quantized or distributed weights
        raise Changing(str(error)) from error
