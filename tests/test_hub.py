"""Adapters to and from the hub: the real client against a stand-in of its HTTP API."""

from __future__ import annotations

import json
import re

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from hub_server import hub_in_use
from small_world import MODEL, SIZES, tiny_vit, transformers_of_the_twins
from timm.models import save_for_hf

import pgn_fast
from pgn_fast import cli, hub
from pgn_fast.adapters import CONFIG_FILE, WEIGHTS_FILE
from pgn_fast.backbone.load import load_backbone, load_recorded
from pgn_fast.errors import UserError

IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_in_use(monkeypatch, tmp_path / "cache") as stand_in:
        yield stand_in


def test_there_and_back(server):
    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2).eval()
    model.class_names = ["a", "b", "c"]
    address = model.push_to_hub("me/pets", private=True, commit_message="First")
    assert "/me/pets/commit/" in address
    made = server.created[0]
    assert made.get("visibility", made.get("private")) in ("private", True)
    assert server.messages == ["First"]
    assert set(server.files["me/pets"]) == {"README.md", CONFIG_FILE, WEIGHTS_FILE}
    again = pgn_fast.from_pretrained("me/pets", tiny_vit())
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    assert again.class_names == ["a", "b", "c"]
    assert isinstance(pgn_fast.VPT.from_pretrained("me/pets@main", tiny_vit()), pgn_fast.VPT)
    with pytest.raises(ValueError, match="holds a VPT, not a PGN"):
        pgn_fast.PGN.from_pretrained("me/pets", tiny_vit())
    assert model.push_to_hub("me/pets", create_pr=True).endswith("/discussions/1")


def test_the_card_says_what_it_is(server, tmp_path):
    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2)
    summary = {
        "config": {"data": "/home/somebody/secret/photos"},
        "chosen_by": "validation top-1",
        "validation": {"split": "/home/somebody/x", "images": 40, "top1": 87.5, "loss": 0.4},
        "test": {"split": "/home/somebody/y", "images": 100, "top1": 85.0, "loss": 0.5},
    }
    model.push_to_hub("me/pets", summary=summary)
    card = huggingface_hub.ModelCard(server.files["me/pets"]["README.md"].decode())
    assert card.data.library_name == "pgn_fast" and "vpt-deep" in card.data.tags
    assert card.data.base_model.startswith("timm/vit_tiny_patch16_224")
    scores = {r.dataset_split: r.metric_value for r in card.data.eval_results}
    assert scores == {"validation": 0.875, "test": 0.85}
    for said in ("vpt-deep", "photos", "| test | 100 | 85.00 % |", 'from_pretrained("me/pets")'):
        assert said in card.text
    assert "somebody" not in card.content


def test_what_the_hub_refuses_is_one_sentence(server, tmp_path, capsys):
    server.gated.add("owner/gated")
    server.files["owner/empty"] = {"README.md": b"nothing"}
    for name, said in (
        ("owner/gated", r"owner/gated: access is granted by its owners.*HF_TOKEN"),
        ("owner/missing", r"owner/missing: the hub has no such repository, or it is private"),
        ("owner/empty", r"owner/empty: the repository has no adapter_config\.json"),
    ):
        with pytest.raises(hub.HubError, match=said):
            pgn_fast.from_pretrained(name, tiny_vit())
        assert cli.main(["eval", name, "digits"]) == 2
        assert re.search(said, capsys.readouterr().err)
    with pytest.raises(UserError, match="give OWNER/NAME"):
        pgn_fast.VPT(tiny_vit(), 3, num_prompts=1).push_to_hub("just-a-name")


def truncated(handler):
    handler.send_response(200)
    for name, value in {
        "Content-Length": "99999",
        "ETag": '"x"',
        "X-Repo-Commit": "a" * 40,
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(b"{")
    handler.close_connection = True


FAULTS = {
    "400": (lambda h: h.send(400, b"<html>no</html>"), "answers, but not with it: .*400"),
    "no headers of the hub": (lambda h: h.send(200, b"{}"), "answers, but not with it: "),
    "revision": (
        lambda h: h.send(404, b"", X_Error_Code="RevisionNotFound"),
        "the repository has no such revision",
    ),
    "in a circle": (lambda h: h.send(302, b"", Location=h.path), "answers, but not with it: .*20"),
    "half": (truncated, "answers, but not with it: .*complete"),
    "out of the cache": (
        lambda h: h.send(200, b"{}", ETag='"x"', X_Repo_Commit="../../../../outside"),
        "answers, but not with it: .*pointer path",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_answers_wrongly_is_one_sentence(fault, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's between its attempts
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    answer, said = FAULTS[fault]
    server.files["me/pets"] = {}
    server.faults["me/pets"] = answer
    assert cli.main(["verify", "me/pets", "--no-scores"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"pgn-fast verify: error: .*me/pets: .*{said}", told) and len(told) < 500
    assert cli.main(["train", "digits", "--model", "me/pets", "--output", str(tmp_path / "r")]) == 2
    assert re.search(f"pgn-fast train: error: .*me/pets: .*{said}", capsys.readouterr().err)
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("me/" + "x" * 100, "there is no folder me/xxx"),
        ("mé/gööd", "there is no folder mé/gööd"),
        ("my pets/good ones", "there is no folder my pets/good ones"),
        ("me/pets@a b", "there is no folder me/pets@a b"),
        ("https://huggingface.co/me/pets", "there is no folder"),
    ],
)
def test_what_is_no_repositorys_id_is_a_folder(name, said, server, capsys):
    assert cli.main(["verify", name]) == 2
    error = capsys.readouterr().err
    assert said in error and "hub" not in error.replace("huggingface", "") and error[-1] == "\n"
    assert error.count("\n") == 1


def test_a_folder_comes_before_a_repository_of_its_name(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "pets").mkdir(parents=True)
    server.files["me/pets"] = {"README.md": b"of the hub"}
    for words in (["verify", "me/pets"], ["train", "digits", "--model", "me/pets"]):
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "me/pets" in error and "repository" not in error
    assert cli.main(["train", "digits", "--model", "local-dir:"]) == 2
    assert "after it comes the path of a folder" in capsys.readouterr().err


def test_an_adapter_of_a_stranger_is_one_sentence(server, capsys):
    pgn_fast.VPT("pgn_demo_vit", 3, num_prompts=1).push_to_hub("me/pets")
    config = json.loads(server.files["me/pets"][CONFIG_FILE])
    for wrong in (
        b"",
        b"{nope",
        b"[1]",
        b"[" * 100_000,
        b"\xff\xfe{",
        b"{" + b" " * 5_000_000 + b"}",
        {**config, "base_model_name_or_path": "/etc/passwd"},
        {**config, "base_model_name_or_path": "file:///etc/passwd"},
        {**config, "base_model_name_or_path": "evil/\u202eother\x1b[31m"},
        {**config, "method": {"a": 1}},
    ):
        raw = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
        server.files["me/pets"][CONFIG_FILE] = raw
        assert cli.main(["verify", "me/pets", "--no-scores"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "adapter_config.json" in error and "\x1b" not in error


def test_a_pickle_in_a_repository_is_not_opened(server):
    pgn_fast.VPT(tiny_vit(), 3, num_prompts=1).push_to_hub("me/pets")
    server.files["me/pets"][WEIGHTS_FILE] = b"PK\x03\x04 not safetensors"
    with pytest.raises(UserError):
        pgn_fast.from_pretrained("me/pets", tiny_vit())


def test_a_backbone_from_the_hub(server, tmp_path):
    vit = timm.create_model(MODEL, num_classes=3, **SIZES)
    save_for_hf(vit, str(tmp_path / "vit"), model_args=SIZES, safe_serialization=True)
    server.files["me/vit"] = {p.name: p.read_bytes() for p in (tmp_path / "vit").iterdir()}
    for name in ("me/vit", "hf-hub:me/vit"):
        backbone = load_backbone(name)
        assert torch.equal(backbone.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    # recorded by its id, so that another machine finds the same weights
    pgn_fast.VPT(backbone, 2, num_prompts=1).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "me/vit"
    again = load_recorded("me/vit")
    assert torch.equal(again.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    # a stranger's file does not make a pickle be read
    server.files["me/vit2"] = {**server.files["me/vit"], "pytorch_model.bin": b"\x80\x02."}
    del server.files["me/vit2"]["model.safetensors"]
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_recorded("me/vit2")


def test_a_transformers_backbone_from_the_hub(server, tmp_path):
    transformers = transformers_of_the_twins()
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    original = transformers.Dinov2Model(config).eval()
    original.save_pretrained(tmp_path / "model")
    settings = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 16, "width": 16},
        "do_center_crop": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    server.files["me/dino"] = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    backbone = load_backbone("me/dino@main")
    assert backbone.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    with torch.no_grad():
        expected = original(IMAGES).last_hidden_state
        assert torch.allclose(backbone.forward_features(IMAGES), expected, atol=1e-5)
    assert backbone.origin.name == "me/dino@main"


def test_push_and_verify_from_the_command_line(server, tmp_path, capsys):
    run = tmp_path / "run"
    model = pgn_fast.VPT("pgn_demo_vit", 10, num_prompts=1)
    model.save_pretrained(run / "best")
    summary = {"config": {"data": "digits", "method": "vpt-deep"}, "chosen_by": "last epoch"}
    score = {"split": "digits", "images": 797, "top1": 99.0, "loss": 1.0}
    (run / "summary.json").write_text(json.dumps({**summary, "test": score}))

    assert cli.main(["push", str(run), "--card"]) == 0
    assert "99.00 %" in capsys.readouterr().out
    assert cli.main(["push", str(run), "me/digits"]) == 0
    assert "/me/digits/commit/" in capsys.readouterr().out
    assert cli.main(["push", str(run)]) == 2

    assert cli.main(["verify", "me/digits", "-j", "0"]) == 0
    assert "shapes fit" in capsys.readouterr().out
    assert cli.main(["verify", str(run), "-j", "0", "--device", "cpu"]) == 2
    found = re.search(r"top-1 ([\d.]+) %, recorded 99\.00 %: \d+ images", capsys.readouterr().err)
    score["top1"] = float(found[1])
    (run / "summary.json").write_text(json.dumps({**summary, "test": score}))
    assert cli.main(["verify", str(run), "-j", "0", "--device", "cpu"]) == 0
    assert "797 images" in capsys.readouterr().out

    tensors = safetensors.torch.load_file(run / "best" / WEIGHTS_FILE)
    tensors["head.bias"][0] += 1
    safetensors.torch.save_file(tensors, run / "best" / WEIGHTS_FILE)
    assert cli.main(["verify", str(run), "--no-scores"]) == 2
    assert "digest" in capsys.readouterr().err


def test_a_repository_is_served_and_added_to_a_folder_of_tasks(server, tmp_path, monkeypatch):
    from pgn_fast.serve import load_served_tasks

    model = pgn_fast.VPT("pgn_demo_vit", 3, num_prompts=1).eval()
    torch.nn.init.normal_(model.head.weight)
    model.push_to_hub("me/pets")
    tasks = load_served_tasks("me/pets@main")
    assert list(tasks.tasks()) == ["pets"]
    with pytest.raises(UserError, match=r"no folder me/dogs, and on the hub, me/dogs: the hub has"):
        load_served_tasks("me/dogs")
    seen = {}
    monkeypatch.setattr(
        "pgn_fast.serve.server.run_server", lambda served, *a, **k: seen.update(served=served)
    )
    assert cli.main(["serve", "me/pets", "--device", "cpu"]) == 0
    assert list(seen["served"].tasks()) == ["pets"]
    assert cli.main(["tasks", "add", str(tmp_path / "tasks"), "cats", "me/pets"]) == 0
    assert sorted(p.name for p in (tmp_path / "tasks" / "cats").iterdir()) == [
        CONFIG_FILE,
        WEIGHTS_FILE,
    ]
