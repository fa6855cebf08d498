"""The image API under load: the packaged backbone behind ``pgn-fast serve``, on this machine.

    python bench/bench_server.py [--seconds 10] [--rounds 5] [--rows FILE.jsonl]

or ``pytest bench/bench_server.py``. Server and load are processes of their own that share the
machine's cores; the load generator writes prepared bytes, so that it costs a few per cent of what
the server does. Measured are

1. the model called directly, in batches of 32 normalized tensors: in one thread, in all, and in as
   many concurrent calls as there are cores. The best of them is what the server is held against
   (wanted: 0.8 of it). The same concurrent calls of the pass that the server runs, from uint8 to
   float32, stand beside them (``pass``);
2. the server at saturation, each connection sending its next call when it has its answer;
3. latency at 0.7 of that load, calls arriving at random (Poisson);
4. calls arriving ten times as fast as it can answer, again and again: statuses, the load it still
   carries, and its memory when each is over. The first round is not counted: it is the
   first time that the server holds as many calls at once as its limits let in.

Rounds of 1 and 2 alternate, so that both meet the same machine noise. What other processes
take of the cores meanwhile is stated: beyond a few per cent the figures are of another machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
import torch
from level import LEVEL
from PIL import Image
from rows import Row
from torch import Tensor

from pgn_fast import demo
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.backbone.load import load_backbone
from pgn_fast.backbone.readout import Readout, rows_read
from pgn_fast.backbone.schedule import NO_PROMPTS
from pgn_fast.serve import load_served_model
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
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body


@dataclass(frozen=True)
class Saturation:
    """One round of ``saturate``; shares are of all cores' time."""

    images_per_second: float
    cpu_per_image: float
    load_share: float
    others_share: float


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


def direct_rate(
    model: Callable[[Tensor], Tensor], batch: Tensor, callers: int, threads: int, seconds: float
) -> tuple[float, float]:
    """Images a second, and CPU seconds an image, of the model called by ``callers`` threads."""
    torch.set_num_threads(threads)
    counts = [0] * callers

    def call(caller: int) -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            while time.perf_counter() < end:
                model(batch)
                counts[caller] += len(batch)

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


def busy_seconds() -> float:
    """CPU seconds of the whole machine: all but idle and waiting for disks."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def stage_seconds(port: int) -> dict[str, float]:
    """Mean seconds of each stage, as the server counted them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    kept = dict(re.findall(r"^pgn_fast_stage_seconds_(\w+\{.*\}) (\S+)$", text, re.MULTILINE))
    stages = ("read", "decode", "predict", "model", "answer")
    return {
        s: float(kept[f'sum{{stage="{s}"}}']) / float(kept[f'count{{stage="{s}"}}']) for s in stages
    }


def saturate(port: int, pid: int, call: bytes, connections: int, seconds: float) -> Saturation:
    """The server's best, and where the cores' time goes meanwhile."""
    began, busy = time.perf_counter(), busy_seconds()
    server, load = cpu_seconds(pid), time.process_time()
    rate, calls = asyncio.run(closed_load(port, call, connections, seconds))
    server, load = cpu_seconds(pid) - server, time.process_time() - load
    cores_seconds = (time.perf_counter() - began) * usable_cores()
    return Saturation(
        images_per_second=rate * IMAGES,
        cpu_per_image=server / (calls * IMAGES),
        load_share=load / cores_seconds,
        others_share=max(0.0, busy_seconds() - busy - server - load) / cores_seconds,
    )


def overload(
    port: int, pid: int, call: bytes, rate: float, rounds: int, seconds: float
) -> dict[str, Any]:
    """Round after round of more calls than the server can answer; memory after each."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    lasted = 0.0
    before = resident_mb(pid)
    memory = []
    for number in range(rounds + 1):
        answered = asyncio.run(open_load(port, call, rate, seconds))
        # until the server has seen that it is idle, and given back what the load left behind
        time.sleep(2.5)
        memory.append(resident_mb(pid))
        if number > 0:
            statuses += answered[0]
            latencies += answered[1]
            lasted += answered[2]
    counted = memory[1:]
    slope = np.polyfit(range(rounds), counted, 1)[0] if rounds > 1 else 0.0
    return {
        "calls_per_second": round(rate, 1),
        "rounds": rounds,
        "seconds_a_round": seconds,
        "statuses": dict(statuses),
        "answered_images_per_second": round(len(latencies) * IMAGES / lasted, 1),
        "p99_ms_of_the_answered": round(float(np.percentile(latencies, 99)) * 1e3, 1),
        "resident_mb": {
            "before": round(before, 1),
            "after_the_first_round": round(memory[0], 1),
            "after_each_counted_round": [round(mb, 1) for mb in counted],
            "slope_mb_a_round": round(float(slope), 2),
        },
    }


def measure(seconds: float, rounds: int = 5, overloads: int = 10) -> dict[str, Any]:
    """All figures; about ``seconds * (rounds * 5 + 4) + overloads * 6`` seconds of wall time."""
    model, cores = demo.backbone(), usable_cores()
    call, single = prepared_call(IMAGES), prepared_call(1)
    # (callers, threads) of each way
    ways = {
        "one thread": (1, 1),
        f"torch with {cores} threads": (1, cores),
        f"{cores} callers": (cores, 1),
    }
    one_pass = load_served_model(model, name=demo.NAME).passes["features"]
    levels = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    images = torch.randn(IMAGES, 3, 32, 32)
    direct: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    passes, saturated = [], []
    with server() as (port, pid):
        connections = 2 * ServerSettings.model_workers + 2
        asyncio.run(closed_load(port, call, connections, 1.0))
        for _ in range(rounds):
            for way, (callers, threads) in ways.items():
                direct[way].append(direct_rate(model, images, callers, threads, seconds))
            saturated.append(saturate(port, pid, call, connections, seconds))
            passes.append(direct_rate(one_pass, levels, cores, 1, seconds)[0])
        stages = stage_seconds(port)
        single_rate, _ = asyncio.run(closed_load(port, single, 32, seconds))

        served = statistics.median(run.images_per_second for run in saturated)
        capacity = served / IMAGES
        statuses, latencies, _ = asyncio.run(open_load(port, call, 0.7 * capacity, 3 * seconds))
        storms = overload(port, pid, call, 10 * capacity, overloads, min(3.0, seconds))
    # (images a second, CPU seconds an image) of each way, and of the fastest
    medians = {
        way: tuple(map(statistics.median, zip(*r, strict=True))) for way, r in direct.items()
    }
    best, best_cpu = max(medians.values())
    best_by_round = [max(way[i][0] for way in direct.values()) for i in range(rounds)]
    served_cpu = statistics.median(run.cpu_per_image for run in saturated)
    return {
        "direct_images_per_second": {way: round(rate, 1) for way, (rate, _) in medians.items()},
        "direct_cpu_us_per_image": round(best_cpu * 1e6, 1),
        "pass_images_per_second": round(statistics.median(passes), 1),
        "server_images_per_second": round(served, 1),
        "server_over_best_direct": round(served / best, 3),
        "server_over_best_direct_by_round": [
            round(run.images_per_second / rate, 3)
            for run, rate in zip(saturated, best_by_round, strict=True)
        ],
        "server_over_pass": round(served / statistics.median(passes), 3),
        "server_cpu_us_per_image": round(served_cpu * 1e6, 1),
        "direct_cpu_over_server_cpu": round(best_cpu / served_cpu, 3),
        "share_of_the_cores_at_saturation": {
            "load_generator": round(statistics.median(run.load_share for run in saturated), 3),
            "others": [round(run.others_share, 3) for run in saturated],
        },
        "single_image_calls_per_second": round(single_rate, 1),
        "stage_ms_per_call_of_32_at_saturation": {s: round(t * 1e3, 2) for s, t in stages.items()},
        "at_0.7_of_saturation": {
            "calls_per_second": round(0.7 * capacity, 2),
            "statuses": dict(statuses),
            "p50_ms": round(float(np.percentile(latencies, 50)) * 1e3, 1),
            "p99_ms": round(float(np.percentile(latencies, 99)) * 1e3, 1),
        },
        "at_10_times_saturation": storms,
    }


def as_rows(told: dict[str, Any], rounds: int) -> list[Row]:
    """The figures that the pages show."""
    calls = f"{demo.NAME}, PNGs of 32 x 32 in calls of {IMAGES}"
    rates = {f"direct calls, {way}": r for way, r in told["direct_images_per_second"].items()}
    rates["server"] = told["server_images_per_second"]
    kept = [Row("server", calls, who, r, "images/s", rounds=rounds) for who, r in rates.items()]
    storms = told["at_10_times_saturation"]
    memory = storms["resident_mb"]["after_each_counted_round"]
    usual = told["at_0.7_of_saturation"]["p99_ms"] / 1e3
    kept.append(Row("server", "p99 at 0.7 of saturation", "server", usual))
    overloaded = storms["p99_ms_of_the_answered"] / 1e3
    kept.append(Row("server", "p99 of the answered at 10 times saturation", "server", overloaded))
    case = f"resident memory over {storms['rounds']} overloads, highest - lowest"
    kept.append(Row("server", case, "server", 1e6 * (max(memory) - min(memory)), "bytes"))
    return kept


# backbone, pixels of an image, images of a batch, and whether it is compiled, too (15 s each)
PASSES = (
    ("pgn_demo_vit", 32, 1, False),
    ("pgn_demo_vit", 32, 32, True),
    ("vit_tiny_patch16_224", 96, 4, False),
    ("vit_tiny_patch16_224", 128, 4, False),
    ("vit_tiny_patch16_224", 224, 4, False),
    ("vit_small_patch16_224", 224, 4, True),
    ("vit_base_patch32_224", 224, 4, False),
)


@pytest.mark.parametrize("arch, size, images, compiled", PASSES)
def bench_passes(measure, quick, arch, size, images, compiled) -> None:
    """What runs a frozen model fastest, in one thread, as the server's workers do: timm's own
    operations, the engine, or the code that inductor compiles for one size of batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kwargs = {} if arch == demo.NAME else {"pretrained": False, "img_size": size}
    model = load_backbone(arch, **kwargs)
    engine, readout = FastBackbone(model), Readout(rows=rows_read(model), prompts=False)

    def timms(x: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(x), pre_logits=True)

    def ours(x: Tensor) -> Tensor:
        return model.forward_head(engine.encode(x, NO_PROMPTS, readout), pre_logits=True)

    runs = {"timm": timms, "ours": ours}
    if compiled and LEVEL != "chosen":
        runs["compile"] = torch.compile(timms)
    x = torch.randn(images, 3, size, size)
    steps = {who: (lambda run=run: run(x)) for who, run in runs.items()}
    case = f"a pass of {images} images, {arch} of {size} pixels, one thread"
    with torch.inference_mode():
        measure(steps, suite="server", case=case, dtype=torch.float32)
    torch.set_num_threads(threads)


def bench_server(benchmark, quick, record) -> None:
    """A short round that holds the promises which do not depend on machine noise."""
    seconds, overloads = (0.5, 2) if quick else (1.0, 2) if LEVEL == "chosen" else (3.0, 6)
    settings = {"seconds": seconds, "rounds": 1, "overloads": overloads}
    told = benchmark.pedantic(measure, kwargs=settings, rounds=1, iterations=1)
    for row in as_rows(told, rounds=1):
        record(row)
    overload = told["at_10_times_saturation"]
    assert set(overload["statuses"]) == {200, 503}
    memory = overload["resident_mb"]
    assert memory["after_each_counted_round"][-1] - memory["after_the_first_round"] < 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round (10)")
    parser.add_argument("--rounds", type=int, default=5, help="of direct calls and server (5)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write the figures as JSON lines")
    args = parser.parse_args()
    told = measure(args.seconds, args.rounds)
    if args.rows:
        rows.write(args.rows, as_rows(told, args.rounds))
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
