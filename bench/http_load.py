"""Calls to an image server, closed and open loop, by prepared bytes (see bench_server.py)."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pgn_fast import demo


@dataclass(frozen=True)
class Traffic:
    """What is served, without pretrained weights, and what is sent to it.

    Attributes:
        model: its name.
        pixels: sides of an image.
        kind: "PNG" of noise, which compresses the worst, or "JPEG" of something smoother.
        images: of a call.
    """

    model: str
    pixels: int
    kind: str
    images: int

    @property
    def case(self) -> str:
        size = f"{self.pixels} x {self.pixels}"
        return f"{self.model}, {self.kind}s of {size} in calls of {self.images}"

    def call(self, images: int | None = None) -> bytes:
        """The bytes of one HTTP call."""
        rng = np.random.default_rng(0)
        encoded = []
        for _ in range(images or self.images):
            file = io.BytesIO()
            self._picture(rng).save(file, self.kind, compress_level=1, quality=90)
            encoded.append(base64.b64encode(file.getvalue()).decode())
        body = json.dumps({"images": encoded, "encoding": "base64"}).encode()
        return (
            b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        ) + body

    def _picture(self, rng: np.random.Generator) -> Image.Image:
        # a JPEG of noise would be several times a photo's size
        sides = self.pixels if self.kind == "PNG" else self.pixels // 4
        noise = Image.fromarray(rng.integers(0, 256, (sides, sides, 3), np.uint8))
        return noise.resize((self.pixels, self.pixels))


# an image of the first costs a millisecond, so that all around the model shows; the second is of
# the size that people serve
TINY = Traffic(demo.NAME, 32, "PNG", 32)
PHOTOS = Traffic("vit_tiny_patch16_224", 224, "JPEG", 8)


class Connection:
    """A kept-alive connection that sends prepared calls."""

    async def open(self, port: int) -> Connection:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def send(self, call: bytes) -> int:
        self.writer.write(call)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        await self.reader.readexactly(length)
        return int(head.split()[1])

    def close(self) -> None:
        self.writer.close()


async def closed_load(
    port: int, call: bytes, connections: int, seconds: float
) -> tuple[float, int]:
    """Calls a second, and calls, when every connection sends as soon as it may; all succeed."""
    answered = 0

    async def work() -> None:
        nonlocal answered
        connection = await Connection().open(port)
        while time.perf_counter() < end:
            status = await connection.send(call)
            assert status == 200, f"the server answered {status} below saturation"
            answered += 1
        connection.close()

    began = time.perf_counter()
    end = began + seconds
    await asyncio.gather(*(work() for _ in range(connections)))
    return answered / (time.perf_counter() - began), answered


async def open_load(
    port: int, call: bytes, rate: float, seconds: float
) -> tuple[Counter[int], list[float], float]:
    """Statuses, seconds of the answered calls, and all seconds, of calls that arrive at random.

    A call's time begins when it should have been sent, so that a slow server, or a slow load
    generator, is not forgiven for the calls that it delayed.
    """
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    idle: list[Connection] = []
    rng = random.Random(0)

    async def arrive(due: float) -> None:
        connection = idle.pop() if idle else await Connection().open(port)
        try:
            status = await connection.send(call)
        except (asyncio.IncompleteReadError, ConnectionError):
            # the server closes connections that were idle for seconds; the call is sent again
            connection = await Connection().open(port)
            status = await connection.send(call)
        idle.append(connection)
        statuses[status] += 1
        if status == 200:
            latencies.append(time.perf_counter() - due)

    began = due = time.perf_counter()
    calls = []
    while due - began < seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        calls.append(asyncio.create_task(arrive(due)))
        due += rng.expovariate(rate)
    await asyncio.gather(*calls)
    elapsed = time.perf_counter() - began
    for connection in idle:
        connection.close()
    return statuses, latencies, elapsed


@contextmanager
def server(model: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of ``pgn-fast serve --model`` without pretrained weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", model, "--device", "cpu", "--port", str(port)]
    if model != demo.NAME:
        words += ["--model-kwargs", "pretrained=False"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pgn_fast.cli", *words], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").close()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(30)
