"""From what is served to a listening process."""

from __future__ import annotations

import ctypes
import gc
import logging
import logging.config
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UserError
from .access import AllowedHosts, Tokens
from .admin import create_admin
from .answerer import Answerer
from .app import create_app
from .lifetime import Server
from .logs import log_config
from .settings import ServerSettings, usable_cores
from .tasks import ServedTasks

_logger = logging.getLogger(__name__)


def run_server(
    served: Answerer,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    access_log: bool = False,
    log_format: str = "text",
    allowed_hosts: Sequence[str] = (),
    token_file: str | None = None,
    admin_port: int | None = None,
) -> bool:
    """Serve until SIGINT or SIGTERM; calls that were let in are answered before it returns.

    The process belongs to the server: the threads that torch uses are divided among the model
    workers, Pillow's warnings about odd images, which would gather in memory, are off, and memory
    that a load has left behind is given back to the system when the load is over.

    Args:
        host, port: where it listens; port 0: a free one.
        access_log: a line for each call.
        log_format: "text" or "json" lines, on stderr.
        allowed_hosts: names that a call's ``Host`` may carry beside the server's own.
        token_file: of bearer tokens, one a line; None: anyone may call.
        admin_port: where tasks are added and removed, on 127.0.0.1 alone; None: nowhere.

    Returns:
        Whether calls that were let in were cut off, by a third signal.

    Raises:
        UserError: the token file holds no token, or the address cannot be listened on.
    """
    torch.set_num_threads(max(1, usable_cores() // settings.model_workers))
    warnings.filterwarnings("ignore", module="PIL")
    logging.config.dictConfig(log_config(log_format, access_log))
    warnings.showwarning = _log_warning
    tokens = None if token_file is None else Tokens(token_file)
    app = create_app(
        served,
        settings,
        on_idle=_give_memory_back,
        hosts=AllowedHosts.of_server(host, allowed_hosts),
        tokens=tokens,
    )
    admin = None
    if admin_port is not None:
        if not isinstance(served, ServedTasks):
            raise UserError("admin_port adds and removes tasks; a single model has none.")
        admin = create_admin(served, tokens), admin_port
    return Server(app, settings, admin).listen(host, port)


def _log_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """A line of the log, and not of another form beside it."""
    _logger.warning("%s", message, extra={"about": str(message)})


def _give_memory_back() -> None:
    """Return what a load has left: calls kept by reference cycles, and the C library's free memory.

    Python would look for the cycles after thousands of calls more, and glibc keeps most of what
    its threads once needed.
    """
    gc.collect()
    if sys.platform == "linux":
        # another C library may not have it
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
