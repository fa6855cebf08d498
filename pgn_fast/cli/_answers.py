"""What ``predict`` asks of images: one adapter, or every task of a folder; and its table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..adapters.places import fetch_adapter
from ..cuda_graphs import graphed_forward
from ..errors import UserError, as_user_error
from ..serve.load import adapters_in, first_shared, load_served_tasks
from ..serve.tasks import ServedTasks
from ..train.evaluation import Autocast
from ..train.loader import eval_transform
from ..train.tables import Columns, Row, TaskColumns, digest_of_files
from ._options import adapter_backbone, adapter_folder, load_adapter


class OneAdapter:
    """The logits of one adapter.

    Attributes:
        transform: upright RGB image → what ``rows`` takes a batch of.
        columns: of the table.
        digest: changes where the adapter is another one.
        failed: why parts of what was asked for are left out.
    """

    failed: Sequence[str] = ()

    def __init__(self, args: argparse.Namespace, kind: str, device: torch.device) -> None:
        self._device = device
        model = load_adapter(args).to(device)
        autocast = Autocast(device, args.amp, args.amp_dtype)
        self._forward = graphed_forward(model, autocast, partial(print, file=sys.stderr))
        self._model = model
        self._names = self._model.class_names or list(map(str, range(self._model.num_classes)))
        topk = min(args.topk, len(self._names))
        self.columns = Columns(kind, topk, self._names if args.logits else None)
        self.transform = eval_transform(self._model.preprocessing)
        folder = Path(adapter_folder(args.adapter))
        self.digest = digest_of_files(sorted(folder.iterdir()) if folder.is_dir() else [folder])

    def rows(self, pixels: Tensor, files: Sequence[str]) -> Iterator[Row]:
        """A batch that went through ``transform``, and the images' names, to a row each."""
        logits = self._forward(pixels.to(self._device)).float()
        several = getattr(self._model, "task", None) == "multilabel"
        probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
        whole = self.columns.logits is not None
        answers = _answers(logits, probabilities, self._names, self.columns.topk, whole)
        for file, answer in zip(files, answers, strict=True):
            yield {"file": file, **answer}


class EveryTask:
    """The logits of every task of a folder, on one backbone; see ``OneAdapter``."""

    def __init__(self, args: argparse.Namespace, kind: str, device: torch.device) -> None:
        self._tasks = load_tasks(args.tasks, args, device)
        self._topk, self._logits = args.topk, args.logits
        self._autocast = Autocast(device, args.amp, args.amp_dtype)
        self._alike = self._tasks.alike()
        self.failed = self._tasks.failed
        self.transform = Geometries([p.geometry for p, _ in self._alike])
        self._shapes = [p.data_config["input_size"] for p, _ in self._alike]
        self._names = {name: self._tasks.labels(name) for name in self._tasks.tasks()}
        table = args.table or "wide"
        self.columns = TaskColumns(kind, args.topk, self._names, args.logits, table)
        # a task that could not be loaded, too: once it can be, the table is another one
        folders = adapters_in(args.tasks).values()  # and where a link leads to
        self.digest = digest_of_files([p for f in folders for p in sorted(f.glob("adapter_*"))])

    def rows(self, pixels: Tensor, files: Sequence[str]) -> Iterator[Row]:
        parts = pixels.split([c * h * w for c, h, w in self._shapes], dim=1)
        work = [
            (preprocessing, list(part.reshape(-1, *shape).numpy()), tasks)
            for (preprocessing, tasks), part, shape in zip(
                self._alike, parts, self._shapes, strict=True
            )
        ]
        with self._autocast():
            found = self._tasks.run_every(work)
        answers = {
            name: list(
                _answers(
                    found[name], found[name].softmax(1), self._names[name], self._topk, self._logits
                )
            )
            for name in self._names
        }
        for number, file in enumerate(files):
            yield {"file": file, "tasks": {name: each[number] for name, each in answers.items()}}


class Geometries:
    """An image's levels after several resizes and crops, one after the other in one vector."""

    def __init__(self, geometries: Sequence[Any]) -> None:
        self.geometries = geometries

    def __call__(self, image: Image.Image) -> Tensor:
        levels = (torch.from_numpy(g(image).copy()).reshape(-1) for g in self.geometries)
        return torch.cat(list(levels))


def load_tasks(
    place: str, args: argparse.Namespace, device: torch.device, **options: Any
) -> ServedTasks:
    """What was trained, on the backbone that the flags, a run or the adapters name.

    Args:
        place: an adapter, a run, a folder of them, or OWNER/NAME on the hub.
        options: of ``load_served_tasks``.

    Raises:
        UserError: nothing there can be loaded.
    """
    adapters = adapters_in(place) if fetch_adapter(place).is_dir() else {}
    found = None
    if adapters:
        first, config = first_shared(list(adapters.values()))
        found = adapter_backbone(first, config, args)
    elif args.model:
        found = args.model, args.model
        options |= args.model_kwargs
    backbone, name = found or (None, None)
    with as_user_error(RuntimeError, TypeError):
        return load_served_tasks(
            place,
            model=backbone,
            name=name,
            device=device,
            strict_backbone=args.strict_backbone,
            **options,
        )


def _answers(
    logits: Tensor, probabilities: Tensor, names: Sequence[str], topk: int, whole: bool
) -> Iterator[Row]:
    """Logits (B, C) to {"predictions": [{"class", "index", "probability"}, ...], "logits"?}."""
    best = probabilities.topk(min(topk, logits.shape[1]), dim=1)
    for values, classes, scores in zip(
        best.values.tolist(), best.indices.tolist(), logits.tolist(), strict=True
    ):
        predictions = [
            {"class": names[c], "index": c, "probability": round(p, 6)}
            for p, c in zip(values, classes, strict=True)
        ]
        yield {"predictions": predictions} | ({"logits": scores} if whole else {})


def check_table(args: argparse.Namespace, kind: str) -> None:
    """Flags that only make sense together.

    Raises:
        UserError: they were given apart.
    """
    if args.tasks is None and args.table is not None:
        raise UserError("--table says how --tasks DIR is written: give both, or neither.")
    if args.table == "long" and args.logits and kind == "csv":
        raise UserError(
            "--logits: tasks have classes of their own, which no column of a long CSV fits; give "
            "--format jsonl, or --table wide."
        )
