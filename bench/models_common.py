"""What the model benchmarks share: cases, peers, alternated timing, counted flops."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import pgn_fast
import pgn_fast.ops  # registers the ops that are counted below

NUM_CLASSES = 100
Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One configuration of the tables: what is trained, on which backbone, how large."""

    method: str  # "deep", "shallow" or "pgn"
    arch: str
    batch: int
    num_prompts: int

    def __str__(self) -> str:
        short = self.arch.removeprefix("vit_").replace("_patch", "/").replace("_224", "")
        return f"{self.method}-{short}-P{self.num_prompts}-B{self.batch}"

    def model(self, backbone: nn.Module, fast: Any = True) -> nn.Module:
        options = {"num_prompts": self.num_prompts, "fast": fast}
        if self.method == "pgn":
            return pgn_fast.PGN(backbone, NUM_CLASSES, **options)
        return pgn_fast.VPT(backbone, NUM_CLASSES, deep=self.method == "deep", **options)


@functools.cache
def _original(arch: str) -> nn.Module:
    return timm.create_model(arch, num_classes=0)


def make_backbone(arch: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights do: no time and no byte here depends on their values."""
    return copy.deepcopy(_original(arch)).to(device, dtype)


def make_batch(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = timm.get_pretrained_cfg(case.arch).input_size
    images = torch.randn(case.batch, *size).to(device, dtype)
    return images, torch.randint(NUM_CLASSES, (case.batch,), device=device)


def training_step(
    forward: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    images: Tensor,
    labels: Tensor,
) -> Step:
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(forward(images).float(), labels).backward()
        optimizer.step()

    return step


def inference_step(forward: Callable[[Tensor], Tensor], images: Tensor) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return forward(images)

    return step


def set_fused_attention(backbone: nn.Module, fused: bool) -> None:
    """timm's switch between scaled_dot_product_attention and the official codes' three steps."""
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def alternate(
    steps: Mapping[str, Step],
    rounds: int,
    calls: Mapping[str, int] | None = None,
    *,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; forward, backward and so on through the list, so that
    whatever slows the machine down meets all of them alike. Where ``calls`` says so, a round is the
    mean of several calls. Each runs once before, unless they are ``warm``."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in () if warm else steps.values():
        step()  # compiles, folds, fills caches
    for round_ in range(rounds):
        names = list(steps) if round_ % 2 == 0 else list(steps)[::-1]
        for name in names:
            step, count = steps[name], (calls or {}).get(name, 1)
            synchronize()
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / count)
    return seconds


class _FlopCounter(TorchDispatchMode):
    """Sums the flops of every operator that torch, or the table below, has a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _ATTENTION:
            first_query, passes = _ATTENTION[packet]
            q, k, _, *prompts = args[first_query:]
            extra = prompts[0].shape[-2] if packet.__name__.startswith("prompt") else 0
            B, h, Q, d = q.shape
            self.total += passes * 2 * B * h * Q * (k.shape[2] + extra) * d
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


# operator -> position of its queries, and how many GEMMs of scores' size it does
_ATTENTION = {
    torch.ops.pgn_fast.prompt_attention: (0, 2),
    torch.ops.pgn_fast.prompt_attention_backward: (1, 5),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}


def count_flops(step: Step) -> float:
    """Floating-point operations of a step's GEMMs, attention and convolutions."""
    with _FlopCounter() as counter:
        step()
    return float(counter.total)


def gemm_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Measured flop/s of one large square GEMM: the best of several, by whichever of
    torch's libraries is the faster."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    products = {"torch": lambda: a @ b, "frozen_linear": lambda: pgn_fast.ops.frozen_linear(a, b)}
    seconds = alternate(products, rounds=7)
    return 2 * size**3 / min(map(min, seconds.values()))


_PRODUCTS = ("::mm", "::addmm", "::bmm", "::baddbmm", "::_mkl_linear", "::_linear_pointwise")


def where_time_goes(step: Step) -> dict[str, float]:
    """Shares of a step's operator time: GEMMs, attention, everything else."""
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if cuda else [activity.CPU]
    step()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    shares = {"GEMM": 0.0, "attention": 0.0, "everything else": 0.0}
    for event in profile.key_averages():
        if not event.key.startswith(("aten::", "pgn_fast", "mkldnn::", "mkl::")):
            continue
        kind = "everything else"
        if event.key.endswith(_PRODUCTS):
            kind = "GEMM"
        elif "attention" in event.key:
            kind = "attention"
        shares[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: share / total for kind, share in shares.items()}
