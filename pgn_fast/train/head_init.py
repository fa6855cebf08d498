"""Where a new linear head starts: at zero, as the official code starts it, or as a linear probe.

The probe is ridge regression on the model's own pooled features, in closed form: one pass over the
training images, no rate to choose. Ridge strength and temperature are those with the smallest
leave-one-out cross entropy, which needs no further pass (the residual of image i without image i is
its residual divided by 1 - h_i, with h the diagonal of the hat matrix).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models import VPT
from ..models.heads import initialize_head
from .config import TrainConfig
from .distributed import Processes
from .evaluation import Autocast, check_labels

# images that the probe looks at, at most
IMAGES = 20_000
_RIDGES = [10.0**power for power in range(-6, 3)]
_SCALES = [2.0 ** (power / 2) for power in range(15)]


def start_head(
    model: Any,
    config: TrainConfig,
    loader: Any,
    num_classes: int,
    autocast: Autocast,
    processes: Processes,
    prepare: Callable[[Tensor], Tensor],
) -> None:
    """Set the start of ``model.head`` in place, where it is a trained linear layer.

    Args:
        model: of the package; in eval mode while its features are computed.
        config: says how, and timm's scale and bias on top.
        loader: training images, augmented as they are in training, for "probe".
        prepare: a batch's images, on the device, to the model's input.
    """
    head = getattr(model, "head", None)
    if type(head) is not nn.Linear or not head.weight.requires_grad:
        return
    init, probe = config.head_init, None
    if init == "probe":
        check = lambda labels: check_labels(labels, num_classes, config.task)
        features, labels = _features(model, loader, autocast, processes, prepare, check)
        if not bool(features.isfinite().all()):
            raise UserError(
                "data: the backbone's features of some training images are not finite: look for "
                "images that hold such numbers, or weights that do; `amp_dtype` bfloat16 reaches "
                "further than float16."
            )
        probe = ridge_probe(features, labels, num_classes) if len(labels) > 1 else None
    with torch.no_grad():
        if probe is not None:
            head.weight.copy_(probe[0])
            head.bias.copy_(probe[1])
        elif init == "official":
            # the other methods' official head is nn.Linear's own, which a new one has
            initialize_head(head, "official" if isinstance(model, VPT) else "torch")
        else:
            initialize_head(head, "zero")
        if config.head_init_scale is not None:
            head.weight.mul_(config.head_init_scale)
            head.bias.mul_(config.head_init_scale)
        if config.head_init_bias is not None:
            head.bias.fill_(config.head_init_bias)


@torch.no_grad()
def _features(
    model: Any,
    loader: Any,
    autocast: Autocast,
    processes: Processes,
    prepare: Callable[[Tensor], Tensor],
    check: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Pooled features (n, D) and labels on the CPU, of the images of all processes."""
    head, training = model.head, model.training
    features, labels, order = [], [], []
    model.head = nn.Identity()
    try:
        model.eval()
        count = 0
        for batch in loader:
            check(batch.labels)
            if len(batch.labels):
                images = prepare(batch.images.to(autocast.device, non_blocking=True))
                with autocast():
                    features.append(model(images).float().cpu())
                labels.append(batch.labels)
                order.append(batch.indices)
            count += len(batch.labels) * processes.world
            if count >= IMAGES:
                break
    finally:
        model.head = head
        model.train(training)
    parts = processes.collect(
        (torch.cat(features), torch.cat(labels), torch.cat(order)) if labels else None
    )
    columns = [torch.cat(column) for column in zip(*filter(None, parts), strict=True)]
    if not columns:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    # in the order of the images, however many processes there are
    rank = columns[2].argsort(stable=True)
    return columns[0][rank], columns[1][rank]


@torch.no_grad()
def ridge_probe(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """A linear classifier in closed form: features (n, D), labels (n,) -> weight (C, D), bias (C,).

        W = argmin |X W - Y|² + ridge · n · s |W|²,  logits = temperature · (X W + b)

    with X and the one-hot Y centered, and s the mean square of X; all in float64. Multi-label, with
    labels (n, C) of 0 and 1: Y is the labels, and a logit of 0 stands for a half.
    """
    several = labels.ndim == 2
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    x, y = features.double(), torch.zeros(len(labels), num_classes, dtype=torch.float64)
    if several:
        y, middle, loss_of = labels.double(), 0.5, F.binary_cross_entropy_with_logits
    else:
        y[torch.arange(len(labels)), labels] = 1
        middle = 0.0
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, targets = x - x_mean, y - y_mean
    count, width = x.shape
    # the smaller of the two Gram matrices has all that is needed
    left, singular, right = torch.linalg.svd(x, full_matrices=False) if count <= width else _svd(x)
    power = singular.square()
    projected = left.T @ targets  # (r, C)
    best = (float("inf"), 1.0, 1.0)
    for ridge in _RIDGES:
        shrink = power / (power + ridge * power.sum().clamp(min=1e-30))
        fitted = left @ (shrink[:, None] * projected)
        # centering takes one degree of freedom: 1 / n beside the ridge's own leverage
        leverage = (left.square() @ shrink + 1 / count).clamp(max=1 - 1e-6)
        left_out = targets - (targets - fitted) / (1 - leverage)[:, None] + y_mean
        for scale in _SCALES:
            loss = float(loss_of(scale * (left_out - middle), y if several else labels))
            best = min(best, (loss, ridge, scale))
    _, ridge, scale = best
    keep = power > 1e-24 * power.sum()
    factor = torch.where(keep, singular / (power + ridge * power.sum().clamp(min=1e-30)), 0.0)
    weight = (right.T @ (factor[:, None] * projected)).T * scale  # (C, D)
    bias = scale * (y_mean - middle) - weight @ x_mean
    return weight.float(), bias.float()


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a tall x (n, D), n > D, by the eigenvectors of its Gram matrix (D, D)."""
    power, right = torch.linalg.eigh(x.T @ x)
    singular = power.clamp(min=0).sqrt()
    keep = power > 1e-14 * power.sum()
    singular, right = singular[keep], right[:, keep].T
    return (x @ right.T) / singular, singular, right
