"""Training from Python: the run of ``pgn-fast train`` on one's own model and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import backbone_name
from ..errors import UserError
from ..methods import method_of
from ..models.heads import is_new
from . import checkpoints
from .config import GIVEN, TrainConfig
from .given import given_split, same_classes
from .loader import preprocessing
from .loop import run
from .parts import Parts, seed_everything
from .signals import Interrupted
from .split import Splits
from .state import resume_config

# what the arguments model, train, val and test say already
_NOT_HERE = (
    *("data", "data_dir", "train_split", "val_split", "test_split", "val_fraction", "num_classes"),
    *("dataset_download", "input_key", "target_key", "labels", "model", "model_kwargs"),
    *("pretrained_path",),
    *("method", "method_kwargs", "num_prompts", "library_size", "generator", "generator_kwargs"),
    *("resolution", "activation", "prompt_dropout", "project_dim", "deploy", "layout", "fast"),
    *("image_grid", "canvas_grid", "allow_blank", "compensate", "server", "backend", "init_from"),
    *("head", "template", "text_model"),
)


@dataclass(frozen=True)
class RunResult:
    """What a run reached; the model that was given has its best epoch's weights.

    Attributes:
        output: the folder of the run, with ``best/``, ``last/``, ``summary.json`` and the rest.
        best_epoch: from 1.
        train: its images, top1 in percent, loss in nats, and the name of the split.
        validation: the same of the validation images; None where none were given.
        test: the same of the test images; None where none were given.
        history: one row an epoch, as in ``history.csv``.
        summary: the whole of ``summary.json``.
    """

    output: Path
    best_epoch: int
    train: dict[str, Any]
    validation: dict[str, Any] | None
    test: dict[str, Any] | None
    history: list[dict[str, Any]]
    summary: dict[str, Any]


def fit(
    model: nn.Module,
    train: Any,
    val: Any = None,
    *,
    epochs: int | None = None,
    test: Any = None,
    class_names: Sequence[str] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    show: bool = True,
    recipe: str | None = None,
    **options: Any,
) -> RunResult:
    """Train a model of this package, as ``pgn-fast train`` does, on data of one's own.

    Args:
        model: a PGN, a VPT, another prompted model, or one of the baselines; trained in place.
        train, val, test: map-style data sets or loaders of (image, label) pairs or of dicts with
            image or pixel_values and label or labels, with ``task="multilabel"`` a vector of 0 and
            1, one place a class. PIL images and uint8 arrays (H, W, 3) are
            augmented and normalized as by the command; tensors are the model's input as they are.
            Without ``val`` the last epoch is the best; ``test`` is read once, at the end.
        epochs: None: 30, or the recipe's.
        class_names: in label order; None: as data or model tell.
        output: folder of the run; None: runs/METHOD.
        resume: continue the run in ``output``. Data sets resume to the bit; a loader as far as its
            order follows from torch's generator.
        device: None: where the model is; under torchrun each process takes its own accelerator.
        show: print progress.
        recipe: "pgn-official" or "vpt-official".
        **options: of ``pgn-fast train``, by the same names with underscores: ``lr``,
            ``batch_size``, ``mixup``, ... A new head starts as the command's does, for prompts as
            a linear probe; one that was trained, loaded or started otherwise stays as it is unless
            ``head_init`` is given.

    Raises:
        UserError: (a ValueError) an option or data that cannot work; nothing was created.
        TrainingStopped: see ``train.loop.train``.
    """
    method = method_of(model)
    if wrong := sorted(set(options) & set(_NOT_HERE)):
        raise UserError(f"fit: {', '.join(wrong)}: the model and the data that are given say it.")
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(options) - known):
        raise UserError(f"fit takes no {', '.join(unknown)}; it takes the options of TrainConfig.")
    given = {**options, **({} if epochs is None else {"epochs": epochs})}
    facts: Any = model
    folder = Path(output or f"runs/{method}")
    # what was given, for people and for a resumed run; only their script can make it again
    name = backbone_name(facts.backbone) or type(facts.backbone).__name__
    own = {"data": GIVEN, "method": method, "model": name}
    config = resume_config(folder, own | given) if resume else None
    config = config or TrainConfig.make(recipe, **own, **given)
    pixels = preprocessing(facts.backbone, config)
    told = {"num_classes": facts.num_classes, "task": config.task, "pixels": pixels}
    split: dict[str, Any] = {
        name: None if data is None and name != "train" else given_split(name, data, **told)
        for name, data in (("train", train), ("validation", val), ("test", test))
    }
    split |= same_classes(split, class_names, getattr(model, "class_names", None))

    def parts() -> Parts:
        seed_everything(config.seed)
        classes = split["train"].class_names
        if classes and facts.num_classes and len(classes) != facts.num_classes:
            raise UserError(
                f"fit: the head of the model has {facts.num_classes} classes, the data have "
                f"{len(classes)}: give the model num_classes={len(classes)}."
            )
        splits = Splits(
            split["train"], split["validation"], split["test"], facts.num_classes, classes
        )
        # a head that was trained, loaded or given by somebody stays as it is
        return Parts(splits, model, pixels, fresh="head_init" in options or is_new(facts.head))

    where = torch.device(device) if device is not None else next(model.parameters()).device
    try:
        summary = run(config, folder, parts, where, resume, show)
    except Interrupted as stop:
        again = f"pgn_fast.fit(model, train, ..., output={str(folder)!r}, resume=True)"
        raise stop.continued_by(again) from stop
    state = checkpoints.load(folder)
    assert state is not None
    return RunResult(
        folder,
        summary["best_epoch"],
        summary["train"],
        summary["validation"],
        summary["test"],
        state["record"]["history"],
        summary,
    )
