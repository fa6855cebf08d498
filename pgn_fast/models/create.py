"""``prompted_vit``: a registered method's prompter in front of a frozen backbone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..backbone.load import load_backbone
from ..backbone.options import FastOptions
from ..prompts import Prompter
from .base import PromptedViT
from .heads import build_head
from .values import VALUES, constructor_values


def prompted_vit(
    method: str,
    constructor: type[Prompter],
    backbone: str | nn.Module,
    num_classes: int | None = None,
    /,
    *,
    head: str | nn.Module = "linear",
    class_embeddings: Tensor | None = None,
    logit_scale: float = 100.0,
    backend: str | None = None,
    fast: bool | str | Mapping[str, Any] | FastOptions = True,
    **values: Any,
) -> PromptedViT:
    """A registered prompter in front of a frozen backbone; see ``pgn_fast.create_model``.

    Args:
        method: its name.
        constructor: its prompter's class.
        values: the prompter's own arguments.

    Raises:
        ValueError: the prompter keeps the backbone, or an argument cannot work.
    """
    given = locals()
    config = constructor_values({name: given[name] for name in VALUES if name in given})
    vit: Any = load_backbone(backbone)
    bound = inspect.signature(constructor).bind(vit, **values)
    bound.apply_defaults()
    own = dict(list(bound.arguments.items())[1:])
    prompter = constructor(vit, **values)
    frozen = {id(p) for p in vit.parameters()}
    if kept := [name for name, p in prompter.named_parameters() if id(p) in frozen]:
        raise ValueError(
            f"method {method!r}: {type(prompter).__name__} keeps parameters of the backbone as "
            f"its own ({kept[0]} and {len(kept) - 1} more), which would be trained and saved; keep "
            "sizes, or copies, or the module in a tuple"
        )
    built = build_head(
        head, vit, num_classes, class_embeddings=class_embeddings, logit_scale=logit_scale
    )
    return PromptedViT(
        vit,
        prompter,
        built,
        method=method,
        config=config | constructor_values(own, {}),
        backend=backend,
        fast=fast,
    )
