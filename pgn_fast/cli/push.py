"""``pgn-fast push``: an adapter to Hugging Face's hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "upload an adapter to Hugging Face's hub, with a model card"
EPILOG = """\
examples:
  pgn-fast push runs/pgn/best --card                       the card alone, offline
  pgn-fast push runs/photos/best me/photos --private
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="a folder such as runs/pgn/best, or a run's"
    )
    parser.add_argument("repo_id", metavar="OWNER/NAME", nargs="?", help="the repository")
    parser.add_argument("--card", action="store_true", help="print the model card, upload nothing")
    parser.add_argument("--private", action="store_true", default=None, help="if it is made now")
    parser.add_argument("--commit-message", metavar="TEXT")
    parser.add_argument("--revision", metavar="BRANCH")
    parser.add_argument("--create-pr", action="store_true", help="as a pull request")


def run(args: argparse.Namespace) -> int:
    from ..adapters import read_adapter
    from ..adapters.repository import model_card, push_adapter
    from ..errors import UserError
    from ._options import adapter_folder

    folder = Path(adapter_folder(args.adapter))
    summary = run_summary(folder)
    if args.card:
        print(model_card(read_adapter(folder)[0], args.repo_id or folder.name, summary))
        return 0
    if args.repo_id is None:
        raise UserError("OWNER/NAME is needed: the repository to upload to (or --card).")
    address = push_adapter(
        folder,
        args.repo_id,
        summary=summary,
        private=args.private,
        commit_message=args.commit_message,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    print(address)
    return 0


def run_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json`` of the run that wrote this adapter as its best; None where there is none."""
    path = folder.resolve().parent / "summary.json"
    if folder.resolve().name != "best" or not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text())
    except ValueError:
        return None
    return summary if isinstance(summary, dict) else None
