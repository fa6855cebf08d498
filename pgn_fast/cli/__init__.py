"""The command ``pgn-fast``: one module a command, each with HELP, add_arguments and run.

Only ``run`` may import torch, timm and the like, so that every ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import TrainingStopped, UserError
from ._flags import in_flags, unknown_arguments

# the order of a newcomer's way through them; a command is there when its module is
_ORDER = (
    "demo",
    "train",
    "tune",
    "eval",
    "predict",
    "tasks",
    "invert",
    "serve",
    "export",
    "push",
    "verify",
    "reproduce",
    "bench",
    "autotune",
    "env",
)

_EPILOG = """\
a first round, offline, in a few minutes:
  pgn-fast demo                                        the point of it all, on handwritten digits
  pgn-fast train digits --method pgn --output runs/pgn
  pgn-fast eval runs/pgn/best digits
on your own images, one sub-folder a class:
  pgn-fast train photos --model vit_small_patch16_224 --method vpt-deep --output runs/photos
  pgn-fast predict runs/photos/best new_photos --output predictions.csv

pgn-fast COMMAND --help explains a command. Exit codes: 0 done, 1 stopped on the way, 2 bad
arguments or data.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and where to read more, instead of the whole usage."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def commands() -> list[str]:
    """Names of the commands that this installation has."""
    there = {module.name for module in pkgutil.iter_modules(__path__)}
    return [name for name in _ORDER if name in there]


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or of one of them alone."""
    parser = _Parser(
        prog="pgn-fast",
        description="Prompts for frozen vision transformers: PGN and VPT, fast and exact.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pgn_fast {__version__}")
    commands_parser = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in [only] if only else commands():
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands_parser.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; ``sys.argv`` where ``argv`` is None.

    Returns:
        0 done; 1 stopped on the way (a loss that is not finite, a full disk); 2 bad arguments or
        data, one line on stderr; 130 interrupted; 143 ended by SIGTERM, after a checkpoint.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    only = words[0] if words and words[0] in commands() else None
    parser = build_parser(only)
    try:
        args, unknown = parser.parse_known_args(words)
        if unknown:
            return _complain(args.command, unknown_arguments(parser, args.command, unknown), 2)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return args.run(args)
    except UserError as error:
        return _complain(args.command, in_flags(str(error)), 2)
    except TrainingStopped as error:
        return _complain(args.command, in_flags(str(error)), error.exit_code)
    except OSError as error:
        return _complain(args.command, f"{error}; files written before are whole.", 1)
    except KeyboardInterrupt:
        return _complain(args.command, "interrupted; files written before are whole.", 130)


def _complain(command: str, message: str, code: int) -> int:
    print(f"pgn-fast {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
