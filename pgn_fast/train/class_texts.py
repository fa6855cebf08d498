"""The head of words that a configuration asks for: class names to a zero-shot head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from ..words import TEMPLATE, check_names, check_templates, encode_class_names
from ..words.names import names_for, read_class_names
from . import protocols
from .config import TrainConfig
from .split import Splits


@dataclass(frozen=True)
class ClassTexts:
    """Names in label order, and the sentences around them."""

    names: list[str]
    templates: str | Sequence[str]

    def head(self, config: TrainConfig, backbone: Any) -> dict[str, Any]:
        """Arguments of a model's constructor that make its zero-shot head.

        Raises:
            UserError: no text tower of that model, see ``encode_class_names``.
        """
        model = config.text_model or config.model
        words = encode_class_names(model, self.names, self.templates, backbone=backbone)
        return {"head": "zero_shot", **words._asdict()}


def class_texts(config: TrainConfig, splits: Splits) -> tuple[ClassTexts, Splits]:
    """The words of a zero-shot head, and the splits again, with class names where they had none.

    Names come from ``config.class_names``, else from the data; in a folder's name an underscore
    stands for a space. PGN's data sets have the paper's sentence.

    Raises:
        UserError: no names, not one for each class, or a template without "{}".
    """
    classes, train = splits.class_names, splits.train
    row = protocols.find(config.data) if protocols.is_named(config.data) else None
    notes: list[str] = []
    if config.class_names is not None:
        given = _given_names(config.class_names)
        names, notes = names_for(given, classes, splits.num_classes, train.origin)
    elif classes is not None and (row is None or row.template is not None):
        names = [name.replace("_", " ").strip() for name in classes]
        if row is not None:  # as the official code writes them
            names = [name.lower() for name in names]
    else:
        raise UserError(
            f"`class_names`: {train.origin} does not tell what its {splits.num_classes} classes "
            "are called; give a file with one name a line, in label order."
        )
    template = config.template or (row and row.template) or TEMPLATE
    texts = ClassTexts(check_names(names), check_templates(template))
    notes.append(f"classes in words, such as {names[0]!r} and {names[-1]!r}")
    train = replace(train, notes=(*train.notes, *notes))
    return texts, replace(splits, train=train, class_names=classes or names)


def _given_names(source: str) -> Sequence[str] | Mapping[str, str]:
    """The names in a file, or those of one of PGN's data sets ("pgn/food101")."""
    if protocols.is_named(source) and protocols.find(source).template is not None:
        found: list[str] = protocols.pgn_words(protocols.find(source).short)["classes"]
        return found
    return read_class_names(source)
