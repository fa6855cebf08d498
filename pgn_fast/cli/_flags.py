"""Between Python's argument names and the command line's flags."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence

# where a flag is not the argument's name with dashes
_FLAGS = {
    "batch_size": "-b",
    "workers": "-j",
    "data": "DATA",
    "resume=True": "--resume",
    "fast=False": "--no-fast",
    "compensate=False": "--no-compensate",
    "sync_bn=False": "--no-sync-bn",
}
# what people type who come from other tools -> what it is called here
_MEANT = {
    "batch": "batch-size",
    "backbone": "model",
    "base-lr": "lr-base",
    "checkpoint": "resume",
    "dropout": "prompt-dropout",
    "ema": "model-ema",
    "gpu": "device",
    "gpus": "device",
    "label-smoothing": "smoothing",
    "learning-rate": "lr",
    "max-epochs": "epochs",
    "n-epochs": "epochs",
    "num-epochs": "epochs",
    "num-workers": "workers",
    "optim": "opt",
    "optimizer": "opt",
    "out": "output",
    "output-dir": "output",
    "per-device-train-batch-size": "batch-size",
    "precision": "amp-dtype",
    "prompts": "num-prompts",
    "num-train-epochs": "epochs",
    "scheduler": "sched",
    "lr-scheduler": "sched",
    "save-dir": "output",
    "wd": "weight-decay",
}


def in_flags(message: str) -> str:
    """A library message for the command line: `batch_size` becomes -b, `lr` becomes --lr."""

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        return _FLAGS.get(name, f"--{name.partition('=')[0].replace('_', '-')}")

    return re.sub(r"`([a-z_]+(?:=(?:True|False))?)`", flag, message)


def unknown_arguments(parser: argparse.ArgumentParser, command: str, unknown: Sequence[str]) -> str:
    """What to answer to words that ``command`` does not know, with what was probably meant."""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = {
        option for action in commands.choices[command]._actions for option in action.option_strings
    }
    hints = []
    for word in unknown:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            continue
        meant = f"--{_MEANT.get(name.lstrip('-').replace('_', '-'), '')}"
        near = [meant] if meant in known else difflib.get_close_matches(name, known, n=1)
        if near:
            hints.append(f"{name}: did you mean {near[0]}?")
    hint = f" {' '.join(hints)}" if hints else ""
    return f"unknown: {' '.join(unknown)}.{hint} pgn-fast {command} --help lists the flags."
