"""Which tasks of a bank are in memory, and which wait on disk until they are asked for."""

from __future__ import annotations

import difflib
import hashlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapters import from_pretrained, save_pretrained
from ..errors import UserError
from .mixed import KeysValues


class UnknownTask(UserError, KeyError):
    """No task of that name in the bank; the message offers the nearest."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show its message in quotes


@dataclass
class Resident:
    """A task as it answers: its model on the shared backbone, and what was made beforehand.

    Attributes:
        model: holds the task's own parameters; its backbone is the bank's.
        ready: keys and values of deep prompts, by block.
        made_from: the blocks' weights that ``ready`` was made from.
    """

    model: Any
    ready: dict[int, KeysValues] = field(default_factory=dict)
    made_from: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters, its head, and what is made from them."""
        own = sum(t.nbytes for t in self.model.adapter_state_dict().values())
        return own + sum(k.nbytes + v.nbytes for k, v in self.ready.values())


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
    digest: str
    lock: threading.Lock = field(default_factory=threading.Lock)


class Residents:
    """The bank's tasks by name, safe to use from several threads.

    Args:
        backbone: what adapters that come back from disk are put in front of.
        make: model -> ``Resident``.
        max_bytes: beyond it the tasks used least recently leave memory; None: never.
    """

    def __init__(
        self, backbone: Any, make: Callable[[Any], Resident], max_bytes: int | None
    ) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._backbone = backbone
        self._make = make
        self._tasks: OrderedDict[str, Task] = OrderedDict()  # least recently used first
        self._lock = threading.RLock()
        self._spilled: tempfile.TemporaryDirectory[str] | None = None

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
        if task is None:
            with self._lock:
                near = difflib.get_close_matches(str(name), list(self._tasks), n=3)
            hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
            raise UnknownTask(f"no task {name!r} among the bank's {len(self)}{hint}")
        return task

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
            _digest(model),
        )
        with self._lock:
            if name in self._tasks:
                raise ValueError(f"task {name!r} is in the bank already; remove it first")
            self._tasks[name] = task
            self.nbytes += task.nbytes
            self._shrink(keep=name)

    def remove(self, name: str) -> None:
        """Forget a task; who has it in hand still answers."""
        with self._lock:
            task = self.find(name)
            del self._tasks[name]
            if task.resident is not None:
                self.nbytes -= task.nbytes

    def get(self, names: Iterable[str]) -> dict[str, Resident]:
        """The tasks of these names as they are now; those on disk alone are loaded."""
        with self._lock:
            tasks = [self.find(name) for name in names]
            for task in tasks:
                self._tasks.move_to_end(task.name)
        return {task.name: self._loaded(task) for task in tasks}

    def _loaded(self, task: Task) -> Resident:
        resident = task.resident
        if resident is not None:
            return resident
        with task.lock:
            if task.resident is not None:
                return task.resident
            assert task.source is not None
            model = from_pretrained(task.source, self._backbone)
            if _digest(model) != task.digest:
                raise UserError(
                    f"task {task.name!r}: its adapter in {task.source} is another one than when it "
                    "was added; remove the task and add it again"
                )
            resident = self._make(model)
            with self._lock:
                task.resident = resident
                if self._tasks.get(task.name) is task:
                    self.nbytes += task.nbytes
                    self._shrink(keep=task.name)
            return resident

    def _shrink(self, keep: str) -> None:
        """Let the tasks that were used least recently go while there are too many bytes."""
        if self.max_bytes is None:
            return
        for task in list(self._tasks.values()):
            if self.nbytes <= self.max_bytes:
                return
            if task.resident is None or task.name == keep:
                continue
            if task.source is None:
                task.source = self._spill(task)
            task.resident = None
            self.nbytes -= task.nbytes

    def _spill(self, task: Task) -> Path:
        """Save a task that was added as a model."""
        if self._spilled is None:
            self._spilled = tempfile.TemporaryDirectory(prefix="pgn_fast_tasks_")
        assert task.resident is not None
        folder = Path(self._spilled.name, str(id(task)))
        save_pretrained(task.resident.model, folder, class_names=task.class_names)
        return folder


def _digest(model: Any) -> str:
    """Of a task's own tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.adapter_state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
