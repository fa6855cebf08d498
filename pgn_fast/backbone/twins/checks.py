"""What every reader refuses: modules of unknown types, hooks, replaced forwards, odd patches."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .assembly import TwinRefused

# torch's own modules that an image encoder is made of
TORCH = (
    nn.Linear,
    nn.Conv2d,
    nn.LayerNorm,
    nn.Dropout,
    nn.Identity,
    nn.Embedding,
    nn.ModuleList,
    nn.MultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)


def check_modules(
    tower: nn.Module, known: Callable[[nn.Module], bool], skip: tuple[str, ...] = ()
) -> None:
    """Every module is of a known type, runs its class's forward and has no hook.

    Args:
        known: whether a module that is none of torch's plain ones is one of the library's own.
        skip: children of the tower that are no part of the twin.

    Raises:
        TwinRefused: names the module and what is wrong with it.
    """
    for name, module in tower.named_modules():
        if name.partition(".")[0] in skip:
            continue
        kind, where = type(module), name or "the model"
        if kind not in TORCH and not known(module):
            raise TwinRefused(
                f"{where} is a {kind.__module__}.{kind.__qualname__}, of which the twin knows "
                "nothing; merge adapters and take quantization off first, or put them on the twin"
            )
        if "forward" in module.__dict__:
            raise TwinRefused(
                f"the forward of {where} was replaced (device_map does that, among others); load "
                "the model without it"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise TwinRefused(f"a hook is registered on {where}; remove it first")
        if isinstance(module, nn.Conv2d):
            _check_patches(where, module)
        if isinstance(module, nn.MultiheadAttention):
            _check_attention(where, module)


def _check_patches(name: str, conv: nn.Conv2d) -> None:
    plain = conv.stride == conv.kernel_size and conv.groups == 1 and conv.dilation == (1, 1)
    if not plain or conv.padding not in ("valid", (0, 0)):
        raise TwinRefused(f"{name} is {conv}: its patches overlap or are padded")


def _check_attention(name: str, attention: nn.MultiheadAttention) -> None:
    odd = attention.in_proj_weight is None or attention.bias_k is not None
    if odd or attention.add_zero_attn or not attention.batch_first:
        raise TwinRefused(
            f"{name} has keys of another width, added keys, or the batch as its second dimension"
        )
