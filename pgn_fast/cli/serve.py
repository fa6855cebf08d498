"""``pgn-fast serve``: what was trained, or a frozen model as it is, behind an image API."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from ..errors import UserError, as_user_error
from ..serve.logs import FORMATS
from ..serve.settings import OUTPUTS, ServerSettings
from ._options import (
    add_backbone_arguments,
    add_device_argument,
    add_strict_argument,
    at_least,
    pick_device,
)

HELP = "serve what was trained, or a frozen model's features, over HTTP"
EPILOG = """\
examples:
  pgn-fast serve runs/photos                   one task: a run, or an adapter
  pgn-fast serve me/pets                       the same from the hub
  pgn-fast serve tasks --token-file tokens     one task a sub-folder; the folder is watched
  pgn-fast serve --model vit_base_patch32_clip_224.openai
  pgn-fast serve --model pgn_demo_vit --port 8001
  curl -F images=@cat.png -F images=@dog.jpg http://127.0.0.1:8000/v1/predict
  curl -F images=@cat.png -F task=pets http://127.0.0.1:8000/v1/predict
  curl http://127.0.0.1:8000/v1/tasks          what may be asked for

It listens on 127.0.0.1 unless --host says otherwise; --token-file asks callers for a token.
docs/serving.md has the rest.
"""

# flag -> field of ServerSettings, type, help
_SETTINGS: dict[str, tuple[type, str]] = {
    "max_batch": (int, "images that go through the model together"),
    "max_wait_ms": (float, "milliseconds that a batch waits to fill"),
    "queue_images": (int, "images that may wait for the model"),
    "model_workers": (int, "batches computed at the same time"),
    "decode_threads": (int, "threads that decode images"),
    "max_connections": (int, "open connections"),
    "max_calls": (int, "calls in progress"),
    "max_pending_bytes": (int, "bytes that have arrived of all bodies in progress"),
    "max_call_bytes": (int, "bytes of one call"),
    "max_call_images": (int, "images of one call"),
    "max_call_pixels": (int, "pixels of one call"),
    "max_image_pixels": (int, "pixels of one image"),
    "timeout_s": (float, "seconds for one call"),
    "header_timeout_s": (float, "seconds for the headers of one call"),
    "min_body_rate": (int, "bytes a second at which a body must arrive"),
    "drain_s": (float, "seconds between SIGTERM and the end of listening"),
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ServerSettings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("what is served")
    model.add_argument(
        "place",
        nargs="?",
        metavar="ADAPTER|TASKS_DIR",
        help="an adapter, a training run, OWNER/NAME on the hub, or a folder with an adapter or a "
        "run in each sub-folder",
    )
    add_backbone_arguments(
        model,
        "alone: a timm vision transformer as it is, with its tag (pgn_demo_vit is inside); beside "
        "adapters: their backbone, where it is not the one that they name",
    )
    add_strict_argument(model)
    model.add_argument(
        "--output",
        choices=OUTPUTS,
        help="where a call does not say (a model: features; tasks: logits)",
    )
    add_device_argument(model)

    model.add_argument(
        "--watch-s",
        type=float,
        default=2.0,
        metavar="X",
        help="seconds between two looks at TASKS_DIR; 0: none (default: %(default)s)",
    )

    model.add_argument(
        "--max-task-bytes",
        type=at_least(1),
        metavar="N",
        help="bytes of the tasks in memory; those used least recently go to disk (default: all "
        "stay)",
    )

    pixels = parser.add_argument_group("preprocessing of a model alone (default: its own)")
    pixels.add_argument(
        "--input-size", type=int, nargs=3, metavar="N", help="channels, height and width"
    )
    pixels.add_argument("--crop-pct", type=float, metavar="X", help="crop as a share of the resize")
    pixels.add_argument("--crop-mode", choices=("center", "squash", "border"))
    pixels.add_argument("--interpolation", metavar="NAME", help="bilinear, bicubic, ...")
    for name in ("mean", "std"):
        pixels.add_argument(f"--{name}", type=float, nargs=3, metavar="X")

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(127.0.0.1)")
    server.add_argument(
        "--port", type=at_least(0), default=8000, metavar="N", help="0: a free one (8000)"
    )
    server.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that a call's Host may carry, such as api.example.com or *.example.com; "
        "* for any (default: localhost, the name of --host, and every IP address)",
    )
    server.add_argument(
        "--token-file", metavar="FILE", help="bearer tokens, one a line; calls must carry one"
    )
    server.add_argument(
        "--admin",
        type=at_least(0),
        metavar="PORT",
        help="add and remove tasks on this port of 127.0.0.1 (POST, DELETE /v1/tasks)",
    )
    server.add_argument("--access-log", action="store_true", help="a line for every call")
    server.add_argument("--log-format", choices=FORMATS, default="text", help="(text)")

    limits = parser.add_argument_group("batching and limits")
    for name, (kind, text) in _SETTINGS.items():
        limits.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=_DEFAULTS[name],
            metavar="N" if kind is int else "X",
            help=f"{text} (default: %(default)s)",
        )


def run(args: argparse.Namespace) -> int:
    if args.place is None and args.model is None:
        raise UserError(
            "name what is to be served: an adapter, a folder of tasks, or --model NAME."
        )
    output = args.output or ("features" if args.place is None else "logits")
    with as_user_error():
        settings = ServerSettings(
            default_output=output, **{name: getattr(args, name) for name in _SETTINGS}
        )
    device = pick_device(args.device)
    with as_user_error(ImportError):
        from ..serve import run_server
        from ..serve.access import is_loopback

    with as_user_error(RuntimeError, TypeError):
        served = _load(args, device)
        served.check_output(output)
    if args.token_file is None and not is_loopback(args.host):
        print(
            f"pgn-fast serve: warning: anyone who reaches {args.host} may call; --token-file asks "
            "for a token.",
            file=sys.stderr,
        )
    what = args.model if args.place is None else f"{len(served.tasks())} tasks on {served.name}"
    # where it listens is in the log, once it does
    print(f"{what} at /v1/predict", flush=True)
    with as_user_error():
        cut_off = run_server(
            served,
            settings,
            host=args.host,
            port=args.port,
            access_log=args.access_log,
            log_format=args.log_format,
            allowed_hosts=args.allowed_host,
            token_file=args.token_file,
            admin_port=args.admin,
        )
    return 1 if cut_off else 0


def _load(args: argparse.Namespace, device: Any) -> Any:
    from ..serve import load_served_model
    from ..train.methods import weights_file
    from ._answers import load_tasks

    names = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    data_args: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.place is None:
        kwargs = dict(args.model_kwargs)
        if args.pretrained_path is not None:
            kwargs |= weights_file(args.model, args.pretrained_path)
        return load_served_model(args.model, data_args=data_args, device=device, **kwargs)
    given = [f"--{name.replace('_', '-')}" for name in names if data_args[name] is not None]
    if given:
        raise UserError(
            f"{', '.join(given)}: adapters have a preprocessing of their own; leave the flags out."
        )
    return load_tasks(args.place, args, device, watch_s=args.watch_s, max_bytes=args.max_task_bytes)
