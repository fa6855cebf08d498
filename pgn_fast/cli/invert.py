"""``pgn-fast invert``: an adapter as 8-bit pixels for an image API, with a report."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ._canvas import add_canvas_arguments, canvas_fields
from ._options import ADAPTER, adapter_folder, add_backbone_arguments, at_least, load_adapter

HELP = "turn an adapter into pixels for an image API, or say whether a backbone allows it"
EPILOG = """\
examples:
  pgn-fast invert runs/rgb/best --out inverted              canvases of eight test digits
  pgn-fast invert runs/rgb/best --out inverted --images cat.jpg dog.png
  pgn-fast invert runs/pgn/best --out inverted --layout enlarged         trained in latent space
  pgn-fast invert --analyze vit_base_patch16_224            a verdict before anybody trains

what comes out, in --out: canvas_*.png (what the server is sent), library.png (the token library as
patches), overview.png, errors.png, report.json, and library.safetensors (the inverted library,
for pgn_fast.inversion.InvertedLibrary.load).
Train for it with: pgn-fast train --deploy rgb --output runs/rgb. Its canvas and server are those of
the training; --layout and --server are for adapters that were trained without --deploy rgb.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", help=ADAPTER)
    parser.add_argument("--out", metavar="DIR", help="for pictures, report and library")
    parser.add_argument(
        "--images",
        metavar="IMAGE",
        nargs="+",
        help="files or folders (default: the packaged test digits)",
    )
    parser.add_argument(
        "-n", "--count", type=at_least(1), default=8, metavar="N", help="images (8)"
    )
    add_backbone_arguments(parser)
    add_canvas_arguments(parser, "that of the training; trained in latent space: enlarged")
    parser.add_argument(
        "--scale",
        choices=("fixed", "auto"),
        help="of latent prompts (default: auto where a norm follows, as in CLIP)",
    )
    parser.add_argument(
        "--on-unreachable",
        choices=("error", "project"),
        default="error",
        help="library tokens outside the gamut: refuse (default), or deploy the nearest",
    )
    parser.add_argument(
        "--analyze",
        metavar="NAME",
        nargs="+",
        help="print the verdict for these timm backbones instead; no adapter is needed",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="with --analyze: weights of timm's initialization, seed 0, instead of pretrained ones "
        "(shapes and limits only)",
    )


def run(args: argparse.Namespace) -> int:
    from ..errors import as_user_error

    if args.analyze:
        if args.adapter:
            raise UserError(f"--analyze needs no adapter, got {args.adapter}: give one of them.")
        with as_user_error(TypeError):
            return _analyze(args)
    if not args.adapter or not args.out:
        raise UserError("give an ADAPTER and --out DIR, or --analyze NAME.")
    with as_user_error(TypeError):
        return _invert(args)


def _analyze(args: argparse.Namespace) -> int:
    import torch

    from ..backbone.load import load_backbone
    from ..inversion import PatchMap, ServerSpec, analyze
    from ..train.methods import any_size

    words = canvas_fields(args)
    for name in args.analyze:
        kwargs = dict(args.model_kwargs)
        if args.random_weights:
            torch.manual_seed(0)
            kwargs["pretrained"] = False
        if words.get("layout") == "enlarged":
            kwargs = any_size(name, kwargs)
        try:
            backbone = load_backbone(name, **kwargs)
        except RuntimeError as error:
            raise UserError(
                f"{error}; or --random-weights, for what follows from the shapes alone."
            ) from error
        server = ServerSpec.from_backbone(backbone, **(args.server or {}))
        layout = _layout(words, backbone, 16) if words else None
        print(analyze(PatchMap.from_backbone(backbone, server, layout)))
        if args.random_weights:
            print("  (random weights: the spectrum of trained ones is another)")
    return 0


def _invert(args: argparse.Namespace) -> int:
    from .. import plots
    from .._files import write_files
    from ..inversion import GamutLibrary, analyze, invert, verify
    from ..inversion.pictures import save_error_histogram, save_library, save_overview

    words = canvas_fields(args)
    model = _load(args, words)
    settings = {} if args.scale is None else {"scale": args.scale}
    library = getattr(getattr(model, "prompter", None), "token_library", None)
    layout, server = None, None
    if words:
        layout = _layout(words, model.backbone, model.num_prompts)
    if args.server:
        server = _server(args.server, model.backbone, library)
    prompter = invert(model, server, layout, on_unreachable=args.on_unreachable, **settings)
    if not isinstance(library, GamutLibrary) and not prompter.layout.compensate_positions:
        print(
            f"note: the adapter was not trained on {prompter.layout.describe()}; what it is worth "
            "there has to be measured.",
            file=sys.stderr,
        )
    images, names, unreadable = _images(args, model)
    for message in unreadable:
        print(f"unreadable, left out: {message}", file=sys.stderr)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    checked = verify(prompter, model, images)
    canvases, size = prompter(images), prompter.inverted.patch_size
    extension = "jpg" if prompter.server.codec == "jpeg" else "png"
    files = {
        out / f"canvas_{i:03d}.{extension}": prompter.server.encode(canvas)
        for i, canvas in enumerate(canvases)
    }
    layout, border = prompter.layout, prompter.server.border
    height, width = layout.grid[0] * size, layout.grid[1] * size
    inner = canvases[:, :, border : border + height, border : border + width]
    levels = prompter.server.levels(images).byte()
    captions = [Path(name).name for name in names[:4]]
    sent = [path.name for path in files]
    if reason := plots.missing():
        print(f"library.png, errors.png and overview.png were left out: {reason}", file=sys.stderr)
    else:
        sheet, errors, overview = io.BytesIO(), io.BytesIO(), io.BytesIO()
        save_library(prompter, sheet)
        save_error_histogram([prompter.report, checked], errors)
        save_overview(levels[:4], inner[:4], layout, size, overview, captions, sent[:4])
        files |= {
            out / "library.png": sheet.getvalue(),
            out / "errors.png": errors.getvalue(),
            out / "overview.png": overview.getvalue(),
        }

    patch_map = prompter.patch_map
    assert patch_map is not None  # invert() gives one
    # the inverted library as contents: what its patches add to mid gray
    tokens = prompter.inverted.patches.double().cpu() @ patch_map.A.T
    content: dict[str, Any] = {
        "adapter": str(args.adapter),
        "backbone": patch_map.name,
        "prompt_pos": prompter.inverted.prompt_pos,
        "scale": prompter.inverted.scale,
        "margin": prompter.inverted.margin,
        "layout": layout.to_dict(),
        "server": prompter.server.to_dict(),
        "reachability": analyze(patch_map, tokens).to_dict(),
        "library": prompter.report.to_dict(),
        "canvases": {"images": names, "unreadable": unreadable, **checked.to_dict()},
    }
    # one write for all: the canvases and the report that names them belong together
    write_files(files | {out / "report.json": (json.dumps(content, indent=2) + "\n").encode()})
    prompter.inverted.save(out / "library.safetensors")
    print(f"library:  {prompter.report}")
    print(f"canvases: {checked}")
    print(f"written to {out}")
    return 0


def _load(args: argparse.Namespace, words: dict[str, Any]) -> Any:
    """The adapter in front of its backbone; of any size, where the canvas will need it.

    Raises:
        UserError: no such adapter, or a backbone of one size that would need more.
    """
    from ..adapters.files import OpenAdapter
    from ..backbone.load import DEMO_NAME
    from ..train.methods import any_size

    with OpenAdapter(Path(adapter_folder(args.adapter))) as adapter:
        config = adapter.config
    name = str(args.model or config.get("base_model_name_or_path"))
    trained = config.get("token_library")
    if isinstance(trained, dict):  # of a GamutLibrary
        larger = trained["server"]["dynamic_size"]
    else:
        larger = words.get("layout", "enlarged") == "enlarged"
        if larger and name == DEMO_NAME and "layout" not in words:
            raise UserError(
                f"{args.adapter} was trained in latent space, and its backbone {name} has one "
                "size, so no canvas has room for image and prompts as they were trained. Train "
                "with --deploy rgb; or see what --layout border --on-unreachable project is worth."
            )
    if larger and config.get("method") in ("pgn", "vpt-shallow"):
        args.model_kwargs = any_size(name, args.model_kwargs)
    return load_adapter(args)


def _layout(words: dict[str, Any], backbone: Any, prompts: int) -> Any:
    """The CanvasLayout that the arguments ask for."""
    from ..inversion import CanvasLayout

    rows, columns = backbone.patch_embed.grid_size
    kind = words.get("layout", "border" if "image_grid" in words else "enlarged")
    rest = {name: value for name, value in words.items() if name != "layout"}
    return CanvasLayout.named(kind, (int(rows), int(columns)), prompts, **rest)


def _server(overrides: dict[str, Any], backbone: Any, library: Any) -> Any:
    """The ServerSpec of ``--server``: what it changes of the training's, else the backbone's."""
    from ..inversion import GamutLibrary, ServerSpec

    if isinstance(library, GamutLibrary):
        return ServerSpec(**{**library.patch_map.server.to_dict(), **overrides})
    return ServerSpec.from_backbone(backbone, **overrides)


def _images(args: argparse.Namespace, model: Any) -> tuple[Any, list[str], list[str]]:
    """Normalized images (N, 3, H, W) as the model takes them, their names, and what is unreadable
    among the files before the last of them."""
    import torch

    from ..train.config import TrainConfig
    from ..train.data import image_files, load_split
    from ..train.loader import eval_transform, make_loader

    if args.images:
        split = image_files(args.images)
    else:
        split = load_split(TrainConfig.make(data="digits"), "test")
    batches: list[Any] = []
    names: list[str] = []
    unreadable: list[str] = []
    for pixels, _, indices, missing in make_loader(
        split, eval_transform(model.preprocessing), args.count, workers=0
    ):
        unreadable += missing
        if len(indices):
            batches.append(pixels)
            names += [split.images.name(i) for i in indices.tolist()]
        if len(names) >= args.count:
            break
    if not batches:
        raise UserError(f"--images: none of the files could be read, such as {unreadable[0]}.")
    return torch.cat(batches)[: args.count], names[: args.count], unreadable
