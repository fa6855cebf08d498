"""``pgn-fast autotune``: verify and time the kernels on this device, and remember the winners."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "verify and measure the kernels on this device, and use those that win from now on"
EPILOG = """\
Each kernel runs in a process of its own and is held to float64 before it is timed; one that hangs,
crashes or errs is barred on this device. pgn-fast env shows what was found.

example, offline:
  pgn-fast autotune --device cpu --model vit_tiny_patch16_224 --minutes 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="vit_base_patch16_224", help="whose sizes to measure")
    parser.add_argument("-b", "--batch", type=int, default=8, help="images a batch (8)")
    parser.add_argument("--minutes", type=float, default=3.0, help="for everything (3)")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--export", type=Path, metavar="FILE", help="also write the results there")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..autotune import autotune, export, sizes_of
    from ..errors import UserError, as_user_error
    from ..ops import measured

    if args.batch < 1 or not args.minutes > 0:
        raise UserError(
            f"--batch and --minutes must be above 0, got {args.batch} and {args.minutes}"
        )
    with as_user_error(RuntimeError):
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {args.device}: the kernels run on cpu and cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {args.device}: torch sees no CUDA device here")
        sizes = sizes_of(args.model, args.batch)
    results = autotune(device, model=args.model, sizes=sizes, minutes=args.minutes)
    try:
        print(f"kept in {measured.save(device, results)}; forget it by removing the file")
    except OSError as error:
        print(f"not kept, the defaults stay: {error}")
    if args.export:
        export(device, args.export, results)
        print(f"written: {args.export}")
    return 0
