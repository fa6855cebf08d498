"""Checkpoints of other people's trainers: the adapter alone, beside the backbone that it knows."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from small_world import tiny_vit
from torch import nn

import pgn_fast
from pgn_fast.backbone.digest import backbone_digest
from pgn_fast.errors import UserError
from pgn_fast.models import FineTuned, LinearProbe

IMAGES = torch.linspace(-2, 2, 8 * 3 * 16 * 16).reshape(8, 3, 16, 16).sin()


def prompted(seed=0):
    torch.manual_seed(0)
    return pgn_fast.VPT(tiny_vit(seed), 3, num_prompts=2, dropout=0.1)


def test_the_state_is_what_is_trained():
    model = prompted()
    state = model.state_dict()
    assert set(state) == {*model.adapter_state_dict(), "_extra_state"}
    assert {"prompter.prompts", "head.weight", "head.bias"} <= set(state)
    other = prompted()
    nn.init.normal_(other.head.weight)
    assert list(other.load_state_dict(state)) == [[], []]
    assert torch.equal(other.head.weight, model.head.weight)
    # a whole state is taken, too, and a missing trained tensor is missed
    whole = {**state, **{f"backbone.{n}": t for n, t in model.backbone.state_dict().items()}}
    assert list(other.load_state_dict(whole)) == [[], []]
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        other.load_state_dict(state)
    assert other.load_state_dict(state, strict=False).missing_keys == ["head.bias"]


def test_it_survives_a_copy():
    model = prompted()
    again = copy.deepcopy(model)
    assert set(again.state_dict()) == set(model.state_dict())
    assert list(again.load_state_dict(model.state_dict())) == [[], []]


def test_other_frozen_weights_are_refused():
    with pytest.raises(UserError, match=r"digest [0-9a-f]{12}; this one has [0-9a-f]{12}, other"):
        prompted(seed=1).load_state_dict(prompted().state_dict())


def test_a_whole_state_brings_its_backbone():
    model, other = prompted().eval(), prompted(seed=1).eval()
    frozen = {f"backbone.{n}": t for n, t in model.backbone.state_dict().items()}
    assert list(other.load_state_dict({**model.state_dict(), **frozen})) == [[], []]
    assert torch.allclose(other(IMAGES), model(IMAGES), atol=1e-6)


def test_averaged_checkpoints():
    model, other = prompted(), prompted()
    nn.init.normal_(other.head.weight)
    states = model.state_dict(), other.state_dict()
    # as timm's avg_checkpoints does, digests and all
    mean = {name: ((a.double() + states[1][name]) / 2).float() for name, a in states[0].items()}
    assert list(prompted().load_state_dict(mean)) == [[], []]
    with pytest.raises(UserError, match="other weights"):
        prompted(seed=1).load_state_dict(mean)
    moved = {name: value + 1.5 for name, value in states[0].items()}
    with pytest.warns(UserWarning, match="no digest of a backbone any more"):
        assert list(prompted().load_state_dict(moved)) == [[], []]


def test_inside_of_another_module():
    outer = nn.ModuleDict({"model": prompted()})
    state = outer.state_dict()
    assert "model._extra_state" in state
    assert not any("blocks" in name for name in state)
    assert list(nn.ModuleDict({"model": prompted()}).load_state_dict(state)) == [[], []]


@pytest.fixture
def with_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"])

    def build(seed=0, trained=True):
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="LoRA"):
            backbone = peft.inject_adapter_in_model(config, tiny_vit(seed))
            model = pgn_fast.VPT(backbone, 3, num_prompts=1)
        for name, p in model.backbone.named_parameters():
            p.requires_grad_(trained and "lora_" in name)
            if "lora_" in name:
                nn.init.normal_(p, std=0.1)
        return model

    return build


def test_what_is_trained_inside_of_the_backbone_is_kept(with_lora):
    state = with_lora().state_dict()
    assert sum("lora_" in name for name in state) == 4
    assert not any("base_layer" in name for name in state)


def test_what_is_frozen_beside_lora_has_a_digest(with_lora):
    """LoRA is in the checkpoint; what stays frozen around it is held to be the same weights."""
    model = with_lora()
    state = model.state_dict()
    dtype, digest = bytes(state["_extra_state"].tolist()).decode().split()
    lora = {name for name in model.backbone.state_dict() if "lora_" in name}
    assert (dtype, digest) == ("float32", backbone_digest(model.backbone, without=lora))
    # a step of training leaves it, another frozen weight does not
    with torch.no_grad():
        for name, p in model.backbone.named_parameters():
            if name in lora:
                p.add_(1)
    assert torch.equal(model.state_dict()["_extra_state"], state["_extra_state"])
    # for training and for inference alike, where all is frozen
    for other in (with_lora(), with_lora(trained=False)):
        assert list(other.load_state_dict(state)) == [[], []]
        held = other.backbone.state_dict()
        assert all(torch.equal(held[name], state[f"backbone.{name}"]) for name in lora)
    for trained in (True, False):
        with pytest.raises(UserError, match="other weights"):
            with_lora(seed=1, trained=trained).load_state_dict(state)
    with pytest.raises(UserError, match=r"lora_A.*no place.*LoRA"):
        prompted().load_state_dict(state)


def test_a_part_of_the_backbone_that_is_trained():
    model, other = prompted(), prompted()
    for m in (model, other):
        m.backbone.blocks[-1].requires_grad_(True)
    nn.init.normal_(model.backbone.blocks[-1].mlp.fc1.weight)
    state = model.state_dict()
    assert sum("blocks" in name for name in state) == len(model.backbone.blocks[-1].state_dict())
    assert list(other.load_state_dict(state)) == [[], []]
    with torch.no_grad():
        other.backbone.blocks[0].mlp.fc1.bias.add_(1)
    with pytest.raises(UserError, match="other weights"):
        other.load_state_dict(state)
    model.backbone.requires_grad_(True)
    assert "_extra_state" not in model.state_dict()


def test_baselines():
    probe = LinearProbe(tiny_vit(), 3)
    assert set(probe.state_dict()) == {"head.weight", "head.bias", "_extra_state"}
    # all of it is trained
    assert "blocks.0.mlp.fc1.weight" in " ".join(FineTuned(tiny_vit(), 3).state_dict())


def test_another_dtype_cannot_be_compared():
    state, half = prompted().state_dict(), prompted()
    half.backbone.half()
    assert list(half.load_state_dict(state)) == [[], []]


def test_a_kept_head_counts():
    model, other = (pgn_fast.VPT(tiny_vit(), head="keep", num_prompts=1) for _ in range(2))
    assert list(other.load_state_dict(model.state_dict())) == [[], []]
    with torch.no_grad():
        other.backbone.head.bias.add_(1)
    with pytest.raises(UserError, match="other weights"):
        other.load_state_dict(model.state_dict())


def test_torchs_own_checkpoints(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = prompted(), prompted()
    nn.init.normal_(model.head.weight)
    checkpoint.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state)
    assert torch.equal(other.head.weight, model.head.weight)


def test_who_exports_or_records_sees_all():
    model = prompted().eval()
    assert set(model.state_dict(keep_vars=True)) == set(nn.Module.state_dict(model))
    with torch.no_grad():
        program = torch.export.export(model, (IMAGES,))
        assert torch.allclose(program.module()(IMAGES), model(IMAGES), atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_trainer_resumes_to_the_bit_from_the_adapter_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(IMAGES)]

    def trainer(folder):
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), num_train_epochs=2, per_device_train_batch_size=2,
            learning_rate=0.01, eval_strategy="steps", eval_steps=3, save_steps=3, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=3, load_best_model_at_end=True,
        )  # fmt: skip
        return transformers.Trainer(prompted(), arguments, train_dataset=data, eval_dataset=data)

    whole = trainer("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    saved = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert set(saved) == set(prompted().state_dict())
    assert (checkpoint / "model.safetensors").stat().st_size < 10_000
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    trained = whole.model.adapter_state_dict()
    found = resumed.model.adapter_state_dict()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    history = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert history["global_step"] == 6
