"""Many tasks on one frozen backbone: mixed freely in a batch, or many for the same images."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import CONFIG_FILE, from_pretrained
from ..adapters.repository import fetch_adapter
from ..backbone.engine import FastBackbone
from ..backbone.inputs import check_images
from ..backbone.load import load_backbone
from ..backbone.options import FastOptions
from ..backbone.readout import pool, rows_read
from ..backbone.schedule import PromptSchedule
from ..errors import UserError
from ..models import FineTuned, LinearProbe, PromptedViT
from ..prompts import VisualPrompts
from .mixed import Below, MixedBackbone, Part, group
from .residents import Ready, Resident, Residents, load, taken, versions_of
from .steps import steps_of

_NO_PROMPTS = PromptSchedule("append", {})

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
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, or None for no limit, got {max_bytes}")
        self.backbone: Any = load_backbone(backbone)
        self.failed: dict[str, str] = {}
        options = FastOptions.of(fast)
        self._engine = None if options is None else FastBackbone(self.backbone, options, backend)
        self._residents = Residents(self.backbone, self._make, max_bytes)

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

        A damaged adapter does not keep the others from being served: it is named in a warning, and
        in ``failed``.

        Args:
            path: a directory with one adapter a sub-directory.
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
        folders = sorted(f for f in root.iterdir() if (f / CONFIG_FILE).exists())
        if not folders:
            raise UserError(
                f"no tasks in {root}: it has no sub-folder with an {CONFIG_FILE}, one a task."
            )
        bank = None if backbone is None else cls(backbone, **options)
        failed = {}
        for folder in folders:
            try:
                if bank is None:
                    first = from_pretrained(folder)
                    bank = cls(first.backbone, **options)
                bank.add(folder.name, folder, strict_backbone=strict_backbone)
            except ValueError as error:
                failed[folder.name] = str(error)
                warnings.warn(f"task {folder.name!r} is left out: {error}", stacklevel=2)
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
            source: an adapter's directory or hub id ("OWNER/NAME", "OWNER/NAME@REVISION"), or a
                model on this bank's backbone, which becomes frozen and should change no more.
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
            place = fetch_adapter(source)
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
        if isinstance(tasks, str) or len(tasks) != images.shape[0]:
            given = f"the string {tasks!r}" if isinstance(tasks, str) else f"{len(tasks)} names"
            raise ValueError(
                f"tasks must name one task for each of the {images.shape[0]} images, got {given}"
            )
        places: dict[str, list[int]] = {}
        for i, name in enumerate(tasks):
            places.setdefault(name, []).append(i)
        residents = self._residents.get(places)
        answers: list[Tensor | None] = [None] * images.shape[0]
        with torch.no_grad():
            check_images(self.backbone, images)
            work = [(residents[name], rows) for name, rows in sorted(places.items())]
            for rows, logits in self._answer(images, work, self._mixed(images.shape[0])):
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
        names = list(self.names if tasks is None else dict.fromkeys(tasks))
        everything = list(range(images.shape[0]))
        answers: dict[str, Tensor] = {}
        with torch.no_grad():
            check_images(self.backbone, images)
            mixed = self._mixed(len(everything))
            below = None if mixed is None else Below(mixed, images)
            at_once = max(1, _AT_ONCE // max(1, len(everything)))
            for start in range(0, len(names), at_once):
                chosen = names[start : start + at_once]
                residents = self._residents.get(chosen)
                work = [(residents[name], everything) for name in chosen]
                found = self._answer(images, work, mixed, below)
                answers |= dict(zip(chosen, (logits for _, logits in found), strict=True))
        return answers

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
        if reason := self._apart():
            lines.append(f"Every task runs by its own model, one after the other: {reason}.")
        elif self._engine is not None:
            runs = self._engine.cache.backend_for(
                "prompt_attention_ragged", self._engine.cache.dtype
            )
            how = f"one call by {runs}" if runs != "reference" else "a call for each P, plain torch"
            lines.append(f"Attention of a batch with unequal numbers of prompts P: {how}.")
        return "\n".join(lines)

    def _checked(self, name: str, model: Any) -> Any:
        """A model that can answer in this bank, frozen."""
        if isinstance(model, FineTuned):
            raise ValueError(
                f"task {name!r}: a fine-tuned model has a backbone of its own, which no other task "
                "can share"
            )
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

    def _apart(self, images: int = 1) -> str | None:
        """Why tasks cannot share a batch of so many images; None where they can."""
        if self._engine is None:
            return "fast=False"
        self._engine.cache.follow(images)
        return self._engine.cache.refused

    def _mixed(self, images: int) -> MixedBackbone | None:
        """The backbone as it is now; None where every task runs by its own model."""
        if self._engine is None or self._apart(images) is not None:
            return None
        return MixedBackbone(self._engine)

    def _make(self, model: Any) -> Resident:
        """Project deep prompts' keys and values, once."""
        resident = Resident(model)
        with torch.no_grad():
            mixed = self._mixed(1)
            if mixed is not None and _static(model):
                self._ready(resident, mixed)
        return resident

    def _ready(self, resident: Resident, mixed: MixedBackbone) -> Ready:
        """A static task's schedule, and its keys and values where the weights that they are made
        from may be kept; made again when those or the prompts have changed."""
        model, ready = resident.model, resident.ready
        versions = versions_of(model.prompter)
        if ready is not None and ready.holds(mixed.weights[0], versions):
            return ready
        schedule = model.prompter.schedule(torch.empty(0))
        steps = steps_of(schedule, model.readout.prompts, mixed.depth)
        rows = mixed.ready(schedule, steps) if mixed.engine.cache.folds else {}
        made_from = weakref.ref(mixed.weights[0]), versions
        resident.ready = ready = Ready(schedule, steps, rows, made_from)
        return ready

    def _answer(
        self,
        images: Tensor,
        work: list[tuple[Resident, list[int]]],
        mixed: MixedBackbone | None,
        below: Below | None = None,
    ) -> list[tuple[list[int], Tensor]]:
        """Rows and logits of each task.

        Args:
            work: tasks, and the places of their images.
            mixed: what runs them together; None: every task runs by its own model.
            below: for the same images through many tasks: their tokens, kept from call to call.
                None: every image has one task.
        """
        answers: list[tuple[list[int], Tensor] | None] = [None] * len(work)
        parts: dict[int, Part] = {}
        for n, (resident, rows) in enumerate(work):
            part = None if mixed is None else self._part(resident, images, rows, mixed)
            if part is None:
                answers[n] = rows, resident.model(images[rows])
            else:
                parts[n] = part
        if mixed is not None and parts:
            groups = group(parts.values(), mixed.depth, 0 if below is None else None)
            below = below or Below(mixed, images)
            below.reach(one.first for one in groups)
            tokens = mixed.run(below.starts, below.rope, groups)
            places = {
                id(part): (g, at) for g in range(len(groups)) for part, at in groups[g].slices()
            }
            for n, part in parts.items():
                g, at = places[id(part)]
                answers[n] = part.rows, self._logits(work[n][0].model, part, tokens[g][at])
        return answers  # type: ignore[return-value]

    def _part(
        self, resident: Resident, images: Tensor, rows: list[int], mixed: MixedBackbone
    ) -> Part | None:
        """A task's share of the batch; None where it changes images or embedding on the way."""
        model = resident.model
        if isinstance(model, LinearProbe):
            steps = steps_of(_NO_PROMPTS, False, mixed.depth)
            return Part(rows, _NO_PROMPTS, steps, outputs=rows_read(self.backbone))
        reads = model.readout.prompts
        outputs = None if reads else model.readout.rows
        if _static(model):
            ready = self._ready(resident, mixed)
            if ready.schedule.position == "add":
                return None
            return Part(rows, ready.schedule, ready.steps, reads, outputs, ready.rows)
        own = images[rows]
        pixels, schedule = model._prompted(own, mixed.engine.backend)
        if pixels is not own or schedule.position == "add" or schedule.patch_weight is not None:
            return None
        norm_pre = mixed.engine.cache.family.norm_pre(self.backbone)
        if callable(schedule.parts(0).tokens) and not isinstance(norm_pre, nn.Identity):
            return None
        steps = steps_of(schedule, reads, mixed.depth)
        return Part(rows, schedule, steps, reads, outputs)

    def _logits(self, model: Any, part: Part, tokens: Tensor) -> Tensor:
        """(B, M, D) to (B, C), one image after the other: its mates then leave no trace in the
        order of a sum."""
        if isinstance(model, LinearProbe):
            return torch.cat([model.classify(pool(self.backbone, x[None])) for x in tokens])
        prompts = part.schedule.num_prompts_left if part.reads else 0
        return torch.cat([model._classify(x[None], prompts) for x in tokens])


def _static(model: Any) -> bool:
    """Whether the prompts are the same for all images."""
    return isinstance(getattr(model, "prompter", None), VisualPrompts)
