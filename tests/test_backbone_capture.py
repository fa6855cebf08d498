"""A captured step trains exactly as the eager one, and says what it cannot do."""

from __future__ import annotations

import copy

import pytest
import torch
from test_backbone_works_with import pgn, relative, vpt
from torch import Tensor, nn

import pgn_fast


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_refuses_without_cuda() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device here; call the step itself"):
        pgn_fast.capture(lambda images: images)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [vpt, pgn])
def test_trains_as_the_eager_step(make) -> None:
    eager_model = make().cuda()
    model = copy.deepcopy(eager_model)
    eager, captured = training_step(eager_model), pgn_fast.capture(training_step(model), warmup=2)
    for B in (4, 4, 4, 4, 3, 4, 3, 3, 3):  # the third call of each size records
        images, labels = torch.randn(B, 3, 32, 32).cuda(), torch.randint(5, (B,)).cuda()
        assert relative(captured(images, labels), eager(images, labels)) <= 1e-5
    pairs = zip(model.trainable_parameters(), eager_model.trainable_parameters(), strict=True)
    assert all(relative(a, b) <= 1e-4 for a, b in pairs)


@pytest.mark.gpu
def test_names_wrong_arguments() -> None:
    captured = pgn_fast.capture(lambda images: images + 1)
    with pytest.raises(ValueError, match="argument 0 is a tensor on cpu"):
        captured(torch.zeros(2))
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        pgn_fast.capture(lambda images: images, warmup=0)


def training_step(model: nn.Module):
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1, momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
