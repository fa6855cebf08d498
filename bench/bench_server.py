"""The image API under load: the packaged backbone behind ``pgn-fast serve``, on this machine.

    python bench/bench_server.py [--photos] [--seconds 10] [--rounds 5] [--rows FILE.jsonl]

or ``pytest bench/bench_server.py``; ``--photos`` is the same load of a ViT-Ti/16 and JPEGs of 224
pixels. Server and load are processes of their own that share the
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
import json
import os
import re
import statistics
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
import torch
from http_load import PHOTOS, TINY, Traffic, closed_load, open_load, server
from level import LEVEL
from rows import Row
from torch import Tensor, nn

from pgn_fast import demo
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.backbone.load import load_backbone
from pgn_fast.backbone.readout import Readout, rows_read
from pgn_fast.backbone.schedule import NO_PROMPTS
from pgn_fast.serve import load_served_model
from pgn_fast.serve.settings import ServerSettings, usable_cores

Figures = dict[str, Any]
BATCH = 32  # of direct calls


@dataclass(frozen=True)
class Saturation:
    """One round of ``saturate``; shares are of all cores' time."""

    images_per_second: float
    cpu_per_image: float
    load_share: float
    others_share: float


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


def saturate(
    port: int, pid: int, call: bytes, images: int, connections: int, seconds: float
) -> Saturation:
    """The server's best, and where the cores' time goes meanwhile."""
    began, busy = time.perf_counter(), busy_seconds()
    server, load = cpu_seconds(pid), time.process_time()
    rate, calls = asyncio.run(closed_load(port, call, connections, seconds))
    server, load = cpu_seconds(pid) - server, time.process_time() - load
    cores_seconds = (time.perf_counter() - began) * usable_cores()
    return Saturation(
        images_per_second=rate * images,
        cpu_per_image=server / (calls * images),
        load_share=load / cores_seconds,
        others_share=max(0.0, busy_seconds() - busy - server - load) / cores_seconds,
    )


def overload(
    port: int, pid: int, call: bytes, images: int, rate: float, rounds: int, seconds: float
) -> Figures:
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
        "answered_images_per_second": round(len(latencies) * images / lasted, 1),
        "p99_ms_of_the_answered": round(float(np.percentile(latencies, 99)) * 1e3, 1),
        "resident_mb": {
            "before": round(before, 1),
            "after_the_first_round": round(memory[0], 1),
            "after_each_counted_round": [round(mb, 1) for mb in counted],
            "slope_mb_a_round": round(float(slope), 2),
        },
    }


def at_saturation(traffic: Traffic, port: int, pid: int, seconds: float, rounds: int) -> Figures:
    """The server beside direct calls, in turn; where the cores' time goes."""
    model, cores = load_backbone(traffic.model, **model_args(traffic)), usable_cores()
    # (callers, threads) of each way
    ways = {
        "one thread": (1, 1),
        f"torch with {cores} threads": (1, cores),
        f"{cores} callers": (cores, 1),
    }
    one_pass = load_served_model(model, name=traffic.model).passes["features"]
    shape = (BATCH, 3, traffic.pixels, traffic.pixels)
    levels, images = torch.randint(0, 256, shape, dtype=torch.uint8), torch.randn(shape)
    direct: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    passes, saturated = [], []
    # so many calls that a batch more than there are workers is always on its way
    workers = ServerSettings.model_workers
    connections = max(2 * workers + 2, (workers + 1) * BATCH // traffic.images)
    call = traffic.call()
    asyncio.run(closed_load(port, call, connections, 1.0))
    for _ in range(rounds):
        for way, (callers, threads) in ways.items():
            direct[way].append(direct_rate(features(model), images, callers, threads, seconds))
        saturated.append(saturate(port, pid, call, traffic.images, connections, seconds))
        passes.append(direct_rate(one_pass, levels, cores, 1, seconds)[0])
    stages = stage_seconds(port)
    served = statistics.median(run.images_per_second for run in saturated)
    # (images a second, CPU seconds an image) of each way, and of the fastest
    medians = {
        way: tuple(map(statistics.median, zip(*r, strict=True))) for way, r in direct.items()
    }
    _, best_cpu = max(medians.values())
    by_round = [
        run.images_per_second / max(way[i][0] for way in direct.values())
        for i, run in enumerate(saturated)
    ]
    served_cpu = statistics.median(run.cpu_per_image for run in saturated)
    return {
        "direct_images_per_second": {way: round(rate, 1) for way, (rate, _) in medians.items()},
        "direct_cpu_us_per_image": round(best_cpu * 1e6, 1),
        "pass_images_per_second": round(statistics.median(passes), 1),
        "server_images_per_second": round(served, 1),
        "server_over_best_direct": round(statistics.median(by_round), 3),
        "server_over_best_direct_by_round": [round(ratio, 3) for ratio in by_round],
        "server_over_pass": round(served / statistics.median(passes), 3),
        "server_cpu_us_per_image": round(served_cpu * 1e6, 1),
        "direct_cpu_over_server_cpu": round(best_cpu / served_cpu, 3),
        "share_of_the_cores_at_saturation": {
            "load_generator": round(statistics.median(run.load_share for run in saturated), 3),
            "others": [round(run.others_share, 3) for run in saturated],
        },
        "stage_ms_per_call_at_saturation": {s: round(t * 1e3, 2) for s, t in stages.items()},
    }


def beside_saturation(
    traffic: Traffic, port: int, pid: int, images_per_second: float, seconds: float, overloads: int
) -> Figures:
    """Calls of one image, latency below saturation, and what far more calls than that do."""
    call, capacity = traffic.call(), images_per_second / traffic.images
    single_rate, _ = asyncio.run(closed_load(port, traffic.call(1), 32, seconds))
    statuses, latencies, _ = asyncio.run(open_load(port, call, 0.7 * capacity, 3 * seconds))
    return {
        "single_image_calls_per_second": round(single_rate, 1),
        "at_0.7_of_saturation": {
            "calls_per_second": round(0.7 * capacity, 2),
            "statuses": dict(statuses),
            "p50_ms": round(float(np.percentile(latencies, 50)) * 1e3, 1),
            "p99_ms": round(float(np.percentile(latencies, 99)) * 1e3, 1),
        },
        "at_10_times_saturation": overload(
            port, pid, call, traffic.images, 10 * capacity, overloads, min(3.0, seconds)
        ),
    }


def measure(traffic: Traffic, seconds: float, rounds: int = 5, overloads: int = 10) -> Figures:
    """All figures; no overloads: those at saturation alone.

    About ``seconds * rounds * 5 + 4 * seconds + overloads * 6`` seconds of wall time.
    """
    with server(traffic.model) as (port, pid):
        told = at_saturation(traffic, port, pid, seconds, rounds)
        if overloads:
            rate = told["server_images_per_second"]
            told |= beside_saturation(traffic, port, pid, rate, seconds, overloads)
    return told


def model_args(traffic: Traffic) -> dict[str, Any]:
    return {} if traffic.model == demo.NAME else {"pretrained": False}


def features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the server is asked for, by timm's own operations."""
    return lambda x: model.forward_head(model.forward_features(x), pre_logits=True)


def as_rows(traffic: Traffic, told: Figures, rounds: int) -> list[Row]:
    """The figures that the pages show."""
    rates = {f"direct calls, {way}": r for way, r in told["direct_images_per_second"].items()}
    rates["server"] = told["server_images_per_second"]
    kept = [
        Row("server", traffic.case, who, rate, "images/s", rounds=rounds)
        for who, rate in rates.items()
    ]
    for name in ("server over best direct", "direct CPU over server CPU"):
        ratio = told[name.replace(" ", "_").replace("CPU", "cpu")]
        kept.append(Row("server", traffic.case, name, ratio, "ratio", rounds=rounds))
    if "at_10_times_saturation" not in told:
        return kept
    storms = told["at_10_times_saturation"]
    memory = storms["resident_mb"]["after_each_counted_round"]
    usual = told["at_0.7_of_saturation"]["p99_ms"] / 1e3
    kept.append(Row("server", f"{traffic.case}: p99 at 0.7 of saturation", "server", usual))
    overloaded = storms["p99_ms_of_the_answered"] / 1e3
    case = f"{traffic.case}: p99 of the answered at 10 times saturation"
    kept.append(Row("server", case, "server", overloaded))
    case = f"{traffic.case}: resident memory over {storms['rounds']} overloads, highest - lowest"
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
    settings = {"traffic": TINY, "seconds": seconds, "rounds": 1, "overloads": overloads}
    told = benchmark.pedantic(measure, kwargs=settings, rounds=1, iterations=1)
    for row in as_rows(TINY, told, rounds=1):
        record(row)
    overload = told["at_10_times_saturation"]
    assert set(overload["statuses"]) == {200, 503}
    memory = overload["resident_mb"]
    assert memory["after_each_counted_round"][-1] - memory["after_the_first_round"] < 50


def bench_photos(benchmark, quick, record) -> None:
    """The same load of a model and of images as people serve them."""
    settings = {"traffic": PHOTOS, "rounds": 1, "overloads": 0}
    settings["seconds"] = 0.5 if quick else 1.0 if LEVEL == "chosen" else 5.0
    told = benchmark.pedantic(measure, kwargs=settings, rounds=1, iterations=1)
    for row in as_rows(PHOTOS, told, rounds=1):
        record(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round (10)")
    parser.add_argument("--rounds", type=int, default=5, help="of direct calls and server (5)")
    parser.add_argument("--overloads", type=int, default=10, help="0: at saturation alone (10)")
    parser.add_argument("--photos", action="store_true", help="a ViT-Ti/16 and JPEGs of 224 pixels")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write the figures as JSON lines")
    args = parser.parse_args()
    traffic = PHOTOS if args.photos else TINY
    told = measure(traffic, args.seconds, args.rounds, args.overloads)
    if args.rows:
        rows.write(args.rows, as_rows(traffic, told, args.rounds))
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
