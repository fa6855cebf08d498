"""BatchNorm over the images of all processes, so that two processes compute what one would.

torch's ``SyncBatchNorm`` runs on accelerators only; this one runs wherever torch.distributed does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError


class _AllReduce(torch.autograd.Function):
    """The sum over processes; each input's gradient is the sum of the gradients, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None  # an op again, for second derivatives


class _Shared:
    """In training: mean and variance of a channel over the images of all processes."""

    absent = False  # this process has no image in this step; what it computes does not count
    group: Any = None

    def _normalize(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        values = x.float()
        dims = [d for d in range(x.ndim) if d != 1]
        own = x.numel() // x.shape[1]
        present = 0.0 if self.absent else 1.0
        sums = torch.cat([values.sum(dims) * present, values.new_tensor([own * present])])
        sums = _AllReduce.apply(sums, self.group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        shape = [1, -1] + [1] * (x.ndim - 2)
        centered = values - mean.view(shape)
        variance = _AllReduce.apply(centered.square().sum(dims) * present, self.group) / count
        with torch.no_grad():
            if int(count) < 2:
                raise ValueError("Expected more than 1 value per channel when training")
            self.num_batches_tracked.add_(1)
            rate = self.momentum
            if rate is None:
                rate = 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        normal = centered * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)


class _BatchNorm(_Shared, nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._normalize(x)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions: the class stands for BatchNorm1d and 3d, too."""


class _BatchNormAct(_Shared, BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._normalize(x)))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.BatchNorm3d: _BatchNorm,
    BatchNormAct2d: _BatchNormAct,
}


def synchronize(model: nn.Module) -> list[_Shared]:
    """Let every BatchNorm of ``model`` that is trained see the images of all processes.

    Modules change their class in place: parameters, buffers and their names stay.

    Returns:
        The modules; ``absent`` is set on them where this process has no image in a step.

    Raises:
        UserError: a BatchNorm of a class that is not known here.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    # a group of its own: these sums and the averaged gradients never wait for each other
    group = dist.new_group() if layers else None
    for layer in layers:
        if type(layer) not in _CLASSES or not layer.track_running_stats:
            raise UserError(
                f"`sync_bn`: the network has a {type(layer).__name__}, whose statistics cannot be "
                "shared between processes. Train it with `sync_bn=False`: each process then "
                "normalizes by its own images."
            )
        layer.__class__ = _CLASSES[type(layer)]  # type: ignore[assignment]
        layer.group = group  # type: ignore[assignment]
    return layers  # type: ignore[return-value]
