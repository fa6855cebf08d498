"""Defaults of data and deployments, and the published recipes, as data."""

from __future__ import annotations

from typing import Any

# Digits are not mirrored or cropped, a "6" would be no "6" any more.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.0,
        "crop_pct": 1.0,
    },
}

TASK_DEFAULTS: dict[str, dict[str, Any]] = {"multilabel": {"eval_metric": "map"}}

# The published recipes, as far as they are known. The official PGN run also solarizes a fifth of
# its images, at an unknown threshold, and picks the model by test images: neither is done here.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RECIPES: dict[str, dict[str, Any]] = {
    "pgn-official": {
        "method": "pgn",
        "head_init": "official",
        "opt": "sgd",
        "momentum": 0.9,
        "lr": 0.1,
        "weight_decay": 0.0,
        "sched": "cosine-pgn",
        "epochs": 100,
        "warmup_epochs": 50,
        "scale": (1.0, 1.0),
        "color_jitter": 0.4,
        "color_jitter_prob": 0.8,
        "grayscale_prob": 0.2,
        "hflip": 0.5,
        # for every backbone, as in the official data modules
        "mean": _CLIP_MEAN,
        "std": _CLIP_STD,
    },
    "vpt-official": {
        "method": "vpt-deep",
        "head_init": "official",
        "opt": "sgd",
        "momentum": 0.9,
        # base rate 1.0 from the published grid 50 ... 0.05, times batch / 256
        "lr": 0.25,
        "batch_size": 64,
        "weight_decay": 1e-3,
        "sched": "cosine-vpt",
        "epochs": 100,
        "warmup_epochs": 10,
        "prompt_dropout": 0.1,
    },
}


def generator_defaults(data: str, generator: str) -> dict[str, Any]:
    """8 pixels leave nothing to pool away; only the paper's network has that switch."""
    tiny = data == "digits" and generator == "resnet10"
    return {"generator_kwargs": {"max_pool": False}} if tiny else {}


def deploy_defaults(deploy: str | None, model: str) -> dict[str, Any]:
    """The packaged backbone's 4 x 4 patches have 7 cells around an image of 3 x 3."""
    return {"num_prompts": 7} if deploy == "rgb" and model == "pgn_demo_vit" else {}
