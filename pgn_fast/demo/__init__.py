"""The packaged demonstration: a small vision transformer of our own, and what prompts add to it.

``backbone()`` is the frozen model (``demo_vit.safetensors``), pretrained on images made from
formulas by the repository's tools/pretrain_demo.py; ``demo.experiment`` adapts it to handwritten
digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.models import VisionTransformer

NAME = "pgn_demo_vit"
WEIGHTS = Path(__file__).with_name("demo_vit.safetensors")
RECORD = WEIGHTS.with_suffix(".json")

# pixels in [0, 1] become [-1, 1]; patches of 8 hold 192 values, more than the 128 of a token, so
# that every token is the patch embedding of some pixels (what input-space prompts need)
PRETRAINED_CFG: dict[str, Any] = {
    "architecture": NAME,
    "tag": "procedural",
    "input_size": (3, 32, 32),
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "num_classes": 0,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "mit",
}


def build() -> VisionTransformer:
    """The architecture, freshly initialized: D = 128, 6 blocks of 4 heads, 16 patches of 8 × 8."""
    from timm.models import VisionTransformer

    # "jax": Xavier weights; timm's default deviation of 0.02 is too small to learn at this width
    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=128,
        depth=6,
        num_heads=4,
        num_classes=0,
        weight_init="jax",
    )
    # timm's own way to hang its facts on a model, which nn.Module's annotations do not foresee
    facts: Any = model
    facts.pretrained_cfg = facts.default_cfg = dict(PRETRAINED_CFG)
    return model


def backbone() -> VisionTransformer:
    """The packaged pretrained model, in eval mode: images (B, 3, 32, 32) → features (B, 128).

    Its ``pretrained_cfg`` names the preprocessing; ``pretraining_record()`` tells how it was made.
    """
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def pretraining_record() -> dict[str, Any]:
    """Seed, settings, versions, seconds and learning curve of the packaged weights."""
    return json.loads(RECORD.read_text())
