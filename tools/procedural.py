"""Procedural images to pretrain on: seeded, vectorized, made from formulas and nothing else.

Every class is a fixed drawing rule, every image one random execution of it:

    strokes    one to three chained Bezier curves            distance field of the curve
    shapes     a closed outline in polar form r(angle)       radius against outline
    fractals   an iterated function system of affine maps    chaos game, point density
    textures   three gratings through a soft threshold       fills the whole image

An image is its object under a random affine map, thickness and softness, blended in a random
color over a random background; half the images are gray, some are re-sampled from a coarser grid,
all carry pixel noise. Which rule belongs to which class depends on ``seed`` alone, and a batch on
``(seed, step)`` alone, so that training can be repeated and resumed without any stored data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

IMAGE_SIZE = 32

# classes of each family, in the order of their labels
FAMILIES = {"strokes": 160, "shapes": 32, "fractals": 32, "textures": 32}
NUM_CLASSES = sum(FAMILIES.values())

_CURVES, _CURVE_POINTS = 3, 20
_MAPS, _CHAINS, _CHAIN_STEPS, _BURN_IN = 3, 48, 16, 5
_HARMONICS = (1, 2, 3, 4, 5, 6)
_GRATINGS = 3


def _uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=generator)


def _normal(generator: torch.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _generator(*words: int) -> torch.Generator:
    """A generator for a tuple of whole numbers, by a fixed hash that mixes every word."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state ^= (word + 0x9E3779B97F4A7C15 + (state << 6) + (state >> 2)) & (2**64 - 1)
        state = (state * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state ^= state >> 31
    return torch.Generator().manual_seed(state & (2**63 - 1))


@dataclass(frozen=True)
class ImageBatch:
    """Images, the rule behind each, and the object in it before color and noise.

    images: (B, 3, 32, 32) float32 in [0, 1]; labels: (B,) int64 below ``NUM_CLASSES``;
    masks: (B, 32, 32) float32, how much of each pixel the object covers, in [0, 1].
    """

    images: Tensor
    labels: Tensor
    masks: Tensor


class ProceduralImages:
    """The endless data set of one seed: ``batch(step, size)`` always gives the same images.

    Args:
        seed: fixes the drawing rule of every class and every image.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        generator = _generator(seed, 0)
        strokes, shapes, fractals, textures = FAMILIES.values()
        self.curves, self.curve_present = _stroke_rules(generator, strokes)
        self.outlines, self.holes = _shape_rules(generator, shapes)
        self.map_weights, self.map_offsets = _fractal_rules(generator, fractals)
        self.frequencies, self.sharpness = _texture_rules(generator, textures)
        axis = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.pixels = torch.stack([x, y], dim=-1).reshape(-1, 2)  # (H * W, 2)

    def batch(self, step: int, size: int) -> ImageBatch:
        """Draw ``size`` images of uniformly random classes; a function of (seed, step, size)."""
        generator = _generator(self.seed, 1, step)
        labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        # families lie in contiguous runs of the sorted labels
        labels = labels.sort().values
        counts = torch.bincount(_family_of(labels), minlength=len(FAMILIES)).tolist()
        families = labels.split(counts)
        first = [0, *torch.tensor(list(FAMILIES.values())).cumsum(0).tolist()]
        draw = (self._strokes, self._shapes, self._fractals, self._textures)
        masks = [
            render(family - start, _pose(generator, len(family)), generator)
            for render, family, start in zip(draw, families, first, strict=False)
        ]
        # shuffled before the coarse grids are handed out by position in the batch
        order = torch.randperm(size, generator=generator)
        covered = torch.cat(masks)[order]  # (B, H * W)
        images = _degrade(_paint(covered, generator, self.pixels), generator)
        return ImageBatch(images, labels[order], covered.view(size, IMAGE_SIZE, IMAGE_SIZE))

    def _strokes(self, rule: Tensor, pose: _Pose, generator: torch.Generator) -> Tensor:
        curves = self.curves[rule]  # (B, 3, 4, 2)
        curves = curves + _normal(generator, tuple(curves.shape), 0.07)
        t = torch.linspace(0, 1, _CURVE_POINTS)[:, None]
        bernstein = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
        points = torch.einsum("tc,bscx->bstx", bernstein, curves)
        # absent curves collapse onto the first point of the first curve
        present = self.curve_present[rule][:, :, None, None]
        points = torch.where(present, points, points[:, :1, :1])
        points = pose.apply(points.flatten(1, 2))  # (B, 60, 2)
        squared = (
            self.pixels.square().sum(-1)[None, :, None]
            + points.square().sum(-1)[:, None, :]
            - 2 * torch.matmul(self.pixels, points.transpose(1, 2))
        )
        distance = squared.amin(dim=-1).clamp_min(0).sqrt()  # (B, H * W)
        thickness = _uniform(generator, (len(rule), 1), 0.06, 0.22)
        softness = _uniform(generator, (len(rule), 1), 0.02, 0.08)
        return torch.sigmoid((thickness - distance) / softness)

    def _shapes(self, rule: Tensor, pose: _Pose, generator: torch.Generator) -> Tensor:
        local = pose.invert(self.pixels)  # (B, H * W, 2)
        angle = torch.atan2(local[..., 1], local[..., 0])
        outline = self.outlines[rule]  # (B, 2, harmonics)
        outline = outline * (1 + _normal(generator, tuple(outline.shape), 0.12))
        phase = angle[..., None] * torch.tensor(_HARMONICS)
        radius = 0.6 * (
            1
            + torch.einsum("bph,bh->bp", phase.cos(), outline[:, 0])
            + torch.einsum("bph,bh->bp", phase.sin(), outline[:, 1])
        )
        distance = local.norm(dim=-1)
        softness = _uniform(generator, (len(rule), 1), 0.02, 0.08)
        solid = torch.sigmoid((radius - distance) / softness)
        hole = torch.sigmoid((self.holes[rule][:, None] * radius - distance) / softness)
        return solid * (1 - hole)

    def _fractals(self, rule: Tensor, pose: _Pose, generator: torch.Generator) -> Tensor:
        size = len(rule)
        weights = self.map_weights[rule]  # (B, maps, 2, 2)
        offsets = self.map_offsets[rule]  # (B, maps, 2)
        weights = weights * (1 + _normal(generator, tuple(weights.shape), 0.05))
        image = torch.arange(size)[:, None]
        point = _uniform(generator, (size, _CHAINS, 2), -1, 1)
        orbit = []
        for _ in range(_CHAIN_STEPS):
            chosen = torch.randint(_MAPS, (size, _CHAINS), generator=generator)
            point = (weights[image, chosen] @ point[..., None])[..., 0] + offsets[image, chosen]
            orbit.append(point)
        points = pose.apply(torch.cat(orbit[_BURN_IN:], dim=1))  # (B, points, 2)
        cell = ((points + 1) / 2 * IMAGE_SIZE).long()
        inside = ((cell >= 0) & (cell < IMAGE_SIZE)).all(-1)
        flat = (cell[..., 1] * IMAGE_SIZE + cell[..., 0]).clamp(0, IMAGE_SIZE**2 - 1)
        density = torch.zeros(size, IMAGE_SIZE**2).scatter_add_(1, flat, inside.float())
        density = functional.avg_pool2d(
            density.view(size, 1, IMAGE_SIZE, IMAGE_SIZE), 3, stride=1, padding=1
        ).flatten(1)
        return 1 - torch.exp(-4 * density)

    def _textures(self, rule: Tensor, pose: _Pose, generator: torch.Generator) -> Tensor:
        local = pose.invert(self.pixels)
        phase = _uniform(generator, (len(rule), 1, _GRATINGS), 0, 2 * math.pi)
        angle = torch.einsum("bpx,bgx->bpg", local, self.frequencies[rule]) * math.pi + phase
        return 0.5 + 0.5 * torch.tanh(self.sharpness[rule][:, None] * angle.cos().sum(-1))


def _family_of(labels: Tensor) -> Tensor:
    ends = torch.tensor(list(FAMILIES.values())).cumsum(0)
    return torch.bucketize(labels, ends, right=True)


@dataclass(frozen=True)
class _Pose:
    """One affine map an image: matrix (B, 2, 2) and offset (B, 1, 2), object to image."""

    matrix: Tensor
    offset: Tensor

    def apply(self, points: Tensor) -> Tensor:
        return points @ self.matrix.transpose(1, 2) + self.offset

    def invert(self, pixels: Tensor) -> Tensor:
        return (pixels - self.offset) @ torch.linalg.inv(self.matrix).transpose(1, 2)


def _pose(generator: torch.Generator, size: int) -> _Pose:
    angle = _uniform(generator, (size,), -0.45, 0.45)
    scale = _uniform(generator, (size, 2), 0.7, 1.1)
    shear = _uniform(generator, (size,), -0.25, 0.25)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=-1).view(size, 2, 2)
    stretch = torch.diag_embed(scale)
    stretch[:, 0, 1] = shear
    return _Pose(rotation @ stretch, _uniform(generator, (size, 1, 2), -0.2, 0.2))


def _stroke_rules(generator: torch.Generator, classes: int) -> tuple[Tensor, Tensor]:
    curves = _uniform(generator, (classes, _CURVES, 4, 2), -0.9, 0.9)
    present = torch.arange(_CURVES) < torch.randint(
        1, _CURVES + 1, (classes, 1), generator=generator
    )
    # as in handwriting, most curves start where the last one ended
    chained = torch.rand(classes, _CURVES, generator=generator) < 0.6
    for curve in range(1, _CURVES):
        start = torch.where(chained[:, curve, None], curves[:, curve - 1, 3], curves[:, curve, 0])
        curves[:, curve, 0] = start
    return curves, present


def _shape_rules(generator: torch.Generator, classes: int) -> tuple[Tensor, Tensor]:
    decay = torch.tensor(_HARMONICS, dtype=torch.float32).sqrt()
    outlines = _normal(generator, (classes, 2, len(_HARMONICS)), 0.32) / decay
    ring = torch.rand(classes, generator=generator) < 0.4
    holes = torch.where(ring, _uniform(generator, (classes,), 0.35, 0.7), torch.tensor(-1.0))
    return outlines, holes


def _fractal_rules(generator: torch.Generator, classes: int) -> tuple[Tensor, Tensor]:
    angle = _uniform(generator, (classes, _MAPS), -math.pi, math.pi)
    scale = _uniform(generator, (classes, _MAPS, 2), 0.3, 0.65)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=-1).view(classes, _MAPS, 2, 2)
    return rotation * scale[..., None, :], _uniform(generator, (classes, _MAPS, 2), -0.55, 0.55)


def _texture_rules(generator: torch.Generator, classes: int) -> tuple[Tensor, Tensor]:
    angle = _uniform(generator, (classes, _GRATINGS), 0, math.pi)
    length = _uniform(generator, (classes, _GRATINGS), 0.7, 5.0)
    frequencies = torch.stack([length * angle.cos(), length * angle.sin()], dim=-1)
    return frequencies, _uniform(generator, (classes,), 0.4, 3.0)


def _paint(masks: Tensor, generator: torch.Generator, pixels: Tensor) -> Tensor:
    """Blend object over background: masks (B, H * W) → images (B, 3, H, W) in [0, 1]."""
    size = len(masks)
    ink = torch.rand(size, 3, 1, generator=generator)
    paper = torch.rand(size, 2, 3, 1, generator=generator)  # two paper colors
    gray = torch.rand(size, 1, 1, generator=generator) < 0.5
    ink = torch.where(gray, ink[:, :1], ink)
    paper = torch.where(gray[:, None], paper[:, :, :1], paper)
    # push ink and paper apart in brightness: an invisible object has no class
    gap = ink.mean(1, keepdim=True) - paper[:, 0].mean(1, keepdim=True)
    push = torch.where(gap >= 0, 1.0, -1.0) * (0.45 - gap.abs()).clamp_min(0)
    ink, paper = ink + push / 2, paper - (push / 2)[:, None]
    direction = _normal(generator, (size, 2, 1), 1.5)
    phase = _uniform(generator, (size, 1), 0, 2 * math.pi)
    wave = 0.5 + 0.5 * torch.sin((pixels @ direction)[..., 0] + phase)  # (B, H * W)
    busy = _uniform(generator, (size, 1), 0, 0.6)
    plain = torch.rand(size, 1, generator=generator) < 0.3
    blend = (wave * torch.where(plain, 0.0, busy))[:, None]
    background = paper[:, 0] * (1 - blend) + paper[:, 1] * blend
    image = background + masks[:, None] * (ink - background)
    return image.view(size, 3, IMAGE_SIZE, IMAGE_SIZE)


def _degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Re-sample a third of the images from coarser grids, add pixel noise, clip to [0, 1]."""
    size = len(images)
    parts = list(images.split([size - 3 * (size // 8)] + [size // 8] * 3))
    for i, grid in enumerate((8, 12, 16), start=1):
        if len(parts[i]):
            coarse = functional.interpolate(parts[i], size=grid, mode="area")
            parts[i] = functional.interpolate(
                coarse, size=IMAGE_SIZE, mode="bilinear", align_corners=False
            )
    noise = _uniform(generator, (size, 1, 1, 1), 0, 0.08)
    images = torch.cat(parts)
    return (images + noise * _normal(generator, tuple(images.shape), 1.0)).clamp_(0, 1)
