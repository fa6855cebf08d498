"""Tasks' logits for images: together through the backbone where they can, else one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.eager import check_schedule
from ..backbone.engine import FastBackbone
from ..backbone.options import FastOptions
from ..backbone.readout import pool, rows_read
from ..backbone.schedule import NO_PROMPTS
from ..models import LinearProbe
from ..prompts import VisualPrompts
from .mixed import Below, MixedBackbone, Part, group
from .residents import Ready, Resident, versions_of
from .steps import steps_of

# a task, and the places of its images in the batch
Work = Sequence[tuple[Resident, list[int]]]


class Answers:
    """Runs a bank's tasks on its backbone.

    Args:
        backbone: as ``load_backbone`` returns it.
        options: of the engine; None: every task runs by its own model.
        backend: of the ops.
    """

    def __init__(self, backbone: Any, options: FastOptions | None, backend: str | None) -> None:
        self.backbone = backbone
        self.engine = None if options is None else FastBackbone(backbone, options, backend)

    def apart(self, images: int = 1) -> str | None:
        """Why tasks cannot share a batch of so many images; None where they can."""
        if self.engine is None:
            return "fast=False"
        self.engine.cache.follow(images)
        return self.engine.cache.refused

    def resident(self, model: Any) -> Resident:
        """A task's model, with keys and values of its deep prompts projected, once."""
        resident = Resident(model)
        with torch.no_grad():
            mixed = self._mixed(1)
            if mixed is not None and _static(model):
                self._ready(resident, mixed)
        return resident

    def of(self, images: Tensor, work: Work) -> list[tuple[list[int], Tensor]]:
        """Rows and logits (rows, C) of each task, in the order of ``work``; an image has one."""
        return self._run(images, work, self._mixed(images.shape[0]), None)

    def every(
        self, images: Tensor, work: Iterable[Sequence[Resident]]
    ) -> Iterable[tuple[Tensor, ...]]:
        """Logits (B, C) of all images by every task, a part of the tasks at a time; what lies below
        their first prompts runs once for all parts."""
        everything = list(range(images.shape[0]))
        mixed = self._mixed(len(everything))
        below = None if mixed is None else Below(mixed.engine, images)
        for residents in work:
            found = self._run(images, [(one, everything) for one in residents], mixed, below)
            yield tuple(logits for _, logits in found)

    def _mixed(self, images: int) -> MixedBackbone | None:
        """The backbone as it is now; None where every task runs by its own model."""
        if self.engine is None or self.apart(images) is not None:
            return None
        return MixedBackbone(self.engine)

    def _ready(self, resident: Resident, mixed: MixedBackbone) -> Ready:
        """A static task's schedule, and its keys and values where the weights that they are made
        from may be kept; made again when those or the prompts have changed."""
        model, ready = resident.model, resident.ready
        versions = versions_of(model.prompter)
        if ready is not None and ready.holds(mixed.weights[0], versions):
            return ready
        _, schedule = model.prompter.prompt(torch.empty(0), self.backbone, mixed.engine.backend)
        steps = steps_of(schedule, model.readout.prompts, mixed.depth)
        rows = mixed.ready(schedule, steps) if mixed.engine.cache.folds else {}
        made_from = weakref.ref(mixed.weights[0]), versions
        resident.ready = ready = Ready(schedule, steps, rows, made_from)
        return ready

    def _run(
        self,
        images: Tensor,
        work: Work,
        mixed: MixedBackbone | None,
        below: Below | None,
    ) -> list[tuple[list[int], Tensor]]:
        """Rows and logits of each task.

        Args:
            mixed: what runs them together; None: every task runs by its own model.
            below: for the same images through many tasks: their tokens, kept from call to call.
                None: every image has one task.
        """
        answers: list[tuple[list[int], Tensor] | None] = [None] * len(work)
        parts: dict[int, Part] = {}
        for n, (resident, rows) in enumerate(work):
            part = None if mixed is None else self._part(resident, images, rows, mixed)
            if part is None:
                answers[n] = rows, self._alone(resident.model, images[rows])
            else:
                parts[n] = part
        if mixed is not None and parts:
            groups = group(parts.values(), mixed.depth, 0 if below is None else None)
            below = below or Below(mixed.engine, images)
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
            steps = steps_of(NO_PROMPTS, False, mixed.depth)
            return Part(rows, NO_PROMPTS, steps, outputs=rows_read(self.backbone))
        reads = model.readout.prompts
        outputs = None if reads else model.readout.rows
        if _static(model):
            ready = self._ready(resident, mixed)
            if ready.schedule.position == "add":
                return None
            return Part(rows, ready.schedule, ready.steps, reads, outputs, ready.rows)
        own = images[rows]
        pixels, schedule = model._prompted(own, mixed.engine.backend)
        check_schedule(self.backbone, schedule, len(rows))
        if pixels is not own or schedule.position == "add" or schedule.patch_weight is not None:
            return None
        norm_pre = mixed.engine.cache.family.norm_pre(self.backbone)
        if callable(schedule.parts(0).tokens) and not isinstance(norm_pre, nn.Identity):
            return None
        steps = steps_of(schedule, reads, mixed.depth)
        return Part(rows, schedule, steps, reads, outputs)

    def _alone(self, model: Any, images: Tensor) -> Tensor:
        """Logits of images (B, C, H, W) by their task's own model."""
        if isinstance(model, LinearProbe):
            pooled = model.below(images).tokens
            return torch.cat([model.classify(x[None]) for x in pooled])
        tokens, prompts = model._tokens(images)
        return torch.cat([model._classify(x[None], prompts) for x in tokens])

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
