"""``pgn-fast bench``: this machine's images/s, fast path against timm's own blocks."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from ..methods import METHODS
from ..train.config import TrainConfig
from ._options import KeyValues, add_device_argument, at_least, pick_device

HELP = "measure images/s here: the fast path against timm's own blocks"
EPILOG = """\
examples:
  pgn-fast bench
  pgn-fast bench --model vit_base_patch16_224 --method vpt-deep -b 32 --amp
  pgn-fast bench --model vit_base_patch16_224 --model-kwargs pretrained=False

Both ways are measured in turns, so that a busy machine slows both; the figures are medians.
The repository's own suite, with every op and backend, is `pytest bench`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="pgn_demo_vit", metavar="NAME", help="a timm ViT")
    parser.add_argument("--model-kwargs", nargs="*", action=KeyValues, metavar="NAME=VALUE")
    parser.add_argument("--method", choices=tuple(METHODS), help="default: those with prompts")
    parser.add_argument(
        "--num-prompts", type=at_least(1), metavar="P", help="default: the method's"
    )
    parser.add_argument(
        "-b", "--batch-size", type=at_least(1), default=32, metavar="N", help="(32)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=10, metavar="N", help="of each (10)")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)

    import timm
    import torch

    print(
        f"{args.model}, batch {args.batch_size}, {device}, torch {torch.__version__}, "
        f"timm {timm.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{'':<24}{'timm blocks':>14}{'fast path':>14}{'ratio':>8}   images/s")
    prompted = ("pgn", "vpt-deep", "vpt-shallow")
    for method in [args.method] if args.method else prompted:
        config = TrainConfig.make(
            method=method,
            model=args.model,
            model_kwargs=args.model_kwargs or {},
            **({} if args.num_prompts is None else {"num_prompts": args.num_prompts}),
        )
        for name, (reference, fast) in _measure(args, config, device).items():
            print(
                f"{f'{method} {name}':<24}{args.batch_size / reference:>14.1f}"
                f"{args.batch_size / fast:>14.1f}{reference / fast:>8.2f}"
            )
    return 0


def _measure(
    args: argparse.Namespace, config: TrainConfig, device: Any
) -> dict[str, tuple[float, float]]:
    """Median seconds of a batch, by timm's blocks and by the fast path."""
    import torch

    from ..adapters import backbone_pixels
    from ..train.evaluation import Autocast
    from ..train.methods import build_model, load_backbone_for

    torch.manual_seed(0)
    backbone = load_backbone_for(config)
    size = backbone_pixels(backbone)["input_size"]
    model: Any = build_model(config, backbone, num_classes=100).to(device)
    images = torch.randn(args.batch_size, *size, device=device)
    autocast = Autocast(device, args.amp, args.amp_dtype)

    def infer(forward: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad(), autocast():
                forward(images)

        return step

    def train(forward: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            with autocast():
                loss = forward(images).float().square().mean()
            loss.backward()

        return step

    results = {}
    for name, make in (("training step", train), ("inference", infer)):
        model.train(name == "training step")
        steps = make(model.forward_reference), make(model)
        results[name] = _in_turns(*steps, rounds=args.rounds, device=device)
    return results


def _in_turns(
    first: Callable[[], None], second: Callable[[], None], *, rounds: int, device: Any
) -> tuple[float, float]:
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: tuple[list[float], list[float]] = ([], [])
    # the first two rounds warm up caches and choose kernels
    for round_ in range(rounds + 2):
        for step, kept in zip((first, second), seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if round_ >= 2:
                kept.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
