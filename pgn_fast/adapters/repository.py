"""Adapters on Hugging Face's hub: a repository of two files and a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import hub
from ..errors import UserError
from . import CONFIG_FILE, WEIGHTS_FILE, read_adapter, save_pretrained
from . import from_pretrained as from_directory
from .places import fetch_adapter

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD_FILE = "README.md"


def from_pretrained(
    directory_or_repo_id: str | PathLike[str],
    backbone: str | nn.Module | None = None,
    *,
    trainable: bool = False,
    **options: Any,
) -> Any:
    """Load an adapter in front of its frozen backbone.

    Args:
        directory_or_repo_id: what ``save_pretrained`` wrote, or a repository on the hub,
            "OWNER/NAME" or "OWNER/NAME@REVISION"; a directory of that name comes first.
        backbone, trainable, **options: as in ``pgn_fast.adapters.from_pretrained``.

    Raises:
        UserError: (a ValueError) no adapter there, one that does not fit, or a hub that cannot be
            reached.
    """
    if "is_trainable" in options:
        raise UserError("is_trainable is PEFT's name; here it is trainable=True.")
    folder = fetch_adapter(directory_or_repo_id)
    return from_directory(folder, backbone, trainable=trainable, **options)


def push_model(model: Any, repo_id: str, **options: Any) -> str:
    """Save a model's adapter in a temporary directory and ``push_adapter`` it."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return push_adapter(folder, repo_id, **options)


def push_adapter(
    directory: str | PathLike[str],
    repo_id: str,
    *,
    summary: Mapping[str, Any] | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Upload an adapter with a model card; the repository is made where it is missing.

    Args:
        directory: what ``save_pretrained`` wrote. Its two files are uploaded and nothing else.
        repo_id: "OWNER/NAME".
        summary: of its training (``summary.json`` of a run): data and scores for the card.
        private, commit_message, revision, create_pr, token: as in
            ``huggingface_hub.HfApi.upload_folder`` and ``create_repo``.

    Returns:
        The address of the commit or pull request.

    Raises:
        UserError: (a ValueError) no whole adapter there, or a hub that refuses or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if not hub.is_repo_id(repo_id) or "@" in repo_id:
        raise UserError(f"repo_id {repo_id!r}: give OWNER/NAME.")
    folder = Path(directory)
    config, _ = read_adapter(folder)
    card = model_card(config, repo_id, summary)
    contents: dict[str, Any] = {f: str(folder / f) for f in (CONFIG_FILE, WEIGHTS_FILE)}
    contents[CARD_FILE] = str(card).encode()
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    with hub.asked(repo_id, uploads=True):
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=commit_message or f"Upload {config['method']} adapter",
            revision=revision,
            create_pr=create_pr,
        )
    return done.pr_url or done.commit_url


def model_card(
    config: Mapping[str, Any], repo_id: str, summary: Mapping[str, Any] | None = None
) -> ModelCard:
    """The card of an adapter: what it is, what it was trained on, how it scored, how to use it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base = config.get("base_model_name_or_path")
    data = None if summary is None else _data_name(summary.get("config", {}).get("data", ""))
    scores = [] if summary is None else _scores(summary)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data or "unnamed",
            dataset_name=data or "unnamed",
            dataset_split=split,
            metric_type="accuracy",
            metric_value=round(top1 / 100, 6),
        )
        for split, top1, _ in scores
    ]
    about = ModelCardData(
        library_name="pgn_fast",
        pipeline_tag="image-classification",
        tags=["pgn_fast", str(config["method"])],
        base_model=_hub_id(base),
        model_name=repo_id,
        eval_results=results or None,
    )
    lines = [
        f"# {repo_id}",
        "",
        f"A `{config['method']}` adapter for a frozen vision transformer, by `pgn_fast`: only what "
        "was trained is in here, no weight of the backbone.",
        "",
        f"- Backbone: {f'`{base}`' if base else 'not named; pass it when loading'}",
        f"- Digest of the backbone's weights: `{config.get('backbone_digest') or 'not recorded'}`",
        f"- Digest of the adapter's weights: `{config.get('weights_digest') or 'not recorded'}`",
        f"- Prompts: {config.get('num_prompts', 'none')}; classes: {config.get('num_classes')}",
        f"- Images: `{json.dumps(config.get('preprocessing'))}`",
        f"- Data: {data or 'not recorded'}",
    ]
    if config.get("class_names"):
        lines.append(f"- Class names: {', '.join(map(str, config['class_names']))}")
    if scores:
        lines += ["", "| split | images | top-1 |", "| --- | ---: | ---: |"]
        lines += [f"| {split} | {images:,d} | {top1:.2f} % |" for split, top1, images in scores]
        chosen = summary and summary.get("chosen_by")
        lines += ["", f"The epoch was chosen by {chosen}; the test split was used once, after it."]
    passed = "" if base else ", backbone"
    lines += [
        "",
        "```python",
        "import pgn_fast",
        "",
        f'model = pgn_fast.from_pretrained("{repo_id}"{passed})',
        "logits = model(images)  # uint8 or normalized, (B, 3, H, W)",
        "```",
        "",
    ]
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n".join(lines))


def _hub_id(base: str | None) -> str | None:
    """The backbone's repository; timm's names are repositories of timm's."""
    if not base or base == "pgn_demo_vit":
        return None
    return hub.split_revision(base)[0] if "/" in base else f"timm/{base}"


def _data_name(data: str) -> str:
    """The name of a data set; of a folder its last part alone, which tells little of a machine."""
    return data if data.startswith(("torch/", "hfds/", "wds/", "tfds/")) else Path(data).name


def _scores(summary: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """(split, top-1 in percent, images) of the splits that were scored."""
    found = []
    for split in ("validation", "test"):
        score = summary.get(split)
        if score and score.get("top1") is not None:
            found.append((split, float(score["top1"]), int(score["images"])))
    return found
