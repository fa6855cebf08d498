"""A folder of tasks, one sub-folder each: loaded at the start, and watched."""

from __future__ import annotations

import logging
import os
import threading
import time
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
# seconds of one look in which further tasks are loaded
_LOADING_S = 2.0


class TaskFolder:
    """Keeps the tasks of a server those of a folder.

    A new or changed adapter is loaded once its files have stayed the same between two looks, so
    that one which is being copied is left alone; a damaged one is named in the log, and where it
    replaces another, that one stays. So does the task of a folder that cannot be looked into.

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
        # what could not be looked into, and why
        self._denied: dict[str, str] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def load(self) -> list[str]:
        """Load what is there; the reasons of what could not be."""
        stamps, denied = self._found()
        self._denied = denied
        failures = [reason for name, stamp in stamps.items() if (reason := self._try(name, stamp))]
        return [*failures, *denied.values()]

    def start(self) -> None:
        if self._seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="pgn-fast-tasks", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Compare the folder with what is served, once.

        Where many tasks have come, some are left to the next look, so that what has changed or
        gone meanwhile does not wait for all of them.
        """
        stamps, denied = self._found()
        for name in self._served.keys() - stamps.keys() - denied.keys():
            with suppress(KeyError):  # somebody removed it, or put another one in its place
                self._tasks.remove(name, only=self._served.pop(name))
        for name in denied.keys() - self._denied.keys():
            self._tell("task %r is left as it is: %s", name, denied[name])
        self._denied = denied
        changed = {name: s for name, s in stamps.items() if self._tried.get(name) != s}
        until = time.monotonic() + _LOADING_S
        for name, stamp in changed.items():
            if self._pending.get(name) != stamp:
                continue
            if self._stopped.is_set():
                break
            if reason := self._try(name, stamp):
                self._tell("task %r was not loaded: %s", name, reason)
            if time.monotonic() > until:
                break
        self._pending = changed
        self._tried = {
            name: stamp for name, stamp in self._tried.items() if name in stamps or name in denied
        }

    def _tell(self, text: str, name: str, reason: str) -> None:
        # each task is another matter, which no line of an earlier one stands for
        _logger.error(text, name, reason, extra={"about": name})

    def _watch(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self.look()
            except OSError as error:
                _logger.error("%s cannot be watched, its tasks stay: %s", self._folder, error)
            except Exception:
                _logger.exception("looking at %s failed", self._folder)

    def _try(self, name: str, stamp: Stamp) -> str | None:
        self._tried[name] = stamp
        adapter = self._folder / name
        try:
            adapter = find_adapter(adapter) or adapter
            self._served[name] = self._tasks.add(name, adapter)
        except (UserError, OSError) as error:
            return str(error)
        # whatever one adapter brings about, the others are served
        except Exception as error:
            _logger.debug("task %r", name, exc_info=True)
            return f"{adapter} fails with {type(error).__name__}: {brief(error)}"
        return None

    def _found(self) -> tuple[dict[str, Stamp], dict[str, str]]:
        """The tasks that are there, and why nobody can tell of others whether they are.

        Raises:
            OSError: the folder itself cannot be looked into.
        """
        found = {name: _stamp(adapter) for name, adapter in adapters_of(self._folder).items()}
        stamps = {name: stamp for name, stamp in found.items() if stamp}
        others = {path.name for path in self._folder.iterdir() if not path.name.startswith(".")}
        reasons = {name: _why_closed(self._folder / name) for name in others - stamps.keys()}
        return stamps, {name: reason for name, reason in reasons.items() if reason}


def _stamp(adapter: Path) -> Stamp:
    stamps = []
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        try:
            status = (adapter / file).stat()
        except OSError:
            continue
        stamps.append((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(stamps)


def _why_closed(folder: Path) -> str | None:
    """Why a folder, or a run's best adapter in it, cannot be looked into; None: it can, or is not
    there."""
    for place in (folder, folder / "best"):
        try:
            os.listdir(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{place} cannot be read: {error.strerror or error}."
    return None
