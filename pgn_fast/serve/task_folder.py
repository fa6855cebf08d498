"""A folder of tasks, one sub-folder each: loaded at the start, and watched."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path

from ..adapters import CONFIG_FILE, WEIGHTS_FILE
from ..adapters.places import adapters_of, find_adapter
from ..errors import UserError, brief
from .task import Task
from .tasks import ServedTasks

_logger = logging.getLogger(__name__)
# times of modification and change, size and inode of an adapter's files
Stamp = tuple[tuple[int, int, int, int], ...]


class TaskFolder:
    """Keeps the tasks of a server those of a folder.

    A new or changed adapter is loaded once its files have stayed the same between two looks, so
    that one which is being copied is left alone; a damaged one is named in the log, and where it
    replaces another, that one stays.

    Args:
        tasks: of the server.
        folder: one sub-folder a task, named by it: an adapter or a training run.
        seconds: between two looks; 0: the folder is not watched.
    """

    def __init__(self, tasks: ServedTasks, folder: Path, seconds: float) -> None:
        self._tasks = tasks
        self._folder = folder
        self._seconds = seconds
        # what was tried, and of that what is served
        self._tried: dict[str, Stamp] = {}
        self._served: dict[str, Task] = {}
        self._pending: dict[str, Stamp] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def load(self) -> list[str]:
        """Load what is there; the reasons of what could not be."""
        return [
            reason for name, stamp in self._stamps().items() if (reason := self._try(name, stamp))
        ]

    def start(self) -> None:
        if self._seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="pgn-fast-tasks", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Compare the folder with what is served, once."""
        stamps = self._stamps()
        for name in self._served.keys() - stamps.keys():
            with suppress(KeyError):  # somebody removed it, or put another one in its place
                self._tasks.remove(name, only=self._served.pop(name))
        changed = {name: s for name, s in stamps.items() if self._tried.get(name) != s}
        for name, stamp in changed.items():
            if self._pending.get(name) != stamp or self._stopped.is_set():
                continue
            if reason := self._try(name, stamp):
                _logger.error("task %r was not loaded: %s", name, reason)
        self._pending = changed
        self._tried = {name: stamp for name, stamp in self._tried.items() if name in stamps}

    def _watch(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self.look()
            except Exception:
                _logger.exception("looking at %s failed", self._folder)

    def _try(self, name: str, stamp: Stamp) -> str | None:
        self._tried[name] = stamp
        adapter = find_adapter(self._folder / name)
        try:
            if adapter is None:
                raise UserError(f"{self._folder / name} holds no adapter any more.")
            self._served[name] = self._tasks.add(name, adapter)
        except (UserError, OSError) as error:
            return str(error)
        # whatever one adapter brings about, the others are served
        except Exception as error:
            _logger.debug("task %r", name, exc_info=True)
            return f"{adapter} fails with {type(error).__name__}: {brief(error)}"
        return None

    def _stamps(self) -> dict[str, Stamp]:
        found = {name: _stamp(adapter) for name, adapter in adapters_of(self._folder).items()}
        return {name: stamp for name, stamp in found.items() if stamp}


def _stamp(adapter: Path) -> Stamp:
    stamps = []
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        try:
            status = (adapter / file).stat()
        except OSError:
            continue
        stamps.append((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(stamps)
