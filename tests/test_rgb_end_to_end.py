"""The point of input-space prompts: a model behind an image API is adapted by changing the images.

A PGN is trained in gamut on digits, in the canvas layout of its deployment; then the packaged
backbone is served untouched over HTTP, and a client sends PNGs.
"""

from __future__ import annotations

import pytest
import torch
from serving import serving
from torch import nn
from torch.nn import functional

import pgn_fast
from pgn_fast import demo
from pgn_fast.client import RgbClient
from pgn_fast.demo.experiment import NUM_CLASSES, augment, load
from pgn_fast.inversion import CanvasLayout, GamutLibrary, PatchMap, ServerSpec
from pgn_fast.serve import create_app, load_served_model

EPOCHS = 6


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.fixture(scope="module")
def model(digits) -> pgn_fast.PGN:
    """A PGN trained in gamut: 7 prompts in the border around an image of 3 × 3 patches."""
    torch.manual_seed(0)
    backbone = demo.backbone()
    layout = CanvasLayout.border(grid=(4, 4), image=(3, 3), prompts=7)
    patch_map = PatchMap.from_backbone(backbone, ServerSpec.from_backbone(backbone), layout)
    model = pgn_fast.PGN(
        backbone,
        NUM_CLASSES,
        num_prompts=7,
        library_size=64,
        resolution=32,
        generator_kwargs={"max_pool": False},
        token_library=GamutLibrary(64, patch_map),
        head=nn.Linear(backbone.num_features, NUM_CLASSES),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    count, size = len(digits.train_labels), 64
    steps = EPOCHS * (count // size)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(count, generator=generator).split(size)[: count // size]:
            logits = model(augment(digits.train_images[chosen], generator))
            loss = functional.cross_entropy(logits, digits.train_labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def url():
    with serving(create_app(load_served_model(demo.NAME))) as (url, _):
        yield url


@torch.inference_mode()
def test_prompts_as_pixels_adapt_a_served_model(model, digits, url):
    with RgbClient(url) as plain:
        prompter = pgn_fast.invert(model, server=plain.server_spec())
    with RgbClient(url, prompter, head=model.head) as client:
        served = client.predict(digits.test_images)
    latent = model(digits.test_images).argmax(dim=1)

    agreement = (served == latent).double().mean().item()
    served_top1, latent_top1 = (
        100 * (predicted == digits.test_labels).double().mean().item()
        for predicted in (served, latent)
    )
    print(f"latent {latent_top1:.2f} %, served {served_top1:.2f} %, agreement {agreement:.4f}")
    assert latent_top1 > 80, "the model did not learn: the comparison would say nothing"
    assert agreement >= 0.995
    assert abs(served_top1 - latent_top1) <= 0.5


@torch.inference_mode()
def test_a_plain_client_gets_the_unadapted_model(model, digits, url):
    """Without prompts the API is the backbone alone: same features, same accuracy of a probe."""
    backbone = demo.backbone()
    spec = ServerSpec.from_backbone(backbone)
    levels = {
        name: spec.levels(getattr(digits, name)).to(torch.uint8)
        for name in ("train_images", "test_images")
    }
    features = {name: backbone(spec.normalize(value)) for name, value in levels.items()}
    # nearest class mean: the unadapted features' accuracy, nothing trained
    means = torch.stack(
        [features["train_images"][digits.train_labels == c].mean(dim=0) for c in range(NUM_CLASSES)]
    )

    def nearest(features: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(features, means)

    with RgbClient(url, head=nearest) as client:
        served_features = client.features(levels["test_images"])
        served = client.predict(levels["test_images"])
    torch.testing.assert_close(served_features, features["test_images"], rtol=1e-4, atol=1e-4)
    direct = nearest(features["test_images"]).argmax(dim=1)
    top1 = [100 * (p == digits.test_labels).double().mean().item() for p in (served, direct)]
    print(f"unadapted, nearest class mean: served {top1[0]:.2f} %, direct {top1[1]:.2f} %")
    assert top1[0] == top1[1]
    # and with the adapter's head but without its prompts, the head does not see what it learned
    with RgbClient(url, head=model.head) as client:
        unprompted = client.predict(levels["test_images"])
    adapted = (model(digits.test_images).argmax(dim=1) == digits.test_labels).double().mean()
    assert (unprompted == digits.test_labels).double().mean() < adapted
