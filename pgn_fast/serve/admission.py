"""What may be in progress at a time, and how it is divided among clients.

A client is an address (an IPv6 network of 64 bits, which one customer has to itself). What a client
promises costs it and others nothing: bytes count when they have arrived.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .errors import ApiError, overloaded
from .settings import ServerSettings

# seconds for which a client that has asked counts as one who wants a share
_RECENT_S = 10.0
# seconds after which a body that does not move gives way where bytes are short
_SILENT_S = 1.0
# seconds over which the rate of a body is taken
RATE_WINDOW_S = 5.0


def client_of(host: str | None) -> str:
    """The client of an address: itself, or the /64 network of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host or ""
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Share:
    """A capacity that clients divide.

    Alone, a client may have all of it; while others ask too, half. A client that has nothing finds
    an eighth more, which is kept for such, so that one client alone never shuts out another.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.total = 0
        self.used: Counter[str] = Counter()
        # the client that asked last, and the last other one: (name, when)
        self._last = self._before = ("", float("-inf"))

    def fits(self, client: str, amount: int) -> bool:
        """Whether ``amount`` more is there for this client; asking makes it known as present."""
        now = time.monotonic()
        if client != self._last[0]:
            self._before = self._last
        self._last = (client, now)
        used = self.used[client]
        if self.total + amount > self.limit_with_spare(client):
            return False
        return used == 0 or used + amount <= self.limit(client)

    def limit_with_spare(self, client: str) -> int:
        """The most that all clients may have where this one asks."""
        spare = 0 if self.used[client] else max(1, self.capacity // 8)
        return self.capacity + spare

    def limit(self, client: str) -> int:
        """The most that this client may have now."""
        name, when = self._before if self._last[0] == client else self._last
        others = name != client and time.monotonic() - when < _RECENT_S
        return max(1, self.capacity // 2) if others else self.capacity

    def take(self, client: str, amount: int) -> None:
        self.total += amount
        self.used[client] += amount

    def give_back(self, client: str, amount: int) -> None:
        self.total -= amount
        self.used[client] -= amount
        if self.used[client] <= 0:
            del self.used[client]


@dataclass(eq=False)
class Arriving:
    """A body on its way.

    Attributes:
        client: who sends it.
        stop: ends the reading.
        refusal: why the reading was ended.
        bytes: that have arrived.
        moved: when bytes came last.
        window_began, window_bytes: when the rate was last looked at, and ``bytes`` then.
    """

    client: str
    stop: Callable[[], object] = lambda: None
    refusal: ApiError | None = None
    bytes: int = 0
    moved: float = field(default_factory=time.monotonic)
    window_began: float = field(default_factory=time.monotonic)
    window_bytes: int = 0

    def refuse(self, error: ApiError) -> None:
        if self.refusal is None:
            self.refusal = error
            self.stop()


class Admission:
    """Calls and bytes in progress.

    Used by the event loop's thread alone.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._calls = Share(settings.max_calls)
        self._bytes = Share(settings.max_pending_bytes)
        self._arriving: set[Arriving] = set()

    @property
    def calls(self) -> int:
        """Calls whose bodies are here and that are not answered."""
        return self._calls.total

    @property
    def busy(self) -> bool:
        return bool(self._calls.total or self._arriving)

    def check(self, client: str, expected: int) -> None:
        """Refuse, before its body is read, a call that could not be let in now.

        Raises:
            ApiError: 503.
        """
        if not self._calls.fits(client, 1):
            raise self._no_call(client)
        # bodies that have arrived stay until they are answered; those on their way may give way
        on_their_way = sum(body.bytes for body in self._arriving)
        if self._bytes.total - on_their_way + expected > self._bytes.limit_with_spare(client):
            raise self._no_bytes()

    @contextmanager
    def arriving(self, client: str) -> Iterator[Arriving]:
        """Count a body's bytes as they arrive, and until the call is answered."""
        body = Arriving(client)
        self._arriving.add(body)
        try:
            yield body
        finally:
            self._arriving.discard(body)
            self._bytes.give_back(client, body.bytes)

    def arrived(self, body: Arriving, count: int) -> None:
        """Count bytes of a body; where there is no more space, silent bodies give way first.

        Raises:
            ApiError: 503, no space for these bytes.
        """
        body.moved = time.monotonic()
        if not self._bytes.fits(body.client, count):
            self._make_way(body, count)
            if not self._bytes.fits(body.client, count):
                raise self._no_bytes()
        self._bytes.take(body.client, count)
        body.bytes += count

    @contextmanager
    def working(self, body: Arriving) -> Iterator[None]:
        """A call from the end of its body to its answer.

        Raises:
            ApiError: 503, too many calls are in progress.
        """
        self._arriving.discard(body)
        if not self._calls.fits(body.client, 1):
            raise self._no_call(body.client)
        self._calls.take(body.client, 1)
        try:
            yield
        finally:
            self._calls.give_back(body.client, 1)

    def end_slow_bodies(self) -> None:
        """Refuse every body that is slower than the minimum rate; to be called every second."""
        now, rate = time.monotonic(), self._settings.min_body_rate
        for body in list(self._arriving):
            if now - body.window_began < RATE_WINDOW_S:
                continue
            if body.bytes - body.window_bytes < rate * RATE_WINDOW_S:
                body.refuse(
                    ApiError(
                        408,
                        "body_too_slow",
                        f"the body arrives at less than {rate} bytes a second.",
                    )
                )
            body.window_began, body.window_bytes = now, body.bytes

    def _make_way(self, body: Arriving, count: int) -> None:
        """Refuse bodies on their way: silent ones, and those of clients above their share."""
        now = time.monotonic()

        def gives_way(other: Arriving) -> bool:
            above = self._bytes.used[other.client] > self._bytes.limit(other.client)
            silent = now - other.moved >= _SILENT_S
            return other is not body and other.bytes > 0 and (silent or above)

        others = sorted(
            filter(gives_way, self._arriving),
            key=lambda other: (-self._bytes.used[other.client], other.moved),
        )
        for other in others:
            if self._bytes.fits(body.client, count):
                return
            other.refuse(overloaded("other bodies needed the space of this one; try again."))
            self._bytes.give_back(other.client, other.bytes)
            other.bytes = 0
            self._arriving.discard(other)

    def _no_call(self, client: str) -> ApiError:
        return overloaded(
            f"{self._calls.total} calls are in progress, {self._calls.used[client]} of them yours; "
            f"this server lets {self._calls.capacity} in; try again."
        )

    def _no_bytes(self) -> ApiError:
        return overloaded(
            f"bodies of {self._bytes.total} bytes are in progress and {self._bytes.capacity} is "
            "the most here; try again."
        )
