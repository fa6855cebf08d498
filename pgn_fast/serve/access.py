"""Who may call: the names by which the server may be addressed, and bearer tokens."""

from __future__ import annotations

import codecs
import hmac
import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from .._files import open_file
from ..errors import UserError
from .errors import ApiError

_logger = logging.getLogger(__name__)
_LOOPBACK = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
_LOOK_S = 1.0
_MAX_TOKEN_FILE = 64 * 1024
_SENDABLE = re.compile(rb"[\x20-\x7e]+")


class AllowedHosts:
    """The names that a call's ``Host`` may carry.

    A page that a browser has loaded from a stranger's name can be made to reach a server on the
    browser's own machine, by pointing that name at 127.0.0.1 (DNS rebinding). Its calls carry the
    stranger's name. An IP address in ``Host`` was never looked up, and is always taken.

    Args:
        names: exact names without a port; ``*.example.com`` for every name below one; ``*`` for
            all. None: all.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self._any = names is None or "*" in names
        self._names = {name.lower().rstrip(".") for name in names or ()}

    @classmethod
    def of_server(cls, host: str, names: Sequence[str] = ()) -> AllowedHosts:
        """The default of a server that listens on ``host``, and further names."""
        own = {host, *_LOOPBACK}
        if not is_loopback(host):
            own.add(socket.gethostname())
        return cls([*own, *names])

    def check(self, host: str, origin: str | None) -> None:
        """Raises ApiError for a ``Host`` that is not the server's, and for a stranger's page."""
        if self._any:
            return
        name = _name_of(host)
        if name is None:
            raise ApiError(400, "bad_host", f"Host is {host[:80]!r}, which is no name of a server.")
        if not self._takes(name):
            raise ApiError(
                421,
                "wrong_host",
                f"this server does not answer as {name[:80]!r}; whoever runs it can add the name "
                "with --allowed-host.",
            )
        if origin:
            name = _name_of(origin.partition("://")[2])
            if name is None or not self._takes(name):
                raise ApiError(
                    403, "wrong_origin", f"pages of {origin[:80]!r} may not call this server."
                )

    def _takes(self, name: str) -> bool:
        if name in self._names or _is_address(name):
            return True
        return any(
            allowed.startswith("*.") and name.endswith(allowed[1:]) for allowed in self._names
        )


class Tokens:
    """Bearer tokens out of a file, one a line; the file is read again when it has changed.

    Args:
        path: of the file. Lines that are empty or begin with ``#`` are left out.

    Raises:
        UserError: the file cannot be read or holds no token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._stamp: tuple[int, ...] | None = None
        self._tokens: list[bytes] = []
        self._looked = time.monotonic()
        self._read()

    def check(self, authorization: str | None) -> None:
        """Raises ApiError 401 unless the header holds one of the tokens."""
        self._look_again()
        scheme, _, given = (authorization or "").partition(" ")
        given_bytes = given.strip().encode("utf-8", "surrogateescape")
        # every token is compared, each in a time that does not tell how much of it was right
        right = [hmac.compare_digest(given_bytes, token) for token in self._tokens]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(
                401,
                "unauthorized",
                "send the header 'Authorization: Bearer TOKEN' with a token of this server.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _look_again(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            if _stamp(self._path.stat()) != self._stamp:
                self._read()
        except (OSError, UserError) as error:
            _logger.error("the tokens in use stay: %s", error)

    def _read(self) -> None:
        try:
            with open_file(self._path) as file:
                status = os.fstat(file.fileno())
                data = file.read(_MAX_TOKEN_FILE + 1)
        except UserError as error:
            raise UserError(f"token file {error}") from error
        except OSError as error:
            raise UserError(f"token file {self._path}: {error.strerror or error}.") from error
        self._stamp = _stamp(status)
        # some editors begin a file with a mark of its encoding
        lines = [line.strip() for line in data.removeprefix(codecs.BOM_UTF8).splitlines()]
        tokens = [line for line in lines if line and not line.startswith(b"#")]
        if any(not _SENDABLE.fullmatch(line) for line in tokens):
            raise UserError(
                f"token file {self._path} has a token of more than printable ASCII, which no "
                "header carries alike for all callers (or the file is UTF-16). Make another: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'."
            )
        if not tokens or len(data) > _MAX_TOKEN_FILE:
            raise UserError(
                f"token file {self._path} must hold one token a line and at most "
                f"{_MAX_TOKEN_FILE} bytes; it has {len(tokens)} tokens in {len(data)} bytes or "
                "more. Make one: python -c 'import secrets; print(secrets.token_urlsafe())'."
            )
        mode = status.st_mode & 0o777
        if os.name == "posix" and mode & 0o077:
            _logger.warning(
                "%s can be read by others (mode %o): chmod 600 %s", self._path, mode, self._path
            )
        self._tokens = tokens


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    # the time of the change too: a copy may keep the other one, and tokens are of one size
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _name_of(host: str) -> str | None:
    """The name or address of a ``Host`` header, without its port; None where it is neither."""
    host = host.strip().lower()
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        if not bracket or not _is_address(name):
            return None
    else:
        name, _, port = host.partition(":")
        port = f":{port}" if port else ""
    if port and not (port[0] == ":" and port[1:].isdecimal()):
        return None
    name = name.rstrip(".")
    return name if name and not set(name) & set("/\\@? \t#") else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in _LOOPBACK
