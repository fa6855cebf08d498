"""The digest of a backbone's weights: equal for equal bytes, another for any other byte."""

from __future__ import annotations

import copy
import hashlib

import pytest
import timm
import torch
from torch import nn

from pgn_fast.backbone.digest import backbone_digest


def small() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    return made.eval()


def test_definition() -> None:
    module = nn.Linear(2, 3)
    parts = []
    for name in ("bias", "weight"):
        tensor = getattr(module, name).detach()
        facts = f"{name} torch.float32 {tuple(tensor.shape)}\n".encode()
        parts.append(hashlib.sha256(facts + tensor.numpy().tobytes()).digest())
    assert backbone_digest(module) == hashlib.sha256(b"".join(parts)).hexdigest()


def test_every_bit_counts() -> None:
    module = small()
    known = {backbone_digest(module)}
    for name, tensor in module.state_dict().items():
        flat = tensor.view(-1).view(torch.uint8)
        for byte in (0, flat.numel() - 1):
            flat[byte] ^= 1
            digest = backbone_digest(module)
            assert digest not in known, name
            known.add(digest)
    assert len(known) == 1 + 2 * len(module.state_dict())


def test_what_makes_no_difference() -> None:
    module = small()
    expected = backbone_digest(module)
    assert backbone_digest(copy.deepcopy(module)) == expected
    module[0].weight = nn.Parameter(module[0].weight.detach().T.contiguous().T)  # other strides
    assert backbone_digest(module.requires_grad_(False).train()) == expected
    assert backbone_digest(module.bfloat16()) != expected
    with torch.inference_mode():
        assert backbone_digest(small()) == expected


def test_the_head_counts_where_it_is_used() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=3)
    with_head, without = backbone_digest(vit, head=True), backbone_digest(vit)
    vit.reset_classifier(0)
    assert backbone_digest(vit) == backbone_digest(vit, head=True) == without != with_head


def test_weights_that_cannot_be_read_are_named() -> None:
    with pytest.raises(ValueError, match="bias is on the device meta; load the weights first"):
        backbone_digest(nn.Linear(2, 3, device="meta"))
