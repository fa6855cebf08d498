"""Trained tasks behind the API: adapters on one frozen backbone, mixed in every batch."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..images import UnreadableImage, read_image
from ..tasks import TaskBank
from .answerer import Target
from .batching import Call
from .errors import ApiError
from .models import Models
from .preprocess import Levels, Preprocessing
from .task import MAX_NAME, Task, check_name, load_task

_logger = logging.getLogger(__name__)
# names that a refusal lists
_LISTED = 20


class Beside(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...


class ServedTasks:
    """Tasks by name on one backbone.

    Args:
        backbone: as ``load_backbone`` returns it, on its device.
        name: of the backbone, as the API calls it.
        strict: refuse adapters that were trained on other weights or settings of the backbone;
            False: those of another shape only, and warn of the others.
        max_bytes: of the tasks in memory, as for ``TaskBank``; None: all stay.

    Attributes:
        failed: why adapters of a folder could not be loaded when it was.
        beside: started and stopped with the server: what adds and removes tasks meanwhile.
    """

    outputs = ("logits",)

    def __init__(
        self, backbone: Any, name: str, *, strict: bool = True, max_bytes: int | None = None
    ) -> None:
        self.name = name
        self.failed: list[str] = []
        self.beside: Beside | None = None
        self._strict = strict
        self.backbone = backbone
        self._bank = Models(TaskBank(backbone, max_bytes))
        self._tasks: dict[str, Task] = {}
        self._ids = itertools.count()
        self._changing = threading.RLock()

    def start(self) -> None:
        if self.beside is not None:
            self.beside.start()

    def stop(self) -> None:
        if self.beside is not None:
            self.beside.stop()

    # changes

    def add(self, name: str, folder: str | PathLike[str]) -> Task:
        """Load an adapter, try it on one image, and answer calls for it from then on.

        One of the same name goes on answering until the new one is there, and then leaves.

        Returns:
            The task, for ``remove``.

        Raises:
            UserError: no name for a task; a damaged adapter, or one of another backbone.
        """
        check_name(name)
        task = self._load(name, Path(folder))
        with self._changing:
            before, self._tasks[name] = self._tasks.get(name), task
            if before is not None:
                self._retire(before)
        _logger.info("task %r: %s", name, "replaced" if before else "added")
        return task

    def remove(self, name: str, only: Task | None = None) -> None:
        """Answer no new call for a task; those on their way are answered.

        Args:
            only: what ``add`` returned; another task that has the name by now stays.

        Raises:
            KeyError: there is none of that name, or not that one.
        """
        with self._changing:
            if only not in (None, self._tasks[name]):
                raise KeyError(name)
            self._retire(self._tasks.pop(name))
        _logger.info("task %r: removed", name)

    def _retire(self, task: Task) -> None:
        task.removed = True
        if task.calls == 0:
            self._bank.remove(task.id)

    def _load(self, name: str, folder: Path) -> Task:
        model, preprocessing = load_task(folder, self.backbone, self._strict)
        # a name that is used once: a call never meets a later task of the same name
        task_id = f"{name}#{next(self._ids)}"
        # the model and not its folder: a task that went to disk comes back as it was
        try:
            self._bank.add(task_id, model)
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from error
        task = Task(name, task_id, preprocessing, model.class_names, 0, {})
        try:
            (logits,) = self.run([([preprocessing.zeros()], task)])
            if not logits.isfinite().all():
                raise ValueError("its logits are not finite")
        except Exception as error:
            self._bank.remove(task_id)
            raise UserError(f"{folder} fails on an image of zeros: {error}") from error
        task.num_classes = logits.shape[1]
        task.about = {
            "method": model.method,
            "num_classes": task.num_classes,
            "class_names": None if task.class_names is None else list(task.class_names),
            "preprocessing": preprocessing.describe(),
        }
        return task

    # calls

    def check_output(self, output: str) -> None:
        if output not in self.outputs:
            raise ValueError(f"tasks answer logits and no {output}.")

    def target(self, task: str | None, output: str) -> Target:
        try:
            self.check_output(output)
        except ValueError as error:
            raise ApiError(400, "no_such_output", str(error)) from None
        with self._changing:
            found = self._find(task)
            if found is not None:
                found.calls += 1
        if found is None:
            raise self._unknown(task)
        return Target(found, output, found.preprocessing, found.name, found.class_names)

    def _find(self, name: str | None) -> Task | None:
        if name is None and len(self._tasks) == 1:
            return next(iter(self._tasks.values()))
        return None if name is None else self._tasks.get(name)

    def _unknown(self, name: str | None) -> ApiError:
        """Why there is no task of this name. It compares names: not while others wait."""
        with self._changing:
            names = sorted(self._tasks)
        if not names:
            return ApiError(400, "no_such_task", "this server has no task at the moment.")
        if name is None:
            return ApiError(
                400,
                "task_missing",
                f'this server has {len(names)} tasks; say which one by "task": in the JSON body, '
                f"or as a form field (-F task=NAME). It has {_listed(names)}.",
            )
        short = len(name) <= MAX_NAME  # no task has a longer one
        near = difflib.get_close_matches(name, names[:10_000], n=3, cutoff=0.4) if short else []
        hint = f"the nearest are {_listed(near)}" if near else f"it has {_listed(names)}"
        text = f"this server has no task {name[:MAX_NAME]!r}; {hint}."
        return ApiError(400, "no_such_task", text)

    def release(self, target: Target) -> None:
        with self._changing:
            task: Task = target.key
            task.calls -= 1
            if task.removed and task.calls == 0:
                self._bank.remove(task.id)

    @torch.inference_mode()
    def run(self, calls: Sequence[Call]) -> list[Tensor]:
        """The calls of all tasks in one batch for each size of images.

        Args:
            calls: images that went through the task's geometry, and the ``Task``, for each call.

        Returns:
            Logits (images, C) for each call, float32 on the CPU.
        """
        device = next(self.backbone.parameters()).device
        results: dict[int, Tensor] = {}
        sizes = {(task.preprocessing.height, task.preprocessing.width) for _, task in calls}
        for size in sizes:
            chosen = [
                (i, levels, task)
                for i, (levels, task) in enumerate(calls)
                if (task.preprocessing.height, task.preprocessing.width) == size
            ]
            images = torch.cat(
                [
                    task.preprocessing.normalize(task.preprocessing.stack(levels))
                    for _, levels, task in chosen
                ]
            )
            names = [task.id for _, levels, task in chosen for _ in levels]
            rows = iter(self._bank(images.to(device), tasks=names))
            for i, levels, _ in chosen:
                results[i] = torch.stack(list(itertools.islice(rows, len(levels)))).float().cpu()
        return [results[i] for i in range(len(calls))]

    # without HTTP

    def answer(
        self, images: Sequence[bytes | Image.Image], tasks: Sequence[str | None]
    ) -> list[Tensor]:
        """Images, one task each, to their logits, in one batch.

        Args:
            images: encoded, or upright RGB (``pgn_fast.images.read_image``).
            tasks: a name each; None where there is one task.

        Returns:
            Logits (C,) each, of their own task, float32 on the CPU.

        Raises:
            ValueError: another number of names than images, or an image that cannot be read
                (``UnreadableImage``, which says which one).
            ApiError: there is no such task; the nearest are named.
        """
        if len(images) != len(tasks):
            raise ValueError(f"{len(images)} images and {len(tasks)} tasks: give one task each")
        pictures = _pictures(images)
        targets: list[Target] = []
        try:
            for task in tasks:
                targets.append(self.target(task, "logits"))
            calls = [
                ([target.preprocessing.geometry(picture)], target.key)
                for picture, target in zip(pictures, targets, strict=True)
            ]
            return [logits[0] for logits in self.run(calls)]
        finally:
            for target in targets:
                self.release(target)

    def every(self, images: Sequence[bytes | Image.Image]) -> dict[str, Tensor]:
        """The same images through every task; what lies below a task's first prompt runs once.

        Args:
            images: B, as for ``answer``.

        Returns:
            name -> logits (B, C), float32 on the CPU.

        Raises:
            UnreadableImage: (a ValueError) one that cannot be read; the message says which.
        """
        pictures = _pictures(images)
        with self._all() as tasks:
            if not pictures:
                return {task.name: torch.empty(0, task.num_classes) for task in tasks}
            return self.run_every(
                [(p, [p.geometry(x) for x in pictures], alike) for p, alike in _alike(tasks)]
            )

    def labels(self, task: str | None = None) -> list[str]:
        """A task's classes in the order of its logits; their numbers where nobody has named them.

        Raises:
            ApiError: there is no such task; the nearest are named.
        """
        with self._changing:
            found = self._find(task)
        if found is None:
            raise self._unknown(task)
        return list(found.class_names or map(str, range(found.num_classes)))

    def alike(self) -> list[tuple[Preprocessing, list[Task]]]:
        """The tasks as they are now, those of one preprocessing together."""
        with self._changing:
            return _alike(list(self._tasks.values()))

    @torch.inference_mode()
    def run_every(
        self, work: Sequence[tuple[Preprocessing, Sequence[Levels], Sequence[Task]]]
    ) -> dict[str, Tensor]:
        """As ``every``, of images that went through each preprocessing's geometry."""
        device = next(self.backbone.parameters()).device
        found: dict[str, Tensor] = {}
        for preprocessing, levels, tasks in work:
            images = preprocessing.normalize(preprocessing.stack(levels)).to(device)
            names = {task.id: task.name for task in tasks}
            answers = self._bank.every(images, names)
            found |= {names[i]: logits.float().cpu() for i, logits in answers.items()}
        return found

    def warm_up(self, max_batch: int) -> None:
        """One image of every task (some, where there are many), and a whole batch of them."""
        if next(self.backbone.parameters()).device.type == "cuda":
            _logger.info("no CUDA graphs: every batch is another mixture of tasks; it runs eagerly")
        with self._all() as tasks:
            some = tasks[:max_batch]
            if some:
                self.run([([task.preprocessing.zeros()], task) for task in some])
                mixed = list(itertools.islice(itertools.cycle(some), max_batch))
                self.run([([task.preprocessing.zeros()], task) for task in mixed])

    @contextmanager
    def _all(self) -> Iterator[list[Task]]:
        with self._changing:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.calls += 1
        try:
            yield tasks
        finally:
            for task in tasks:
                self.release(Target(task, "logits", task.preprocessing))

    # what is here

    def tasks(self) -> dict[str, dict[str, Any]]:
        with self._changing:
            return {name: self._tasks[name].about for name in sorted(self._tasks)}

    def models(self) -> dict[str, dict[str, int]]:
        with self._changing:
            return {name: {"logits": task.num_classes} for name, task in self._tasks.items()}

    def describe(self) -> dict[str, Any]:
        about = {"model": self.name, "tasks": len(self._tasks)}
        with self._changing:
            if len(self._tasks) == 1:
                (task,) = self._tasks.values()
                about |= {
                    "outputs": {"logits": task.num_classes},
                    "preprocessing": task.preprocessing.describe(),
                }
        return about


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more (GET /v1/tasks)" if len(names) > _LISTED else ""
    return ", ".join(repr(name) for name in names[:_LISTED]) + more if names else "none"


def _pictures(images: Sequence[bytes | Image.Image]) -> list[Image.Image]:
    pictures = []
    for number, image in enumerate(images):
        try:
            pictures.append(image if isinstance(image, Image.Image) else read_image(image))
        except UnreadableImage as error:
            raise UnreadableImage(f"image {number}: {error}") from error
    return pictures


def _alike(tasks: Sequence[Task]) -> list[tuple[Preprocessing, list[Task]]]:
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        key = json.dumps(task.preprocessing.describe(), sort_keys=True)
        groups.setdefault(key, []).append(task)
    return [(alike[0].preprocessing, alike) for alike in groups.values()]
