"""What a search tries: the fields of ``TrainConfig`` and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import find_method
from .config import TrainConfig

METHODS = ("linear", "vpt-shallow", "vpt-deep", "pgn")
PROMPTS = (4, 8, 16, 32)
# blocks that get prompts in VPT-Deep, from the last one down: below them everything is kept
SHARES = {"all": 1.0, "half": 0.5, "quarter": 0.25}
DECAYS = (0.0, 1e-4, 1e-2)
# times the method's own rate
RATES = (0.1, 10.0)


def propose(
    asked: Any, given: Mapping[str, Any], methods: Sequence[str], backbone: Any
) -> dict[str, Any]:
    """The fields that a trial tries; those that are given are not tried.

    Args:
        asked: Optuna's trial, which suggests values.
        methods: to choose from where none is given.
        backbone: whose ``blocks`` get prompts.
    """
    tried = dict[str, Any]()
    method = given.get("method") or asked.suggest_categorical("method", methods)
    tried["method"] = method
    row = find_method(method)
    if "lr" not in given and "lr_base" not in given:
        usual = row.training.get("lr", TrainConfig.lr)
        factor = asked.suggest_float("rate", *RATES, log=True)
        tried["lr"] = float(f"{usual * factor:.3g}")
    if "weight_decay" not in given:
        tried["weight_decay"] = asked.suggest_categorical("decay", DECAYS)
    if "num_prompts" in row.options.values() and "num_prompts" not in given:
        tried["num_prompts"] = asked.suggest_categorical("P", PROMPTS)
    if method == "vpt-deep" and "method_kwargs" not in given:
        share = SHARES[asked.suggest_categorical("layers", list(SHARES))]
        depth = len(backbone.blocks)
        first = depth - max(1, round(share * depth))
        if first > 0:
            tried["method_kwargs"] = {"layers": list(range(first, depth))}
    return tried
