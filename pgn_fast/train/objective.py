"""What a step minimizes: timm's losses, on images that timm's mixup and cutmix have mixed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from .config import TrainConfig
from .evaluation import check_labels


class Objective:
    """The loss of a batch, as a sum over its images.

    Mixing draws from NumPy's generator, whose state is in a run's checkpoint.
    """

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device) -> None:
        self.config, self.num_classes = config, num_classes
        mixes = config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
        self._mixup = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                cutmix_minmax=None if config.cutmix_minmax is None else list(config.cutmix_minmax),
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                mode=config.mixup_mode,
                label_smoothing=config.smoothing,
                num_classes=num_classes,
            )
            if mixes
            else None
        )
        self._soft = SoftTargetCrossEntropy()
        self._multilabel = config.task == "multilabel"
        self._binary = BinaryCrossEntropy(
            smoothing=0.0 if mixes else config.smoothing,
            target_threshold=config.bce_target_thresh,
            sum_classes=config.bce_sum,
            pos_weight=config.bce_pos_weight,
        ).to(device)

    def check(self, labels: Tensor) -> None:
        """Raises UserError: labels, on the CPU, that are not of the task or out of range."""
        check_labels(labels, self.num_classes, self.config.task)

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many images are answered rightly; 0 where an answer is no single class."""
        if labels.ndim == 2:
            return torch.zeros((), dtype=torch.int64, device=logits.device)
        return (logits.argmax(dim=1) == labels).sum()

    def mix(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and labels (B,) to images and targets: labels, or (B, C) where mixed.

        timm mixes pairs; the last image of an odd batch stays as it is.
        """
        if self._mixup is None:
            return images, labels
        off = self.config.mixup_off_epoch
        self._mixup.mixup_enabled = not off or epoch < off
        even = len(labels) - len(labels) % 2
        mixed, targets = images[:0], labels.new_zeros(0, self.num_classes, dtype=torch.float32)
        if even:
            mixed, targets = self._mixup(images[:even].clone(), labels[:even])
        if even < len(labels):
            alone = mixup_target(labels[even:], self.num_classes, 1.0, self.config.smoothing)
            mixed, targets = torch.cat([mixed, images[even:]]), torch.cat([targets, alone])
        return mixed, targets

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of a batch: logits (B, C) and what ``mix`` gave."""
        if self._multilabel:
            # each label towards a half; older versions of timm only smooth single classes
            targets = targets.lerp(torch.full_like(targets, 0.5), self.config.smoothing)
        if self.config.bce_loss or self._multilabel:
            return self._binary(logits, targets) * len(logits)
        if targets.ndim == 2:
            return self._soft(logits, targets) * len(logits)
        return F.cross_entropy(
            logits, targets, reduction="sum", label_smoothing=self.config.smoothing
        )
