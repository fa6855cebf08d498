"""Training in gamut, end to end on digits: what is trained is what uint8 canvases give.

A small ViT is trained on digits 0 to 4 behind a fixed patch embedding with a steep spectrum (the
hard case: a latent library ends far outside the gamut); a PGN adapts it to all ten. Everything goes
through the public classes, and the canvases through the untouched backbone.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import pgn_fast
from pgn_fast.digits import LEVELS, load_digits
from pgn_fast.inversion import (
    CanvasLayout,
    GamutLibrary,
    PatchMap,
    ServerSpec,
    UnreachablePromptError,
    invert_library,
)

SIDE, PATCH, WIDTH, PROMPTS, LIBRARY = 32, 8, 64, 4, 32
SERVER = ServerSpec(
    resize=None, crop=None, dynamic_size=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
# the image as it is, and one column of prompts to its right
LAYOUT = CanvasLayout(
    (4, 5), (4, 4), tuple(cell for cell in range(20) if cell % 5 < 4), (4, 9, 14, 19)
)
TRAINING = 1200


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """uint8 images (1797, 3, 32, 32) and labels, shuffled; the first TRAINING are for training."""
    packaged = load_digits()
    images = torch.tensor(packaged.images, dtype=torch.float32).view(-1, 1, 8, 8) / LEVELS
    drawn = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(1))
    levels = (drawn * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return levels[order], torch.tensor(packaged.labels)[order]


def new_backbone() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=3,
        num_heads=4,
        num_classes=5,
        dynamic_img_size=True,
    )


@functools.cache
def stressed_backbone() -> nn.Module:
    """The ViT that tests/fixtures/inversion_toy/make.py trained on digits 0 to 4."""
    net = new_backbone()
    net.load_state_dict(
        load_file(Path(__file__).parent / "fixtures/inversion_toy/backbone.safetensors")
    )
    return net.requires_grad_(False).eval()


def pgn(library: nn.Module, seed: int) -> pgn_fast.PGN:
    torch.manual_seed(seed)
    return pgn_fast.PGN(
        stressed_backbone(),
        num_classes=10,
        num_prompts=PROMPTS,
        library_size=LIBRARY,
        generator_kwargs={"channels": 8, "groups": 2, "max_pool": False},
        resolution=SIDE,
        token_library=library,
    )


def train(model: pgn_fast.PGN, epochs: int, lr: float = 3e-3) -> pgn_fast.PGN:
    images, labels = digits()
    theta = model.prompter.token_library.theta
    rest = [p for p in model.trainable_parameters() if p is not theta]
    groups = [{"params": rest, "lr": lr}, {"params": [theta], "lr": 10 * lr}]
    optimizer = torch.optim.Adam(groups)
    steps = epochs * math.ceil(TRAINING / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, 10 * lr], total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(TRAINING).split(64):
            loss = F.cross_entropy(model(SERVER.normalize(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def classes(model: pgn_fast.PGN) -> tuple[Tensor, Tensor]:
    """Predicted classes of the test images: by the latent path, and from uint8 canvases."""
    images = digits()[0][TRAINING:]
    latent = model(SERVER.normalize(images)).argmax(dim=1)
    canvases = pgn_fast.invert(model)(images)
    assert canvases.dtype == torch.uint8 and canvases.shape[-2:] == (32, 40)
    backbone = model.backbone
    features = backbone.forward_features(SERVER.normalize(canvases))  # the server
    pooled = backbone.forward_head(features, pre_logits=True)
    return latent, model.head(pooled).argmax(dim=1)


def accuracy(predicted: Tensor) -> float:
    return 100 * (predicted == digits()[1][TRAINING:]).double().mean().item()


class LatentLibrary(GamutLibrary):
    """Trained in the same canvas, but free to leave the gamut."""

    def forward(self) -> Tensor:
        return self.theta


@pytest.mark.parametrize("seed", range(3))
def test_canvases_agree_with_training(seed):
    """Number 11: uint8 canvases through the bare backbone against the latent path."""
    patch_map = PatchMap.from_backbone(stressed_backbone(), SERVER, LAYOUT)
    assert patch_map.solver.condition > 20
    model = train(pgn(GamutLibrary(LIBRARY, patch_map), seed), epochs=4)
    latent, served = classes(model)
    assert (latent == served).double().mean() >= 0.995
    assert abs(accuracy(latent) - accuracy(served)) <= 0.5


@pytest.mark.slow
def test_latent_libraries_can_be_converted():
    """Number 12: latent training, then from_latent and 5 epochs in gamut: served as uint8 within 2
    points, mean of three seeds. Without conversion the library is out of reach."""
    patch_map = PatchMap.from_backbone(stressed_backbone(), SERVER, LAYOUT)
    drops, latent_accuracies = [], []
    for seed in range(3):
        latent = train(pgn(LatentLibrary(LIBRARY, patch_map), seed), epochs=11)
        with torch.no_grad():
            images = SERVER.normalize(digits()[0][TRAINING:])
            latent_accuracies.append(accuracy(latent(images).argmax(dim=1)))
        tokens = latent.prompter.token_library.theta.detach()
        with pytest.raises(UnreachablePromptError):
            invert_library(tokens, patch_map)
        library = GamutLibrary.from_latent(tokens, patch_map, prompt_pos="canvas")
        converted = pgn(library, seed)
        state = latent.adapter_state_dict()
        state["prompter.token_library.theta"] = library.theta.detach()
        converted.load_adapter_state_dict(state)
        _, served = classes(train(converted, epochs=5))
        drops.append(latent_accuracies[-1] - accuracy(served))
    assert min(latent_accuracies) > 65  # it learned: a guess has 10, the bare features 60
    assert sum(drops) / 3 <= 2, f"drops {drops} of {latent_accuracies}"
