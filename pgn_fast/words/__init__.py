"""Classes in words: their texts through the text tower of the model that the backbone is part of.

    class_embedding = normalize(mean over templates of normalize(text_tower(template, name)))

Source: Radford et al., arXiv:2103.00020, section 3.1.4 (prompt engineering and ensembling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, shown
from .names import same_name
from .towers import find_tower

__all__ = ["TEMPLATE", "ClassEmbeddings", "check_names", "check_templates", "encode_class_names"]

TEMPLATE = "a photo of a {}."
# texts of one pass through the text tower
_TEXTS = 256


class ClassEmbeddings(NamedTuple):
    """What a zero-shot head needs; ``PGN(backbone, head="zero_shot", **words._asdict())``.

    Attributes:
        class_embeddings: (C, E) float32 on the CPU, rows of length one.
        logit_scale: the model's own, exponentiated (CLIP: 100). SigLIP's bias is the same for all
            classes and left out.
    """

    class_embeddings: Tensor
    logit_scale: float


def encode_class_names(
    model: str | nn.Module,
    class_names: Sequence[str],
    templates: str | Sequence[str] = TEMPLATE,
    *,
    tokenizer: Callable[..., Any] | None = None,
    backbone: Any = None,
) -> ClassEmbeddings:
    """Encode class names once, as the classifier of a zero-shot head.

    Args:
        model: the whole model: a transformers CLIP or SigLIP model, an open_clip model, or a name
            as ``load_backbone`` takes it, of a model that has a text tower: a repository's id or a
            folder of transformers' or open_clip's, or a timm name whose weights open_clip knows,
            such as "vit_base_patch32_clip_quickgelu_224.openai".
        class_names: C different names in label order, as they shall stand in a sentence.
        templates: one or several sentences with "{}" in the place of the name. The embeddings of
            several are normalized, averaged and normalized again.
        tokenizer: of a model that is given as a module; None: transformers' by the model's own
            name. open_clip's modules do not name theirs: ``open_clip.get_tokenizer(...)``.
        backbone: the frozen image tower that the embeddings are for; it is compared with the
            model's own on a random image.

    Raises:
        UserError: (a ValueError) names that are missing, empty or equal; a template without "{}";
            a model without a text tower, whose package is not installed, or whose image tower is
            not ``backbone``; a text that is too long for the tower.
        TypeError: neither a name nor a module.
    """
    names, sentences = check_names(class_names), check_templates(templates)
    tower = find_tower(model, tokenizer)
    if backbone is not None:
        tower.check_backbone(backbone)
    total = torch.zeros(len(names), 1)
    for sentence in sentences:
        total = total + _encode(tower.encode, [sentence.replace("{}", name) for name in names])
    # the mean's length does not matter: it is normalized
    return ClassEmbeddings(F.normalize(total, dim=-1), tower.logit_scale)


@torch.no_grad()
def _encode(encode: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
    """Texts to embeddings (C, E) float32, each of length one."""
    parts = [encode(texts[i : i + _TEXTS]) for i in range(0, len(texts), _TEXTS)]
    return F.normalize(torch.cat(parts).float().cpu(), dim=-1)


def check_names(names: Sequence[str]) -> list[str]:
    """Names as a list.

    Raises:
        UserError: fewer than two, one that is no text, or two that read the same.
    """
    if isinstance(names, str) or len(names) < 2:
        raise UserError(
            f"`class_names`: {shown(names)}; give the names of two classes or more, in label order."
        )
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"`class_names`: the name of class {i} is {shown(name)}; give a word.")
        other = seen.setdefault(same_name(name), i)
        if other != i:
            raise UserError(
                f"`class_names`: classes {other} and {i} are both {shown(name)}: their texts could "
                "not be told apart. Give each class a name of its own."
            )
    return [" ".join(name.split()) for name in names]


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates as a list.

    Raises:
        UserError: none, or one without "{}".
    """
    given = [templates] if isinstance(templates, str) else list(templates)
    wrong = [t for t in given if not isinstance(t, str) or "{}" not in t]
    if wrong or not given:
        what = f"{shown(wrong[0])} has no {{}}" if wrong else "none is given"
        raise UserError(
            f"`template`: {what}; mark the place of the class's name, as in {shown(TEMPLATE)}."
        )
    return given
