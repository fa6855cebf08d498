"""What timm's ``train.py`` accepts and this command does not, and the way to it.

Every other flag of timm's is one of ``pgn-fast train``, with timm's meaning.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
from typing import Any, NoReturn

from ..errors import UserError, brief

_FROZEN = "the frozen backbone stays in eval mode"
_FIXED = "an image's augmentation depends on the seed, the epoch and the image alone"
_SQUARE = "a run has one image size: give --img-size N"
_NAFLEX = "NaFlex models are not supported: give --img-size N"
_TEACHER = "distillation is not part of this command: train with timm's tasks from Python"

# flag -> the sentence that says why not, and what to do
REFUSED: dict[str, str] = {
    "--train-num-samples": "timm counts streamed data; write the count into the data set's info",
    "--val-num-samples": "timm counts streamed data; write the count into the data set's info",
    "--class-map": "classes are the names of the class folders: rename the folders",
    "--dataset-trust-remote-code": "code that comes with a data set is never run: save it as files",
    "--no-resume-opt": "to start over from trained weights give --init-from ADAPTER",
    "--start-epoch": "--resume knows its epoch; from weights alone: --init-from ADAPTER",
    "--input-img-mode": "every image becomes RGB, as docs/training.md says",
    "--in-chans": "images are read as RGB: convert others to three channels",
    "--channels-last": "tokens have one layout, and PGN's network its fastest already",
    "--fuser": "TorchScript is not used; give --torchcompile",
    "--torchscript": "TorchScript is not used; give --torchcompile",
    "--fast-norm": "the fused ops of this package take its place; pgn-fast env lists them",
    "--model-dtype": "trained weights are float32; give --amp --amp-dtype bfloat16",
    "--epoch-repeats": "give as many more --epochs",
    "--aug-repeats": f"{_FIXED}: give more --epochs",
    "--aug-splits": "there is one augmentation of an image a step: give --aa and --reprob",
    "--jsd-loss": "it needs --aug-splits, which is not supported: give --smoothing or --mixup",
    "--resplit": "it needs --aug-splits, which is not supported",
    "--split-bn": "it needs --aug-splits, which is not supported",
    "--drop": f"{_FROZEN}: give --prompt-dropout X for the prompts",
    "--drop-connect": f"{_FROZEN}: give --prompt-dropout X for the prompts",
    "--drop-path": f"{_FROZEN}; with --method full: --model-kwargs drop_path_rate=X",
    "--drop-block": f"{_FROZEN}: give --prompt-dropout X for the prompts",
    "--dist-bn": "BatchNorm is synchronized at every step, so its statistics agree; leave it out",
    "--model-ema-force-cpu": "only what is trained is averaged, which is small: give --model-ema",
    "--worker-seeding": f"{_FIXED}, whatever the number of -j",
    "--save-images": "pgn-fast predict and a look at the files show what is read",
    "--tta": "scores are of one view an image",
    "--train-img-sizes": _SQUARE,
    "--train-batch-sizes": _SQUARE,
    "--train-size-probs": _SQUARE,
    "--train-size-schedule": _SQUARE,
    "--train-size-schedule-spread": _SQUARE,
    "--train-size-random-mix": _SQUARE,
    "--train-batches-per-epoch": "an epoch is every image once: give --epochs",
    "--variable-batch-loss-scale": "a step's loss is the mean over its images, however many",
    "--naflex-loader": _NAFLEX,
    "--naflex-train-seq-lens": _NAFLEX,
    "--naflex-max-seq-len": _NAFLEX,
    "--naflex-patch-sizes": _NAFLEX,
    "--naflex-patch-size-probs": _NAFLEX,
    "--naflex-loss-scale": _NAFLEX,
    "--naflex-patchify-channels-first": _NAFLEX,
    "--kd-model-name": _TEACHER,
    "--kd-distill-type": _TEACHER,
    "--kd-loss-type": _TEACHER,
    "--kd-temperature": _TEACHER,
    "--kd-student-feature-dim": _TEACHER,
    "--kd-teacher-feature-dim": _TEACHER,
    "--kd-token-distill-type": _TEACHER,
    "--distill-loss-weight": _TEACHER,
    "--task-loss-weight": _TEACHER,
}
# flags that say what is so anyway -> whether they take a value
ALREADY_SO = {
    "--pretrained": False,  # a frozen backbone of random weights is of no use
    "--no-ddp-bb": False,  # buffers are never broadcast
    "--sync-bn": False,  # the default
    "--pin-mem": False,  # so on CUDA
    "--no-prefetcher": False,  # there is none
    "--use-multi-epochs-loader": False,  # workers persist
    "--local_rank": True,  # the environment tells
}
_ALIASES = {"--train-batches-per-epoch": ("--train-steps-per-epoch",)}


# flag -> (the keyword of timm.create_model that it sets, its type)
_MODEL_KWARGS: dict[str, tuple[str, Any]] = {
    "--initial-checkpoint": ("checkpoint_path", str),
    "--gp": ("global_pool", str),
    "--img-size": ("img_size", int),
}


class _Refuse(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> NoReturn:
        parser.error(f"{option}: {REFUSED[self.option_strings[0]]}")


class _Keyword(argparse.Action):
    """Sets one of ``--model-kwargs``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        given = dict(getattr(namespace, "model_kwargs", None) or {})
        if self.option_strings[0] == "--input-size":
            channels, *size = values
            if channels != 3:
                parser.error(f"{option}: images are read as RGB; give 3 H W")
            given["img_size"] = tuple(size) if size[0] != size[1] else size[0]
        else:
            given[_MODEL_KWARGS[self.option_strings[0]][0]] = values
        namespace.model_kwargs = given


class _Import(argparse.Action):
    """timm's --device-modules: packages that make a device known to torch."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        for name in values:
            try:
                importlib.import_module(name)
            except ImportError as error:
                parser.error(f"{option} {name}: {error}")


def add_timm_arguments(parser: argparse.ArgumentParser) -> None:
    """timm's flags that set another flag, change nothing, or are refused with a sentence."""
    backbone = parser.add_argument_group("backbone, by timm's flags")
    for flag, (name, kind) in _MODEL_KWARGS.items():
        backbone.add_argument(
            flag, type=kind, action=_Keyword, metavar="X", help=f"--model-kwargs {name}=X"
        )
    backbone.add_argument(
        "--input-size",
        type=int,
        nargs=3,
        action=_Keyword,
        metavar="N",
        help="3 H W: --model-kwargs img_size",
    )
    backbone.add_argument(
        "--device-modules", nargs="+", action=_Import, metavar="NAME", help="to import first"
    )
    for flag in REFUSED:
        names = (flag, *_ALIASES.get(flag, ()))
        parser.add_argument(*names, nargs="*", action=_Refuse, help=argparse.SUPPRESS)
    for flag, takes_value in ALREADY_SO.items():
        if takes_value:
            parser.add_argument(flag, dest="_ignored", help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, dest="_ignored", action="store_true", help=argparse.SUPPRESS)


def read_settings(path: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The settings in a YAML file, by the flags' names: what timm's ``-c`` reads.

    Raises:
        UserError: no such file, no YAML, or a setting of another name.
    """
    import yaml

    try:
        with open(path) as file:
            settings = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"-c {path}: {brief(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"-c {path} holds no settings: give NAME: VALUE, one a line.")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if unknown := sorted(set(settings) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise UserError(
            f"-c {path}: {unknown[0]} is no setting of this command"
            + (f"; did you mean {near[0]}?" if near else ".")
        )
    return settings
