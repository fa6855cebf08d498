"""``pgn-fast export``: what was trained, and its backbone, for other runtimes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import UserError
from ._options import add_adapter_arguments, add_strict_argument, load_adapter, pick_device

HELP = "write what was trained for other runtimes: ONNX, torch's .pt2, OpenVINO, a Triton model"
EPILOG = """\
onnx, pt2 and openvino: one file that holds the backbone, too, and needs nothing of this package.
triton: a folder for the python backend of NVIDIA's server, with the adapter, or with every task of
a folder of them, mixed in every batch; it needs this package where Triton runs.

examples:
  pgn-fast export runs/pgn                                 runs/pgn/best/model.onnx
  pgn-fast export runs/photos --format pt2 --output photos.pt2 --preprocessing-inside
  pgn-fast export tasks/ --format triton --output models/photos
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument("--format", choices=("onnx", "pt2", "openvino", "triton"), default="onnx")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: model.* in the adapter's folder; triton: MODELS/NAME, a new folder",
    )
    parser.add_argument(
        "--preprocessing-inside",
        action="store_true",
        help="take uint8 pixels of the model's size and normalize them inside (triton: always, and "
        "encoded images)",
    )
    parser.add_argument("--report", metavar="FILE", help="write the comparison there as JSON")
    add_strict_argument(parser)


def run(args: argparse.Namespace) -> int:
    return _triton(args) if args.format == "triton" else _file(args)


def _file(args: argparse.Namespace) -> int:
    from ..export import SUFFIXES, check_target, export
    from ._options import adapter_folder

    folder = Path(adapter_folder(args.adapter))
    output = Path(args.output) if args.output else folder / f"model{SUFFIXES[args.format]}"
    # before the model is loaded: these are sooner wrong; a missing adapter is told on loading
    if args.output or folder.is_dir():
        check_target(output, args.format)
    if args.report and not (report := Path(args.report)).parent.is_dir():
        raise UserError(f"{report}: there is no folder {report.parent}. Make it first.")
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


def _triton(args: argparse.Namespace) -> int:
    from ..serve.load import adapters_in
    from ..serve.triton import write_model
    from ._answers import load_tasks

    if args.output is None:
        raise UserError(
            "--output MODELS/NAME is needed: the model's folder in Triton's repository."
        )
    if args.report:
        raise UserError("--report compares a file with the model; --format triton runs the model.")
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} is there already; name a new folder, or remove it.")
    # whatever Triton would refuse is refused here
    tasks = load_tasks(args.adapter, args, pick_device("cpu"), watch_s=0)
    if tasks.failed:
        raise UserError(f"not exported: {' '.join(tasks.failed)}")
    about = getattr(tasks.backbone, "pretrained_cfg", None) or {}
    given = {
        "model": args.model,
        "model_kwargs": json.dumps(args.model_kwargs) if args.model_kwargs else None,
        # of the flag, or of the training run
        "pretrained_path": about.get("file"),
        "strict_backbone": None if args.strict_backbone else "false",
    }
    adapters = adapters_in(args.adapter)
    write_model(output, adapters, parameters={n: v for n, v in given.items() if v})
    print(f"{output}: {len(adapters)} tasks on {tasks.name}, a model of Triton's python backend")
    return 0
