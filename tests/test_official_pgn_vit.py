"""PGN through frozen CLIP, DINO and torchvision ViTs, against the official code, end to end."""

from __future__ import annotations

import pytest
import torch
from official import backbones
from official.goldens import GRADIENT, assert_close, load, part
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from pgn_fast import PGN, VPT, PromptGenerator
from pgn_fast.prompts.official import official_name

KINDS = ["clip", "dino", "vit"]


class Case:
    """One official backbone with its PGN, built again whenever asked for: runs change the PGN."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.tensors, self.config = load(f"official_pgn_vit/{kind}")
        self.images, self.labels = self.tensors["images"], self.tensors["labels"]
        self.weights = part(self.tensors, "backbone.")

    def backbone(self) -> VisionTransformer:
        build = {"clip": backbones.clip, "dino": backbones.dino, "vit": backbones.torchvision_vit}
        return build[self.kind](self.weights, self.config)

    def model(self, **options) -> PGN:
        """The official model's logits: CLIP times the text matrix, DINO's head, torchvision's."""
        settings = self.config["pgn"]
        generator = PromptGenerator.from_official(
            part(self.tensors, "pgn."),
            resolution=settings["pgn_resolution"],
            activation=settings["pgn_act_fn"],
            generator_kwargs={"max_pool": settings["init_max_pool"]},
        )
        backbone = self.backbone()
        if "head" not in options:
            options["head"] = self._head(backbone)
        model = PGN(backbone, generator=generator, **options)
        if self.kind == "vit" and options["head"] == "linear":
            model.head.load_state_dict(backbone.head.state_dict())
        return model

    def _head(self, backbone: VisionTransformer) -> str | nn.Module:
        if self.kind == "clip":
            text = nn.Linear(*self.tensors["text_matrix"].shape, bias=False)
            text.load_state_dict({"weight": self.tensors["text_matrix"].T})
            return nn.Sequential(backbone.head, text.requires_grad_(False))
        if self.kind == "dino":
            return backbones.DINOHead(part(self.weights, "dino_head."))
        return "linear"  # the official code trains torchvision's head too

    def parameter(self, model: PGN, name: str) -> torch.Tensor:
        """The model's tensor of an official parameter or buffer name."""
        if name.startswith("vit_model.heads.head."):
            return getattr(model.head, name.rpartition(".")[2])
        name = official_name(name)
        own = dict(model.prompter.named_parameters()) | dict(model.prompter.named_buffers())
        return own[name]


def is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.fixture(params=KINDS, scope="module")
def case(request):
    return Case(request.param)


@torch.no_grad()
def test_backbone_without_prompts(case):
    backbone = case.backbone().eval()
    pooled = backbone.forward_head(backbone.forward_features(case.images), pre_logits=True)
    if case.kind == "vit":
        assert_close("logits", backbone(case.images), case.tensors["noprompt.logits"])
    else:
        features = backbone.head(pooled) if case.kind == "clip" else pooled
        assert_close("features", features, case.tensors["noprompt.features"])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_loss_and_gradients(case, mode, fast):
    model = case.model(fast=fast).train(mode == "train")
    want = part(case.tensors, f"{mode}.")
    logits = model(case.images)
    loss = F.cross_entropy(logits, case.labels)
    loss.backward()
    assert_close("logits", logits, want["logits"])
    assert_close("loss", loss, want["loss"])
    grads = part(want, "grad.")
    assert len(grads) == len(model.trainable_parameters())
    for name, value in grads.items():
        assert_close(name, case.parameter(model, name).grad, value, GRADIENT)
    if mode == "train":
        buffers = part(case.tensors, "after_train.")
        assert set(buffers) == {n for n in part(case.tensors, "pgn.") if is_buffer(n)}
        for name, value in buffers.items():
            assert_close(name, case.parameter(model, name), value)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_prompts_sequence_and_features(case, mode):
    want = part(case.tensors, f"{mode}.")
    train = mode == "train"  # then each call sees the same batch statistics
    model = case.model(fast=False).train(train)
    assert_close("prompts", model.prompts(case.images), want["prompts"])
    assert_close("mix", model.prompter.mixture(case.images), want["mix"])
    seen = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.forward_reference(case.images)
    assert_close("block_input", seen[0], want["block_input"])
    tokens = model.forward_features(case.images)
    num_patches = (case.config["image_size"] // case.config["patch_size"]) ** 2
    assert tokens.shape == (len(case.images), 1 + num_patches, case.config["width"])
    pooled = model.forward_head(tokens, pre_logits=True)
    if case.kind != "vit":
        features = model.backbone.head(pooled) if case.kind == "clip" else pooled
        assert_close("features", features, want["features"])


@pytest.mark.parametrize("fast", [True, False])
def test_five_steps_of_sgd(case, fast):
    model = case.model(fast=fast).train()
    frozen = {name: p.clone() for name, p in model.backbone.state_dict().items()}
    sgd = torch.optim.SGD(model.trainable_parameters(), **case.config["sgd5"])
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(case.images), case.labels)
        losses.append(loss.detach())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert_close("losses", torch.stack(losses), case.tensors["sgd5.losses"])
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, frozen[name]), f"{name} moved"


@pytest.mark.parametrize("fast", [True, False])
def test_clip_classifies_by_cosine(fast):
    case = Case("clip")
    model = case.model(
        head="zero_shot",
        class_embeddings=case.tensors["text_matrix"].T,
        logit_scale=case.weights["logit_scale"].exp().item(),
        fast=fast,
    )
    logits = model.train()(case.images)
    loss = F.cross_entropy(logits, case.labels)
    loss.backward()
    want = part(case.tensors, "train.cosine.")
    assert_close("logits", logits, want["logits"])
    assert_close("loss", loss, want["loss"])
    grads = part(want, "grad.")
    assert len(grads) == 4
    for name, value in grads.items():
        assert_close(name, case.parameter(model, name).grad, value, GRADIENT)


@torch.no_grad()
def test_clip_features_are_the_kept_heads_output():
    case = Case("clip")
    model = case.model(head="keep").eval()
    assert model.num_classes == case.config["output_dim"]
    assert_close("features", model(case.images), case.tensors["eval.features"])


@torch.no_grad()
def test_prompts_that_do_not_depend_on_the_input():
    tensors, _ = load("official_pgn_vit/pgn_variants")
    vectors = tensors["iip.pgn_vectors"]
    backbone = VisionTransformer(
        img_size=tensors["images"].shape[-1],
        patch_size=16,
        embed_dim=vectors.shape[1],
        depth=1,
        num_heads=1,
        num_classes=0,
    )
    model = VPT(backbone, 2, num_prompts=len(vectors), deep=False)
    model.prompter.prompts[0] = vectors
    assert torch.equal(model.prompts(tensors["images"]), tensors["iip.prompts"])
