"""What a search keeps in its folder, so that it goes on with the choices that it was begun with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import write_files
from ..errors import UserError
from .run_folder import SEARCH
from .state import FREE
from .tune_trial import Trial


@dataclass(frozen=True)
class Search:
    """What is asked of a search.

    Attributes:
        given: fields of ``TrainConfig`` that hold for all trials.
        methods: that are tried.
        seconds, trials: the budget; None: no bound.
        made_by: what else its answer depends on, by name.
    """

    given: dict[str, Any]
    methods: tuple[str, ...]
    seconds: float | None
    trials: int | None
    made_by: dict[str, Any]


def load_search(output: Path) -> tuple[Search, list[Trial]] | None:
    """The search in a folder, and its trials; None where there is none.

    Raises:
        UserError: its file is damaged.
    """
    path = output / SEARCH
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        asked = state["search"] | {"methods": tuple(state["search"]["methods"])}
        return Search(**asked), [Trial(**trial) for trial in state["trials"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"`resume`: {path} is damaged: {error}") from error


def save_search(
    output: Path, search: Search, rungs: Sequence[int], trials: Sequence[Trial]
) -> None:
    """Replace the file of a search; the folder must be there."""
    content = {
        "search": dataclasses.asdict(search),
        "rungs": rungs,
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
    write_files({output / SEARCH: (json.dumps(content, indent=1) + "\n").encode()})


def continued(before: Search, now: Search, output: Path, methods_given: bool) -> Search:
    """The search in ``output`` with another budget, or as it was: ``now`` names the same choices.

    Args:
        methods_given: whether those of ``now`` were asked for.

    Raises:
        UserError: a choice, or a version of a package, that would change its answer.
    """
    plain = json.loads(json.dumps(now.given))
    asked = {name: value for name, value in plain.items() if name not in FREE} | now.made_by
    asked |= {"methods": list(now.methods)} if methods_given else {}
    known = before.given | before.made_by | {"methods": list(before.methods)}
    for name, value in asked.items():
        if name not in known or known[name] != value:
            was = f"has `{name}` = {known[name]!r}" if name in known else f"was given no `{name}`"
            raise UserError(
                f"`resume`: the search in {output} {was}, now it is {value!r}: leave it as it was "
                "to go on, or start a new one with `output`."
            )
    budget = before if now.seconds is None and now.trials is None else now
    return dataclasses.replace(
        before, given=before.given | plain, seconds=budget.seconds, trials=budget.trials
    )
