"""Export as a command: the file runs elsewhere, takes any batch, names its classes, and agrees."""

from __future__ import annotations

import json
import os

import pytest
import torch
from small_world import tiny_vit

import pgn_fast
from pgn_fast import cli
from pgn_fast.errors import UserError
from pgn_fast.export import export

PIXELS = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


def small(kind="vpt"):
    if kind == "vpt":
        model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2)
    else:
        options = {"channels": 4, "groups": 2}
        model = pgn_fast.PGN(
            tiny_vit(), 3, num_prompts=2, library_size=4, resolution=16, generator_kwargs=options
        )
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)
    model.class_names = ["a", "b", "c"]
    model.preprocessing = {
        "input_size": [3, 16, 16],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    return model.eval()


def normalized(pixels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    return (pixels / 255 - mean) / std


def runner(path):
    """The file's logits, and its metadata, by its own runtime."""
    if path.suffix == ".pt2":
        extra = {"about": ""}
        program = torch.export.load(path, extra_files=extra).module()
        return program, json.loads(extra["about"])
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        about = session.get_modelmeta().custom_metadata_map
        about = {n: v if n == "pgn_fast_version" else json.loads(v) for n, v in about.items()}
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), about
    openvino = pytest.importorskip("openvino")
    graph = openvino.Core().read_model(str(path))
    names = ("class_names", "preprocessing")
    about = {n: json.loads(graph.get_rt_info(["pgn_fast", n]).value) for n in names}
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy()), about


@pytest.mark.parametrize(
    "kind, name, inside",
    [
        ("vpt", "model.pt2", True),
        ("vpt", "model.onnx", False),
        ("pgn", "model.onnx", True),
        ("vpt", "model.xml", True),
    ],
)
def test_the_file_equals_the_model(kind, name, inside, tmp_path):
    formats = {"onnx": "onnx", "pt2": "pt2", "xml": "openvino"}
    format = formats[name.rpartition(".")[2]]
    if format == "openvino":
        pytest.importorskip("openvino")
    model, path = small(kind), tmp_path / name
    parity = export(model, path, format, preprocessing_inside=inside)
    assert (parity.images, parity.equal_argmax) == (256, 256) and parity.error <= 1e-5
    run, about = runner(path)
    assert about["class_names"] == ["a", "b", "c"]
    assert about["preprocessing"]["inside"] is inside
    with torch.no_grad():
        for count in (1, 5):
            images = PIXELS[:count] if inside else normalized(PIXELS[:count])
            expected = model(normalized(PIXELS[:count]))
            assert torch.allclose(run(images), expected, atol=1e-4)
    left = {"model.xml": {"model.xml", "model.bin"}}.get(name, {name})
    assert set(os.listdir(tmp_path)) == left


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    from pgn_fast import export as module

    def wrong(model, images, path, about):
        path.write_bytes(b"x")
        return lambda x: model(x) * 1.01

    monkeypatch.setitem(module._WRITERS, "pt2", wrong)
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(UserError, match=r"differs from the model by 1\.0e-02"):
        export(small(), tmp_path / "model.pt2", "pt2")
    assert (tmp_path / "model.pt2").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pt2"]


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    model = pgn_fast.VPT("pgn_demo_vit", 10, num_prompts=1)
    model.save_pretrained(tmp_path / "run" / "best")
    report = tmp_path / "report.json"
    given = ["export", str(tmp_path / "run"), "--format", "pt2", "--preprocessing-inside"]
    assert cli.main([*given, "--report", str(report)]) == 0
    assert "of 256 random images in the same class" in capsys.readouterr().out
    assert (tmp_path / "run" / "best" / "model.pt2").is_file()
    assert json.loads(report.read_text())["images"] == 256
    assert cli.main([*given, "--output", str(tmp_path / "model.onnx")]) == 2
    assert cli.main([*given, "--output", str(tmp_path / "nowhere" / "model.pt2")]) == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["export", str(tmp_path / "run")]) == 2
    assert "pip install 'pgn_fast[onnx]'" in capsys.readouterr().err


def test_a_model_on_another_device_is_told_the_way(tmp_path):
    with pytest.raises(UserError, match=r"on the CPU, this one is on meta: model\.cpu\(\)"):
        export(torch.nn.Linear(3, 2, device="meta"), tmp_path / "model.pt2", "pt2")
