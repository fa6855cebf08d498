"""``pgn-fast export``: an adapter and its backbone as one file for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from ._options import add_adapter_arguments, load_adapter

HELP = "write an adapter and its backbone as one file: ONNX, torch's .pt2, OpenVINO"
EPILOG = """\
examples:
  pgn-fast export runs/pgn                                 runs/pgn/best/model.onnx
  pgn-fast export runs/photos --format pt2 --output photos.pt2 --preprocessing-inside
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument("--format", choices=("onnx", "pt2", "openvino"), default="onnx")
    parser.add_argument("--output", metavar="FILE", help="default: model.* in the adapter's folder")
    parser.add_argument(
        "--preprocessing-inside",
        action="store_true",
        help="take uint8 pixels of the model's size and normalize them inside",
    )
    parser.add_argument("--report", metavar="FILE", help="write the comparison there as JSON")


def run(args: argparse.Namespace) -> int:
    from ..export import SUFFIXES, export, missing
    from ._options import adapter_folder

    # before the model is loaded: these are sooner wrong
    if lacks := missing(args.format):
        raise UserError(f"--format {args.format}: {lacks}.")
    folder = Path(adapter_folder(args.adapter))
    output = Path(args.output) if args.output else folder / f"model{SUFFIXES[args.format]}"
    for path in (output, *([Path(args.report)] if args.report else [])):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}. Make it first.")
    if output.suffix != SUFFIXES[args.format]:
        raise UserError(f"--output {output}: a name for --format {args.format} ends in "
                        f"{SUFFIXES[args.format]}.")  # fmt: skip
    parity = export(
        load_adapter(args), output, args.format, preprocessing_inside=args.preprocessing_inside
    )
    print(
        f"{output}: {parity.equal_argmax} of {parity.images} random images in the same class, "
        f"largest error {parity.error:.1e} of the largest logit"
    )
    if args.report:
        from ..train.reports import write_json

        write_json(Path(args.report), {"file": str(output), **parity.as_dict()})
    return 0
