"""The errors that the command line answers with one readable line instead of a traceback."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Bad arguments or data; says what was given and what would work. Exit code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on: a loss that is not finite, a full device, a signal.

    Attributes:
        exit_code: of the command line.
    """

    exit_code = 1


def shown(value: Any, longest: int = 80) -> str:
    """A value that somebody gave, for a message: short, control characters escaped, quoted."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = longest
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 4, 6, 6
    return brief(short.repr(value), 3 * longest)


def brief(text: Any, longest: int = 400) -> str:
    """Another library's message or a file's words in one line: short, control characters
    escaped."""
    # twice the length is more than enough to see what is left after whitespace is folded
    line = " ".join(str(text)[: 4 * longest].split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


@contextmanager
def as_user_error(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, raised by code that is handed a user's own values, become UserErrors.

    Args:
        kinds: the exceptions to translate beside ValueError.
    """
    translated: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except (UserError, TrainingStopped):
        raise
    except translated as error:
        raise UserError(brief(error, 2000) or type(error).__name__) from error
