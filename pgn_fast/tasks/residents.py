"""Which tasks of a bank are in memory, and which wait on disk until they are asked for."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..adapters import CONFIG_FILE, save_pretrained
from ..adapters.load import load_on
from ..adapters.schema import GIVEN
from ..backbone.schedule import PromptSchedule
from ..errors import UserError, shown
from .steps import Step

# letters of a name that is not known, by which the nearest are found
_COMPARED = 200


class UnknownTask(UserError, KeyError):
    """No task of that name in the bank; the message offers the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show its message in quotes


@dataclass(frozen=True)
class Ready:
    """What a task's prompts are for every image, made beforehand.

    Attributes:
        schedule, steps: of the task.
        rows: block -> keys and values (P, 2, h, d) of the prompts that enter it alone.
        made_from: the first block's weights, and the versions of the prompter's tensors, that all
            of it was made from. A weak reference: the weights go when the backbone lets go of them.
    """

    schedule: PromptSchedule
    steps: tuple[Step, ...]
    rows: dict[int, Tensor]
    made_from: tuple[weakref.ref[Any], tuple[Any, ...]]

    def holds(self, weights: Any, versions: tuple[Any, ...]) -> bool:
        """Whether it was made from just these."""
        return self.made_from[0]() is weights and self.made_from[1] == versions


@dataclass
class Resident:
    """A task as it answers: its model on the shared backbone, and what was made beforehand.

    Attributes:
        model: holds the task's own parameters; its backbone is the bank's.
        ready: for prompts that are the same for all images, where weights may be kept; replaced
            as a whole when what it was made from has changed.
    """

    model: Any
    ready: Ready | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters, its head, and what is made from them."""
        own = sum(t.nbytes for t in self.model.adapter_state_dict().values())
        return own + sum(rows.nbytes for rows in self.ready.rows.values()) if self.ready else own


@dataclass
class Task:
    """One name of the bank. ``resident`` is None while the task is on disk alone."""

    name: str
    source: Path | None
    num_classes: int
    class_names: tuple[str, ...] | None
    method: str
    resident: Resident | None
    nbytes: int
    digest: str | None = None  # of its tensors, once it may leave memory
    spilled: bool = False  # its source, if any, is a folder of ours
    stays: bool = False  # in memory: no adapter holds all of it, such as a head of the user's code
    lock: threading.Lock = field(default_factory=threading.Lock)


class Residents:
    """The bank's tasks by name, safe to use from several threads.

    Adding, removing and finding a task take the same time whatever else is there.

    Args:
        backbone: what adapters that come back from disk are put in front of.
        make: model -> ``Resident``.
        max_bytes: beyond it the tasks used least recently leave memory; None: never.
    """

    def __init__(
        self, backbone: Any, make: Callable[[Any], Resident], max_bytes: int | None
    ) -> None:
        self.nbytes = 0
        self._backbone = backbone
        self._make = make
        self._tasks: dict[str, Task] = {}
        self._recent: OrderedDict[str, Task] = OrderedDict()  # in memory, least recently used first
        self._lock = threading.RLock()
        self._spilled: tempfile.TemporaryDirectory[str] | None = None
        self._folders = itertools.count()
        self.max_bytes = max_bytes

    @property
    def max_bytes(self) -> int | None:
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int | None) -> None:
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"max_bytes must be at least 1, or None for no limit, got {value}")
        with self._lock:
            self._max_bytes = value
            self._shrink()

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def tasks(self) -> list[Task]:
        """All tasks as they are now."""
        with self._lock:
            return list(self._tasks.values())

    def find(self, name: str) -> Task:
        """The task of a name; UnknownTask offers the nearest names."""
        task = self._tasks.get(name)
        return self._unknown(name) if task is None else task

    def _unknown(self, name: Any) -> NoReturn:
        """Compares names, which takes long where there are many: not while others wait."""
        names = [task.name for task in self.tasks()]
        near = difflib.get_close_matches(str(name)[:_COMPARED], names, n=3)
        hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
        raise UnknownTask(f"no task {shown(name)} among the bank's {len(names)}{hint}")

    def add(self, name: str, model: Any, source: Path | None) -> None:
        """Make a model known; nothing is added where the name is taken (ValueError)."""
        resident = self._make(model)
        names = getattr(model, "class_names", None)
        task = Task(
            name,
            source,
            model.num_classes,
            None if names is None else tuple(names),
            model.method,
            resident,
            resident.nbytes,
            spilled=source is None,
        )
        if self.max_bytes is not None:
            self._prepare(task)
        with self._lock:
            if name in self._tasks:
                raise ValueError(taken(name))
            self._tasks[name] = task
            if not task.stays:
                self._recent[name] = task
            self.nbytes += task.nbytes
            self._shrink(keep=name)

    def remove(self, name: str) -> None:
        """Forget a task; who has it in hand still answers."""
        task = self.find(name)
        with self._lock:
            if self._tasks.get(name) is not task:
                raise UnknownTask(f"no task {name!r} any more: it was removed meanwhile")
            del self._tasks[name]
            self._recent.pop(name, None)
            if task.resident is not None:
                self.nbytes -= task.nbytes

    def hold(self, names: Iterable[str] | None = None) -> list[Task]:
        """The tasks of these names as they are now, None: all, sorted. They answer for who holds
        them, whatever becomes of their names meanwhile."""
        with self._lock:
            names = sorted(self._tasks) if names is None else names
            found = [(name, self._tasks.get(name)) for name in names]
            tasks = [task for _, task in found if task is not None]
            for task in tasks:
                if self._recent.get(task.name) is task:
                    self._recent.move_to_end(task.name)
        if len(tasks) < len(found):
            self._unknown(next(name for name, task in found if task is None))
        return tasks

    def loaded(self, tasks: Iterable[Task]) -> list[Resident]:
        """What answers for these tasks; those on disk alone are loaded."""
        return [self._loaded(task) for task in tasks]

    def _loaded(self, task: Task) -> Resident:
        resident = task.resident
        if resident is not None:
            return resident
        with task.lock:
            if task.resident is not None:
                return task.resident
            assert task.source is not None
            try:
                model = load(task.source, self._backbone)
            except UserError as error:
                text = f"task {task.name!r} cannot come back from disk: {error}"
                raise UserError(text) from error
            if _digest(model, task.spilled) != task.digest:
                raise UserError(
                    f"task {task.name!r}: its adapter in {task.source} is another one than when it "
                    "was added; remove the task and add it again"
                )
            resident = self._make(model)
            with self._lock:
                if self._tasks.get(task.name) is task:
                    task.resident = resident
                    self._recent[task.name] = task
                    self.nbytes += task.nbytes
                    self._shrink(keep=task.name)
            return resident

    def _shrink(self, keep: str | None = None) -> None:
        """Let the tasks that were used least recently go while there are too many bytes."""
        while self.max_bytes is not None and self.nbytes > self.max_bytes and self._recent:
            name, task = next(iter(self._recent.items()))
            if name == keep:
                return  # the last of them
            self._prepare(task)
            del self._recent[name]
            if task.stays:
                continue
            task.resident = None
            self.nbytes -= task.nbytes

    def _prepare(self, task: Task) -> None:
        """Let a task be able to leave memory: know its tensors again, and have them on disk.

        Where there is a limit this is done when a task is added, and nobody waits for it.
        """
        assert task.resident is not None
        model = task.resident.model
        if task.digest is None:
            task.digest = _digest(model, task.spilled)
        if task.source is not None:
            return
        with self._lock:
            if self._spilled is None:
                self._spilled = tempfile.TemporaryDirectory(prefix="pgn_fast_tasks_")
        folder = Path(self._spilled.name, str(next(self._folders)))
        # once the task is removed and nobody has it in hand any more
        weakref.finalize(task, shutil.rmtree, folder, ignore_errors=True)
        try:
            save_pretrained(model, folder, class_names=task.class_names)
        except (TypeError, ValueError):
            task.stays = True
            return
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        task.stays = any(isinstance(v, str) and v.startswith(GIVEN) for v in config.values())
        task.source = folder


def load(source: Path, backbone: Any, *, strict: bool = False) -> Any:
    """The model of an adapter. It outlives the call that asks, which may run in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return load_on(backbone, source, strict_backbone=strict)


def taken(name: str) -> str:
    """Why a name cannot be added."""
    return f"task {name!r} is in the bank already; remove it first"


def versions_of(prompter: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes with every write to its parameters that autograd counts."""
    version = lambda p: -1 if p.is_inference() else p._version
    return tuple((id(p), version(p)) for p in prompter.parameters())


def _digest(model: Any, tensors_alone: bool) -> str:
    """Of a task's own tensors, and of how they are used.

    Args:
        tensors_alone: of an adapter that nobody else writes; the settings of a model that was given
            may come back from disk in other words, such as a list for a tuple.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.adapter_state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if not tensors_alone:
        settings = [model.method, sorted(model.adapter_config.items())]
        settings.append(getattr(model, "class_names", None))
        found.update(repr(settings).encode())
    return found.hexdigest()
