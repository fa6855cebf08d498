"""Export as a command: the file runs elsewhere, takes any batch, names its classes, and agrees."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from small_world import tiny_vit

import pgn_fast
from pgn_fast import cli
from pgn_fast.errors import UserError
from pgn_fast.export import export

CLASSES = ['a "b"', "käse\n日本", "🦒,;\\<&>"]
PIXELS = torch.randint(0, 256, (17, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


def small(kind="vpt", **options):
    if kind == "vpt":
        model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2, **options)
    elif kind == "linear":
        model = pgn_fast.models.LinearProbe(tiny_vit(), 3)
    else:
        options = {"channels": 4, "groups": 2}
        model = pgn_fast.PGN(
            tiny_vit(), 3, num_prompts=2, library_size=4, resolution=16, generator_kwargs=options
        )
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)
    model.class_names = CLASSES
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
        about = {
            n: v if n in ("pgn_fast_version", "task") else json.loads(v) for n, v in about.items()
        }
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), about
    openvino = pytest.importorskip("openvino")
    graph = openvino.Core().read_model(str(path))
    names = ("class_names", "preprocessing")
    about = {n: json.loads(graph.get_rt_info(["pgn_fast", n]).value) for n in names}
    about["task"] = graph.get_rt_info(["pgn_fast", "task"]).value
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
    assert about["class_names"] == CLASSES and about["task"] == "multiclass"
    assert about["preprocessing"]["inside"] is inside
    with torch.no_grad():
        for count in (1, 3, 17):
            images = PIXELS[:count] if inside else normalized(PIXELS[:count])
            expected = model(normalized(PIXELS[:count]))
            assert torch.allclose(run(images), expected, atol=1e-4)
    left = {"model.xml": {"model.xml", "model.bin"}}.get(name, {name})
    assert set(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("kind", ["linear", "multilabel", "int8", "zero_shot", "kept"])
def test_other_models(kind, tmp_path):
    if kind == "linear":
        model = small("linear")
    elif kind == "int8":
        model = small(fast={"weights": "int8"})
    elif kind == "zero_shot":
        vit = tiny_vit()
        words = torch.nn.functional.normalize(torch.randn(3, vit.num_features), dim=1)
        model = pgn_fast.VPT(vit, head="zero_shot", class_embeddings=words, num_prompts=2).eval()
    elif kind == "kept":
        model = pgn_fast.VPT(tiny_vit(), head="keep", num_prompts=2).eval()
    else:
        model = small()
        model.task = kind
    parity = export(model, tmp_path / "model.pt2", "pt2", preprocessing_inside=True)
    assert parity.equal_argmax == 256 and parity.error <= 1e-5
    run, about = runner(tmp_path / "model.pt2")
    assert about["task"] == ("multilabel" if kind == "multilabel" else "multiclass")
    assert run(PIXELS[:3]).shape == (3, model.num_classes)


def not_finite():
    model = small()
    model.head.bias.data[0] = float("nan")
    return model


def two_channels():
    model = small()
    model.preprocessing = {"mean": [0.1, 0.2], "std": [1.0, 1.0]}
    return model


@pytest.mark.parametrize(
    "build, name, format, told",
    [
        (small, "m.pt2", "tflite", "format='tflite'; known: onnx, pt2, openvino"),
        (small, "m.pt2", ["pt2"], r"format=\['pt2'\]; known"),
        (small, "m.onnx", "pt2", r"path='.*m\.onnx': a file of format 'pt2' ends in \.pt2"),
        (small, "", "pt2", r"ends in \.pt2"),
        (small, "nowhere/m.pt2", "pt2", "there is no folder .*nowhere"),
        (small, "file/m.pt2", "pt2", "there is no folder .*file"),
        (small, "folder.pt2", "pt2", r"folder\.pt2 is a folder"),
        (lambda: small().double(), "m.pt2", "pt2", r"cls_token is torch\.float64 on cpu.*float32"),
        (lambda: small().bfloat16(), "m.pt2", "pt2", r"torch\.bfloat16 on cpu; export takes"),
        (lambda: small().to("meta"), "m.pt2", "pt2", "on meta"),
        (tiny_vit, "m.pt2", "pt2", "model is a VisionTransformer; export takes a PGN"),
        (not_finite, "m.pt2", "pt2", r"head\.bias has numbers that are not finite"),
        (two_channels, "m.pt2", "pt2", "mean has 2 numbers, the backbone has 3 channels"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(build, name, format, told, tmp_path):
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=told) as raised:
        export(build(), tmp_path / name, format)
    assert "\n" not in str(raised.value) and sorted(os.listdir(tmp_path)) == before


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied", "a name of our own")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(UserError, match=r"m\.pt2: the folder .* written to: Permission denied\.$"):
        export(small(), tmp_path / "m.pt2", "pt2")


def test_more_than_onnx_holds(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("pgn_fast.export._LARGEST_ONNX", 1000)
    with pytest.raises(UserError, match="GiB, an ONNX file holds at most 2 GiB; format='pt2'"):
        export(small(), tmp_path / "m.onnx", "onnx")


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_half_a_file_is_not_left(error, tmp_path, monkeypatch):
    def broken(model, images, path, about):
        path.write_bytes(b"half")
        raise error("no operator\nof this kind\n")

    monkeypatch.setitem(sys.modules["pgn_fast.export"]._WRITERS, "pt2", broken)
    (tmp_path / "model.pt2").write_bytes(b"old")
    model = small().train()
    with pytest.raises((UserError, OSError), match="no operator") as raised:
        export(model, tmp_path / "model.pt2", "pt2")
    if error is RuntimeError:
        assert str(raised.value) == ("the model cannot be written as pt2: no operator of this kind")
    assert (tmp_path / "model.pt2").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pt2"] and model.training


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
    assert "ends in .pt2" in capsys.readouterr().err
    assert cli.main([*given, "--output", str(tmp_path / "nowhere" / "model.pt2")]) == 2
    assert cli.main([*given, "--report", str(tmp_path / "nowhere" / "report.json")]) == 2
    assert capsys.readouterr().err.count("there is no folder") == 2
    assert cli.main(["export", str(tmp_path / "nothing"), "--format", "pt2"]) == 2
    assert "no adapter: there is no folder" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["export", str(tmp_path / "run")]) == 2
    assert "pip install 'pgn_fast[onnx]'" in capsys.readouterr().err
