"""The server's log: text or one JSON object a line, and never a flood of the same line."""

from __future__ import annotations

import json
import logging
import time
from datetime import datetime, timezone
from typing import Any

FORMATS = ("text", "json")
# seconds in which a warning or an error of one place in the code is written once
_ONCE_IN_S = 60.0


class OncePerMinute(logging.Filter):
    """Lets one warning or error of each place in the code through a minute, with a count.

    A record's ``about``, where it has one, names what it is about: each counts by itself.
    """

    def __init__(self, clock: Any = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        # (logger, file, line, about) -> (when a record was let through, records held back since)
        self._seen: dict[tuple[str, str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        place = (record.name, record.pathname, record.lineno, getattr(record, "about", ""))
        now = self._clock()
        when, held = self._seen.get(place, (float("-inf"), 0))
        if now - when < _ONCE_IN_S:
            self._seen[place] = (when, held + 1)
            return False
        self._seen[place] = (now, 0)
        if held:
            record.msg = f"{record.getMessage()} ({held} more like this since the last line)"
            record.args = ()
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and what a record carries."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """Time, level, message, and what a record carries as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        facts = getattr(record, "facts", None)
        if not facts:
            return text
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in facts.items())
        return f"{text} {words}"


def log_config(style: str, access_log: bool) -> dict[str, Any]:
    """The configuration for ``logging.config.dictConfig``; everything goes to stderr."""
    formatter = {"text": TextLines, "json": JsonLines}[style]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"once": {"()": OncePerMinute}},
        "formatters": {"lines": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "formatter": "lines",
                "filters": ["once"],
            }
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "uvicorn": {"level": "WARNING"},
            # what a call's body has wrong is in its answer
            "python_multipart": {"level": "ERROR"},
            "pgn_fast": {"level": "INFO"},
            "pgn_fast.access": {"level": "INFO" if access_log else "WARNING"},
        },
    }
