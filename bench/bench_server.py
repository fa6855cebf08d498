"""The image API under load: the packaged backbone behind ``pgn-fast serve``, on this machine.

    python bench/bench_server.py [--seconds 10] [--json bench/results/server_NAME.json]

or ``pytest bench/bench_server.py``. Server and load are processes of their own that share the
machine's cores; the load generator writes prepared bytes, so that it costs a few per cent of what
the server does. Measured are

1. the model called directly, in batches of 32 normalised tensors: in one thread, in all, and in as
   many concurrent calls as the server has workers. The best of them is what the server is held
   against (wanted: 0.8 of it);
2. the server at saturation, each connection sending its next call when it has its answer;
3. latency at 0.7 of that load, calls arriving at random (Poisson);
4. calls arriving ten times as fast as it can answer: statuses, memory, and the load it still
   carries.

Rounds of 1 and 2 alternate, so that a change of the machine's mood meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pgn_fast import demo
from pgn_fast.serve.settings import ServerSettings, usable_cores

IMAGES = 32  # a call, and a batch


def prepared_call(images: int) -> bytes:
    """The bytes of one HTTP call: noise PNGs of the model's size, which compress the worst."""
    rng = np.random.default_rng(0)
    encoded = []
    for levels in rng.integers(0, 256, (images, 32, 32, 3), np.uint8):
        file = io.BytesIO()
        Image.fromarray(levels).save(file, "PNG", compress_level=1)
        encoded.append(base64.b64encode(file.getvalue()).decode())
    body = json.dumps({"images": encoded, "encoding": "base64"}).encode()
    return (
        b"POST /v1/predict HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body


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
def server(*flags: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of ``pgn-fast serve --model pgn_demo_vit``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", demo.NAME, "--device", "cpu", "--port", str(port), *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "pgn_fast.cli", *words], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
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


def direct_rate(
    model: torch.nn.Module, callers: int, threads: int, seconds: float
) -> tuple[float, float]:
    """Images a second, and CPU seconds an image, of the model called by ``callers`` threads."""
    torch.set_num_threads(threads)
    batch = torch.randn(IMAGES, 3, 32, 32)
    counts = [0] * callers

    def call(caller: int) -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            while time.perf_counter() < end:
                model(batch)
                counts[caller] += IMAGES

    began, cpu = time.perf_counter(), time.process_time()
    end = began + seconds
    workers = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    images = sum(counts)
    return images / (time.perf_counter() - began), (time.process_time() - cpu) / images


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stage_seconds(port: int) -> dict[str, float]:
    """Mean seconds of each stage, as the server counted them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    kept = dict(re.findall(r"^pgn_fast_stage_seconds_(\w+\{.*\}) (\S+)$", text, re.MULTILINE))
    stages = ("read", "decode", "predict", "model", "answer")
    return {
        s: float(kept[f'sum{{stage="{s}"}}']) / float(kept[f'count{{stage="{s}"}}']) for s in stages
    }


def measure(seconds: float, rounds: int = 3) -> dict[str, object]:
    """All figures; about ``seconds * (rounds * 4 + 3)`` of wall time."""
    model, cores = demo.backbone(), usable_cores()
    call, single = prepared_call(IMAGES), prepared_call(1)
    workers = ServerSettings.model_workers
    ways = {
        "one thread": (1, 1),
        f"torch with {cores} threads": (1, cores),
        f"{workers} callers": (workers, max(1, cores // workers)),
    }
    direct: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    saturated = []
    with server() as (port, pid):
        connections = 2 * workers + 2
        asyncio.run(closed_load(port, call, connections, 1.0))
        for _ in range(rounds):
            for way, (callers, threads) in ways.items():
                direct[way].append(direct_rate(model, callers, threads, seconds))
            cpu = cpu_seconds(pid)
            rate, calls = asyncio.run(closed_load(port, call, connections, seconds))
            saturated.append((rate * IMAGES, (cpu_seconds(pid) - cpu) / (calls * IMAGES)))
        stages = stage_seconds(port)
        single_rate, _ = asyncio.run(closed_load(port, single, 32, seconds))

        capacity = statistics.median(rate for rate, _ in saturated) / IMAGES
        statuses, latencies, _ = asyncio.run(open_load(port, call, 0.7 * capacity, 3 * seconds))
        before = resident_mb(pid)
        storm, survivors, lasted = asyncio.run(open_load(port, call, 10 * capacity, seconds))
        after = resident_mb(pid)
        storm2, _, _ = asyncio.run(open_load(port, call, 10 * capacity, seconds))
        again = resident_mb(pid)
    served = capacity * IMAGES
    # (images a second, CPU seconds an image) of each way, and of the fastest
    medians = {
        way: tuple(map(statistics.median, zip(*r, strict=True))) for way, r in direct.items()
    }
    best, best_cpu = max(medians.values())
    served_cpu = statistics.median(cpu for _, cpu in saturated)
    return {
        "benchmark": "server",
        "model": demo.NAME,
        "machine": {
            "cores": cores,
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seconds_a_round": seconds,
            "rounds": rounds,
        },
        "direct_images_per_second": {way: round(rate, 1) for way, (rate, _) in medians.items()},
        "direct_cpu_us_per_image": round(best_cpu * 1e6, 1),
        "server_images_per_second": round(served, 1),
        "server_over_best_direct": round(served / best, 3),
        "server_cpu_us_per_image": round(served_cpu * 1e6, 1),
        "direct_cpu_over_server_cpu": round(best_cpu / served_cpu, 3),
        "single_image_calls_per_second": round(single_rate, 1),
        "stage_ms_per_call_of_32_at_saturation": {s: round(t * 1e3, 2) for s, t in stages.items()},
        "at_0.7_of_saturation": {
            "calls_per_second": round(0.7 * capacity, 2),
            "statuses": dict(statuses),
            "p50_ms": round(float(np.percentile(latencies, 50)) * 1e3, 1),
            "p99_ms": round(float(np.percentile(latencies, 99)) * 1e3, 1),
        },
        "at_10_times_saturation": {
            "calls_per_second": round(10 * capacity, 1),
            "statuses": dict(storm + storm2),
            "answered_images_per_second": round(len(survivors) * IMAGES / lasted, 1),
            "p99_ms_of_the_answered": round(float(np.percentile(survivors, 99)) * 1e3, 1),
            "resident_mb": {"before": before, "after": after, "after_once_more": again},
        },
    }


def bench_server(benchmark, quick) -> None:
    """A short round that holds the promises which do not depend on the machine's mood."""
    settings = {"seconds": 0.5 if quick else 3.0, "rounds": 1}
    result = benchmark.pedantic(measure, kwargs=settings, rounds=1, iterations=1)
    benchmark.extra_info.update(result)
    overload = result["at_10_times_saturation"]
    assert set(overload["statuses"]) == {200, 503}
    assert overload["resident_mb"]["after_once_more"] - overload["resident_mb"]["after"] < 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round (10)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    text = json.dumps(measure(args.seconds), indent=2) + "\n"
    if args.json:
        args.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
