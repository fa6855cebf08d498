"""A model for Triton's python backend: what is written, loaded as Triton loads it, answers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from odd_images import encode
from serving import images
from test_serve_tasks import save_task

import pgn_fast
from pgn_fast import cli
from pgn_fast.backbone.load import load_backbone
from pgn_fast.serve import load_served_tasks


class Tensor:
    def __init__(self, name, values):
        self._name, self._values = name, values

    def name(self):
        return self._name

    def as_numpy(self):
        return self._values


class Response:
    def __init__(self, output_tensors, error=None):
        self.outputs = {t.name(): t.as_numpy() for t in output_tensors}
        self.error = None if error is None else error.text


class Error:
    def __init__(self, text):
        self.text = text


class Request:
    def __init__(self, pictures, tasks=None, outputs=("logits", "label", "probability")):
        self.tensors = {"images": _bytes(pictures)}
        if tasks is not None:
            self.tensors["task"] = _bytes([task.encode() for task in tasks])
        self._outputs = list(outputs)

    def requested_output_names(self):
        return self._outputs


def _bytes(values):
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


@pytest.fixture
def backend(monkeypatch):
    """What Triton puts beside a model, by its documented names."""
    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, Error
    module.get_input_tensor_by_name = lambda request, name: (
        Tensor(name, request.tensors[name]) if name in request.tensors else None
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def folder(tmp_path):
    backbone = load_backbone("pgn_demo_vit")
    torch.manual_seed(0)
    for name, classes in (("pets", 3), ("cars", 3), ("flowers", 5)):
        model = pgn_fast.VPT(backbone, classes, num_prompts=2)
        torch.nn.init.normal_(model.head.weight)
        save_task(tmp_path / "tasks" / name, model, ["x", "y", "z"] if name == "pets" else None)
    return tmp_path / "tasks"


def loaded(model):
    """The model as Triton imports and starts it."""
    spec = importlib.util.spec_from_file_location("triton_model", model / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (model / "config.pbtxt").read_text()
    parameters = {
        json.loads(key): {"string_value": json.loads(value)}
        for key, value in re.findall(r"key: (\".*?\") value: { string_value: (\".*\") }", text)
    }
    config = {"max_batch_size": 32, "parameters": parameters}
    found = module.TritonPythonModel()
    found.initialize({"model_config": json.dumps(config), "model_instance_kind": "CPU"})
    return found


def test_it_answers_what_the_tasks_say(folder, backend, capsys):
    output = folder.parent / "models" / "photos"
    words = ["export", str(folder), "--format", "triton", "--output", str(output)]
    assert cli.main(words) == 0
    assert "3 tasks on pgn_demo_vit" in capsys.readouterr().out
    assert [p.name for p in (folder.parent / "models").iterdir()] == ["photos"]
    model = loaded(output)
    pictures = images(6, (40, 36))
    encoded = [encode(picture) for picture in pictures]
    requests = [
        Request(encoded[:3], ["pets", "cars", "pets"]),
        Request(encoded[3:4], ["flowers"], outputs=["logits"]),
        Request([encoded[0], b"torn"], ["pets", "pets"]),
        Request(encoded[:1], ["pet"]),
        Request(encoded[:1]),
        Request(encoded[:2], ["pets", "flowers"]),
        Request(encoded[4:6], ["cars", "cars"]),
    ]
    answers = model.execute(requests)
    expected = load_served_tasks(folder, watch_s=0).every(pictures)

    def close(found, right):
        assert (torch.from_numpy(found) - right).abs().max() <= 1e-5 * right.abs().max()

    rows = [expected[name][i] for i, name in enumerate(["pets", "cars", "pets"])]
    close(answers[0].outputs["logits"], torch.stack(rows))
    labels = [
        names[int(row.argmax())] for names, row in zip(["xyz", "012", "xyz"], rows, strict=True)
    ]
    assert [label.decode() for label in answers[0].outputs["label"][:, 0]] == labels
    best = [float(row.softmax(0).max()) for row in rows]
    assert answers[0].outputs["probability"][:, 0].tolist() == pytest.approx(best, rel=1e-4)
    assert list(answers[1].outputs) == ["logits"]
    close(answers[1].outputs["logits"], expected["flowers"][3:4])
    assert answers[2].error.startswith("image 1: ")
    assert "the nearest are 'pets'" in answers[3].error
    assert "has 3 tasks; say which one" in answers[4].error
    assert "different numbers of classes (flowers 5, pets 3)" in answers[5].error
    close(answers[6].outputs["logits"], expected["cars"][4:6])


def test_a_single_adapter_needs_no_task(folder, backend):
    output = folder.parent / "pets"
    words = ["export", str(folder / "pets"), "--format", "triton", "--model", "pgn_demo_vit"]
    assert cli.main([*words, "--output", str(output)]) == 0
    assert (
        'key: "model" value: { string_value: "pgn_demo_vit" }'
        in (output / "config.pbtxt").read_text()
    )
    (answer,) = loaded(output).execute([Request([encode(images(1)[0])])])
    assert answer.error is None and answer.outputs["logits"].shape == (1, 3)


def test_what_would_fail_in_triton_is_refused_here(folder, capsys):
    def refused(*words):
        assert cli.main(["export", str(folder), "--format", "triton", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 or "a task was not loaded" in error
        return error

    assert "--output MODELS/NAME is needed" in refused()
    assert "is there already" in refused("--output", str(folder))
    assert "--report compares" in refused("--output", str(folder / "x"), "--report", "r.json")
    weights = folder / "cars" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    output = folder.parent / "models"
    assert "cars" in refused("--output", str(output / "photos"))
    assert not output.exists()


def test_unknown_parameters_are_refused(folder, backend):
    output = folder.parent / "photos"
    assert cli.main(["export", str(folder), "--format", "triton", "--output", str(output)]) == 0
    with (output / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "modell" value: { string_value: "x" } }\n')
    with pytest.raises(ValueError, match=r"modell is no parameter of this model; known: model,"):
        loaded(output)
