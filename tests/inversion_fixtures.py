"""Inputs of the inversion tests: patch embeddings of known spectrum, published PGNs, photographs.

No trained backbone is at hand, so every figure belongs to one of these patch embeddings:
"rand" is a convolution's default initialization (well conditioned), "a1" and "a2" have smooth
filters with singular values (1 + f/2)^-1 and ^-2 over the frequency f (condition 10 to 12000).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgn_fast.inversion import CanvasLayout, PatchMap, ServerSpec
from pgn_fast.inversion.layout import to_patches

OFFICIAL = Path(__file__).parent / "fixtures" / "official_pgn"
CLIP_STATISTICS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGENET_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# embedding width, patch size and normalization of the four shapes
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "B/32": (768, 32, CLIP_STATISTICS),
    "S/16": (384, 16, IMAGENET_STATISTICS),
    "B/16": (768, 16, HALVES),
    "L/14": (1024, 14, CLIP_STATISTICS),
}


def _dct(p: int) -> np.ndarray:
    k, i = np.arange(p)[:, None], np.arange(p)[None]
    matrix = np.sqrt(2 / p) * np.cos(np.pi * (2 * i + 1) * k / (2 * p))
    matrix[0] /= np.sqrt(2)
    return matrix


def frequency_basis(p: int) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal patches (3 p^2, 3 p^2), opponent colors times cosines, and their frequencies.

    Chroma counts as twice the frequency plus two.
    """
    cosines = _dct(p)
    colors = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], float)
    colors /= np.linalg.norm(colors, axis=1, keepdims=True)
    k = np.arange(p)
    radius = np.sqrt(k[:, None] ** 2 + k[None] ** 2)
    frequencies = np.concatenate([radius.ravel(), *[(2 * radius + 2).ravel()] * 2])
    patches = np.einsum("ab,ky,lx->aklbyx", colors, cosines, cosines)
    order = np.argsort(frequencies, kind="stable")
    return patches.reshape(3 * p * p, -1)[order], frequencies[order]


@functools.cache
def photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def photo_crops(count: int, size: int = 224) -> Tensor:
    """uint8 (count, 3, size, size): crops of the two photographs that ship with scikit-learn."""
    from PIL import Image

    random, crops = np.random.RandomState(0), []
    for i in range(count):
        photo = photographs()[i % 2]
        side = random.randint(120, 420)
        y = random.randint(0, photo.shape[0] - side + 1)
        x = random.randint(0, photo.shape[1] - side + 1)
        crop = Image.fromarray(photo[y : y + side, x : x + side])
        crops.append(np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def patch_weight(shape: str, kind: str) -> Tensor:
    """A patch embedding (D, 3 p^2) float64; the smooth ones give natural patches the norm 10."""
    D, p, statistics = SHAPES[shape]
    n, generator = 3 * p * p, torch.Generator().manual_seed(0)
    if kind == "rand":
        uniform = torch.rand(D, n, generator=generator, dtype=torch.float64)
        return (2 * uniform - 1) / math.sqrt(n)
    patches, frequencies = frequency_basis(p)
    rank = min(D, n)
    spectrum = torch.from_numpy((1 + frequencies[:rank] / 2) ** -float(kind[1:]))
    random = torch.randn(D, rank, generator=generator, dtype=torch.float64)
    weight = (torch.linalg.qr(random)[0] * spectrum) @ torch.from_numpy(patches[:rank])
    natural = (
        to_patches(ServerSpec(**statistics).normalize(photo_crops(4)), p).double().flatten(0, 1)
    )
    return weight * (10 / (natural @ weight.T).norm(dim=1).mean())


def position_embedding(D: int, side: int, norm: float = 1.0) -> Tensor:
    """Smooth sines in a random rotation plus 20 % noise, (side^2, D) float64, rows of one norm."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij")
    waves = torch.linspace(math.log(0.2), math.log(3.0), 16).double().exp() * math.pi / side
    features = torch.cat(
        [f(c.reshape(-1, 1) * waves) for c in (y, x) for f in (torch.sin, torch.cos)], 1
    )
    rotation = torch.randn(features.shape[1], D, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.normalize(features @ rotation, dim=1)
    noise = torch.randn(side * side, D, generator=generator, dtype=torch.float64)
    table = smooth + 0.2 * torch.nn.functional.normalize(noise, dim=1)
    return norm * torch.nn.functional.normalize(table, dim=1)


@functools.cache
def synthetic_map(
    shape: str, kind: str, position_norm: float = 1.0, scale_free: bool = False
) -> PatchMap:
    """The patch map of a synthetic patch embedding: 4 x 4 cells, all of them for prompts."""
    D, p, statistics = SHAPES[shape]
    side = 4
    server = ServerSpec(resize=None, crop=None, dynamic_size=True, **statistics)
    mean, std = (
        torch.tensor(statistics[name], dtype=torch.float64).repeat_interleave(p * p)
        for name in ("mean", "std")
    )
    weight = patch_weight(shape, kind)
    positions = position_embedding(D, side, position_norm)
    return PatchMap(
        A=weight / (255 * std),
        d=-weight @ (mean / std),
        positions=positions,
        image_positions=positions[:0],
        native=(side, side),
        patch_size=p,
        layout=CanvasLayout((side, side), (0, 0), (), tuple(range(side * side))),
        server=server,
        scale_free=scale_free,
        name=f"{shape} {kind}",
    )


@functools.cache
def published(name: str = "pgn_clip_cifar100", images: int = 8) -> tuple[Tensor, Tensor]:
    """A published token library (K, D) and its coefficients on photographs, (images * 16, K)."""
    from pgn_fast.prompts import PromptGenerator

    generator = PromptGenerator.from_official(OFFICIAL / f"{name}.pt").eval()
    server = ServerSpec(**CLIP_STATISTICS)  # the official code normalizes so for every backbone
    with torch.no_grad():
        coefficients = generator.mixture(server.normalize(photo_crops(images)))
    return generator.library().detach().double(), coefficients.double().flatten(0, 1)


def isotropic_tokens(D: int, count: int = 256) -> Tensor:
    """Random directions with the norms of the published CLIP library, for widths without one."""
    norms = published()[0].norm(dim=1)[:count]
    tokens = torch.randn(count, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.nn.functional.normalize(tokens, dim=1) * norms[:, None]
