"""A backbone by name: what a name means, what a stranger's file may name, and life offline."""

from __future__ import annotations

import json
import socket
import time

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_world import MODEL, SIZES, tiny_vit
from timm.models import save_for_hf

import pgn_fast
from pgn_fast import hub
from pgn_fast.adapters import CONFIG_FILE
from pgn_fast.backbone.load import BackboneName, load_backbone, load_recorded, parse_name
from pgn_fast.errors import UserError

NAMES = {
    "pgn_demo_vit": BackboneName("demo", "pgn_demo_vit"),
    "vit_tiny_patch16_224": BackboneName("timm", "vit_tiny_patch16_224"),
    "timm/vit_tiny_patch16_224.augreg_in21k": BackboneName(
        "timm", "vit_tiny_patch16_224.augreg_in21k"
    ),
    "hf-hub:timm/vit_tiny_patch16_224": BackboneName("timm", "vit_tiny_patch16_224"),
    "hf_hub:me/model@v1": BackboneName("hub", "me/model@v1"),
    "facebook/dinov2-base": BackboneName("hub", "facebook/dinov2-base"),
    "timm/of_a_later_release": BackboneName("hub", "timm/of_a_later_release"),
    "local-dir:some/where": BackboneName("folder", "some/where"),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_means(name):
    assert parse_name(name) == NAMES[name]


def test_a_folder_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_name("mine") == BackboneName("folder", "mine")
    assert parse_name(str(tmp_path)) == BackboneName("folder", str(tmp_path))
    # timm's names come before folders that happen to be called so
    (tmp_path / "vit_tiny_patch16_224").mkdir()
    assert parse_name("vit_tiny_patch16_224").kind == "timm"
    with pytest.raises(ValueError, match=r"no folder '\./nowhere'"):
        parse_name("./nowhere")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load_backbone(f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "local-dir:x",
        "/etc",
        "./weights",
        "../up",
        "a/../b",
        "C:\\weights",
        "a/b/c",
        "~/x",
        "hf-hub:/etc",
    ],
)
def test_a_file_may_not_name_a_path(name):
    with pytest.raises(UserError):
        parse_name(name, recorded=True)


def test_a_folder_that_lies_where_an_id_would_is_not_read_for_a_file(tmp_path, monkeypatch):
    (tmp_path / "me/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_name("me/model").kind == "folder"
    assert parse_name("me/model", recorded=True).kind == "hub"


def test_timms_folder(tmp_path):
    vit = timm.create_model(MODEL, num_classes=3, **SIZES)
    save_for_hf(vit, str(tmp_path), model_args=SIZES, safe_serialization=True)
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        backbone = load_backbone(name)
        assert torch.equal(backbone.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    # an adapter of it does not claim the weights of timm's own release
    pgn_fast.VPT(backbone, 2, num_prompts=1).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] is None


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=4,
    )
    original = transformers.ViTForImageClassification(config).eval()
    original.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"no image processor on this machine.*processor="):
        model = pgn_fast.VPT(str(tmp_path / "model"), head="keep", num_prompts=1)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = original(images).logits
        assert torch.allclose(model.backbone(images), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] is None
    with pytest.raises(UserError, match="does not name its backbone"):
        pgn_fast.from_pretrained(tmp_path / "adapter")


CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip


def clip_folder(path, projection):
    """A whole CLIP whose image tower's own configuration says another width than its file has."""
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 50, "projection_dim": 24}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**CLIP, "projection_dim": projection}, projection_dim=24
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(path)
    return model


@pytest.mark.filterwarnings("ignore:.*no image processor")
def test_a_file_that_is_not_of_its_configuration_is_refused_by_a_sentence(tmp_path, capfd):
    clip_folder(tmp_path / "other", 40)
    message = r"visual_projection\.weight is \(24, 32\) in its file, and \(40, 32\) by its config"
    with pytest.raises(ValueError, match=message):
        load_backbone(str(tmp_path / "other"))
    original = clip_folder(tmp_path / "same", 24)
    capfd.readouterr()  # of transformers, which saves
    twin = load_backbone(str(tmp_path / "same"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = original.get_image_features(images)
        expected = getattr(expected, "pooler_output", expected)
        assert torch.allclose(twin(images), expected, atol=1e-5)
    # the text tower's tensors were not read, and nobody has to be told
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:.*no image processor")
def test_weights_that_are_not_in_the_file_are_not_made_up(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in state if name.endswith("mlp.fc2.weight"))
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its file lacks .*mlp\.fc2\.weight of CLIPVisionModel"):
        load_backbone(str(tmp_path))


def test_a_twin_is_recorded_by_its_id(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    original = transformers.ViTModel(config)
    original.config._name_or_path = "somebody/vit"
    with pytest.warns(UserWarning, match="somebody/vit: no image processor"):
        pgn_fast.VPT(original, 2, num_prompts=1).save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"]
        == "somebody/vit"
    )


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub where nobody listens, and an empty cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return endpoint


@pytest.mark.parametrize(
    "name", ["facebook/dinov2-base", "hf-hub:me/model", "vit_tiny_patch16_224"]
)
def test_without_a_network_the_message_says_what_would_do(name, no_hub):
    with pytest.raises(RuntimeError, match=r"does not answer .*HF_ENDPOINT.*HF_HOME"):
        load_backbone(name)
    # the client's own retries would have switched the hub off for others
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_without_a_network_the_answer_is_quick(no_hub, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(hub.HubError):
        load_recorded("me/model")
    assert sum(slept) < 1, "the client tried again and again"


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pgn_fast\[hf\]'"):
        load_backbone(str(tmp_path))


def test_other_libraries_are_not_imported():
    import subprocess
    import sys

    code = (
        "import sys\nfrom pgn_fast.backbone.load import load_backbone\n"
        "load_backbone('pgn_demo_vit')\n"
        "print({'transformers', 'open_clip'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_ready_model_takes_no_options():
    with pytest.raises(ValueError, match="given with a model that is already there"):
        load_backbone(tiny_vit(), img_size=8)
