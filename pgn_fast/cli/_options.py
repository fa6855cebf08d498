"""Arguments that several commands share, and what becomes of them."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..train.checks import HEADS

if TYPE_CHECKING:
    import torch

DATA_HELP = (
    "a folder with one sub-folder a class (with train/, val/, test/ above them, or without), a "
    "name of timm's such as torch/cifar10, hfds/NAME or wds/NAME, a paper's data set such as "
    "vtab/caltech101, pgn/dtd or fgvc/cub, or 'digits'"
)


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """``--device``; see ``pick_device``."""
    parser.add_argument(
        "--device", metavar="NAME", help="cuda, cuda:1, mps or cpu (default: the first that works)"
    )


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without a name cuda, then mps, then cpu.

    Raises:
        UserError: no such device, or it is not there.
    """
    import torch

    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; give cuda, mps or cpu.") from error
    there = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not there.get(device.type, False):
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds no such device here; leave it out "
            "to use the first that works."
        )
    return device


def add_data_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """DATA and timm's flags for the same: ``data_config`` puts them together."""
    parser.add_argument("data", metavar="DATA", nargs="?", help=f"{DATA_HELP} (default: digits)")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", metavar="NAME", help="timm's flag for DATA as a name")
    group.add_argument("--data-dir", metavar="DIR", help="folder of a named data set, or DATA")
    group.add_argument(
        "--dataset-download",
        action="store_true",
        default=None,
        help="let torchvision download a torch/ data set",
    )
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="CSV of the labels of DATA's images: columns image and label or labels (cat;dog), or "
        "one column of 0 and 1 a class; a column split where there are some",
    )
    group.add_argument(
        "--num-classes", type=int, metavar="C", help="where the data do not tell (default: they do)"
    )
    return group


def data_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration's fields that ``add_data_arguments`` gives, those that were given.

    Raises:
        UserError: DATA, --dataset and --data-dir contradict each other.
    """
    given = {n: getattr(args, n) for n in ("dataset_download", "labels", "num_classes")}
    places = [p for p in (args.data, args.data_dir) if p is not None]
    if len(places) == 2 and (args.dataset or "/" not in args.data):
        raise UserError(f"DATA {args.data} and --data-dir {args.data_dir}: give one of them.")
    if args.dataset:
        given |= {"data": args.dataset, "data_dir": places[0] if places else None}
    elif len(places) == 2:
        given |= {"data": args.data, "data_dir": args.data_dir}
    elif places:
        given |= {"data": places[0]}
    return {n: v for n, v in given.items() if v is not None}


def at_least(low: int) -> Callable[[str], int]:
    """The ``type`` of an argument that is a whole number, ``low`` or more."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"is {value}; give {low} or more")
        return value

    return number


class KeyValues(argparse.Action):
    """``--flag a=1 b=x`` to {"a": 1, "b": "x"}: Python literals where they are some."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        pairs = {}
        for word in values:
            key, equals, text = word.partition("=")
            if not equals:
                parser.error(f"{option_string} takes NAME=VALUE, got {word!r}")
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pairs[key] = text
        # beside what other flags have set: --img-size and --model-kwargs go together
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **pairs})


def add_words_arguments(group: argparse._ArgumentGroup) -> None:
    """The head, and the words of one that is made of class names."""
    group.add_argument(
        "--head",
        choices=HEADS,
        help="a new linear layer, or zero_shot: the classes' names through the text tower of the "
        "model that the backbone is part of (default: linear)",
    )
    group.add_argument(
        "--class-names", metavar="FILE", help="zero_shot: their names (default: the data's own)"
    )
    group.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='zero_shot: "a photo of a {}." (default), or others; given several times: averaged',
    )
    group.add_argument(
        "--text-model",
        metavar="NAME",
        help="zero_shot: the whole model, where --model does not lead to it",
    )


# what ADAPTER may be, see ``adapter_folder``
ADAPTER = (
    "a folder such as runs/pgn/best, with its two files; a run's, whose best is meant; or "
    "OWNER/NAME on the hub"
)


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """ADAPTER and how to come by its backbone; see ``load_adapter``."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help=ADAPTER,
    )
    add_backbone_arguments(parser)


def add_backbone_arguments(
    parser: argparse._ActionsContainer,
    model: str = "the backbone (default: the one that the adapter names)",
) -> None:
    """How to come by an adapter's backbone, see ``adapter_backbone``; ``model`` is a help text."""
    parser.add_argument("--model", metavar="NAME", help=model)
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        action=KeyValues,
        default={},
        metavar="NAME=VALUE",
        help="for timm, such as dynamic_img_size=True, over those of the training",
    )
    parser.add_argument(
        "--pretrained-path", metavar="FILE", help="the backbone's weights (default: as in training)"
    )


def add_strict_argument(parser: argparse._ActionsContainer) -> None:
    """``--no-strict-backbone``, of commands that put many adapters on one backbone."""
    parser.add_argument(
        "--no-strict-backbone",
        dest="strict_backbone",
        action="store_false",
        help="take adapters that were trained on other weights or settings of the backbone, too",
    )


def adapter_folder(given: str) -> str:
    """The folder of an adapter; of a run's folder its ``best``; of a hub's repository its copy."""
    from ..adapters.places import fetch_adapter, find_adapter

    folder = fetch_adapter(given)
    return str(find_adapter(folder) or folder)


def adapter_backbone(
    folder: Path, config: Mapping[str, Any], args: argparse.Namespace
) -> tuple[Any, str] | None:
    """The backbone of an adapter where flags or its run say more than it does itself.

    ``--model``, ``--model-kwargs`` and ``--pretrained-path`` come first, then the ``args.yaml`` of
    the run in whose folder it lies, then what the adapter has recorded.

    Args:
        folder: of the adapter.
        config: its configuration.

    Returns:
        The backbone, frozen, and its name; None where the adapter says it all.

    Raises:
        UserError: no such model, or no way to its weights.
    """
    from ..backbone.load import load_backbone, load_recorded
    from ..errors import as_user_error
    from ..methods import METHODS
    from ..train.methods import weights_file
    from ..train.run_folder import recorded_backbone

    recorded = recorded_backbone(folder.parent)
    path = args.pretrained_path or (None if args.model else recorded.path)
    name = args.model or recorded.name or config.get("base_model_name_or_path")
    if name is None:
        raise UserError(f"{folder} does not name its backbone: give --model NAME.")
    own = METHODS[config["method"]].trains_backbone  # and it has all of its weights
    weights = config.get("base_model_weights")
    if weights and not (path or args.model or own):
        raise UserError(
            f"{folder} was trained on a {name} with weights of its owner ({weights}): give them by "
            "--pretrained-path FILE, or that backbone by --model NAME."
        )
    if not (args.model or args.model_kwargs or path or recorded.kwargs):
        return None
    with as_user_error(TypeError, RuntimeError):
        kwargs = (config.get("base_model_kwargs") or {}) | recorded.kwargs | args.model_kwargs
        if own:
            kwargs = {"pretrained": False} | kwargs
        elif path is not None:
            kwargs |= weights_file(name, path)
        # only a name that the user typed may be a path
        load = load_backbone if args.model else load_recorded
        return load(name, **kwargs), name


def load_adapter(args: argparse.Namespace) -> Any:
    """The adapter in front of its backbone, frozen and in eval mode; see ``adapter_backbone``.

    Raises:
        UserError: no adapter, a damaged one, or a backbone that does not fit.
    """
    from ..adapters import from_pretrained
    from ..adapters.files import OpenAdapter

    folder = Path(adapter_folder(args.adapter))
    with OpenAdapter(folder) as adapter:
        config = adapter.config
    found = adapter_backbone(folder, config, args)
    return from_pretrained(folder, None if found is None else found[0])


def task_of(args: argparse.Namespace) -> str:
    """What an adapter was trained for: "multiclass", or "multilabel"."""
    from ..adapters import read_adapter

    return read_adapter(Path(adapter_folder(args.adapter)))[0].get("task") or "multiclass"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Batch size, workers and precision of a command that only runs a model forward."""
    parser.add_argument(
        "-b", "--batch-size", type=at_least(1), default=64, metavar="N", help="(64)"
    )
    parser.add_argument(
        "-j",
        "--workers",
        type=at_least(0),
        metavar="N",
        help="processes that read images (default: the cores, up to 8)",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16")
