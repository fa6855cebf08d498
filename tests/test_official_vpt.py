"""VPT and its ablations against the official code's numbers, all cases of the fixtures."""

from __future__ import annotations

import pytest
import torch
from official import backbones
from official.goldens import FIXTURES, GRADIENT, assert_close, load, part
from torch import Tensor
from torch.nn import functional as F

from pgn_fast import VPT

SHARED, _ = load("official_vpt/shared")
CASES = sorted(p.stem for p in (FIXTURES / "official_vpt").glob("*.safetensors"))
CASES.remove("shared")


class Case:
    """One official configuration: our model of it, and how its tensors map to ours."""

    def __init__(self, name: str) -> None:
        self.tensors, config = load(f"official_vpt/{name}")
        self.options, self.size = config["options"], config["size"]
        self.params = {n.removeprefix("transformer."): t for n, t in self._part("param.").items()}
        self.grads = {n.removeprefix("transformer."): t for n, t in self._part("grad.").items()}
        self.images, self.labels = SHARED["images"], SHARED["labels"]
        self.location = self.options.get("LOCATION", "prepend")

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return part(self.tensors, prefix)

    def backbone(self):
        weights = part(SHARED, "backbone.")
        size = dict(self.size)
        if self.location == "pad":  # positions are those of the padded, larger image
            positions = "transformer.embeddings.position_embeddings"
            weights[positions] = self.tensors[f"param.{positions}"]
            size["image_size"] += 2 * self.options["NUM_TOKENS"]
        return backbones.vpt(weights, size)

    def layers(self) -> range | None:
        """The blocks with prompts of their own; None: all, or without meaning."""
        number, depth = self.options.get("NUM_DEEP_LAYERS"), self.size["layers"]
        if number is None:
            return None
        return range(depth - number, depth) if self.options.get("REVERSE_DEEP") else range(number)

    def model(self, fast: bool = True) -> VPT:
        options = self.options
        # the official gaussian strip differs in its initial values only
        location = self.location.replace("-gaussian", "")
        model = VPT(
            self.backbone(),
            self.size["classes"],
            num_prompts=options["NUM_TOKENS"],
            deep=options.get("DEEP", False),
            layers=self.layers(),
            shared=options.get("DEEP_SHARED", False),
            expand=not options.get("FORWARD_DEEP_NOEXPAND", False),
            project_dim=options.get("PROJECT"),
            location=location,
            pool=options.get("VIT_POOL_TYPE", "original"),
            fast=fast,
        )
        model.head.load_state_dict(part(SHARED, "backbone.head."))
        with torch.no_grad():
            for name, value in self.ours(self.params).items():
                parameter = model.prompter.get_parameter(name)
                assert parameter.shape == value.shape, name
                parameter.copy_(value)
        return model

    def ours(self, official: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official prompt tensors, or their gradients, under our names."""
        official = {n: t for n, t in official.items() if not n.startswith("head.")}
        official.pop("embeddings.position_embeddings", None)
        renamed = {
            "prompt_proj.weight": "projection.weight",
            "prompt_proj.bias": "projection.bias",
            "prompt_embeddings_lr": "prompts_lr",
            "prompt_embeddings_tb": "prompts_tb",
            "embeddings.patch_embeddings.weight": "patch_weight",
            "embeddings.patch_embeddings.bias": "patch_bias",
        }
        found = {renamed[n]: official.pop(n) for n in list(official) if n in renamed}
        if self.options.get("DEEP_SHARED"):  # created by the official code, but never used
            official.pop("deep_prompt_embeddings", None)
        order = ("prompt_embeddings", "deep_prompt_embeddings")
        if rows := [official.pop(n) for n in order if n in official]:
            found["prompts"] = torch.cat(rows)
        assert not official, f"unknown tensors {list(official)}"
        return found


@torch.no_grad()
def test_backbone_without_prompts():
    backbone = Case("shallow").backbone().eval()
    pooled = backbone.forward_head(backbone.forward_features(SHARED["images"]), pre_logits=True)
    logits = F.linear(pooled, SHARED["backbone.head.weight"], SHARED["backbone.head.bias"])
    assert_close("logits", logits, SHARED["noprompt.logits"])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if name != "deep_reverse"])
def test_case(name, fast):
    case = Case(name)
    model = case.model(fast).train()
    logits = model(case.images)
    loss = F.cross_entropy(logits, case.labels)
    loss.backward()
    assert_close("logits", logits, case.tensors["logits"])
    assert_close("loss", loss, case.tensors["loss"])

    grads = case.ours(case.grads)
    assert set(grads) == {n for n, p in model.prompter.named_parameters() if p.requires_grad}
    for parameter, value in grads.items():
        got = model.prompter.get_parameter(parameter).grad
        assert_close(parameter, got, value, GRADIENT)
    for kind in ("weight", "bias"):
        got = model.head.get_parameter(kind).grad
        assert_close(f"head.{kind}", got, case.grads[f"head.{kind}"], GRADIENT)

    with torch.no_grad():
        assert torch.equal(model.eval()(case.images), logits)  # no dropout: the mode is nothing
        one = case.images[:1]
        encoded = case.tensors["encoded"]
        assert_close("encoded", model._encode(*model._prompted(one, None)), encoded)
        features = model.forward_features(one)
        left = encoded.shape[1] - features.shape[1]
        assert left in (0, case.options["NUM_TOKENS"])
        assert_close("class token", features[:, :1], encoded[:, :1])
        assert_close("patches", features[:, 1:], encoded[:, 1 + left :])


@pytest.mark.parametrize("fast", [True, False])
def test_reverse_without_the_lost_patches(fast):
    """Prompts before the last two blocks, inserted; the official code overwrites patches there.

    The same written out by hand: no golden can hold it."""
    case = Case("deep_reverse")
    model = case.model(fast)
    prompts, backbone = case.params["deep_prompt_embeddings"], model.backbone
    prompts = prompts.clone().requires_grad_()

    x = backbone._pos_embed(backbone.patch_embed(case.images))
    num_patches = x.shape[1] - 1
    for i, block in enumerate(backbone.blocks):
        row = i - (case.size["layers"] - len(prompts))
        if row >= 0:
            new = prompts[row].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], new, x[:, -num_patches:]], dim=1)
        x = block(x)
    want = model.head(backbone.norm(x)[:, 0])
    (grad,) = torch.autograd.grad(F.cross_entropy(want, case.labels), prompts)

    logits = model(case.images)
    F.cross_entropy(logits, case.labels).backward()
    assert_close("logits", logits, want)
    assert_close("prompts", model.prompter.prompts.grad, grad, GRADIENT)
    assert model.forward_features(case.images).shape[1] == 1 + num_patches


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("init_")])
def test_prompts_from_stored_class_tokens(name):
    """The recipes behind the files: which stored class token starts which block's prompts."""
    case = Case(name)
    stored = case.tensors["cls_embeddings"].transpose(0, 1)  # (layers + 1, P, D)
    recipe = case.options["INITIATION"]
    depth = case.size["layers"]
    rows = {
        "final-cls": stored[-1:].expand(depth, -1, -1),
        "cls-nolastl": stored[:depth],
        "cls-nofirstl": stored[1:],
    }[recipe]
    got = case.model().prompter.prompts
    assert torch.equal(got, rows[: len(got)])
