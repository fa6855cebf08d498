"""Tasks for NVIDIA's Triton Inference Server: a folder for its python backend, and what runs there.

``write_model`` writes the folder, ``TritonTasks`` is the model in it. Triton loads it in a Python
that has this package; requests that Triton has put together are one batch here, whatever their
tasks are.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..adapters import CONFIG_FILE, WEIGHTS_FILE
from ..errors import UserError
from ..images import UnreadableImage, read_image
from .errors import ApiError
from .load import load_served_tasks

_TASKS = "tasks"
PARAMETERS = ("model", "model_kwargs", "pretrained_path", "strict_backbone")
_MODEL = '''\
"""Trained tasks on one frozen backbone, for Triton's python backend (pgn_fast {version})."""

from pathlib import Path

from pgn_fast.serve.triton import TritonTasks


class TritonPythonModel(TritonTasks):
    folder = Path(__file__).parent / "{tasks}"
'''
_CONFIG = """\
# {count} of pgn_fast {version}; the model's name is that of this folder
backend: "python"
max_batch_size: {max_batch}
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
input [
  {{ name: "images" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "task" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "logits" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "label" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "probability" data_type: TYPE_FP32 dims: [ 1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_AUTO }} ]
"""
_PARAMETER = "parameters {{ key: {key} value: {{ string_value: {value} }} }}\n"


def write_model(
    folder: Path,
    adapters: Mapping[str, Path],
    *,
    parameters: Mapping[str, str] | None = None,
    max_batch: int = 32,
) -> None:
    """Write the folder of a Triton model; it is there whole, or not at all.

    Args:
        folder: a new one inside of a model repository; its name is the model's.
        adapters: name of a task → its adapter, which has been looked at. They are copied.
        parameters: of ``TritonTasks``, for the configuration.
        max_batch: images that Triton puts together.

    Raises:
        UserError: the folder is there already.
        OSError: it could not be written.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; name a new folder, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    waiting = folder.with_name(f".{folder.name}.{os.getpid()}")
    version = waiting / "1"
    try:
        for name, adapter in adapters.items():
            (version / _TASKS / name).mkdir(parents=True)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                if (adapter / file).exists():
                    shutil.copyfile(adapter / file, version / _TASKS / name / file)
        (version / "model.py").write_text(_MODEL.format(version=__version__, tasks=_TASKS))
        count = f"{len(adapters)} task{'s' * (len(adapters) != 1)}"
        config = _CONFIG.format(count=count, version=__version__, max_batch=max_batch)
        for key, value in (parameters or {}).items():
            config += _PARAMETER.format(key=_quoted(key), value=_quoted(value))
        (waiting / "config.pbtxt").write_text(config, encoding="utf-8")
        waiting.rename(folder)
    finally:
        shutil.rmtree(waiting, ignore_errors=True)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class TritonTasks:
    """A model of Triton's python backend that answers for the tasks of a folder.

    Input ``images``, encoded images (B, 1), and ``task``, their tasks' names (B, 1), which may be
    left out where there is one. Outputs ``logits`` (B, C), ``label`` and ``probability`` (B, 1) of
    the most probable class. The tasks of one request have the same C; those of a batch need not.

    Parameters of the model's configuration, all of them optional: ``model``, the backbone where it
    is not the one that the adapters name, ``model_kwargs`` as JSON, ``pretrained_path``, a file
    with its weights, and ``strict_backbone``, "false" for adapters of other weights.

    Attributes:
        folder: one sub-folder a task.
    """

    folder: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        given = {n: v["string_value"] for n, v in (config.get("parameters") or {}).items()}
        if unknown := sorted(set(given) - set(PARAMETERS)):
            raise UserError(
                f"config.pbtxt: {', '.join(unknown)} is no parameter of this model; known: "
                f"{', '.join(PARAMETERS)}."
            )
        device = "cpu"
        if args.get("model_instance_kind") == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        kwargs: dict[str, Any] = json.loads(given.get("model_kwargs") or "{}")
        if path := given.get("pretrained_path"):
            kwargs["pretrained_cfg_overlay"] = {"file": path}
        self._tasks = load_served_tasks(
            self.folder,
            model=given.get("model"),
            device=device,
            watch_s=0,
            strict_backbone=given.get("strict_backbone") != "false",
            **kwargs,
        )
        if self._tasks.failed:
            raise UserError(" ".join(self._tasks.failed))
        self._tasks.warm_up(int(config.get("max_batch_size") or 1))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        # Triton brings it; it is on no registry
        pb_utils = importlib.import_module("triton_python_backend_utils")
        answers: list[Any] = [None] * len(requests)
        waiting: list[tuple[int, list[Any], list[str | None]]] = []
        for number, request in enumerate(requests):
            try:
                waiting.append((number, *self._read(pb_utils, request)))
            except (ValueError, ApiError) as error:
                answers[number] = str(error)
        images = [image for _, some, _ in waiting for image in some]
        tasks = [task for _, _, some in waiting for task in some]
        logits = iter(self._tasks.answer(images, tasks) if images else ())
        for number, some, names in waiting:
            answers[number] = [(next(logits), name) for _, name in zip(some, names, strict=True)]
        return [
            self._response(pb_utils, request, answer)
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _read(self, pb_utils: Any, request: Any) -> tuple[list[Any], list[str | None]]:
        """A request's images and tasks, each of which can be answered."""
        encoded = pb_utils.get_input_tensor_by_name(request, "images").as_numpy().reshape(-1)
        asked = pb_utils.get_input_tensor_by_name(request, "task")
        tasks: list[str | None] = [None] * len(encoded)
        if asked is not None:
            tasks = [name.decode() for name in asked.as_numpy().reshape(-1)]
        if len(tasks) != len(encoded):
            raise ValueError(f"{len(encoded)} images and {len(tasks)} tasks: give one each")
        sizes = {task: len(self._tasks.labels(task)) for task in set(tasks)}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{task} {count}" for task, count in sorted(sizes.items()))
            raise ValueError(
                f"tasks of different numbers of classes ({listed}): ask for them apart"
            )
        images = []
        for number, data in enumerate(encoded):
            try:
                images.append(read_image(bytes(data)))
            except UnreadableImage as error:
                raise ValueError(f"image {number}: {error}") from error
        return images, tasks

    def _response(self, pb_utils: Any, request: Any, answer: Any) -> Any:
        if isinstance(answer, str):
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(answer))
        logits = torch.stack([vector for vector, _ in answer])
        probability, best = logits.softmax(dim=1).max(dim=1)
        names = {task: self._tasks.labels(task) for task in {task for _, task in answer}}
        labels = [names[task][i] for (_, task), i in zip(answer, best.tolist(), strict=True)]
        found = {
            "logits": logits.numpy(),
            "label": np.array([[label.encode()] for label in labels], dtype=object),
            "probability": probability.numpy()[:, None],
        }
        wanted = request.requested_output_names()
        tensors = [pb_utils.Tensor(name, found[name]) for name in found if name in wanted]
        return pb_utils.InferenceResponse(output_tensors=tensors)
