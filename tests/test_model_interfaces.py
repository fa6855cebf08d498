"""Prompted ViTs under code that was written for timm, PEFT and transformers."""

from __future__ import annotations

import pytest
import timm
import torch
from test_backbone_coverage import tiny
from torch import nn

import pgn_fast


def model_on(backbone: nn.Module, method: str, **kwargs) -> pgn_fast.PromptedViT:
    return pgn_fast.create_model(method, backbone, 5, num_prompts=3, **kwargs)


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_intermediates_equal_the_references_at_every_block(name: str, method: str) -> None:
    vit = tiny(name)
    images = torch.randn(2, 3, *vit.patch_embed.img_size, dtype=torch.float64)
    fast, plain = model_on(vit, method), model_on(vit, method, fast=False)
    plain.load_adapter_state_dict(fast.adapter_state_dict())
    for options in ({}, {"norm": True, "output_fmt": "NLC"}, {"indices": [0], "stop_early": True}):
        final, found = fast.forward_intermediates(images, return_prefix_tokens=True, **options)
        wanted = plain.forward_intermediates(images, return_prefix_tokens=True, **options)
        timms = vit.forward_intermediates(images, return_prefix_tokens=True, **options)
        torch.testing.assert_close(final, wanted[0], rtol=0, atol=1e-9)
        assert final.shape == timms[0].shape and len(found) == len(wanted[1]) == len(timms[1])
        for ours, theirs, bare in zip(found, wanted[1], timms[1], strict=True):
            for a, b, shape_of in zip(ours, theirs, bare, strict=True):
                assert a.shape == shape_of.shape
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert len(fast.get_intermediate_layers(images, n=2)) == 2
    torch.testing.assert_close(
        fast.get_intermediate_layers(images, n=1, norm=True, return_prefix_tokens=True)[0][1],
        fast.forward_features(images)[:, : vit.num_prefix_tokens],
    )


def test_intermediates_as_a_dictionary_and_refusals() -> None:
    vit = tiny("vit_tiny_patch16_224")
    model, images = model_on(vit, "vpt-deep"), torch.randn(1, 3, 48, 48, dtype=torch.float64)
    ours = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    timms = vit.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert ours.keys() == timms.keys()
    with pytest.raises(ValueError, match="attn_mask is not supported with prompts"):
        model.forward_intermediates(images, attn_mask=torch.ones(10, 10))
    with pytest.raises(ValueError, match="output_fmt='NHWC'; known: NCHW, NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_timms_attributes_are_the_backbones() -> None:
    vit = timm.create_model("test_vit")
    model = model_on(vit, "vpt-deep")
    for name in ("default_cfg", "feature_info", "num_prefix_tokens", "global_pool"):
        assert getattr(model, name) == getattr(vit, name)
    assert model.head_hidden_size == vit.num_features


def test_disable_adapter_runs_the_bare_backbone() -> None:
    vit = timm.create_model("test_vit").eval()
    model, images = model_on(vit, "vpt-deep"), torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(images), vit(images))
            assert torch.equal(model.forward_features(images), vit.forward_features(images))
        assert model(images).shape == (2, 5)


def test_labels_give_an_output_with_a_loss() -> None:
    model = model_on(timm.create_model("test_vit"), "vpt-deep")
    images, labels = torch.randn(2, 3, 160, 160), torch.tensor([1, 4])
    logits = model(images)
    output = model(pixel_values=images, labels=labels)
    assert torch.equal(output.logits, logits) and torch.equal(output["logits"], output[1])
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(logits, labels))
    assert model(pixel_values=images).loss is None
    assert not hasattr(model, "config")  # transformers reads a config as its own class
    with pytest.raises(ValueError, match="images or pixel_values, one of them"):
        model(labels=labels)


def test_runs_under_transformers_trainer(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = model_on(timm.create_model("test_vit"), "vpt-deep")
    data = [{"pixel_values": torch.randn(3, 160, 160), "labels": i % 5} for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    before = model.prompter.prompts.detach().clone()
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert not torch.equal(model.prompter.prompts, before)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(data).predictions.shape == (4, 5)
