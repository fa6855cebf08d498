"""Many tasks on one frozen backbone: mixed freely in a batch, or many for the same images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import from_pretrained
from ..adapters.load import OWN_BACKBONE
from ..adapters.places import adapters_of, fetch_adapter, find_adapter
from ..backbone.inputs import check_images
from ..backbone.load import load_backbone
from ..backbone.options import FastOptions
from ..errors import UserError, shown
from ..models import FineTuned, LinearProbe, PromptedViT
from .answers import Answers
from .residents import Residents, load, taken

# images times tasks that `every` runs at once: 64 images of ViT-B are 40 MB a block
_AT_ONCE = 64


class TaskBank:
    """Many tasks on one frozen backbone; every image of a batch may belong to another one.

    PGN, VPT-Shallow, VPT-Deep, linear probes and registered methods mix freely, with their own
    numbers of prompts and classes, places of prompts, pools and heads. The result of an image is
    that of its own task's model, whatever else is in the batch. Adding, removing and answering may
    happen in different threads: a call answers with the tasks as they are when it begins.

    Args:
        backbone: as for ``PGN``; it is frozen in place.
        max_bytes: of the tasks that are in memory (``nbytes``); beyond it those that were used
            least recently go back to disk and are loaded again when they are asked for, but for
            those that no adapter can hold, such as a head of your own code. None: all stay.
        backend, fast: of the ops and the engine, as for ``PGN``.

    Attributes:
        failed: adapters of ``from_directory`` that could not be loaded: name -> reason.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        max_bytes: int | None = None,
        *,
        backend: str | None = None,
        fast: bool | str | FastOptions = True,
    ) -> None:
        self.backbone: Any = load_backbone(backbone)
        self.failed: dict[str, str] = {}
        self._answers = Answers(self.backbone, FastOptions.of(fast), backend)
        self._residents = Residents(self.backbone, self._answers.resident, max_bytes)

    @classmethod
    def from_directory(
        cls,
        path: str | PathLike[str],
        backbone: str | nn.Module | None = None,
        *,
        strict_backbone: bool = True,
        **options: Any,
    ) -> TaskBank:
        """A bank of every adapter in the sub-directories of ``path``, named after them.

        Of a training run it is the best one; hidden sub-directories are passed over.

        A damaged adapter does not keep the others from being served: it is named in a warning, and
        in ``failed``.

        Args:
            path: a directory with one adapter, or training run, a sub-directory.
            backbone: as for ``TaskBank``; None: the one that the adapters name.
            strict_backbone: as for ``add``.
            options: as for ``TaskBank``.

        Raises:
            UserError: no such directory, no adapter in it that can be loaded, or adapters of
                different backbones where none is given.
        """
        root = Path(path)
        if not root.is_dir():
            raise UserError(f"no tasks: there is no folder {root}.")
        adapters = adapters_of(root)
        if not adapters:
            raise UserError(
                f"no tasks in {root}: it has no sub-folder with an adapter or a training run, one "
                "a task."
            )
        bank = None if backbone is None else cls(backbone, **options)
        failed = {}
        for name, adapter in adapters.items():
            try:
                if bank is None:
                    bank = cls(_backbone_of(adapter), **options)
                bank.add(name, adapter, strict_backbone=strict_backbone)
            except (ValueError, OSError) as error:
                failed[name] = str(error)
                warnings.warn(f"task {name!r} is left out: {error}", stacklevel=2)
        if bank is None or not len(bank):
            reasons = "; ".join(failed.values())
            raise UserError(f"no task in {root} can be loaded: {reasons}")
        bank.failed = failed
        return bank

    def add(
        self, name: str, source: str | PathLike[str] | nn.Module, *, strict_backbone: bool = True
    ) -> None:
        """Make a task known by a name. Nothing is added where it fails.

        Args:
            name: what ``tasks`` will call it.
            source: an adapter's directory, a training run's (its best adapter) or a hub id
                ("OWNER/NAME", "OWNER/NAME@REVISION"), or a model on this bank's backbone, which
                becomes frozen and should change no more.
            strict_backbone: refuse an adapter that was trained on other weights or settings of the
                backbone; False: warn.

        Raises:
            ValueError: the name is taken or empty; the model is on another backbone, or trains it;
                or the adapter is damaged or does not fit.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a string of at least one letter, got {name!r}")
        if name in self:
            raise ValueError(taken(name))
        if isinstance(source, nn.Module):
            model, place = self._checked(name, source), None
        else:
            if not isinstance(source, str | PathLike):
                raise ValueError(
                    f"task {name!r}: source takes a directory, a hub id or a model, got "
                    f"{shown(source)}"
                )
            folder = fetch_adapter(source)
            place = find_adapter(folder) or folder
            try:
                found = load(place, self.backbone, strict=strict_backbone)
            except UserError as error:
                raise UserError(f"task {name!r}: {error}") from error
            model = self._checked(name, found)
        self._residents.add(name, model, place)

    def remove(self, name: str) -> None:
        """Forget a task; calls that have begun still answer."""
        self._residents.remove(name)

    def __call__(self, images: Tensor, tasks: Sequence[str]) -> list[Tensor]:
        """Images (B, C, H, W), one task each, to their logits.

        Args:
            images: as the models take them: normalized, or uint8.
            tasks: B names.

        Returns:
            B logit vectors, (C_b,) each, without gradients.

        Raises:
            UnknownTask: (a KeyError) no task of that name; the nearest are named.
            ValueError: another number of names than images.
        """
        check_images(self.backbone, images)
        several = hasattr(tasks, "__len__") and not isinstance(tasks, str)
        if not several or len(tasks) != images.shape[0]:
            given = "the string " * isinstance(tasks, str) + shown(tasks)
            if several:
                given = f"{len(tasks)} names"
            raise ValueError(
                f"tasks must name one task for each of the {images.shape[0]} images, got {given}"
            )
        places: dict[str, list[int]] = {}
        for i, name in enumerate(tasks):
            if not isinstance(name, str):
                raise ValueError(f"tasks must be names, got {name!r} for image {i}")
            places.setdefault(name, []).append(i)
        places = dict(sorted(places.items()))
        held = self._residents.hold(places)
        answers: list[Tensor | None] = [None] * images.shape[0]
        with torch.no_grad():
            residents = self._residents.loaded(held)
            work = list(zip(residents, places.values(), strict=True))
            for rows, logits in self._answers.of(images, work):
                for row, vector in zip(rows, logits, strict=True):
                    answers[row] = vector
        return answers  # type: ignore[return-value]

    def every(self, images: Tensor, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The same images through many tasks; what lies below a task's first prompt runs once.

        Args:
            images: (B, C, H, W), as for a call.
            tasks: their names; None: all.

        Returns:
            name -> logits (B, C).
        """
        check_images(self.backbone, images)
        if isinstance(tasks, str) or not (tasks is None or isinstance(tasks, Iterable)):
            raise ValueError(f"tasks must be several names, or None for all, got {shown(tasks)}")
        held = self._residents.hold(None if tasks is None else dict.fromkeys(tasks))
        if images.shape[0] == 0:
            return {task.name: torch.empty(0, task.num_classes) for task in held}
        at_once = max(1, _AT_ONCE // max(1, images.shape[0]))
        parts = [held[i : i + at_once] for i in range(0, len(held), at_once)]
        with torch.no_grad():
            found = self._answers.every(images, map(self._residents.loaded, parts))
            answers = [logits for part in found for logits in part]
        return {task.name: logits for task, logits in zip(held, answers, strict=True)}

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, sorted."""
        return tuple(sorted(task.name for task in self._residents.tasks()))

    def __contains__(self, name: object) -> bool:
        return name in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def nbytes(self, name: str) -> int:
        """Bytes that a task takes in memory: its parameters, its head, and what is made from them;
        also where it is on disk at the moment."""
        return self._residents.find(name).nbytes

    @property
    def max_bytes(self) -> int | None:
        """The most that tasks in memory may take; None: no limit."""
        return self._residents.max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int | None) -> None:
        self._residents.max_bytes = value

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tasks that are in memory now, without the backbone."""
        return self._residents.nbytes

    def class_names(self, name: str) -> tuple[str, ...] | None:
        """Of a task's logits, in their order; None where its adapter did not know them."""
        return self._residents.find(name).class_names

    def method(self, name: str) -> str:
        """The method that a task was trained by."""
        return self._residents.find(name).method

    def num_classes(self, name: str) -> int:
        """C, the length of a task's logits."""
        return self._residents.find(name).num_classes

    def explain(self) -> str:
        """How many tasks there are, what they take, and which run apart from the others."""
        tasks = self._residents.tasks()
        resident = [task for task in tasks if task.resident is not None]
        lines = [
            f"{len(tasks)} tasks on one {type(self.backbone).__name__}, {len(resident)} of them in "
            f"memory ({self.resident_bytes / 1e6:.1f} MB)."
        ]
        if reason := self._answers.apart():
            lines.append(f"Every task runs by its own model, one after the other: {reason}.")
        elif (engine := self._answers.engine) is not None:
            runs = engine.cache.backend_for("prompt_attention_ragged", engine.cache.dtype)
            alone = "a call for each P, eager PyTorch"
            how = f"one call by {runs}" if runs != "reference" else alone
            lines.append(f"Attention of a batch with unequal numbers of prompts P: {how}.")
        return "\n".join(lines)

    def _checked(self, name: str, model: Any) -> Any:
        """A model that can answer in this bank, frozen."""
        if isinstance(model, FineTuned):
            raise ValueError(f"task {name!r}: {OWN_BACKBONE}")
        if not isinstance(model, PromptedViT | LinearProbe):
            raise ValueError(
                f"task {name!r}: a bank takes models of this package, got {type(model).__name__}"
            )
        if model.backbone is not self.backbone:
            raise ValueError(
                f"task {name!r}: its model is on another backbone than the bank; build it on "
                "bank.backbone, or add its adapter's directory"
            )
        if (engine := getattr(model, "engine", None)) is not None:
            engine.cache.forget_prompts()  # here they are kept once, and counted
        return model.eval().requires_grad_(False)


def _backbone_of(adapter: Path) -> Any:
    """The backbone that an adapter names, with its pretrained weights."""
    model = from_pretrained(adapter)
    if isinstance(model, FineTuned):
        raise UserError(f"{adapter}: {OWN_BACKBONE}")
    return model.backbone
