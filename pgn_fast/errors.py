"""The errors that the command line answers with one readable line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad arguments or data; says what was given and what would work. Exit code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on: a loss that is not finite, a full device. Exit code 1."""


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
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error
