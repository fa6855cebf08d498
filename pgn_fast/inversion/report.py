"""Reports: reachability of a token library in pixel space, and the error of a deployment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .find_patches import MIN_TOKEN_STD, PROMPT_POSITIONS
from .layout import MID_LEVEL
from .library import largest_scale
from .patch_map import PatchMap

VERDICTS = {
    "exact": "every token is a patch: invert it as it is",
    "scale-free": 'tokens fit after dimming: invert with prompt_pos="none", scale="auto"',
    "needs_gamut_training": "tokens lie outside the gamut: train with GamutLibrary",
    "column_space_restricted": "no image produces these tokens: train with GamutLibrary",
}
# what analyze() asks of a backbone when it is given no library
PROBE_TOKENS, PROBE_NORM = 64, 8.0


@dataclass(frozen=True)
class ReachabilityReport:
    """Whether tokens can be produced by 8-bit patches, and what rounding will cost.

    Attributes:
        name: of the backbone.
        embed_dim, patch_values: D and n = 3 p^2.
        rank, kappa: of the patch embedding: how many directions pixels move, and the ratio of the
            strongest to the weakest.
        scale_free, shift_free, rotary: see ``PatchMap``.
        prompt_pos: "canvas" or "none".
        num_tokens, probe: what was asked for.
        unreachable_share: share of the tokens' norm that no image produces, of any amplitude.
        out_of_gamut: share of pixels outside [0, 255] in the pseudo-inverse's patches.
        clip_err: mean relative token error of pseudo-inverse, clip and round.
        residual: relative token error of the best patch in the box, each token, before rounding.
        largest_scale: of the token that fits least: the factor with which its min-norm patch would
            just be in the gamut.
        reachable_norm: the token norm that the gamut holds in a random direction, median.
        round_err, round_gain: absolute token error of feedback rounding as predicted, and how
            many times smaller that is than plain rounding's.
        swing, margin: what feedback moves pixels by, rms levels, and the room that it needs.
        verdict: exact | scale-free | needs_gamut_training | column_space_restricted.
    """

    name: str
    embed_dim: int
    patch_values: int
    rank: int
    kappa: float
    scale_free: bool
    shift_free: bool
    rotary: bool
    prompt_pos: str
    num_tokens: int
    probe: str
    unreachable_share: float
    out_of_gamut: float
    clip_err: float
    residual: list[float] = field(repr=False)
    largest_scale: float
    reachable_norm: float
    round_err: float
    round_gain: float
    swing: float
    margin: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        residual = torch.tensor(self.residual)
        lines = [
            f"{self.name}: {self.verdict} ({VERDICTS[self.verdict]})",
            f"  patch embedding  {self.patch_values} pixel values -> {self.embed_dim}, rank "
            f"{self.rank}, kappa {self.kappa:.3g}",
            f"  free             scale {_yes(self.scale_free)}, shift {_yes(self.shift_free)}; "
            f"rotary positions {_yes(self.rotary)}",
            f"  asked for        {self.num_tokens} tokens ({self.probe}), "
            f"prompt_pos={self.prompt_pos}",
            f"  pseudo-inverse   {self.out_of_gamut:.0%} of its pixels out of gamut, token error "
            f"{self.clip_err:.3g} after clip and round",
            f"  best in gamut    token error {residual.median():.3g} median, {residual.max():.3g} "
            f"largest; {self.unreachable_share:.0%} out of every image's reach",
            f"  gamut            holds tokens up to norm {self.reachable_norm:.3g} in a random "
            f"direction; largest common scale {self.largest_scale:.2g}",
            f"  8-bit rounding   absolute token error {self.round_err:.3g} with feedback, "
            f"{self.round_gain:.1f}x below plain rounding; margin {self.margin:g} levels",
        ]
        return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@torch.no_grad()
def analyze(
    patch_map: PatchMap,
    library: Tensor | None = None,
    alphas: Tensor | None = None,
    prompt_pos: str = "canvas",
    *,
    tol: float = 1e-3,
    iters: int = 150,
) -> ReachabilityReport:
    """Whether this backbone can be given such prompts through pixels.

    Args:
        patch_map: of the backbone, for the server and layout.
        library: tokens (K, D), as ``invert_library`` takes them; None probes with 64 random
            directions of norm 8, the mean norm of the published CLIP library's tokens.
        alphas: coefficients (..., K) of real prompts: judge these mixtures in place of the
            library's own tokens, which are harder to reach.
        prompt_pos: "canvas" or "none" (worst of the prompts' cells).
        tol: relative token error up to which a token counts as reached.
        iters: of the solver, at most.
    """
    if prompt_pos not in PROMPT_POSITIONS:
        raise ValueError(f"prompt_pos={prompt_pos!r}; known: {', '.join(PROMPT_POSITIONS)}")
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(
        PROBE_TOKENS, patch_map.embed_dim, generator=generator, dtype=torch.float64
    )
    directions = torch.nn.functional.normalize(patch_map.center(directions), dim=1)
    if library is None:
        tokens, probe = PROBE_NORM * directions, f"random directions of norm {PROBE_NORM:g}"
    else:
        tokens, probe = library.detach().double().cpu(), "the library's own"
    if alphas is not None:
        tokens, probe = alphas.double().reshape(-1, len(tokens)) @ tokens, "mixtures of the library"

    solver, rounding = patch_map.solver, patch_map.rounding
    mid = torch.full((patch_map.patch_values,), MID_LEVEL, dtype=torch.float64)
    wanted = tokens  # what a patch has to add to mid gray
    if prompt_pos == "none":
        positions = patch_map.positions[list(patch_map.layout.prompt_cells)]
        worst = positions[patch_map.center(positions).norm(dim=1).argmax()]
        wanted = tokens - patch_map.constant - worst
    wanted, norm = patch_map.center(wanted), patch_map.center(tokens).norm(dim=1)
    y = wanted + mid @ solver.A.T

    def error(levels: Tensor) -> Tensor:
        return (levels.double() @ solver.A.T - y).norm(dim=1) / norm.clamp_min(1e-30)

    inverse = solver.min_norm(y, mid)
    low, high = rounding.margin, 255 - rounding.margin
    best = solver.in_box(y.float(), low, high, mid.float(), iterations=iters, tolerance=1e-6)
    residual = error(best)
    unreachable = (solver.unreachable(wanted).norm() / norm.norm()).item()
    fits = largest_scale(mid, solver.min_norm(patch_map.center(tokens), 0 * mid), rounding.margin)
    dimmed = fits[:, 0] * patch_map.center(tokens).std(dim=1, correction=0)

    verdict = "needs_gamut_training"
    if bool((residual <= tol).all()):
        verdict = "exact"
    elif unreachable > tol and patch_map.embed_dim > patch_map.patch_values:
        verdict = "column_space_restricted"
    elif patch_map.scale_free and bool((dimmed >= MIN_TOKEN_STD).all()):
        verdict = "scale-free"
    return ReachabilityReport(
        name=patch_map.name,
        embed_dim=patch_map.embed_dim,
        patch_values=patch_map.patch_values,
        rank=solver.rank,
        kappa=solver.condition,
        scale_free=patch_map.scale_free,
        shift_free=patch_map.shift_free,
        rotary=patch_map.rotary,
        prompt_pos=prompt_pos,
        num_tokens=len(tokens),
        probe=probe,
        unreachable_share=unreachable,
        out_of_gamut=((inverse < 0) | (inverse > 255)).double().mean().item(),
        clip_err=error(inverse.round().clamp(0, 255)).mean().item(),
        residual=residual.tolist(),
        largest_scale=fits.min().item(),
        reachable_norm=largest_scale(mid, solver.min_norm(directions, 0 * mid), rounding.margin)
        .median()
        .item(),
        round_err=rounding.token_error,
        round_gain=rounding.gain,
        swing=rounding.swing,
        margin=rounding.margin,
        verdict=verdict,
    )


@dataclass(frozen=True)
class InversionReport:
    """How well prompts survive as 8-bit pixels; lists have one entry a prompt, (image, cell).

    Attributes:
        source: what was measured: "library" tokens, or the prompts of images ("canvases").
        token_rel_err: |token of the uint8 patch - wanted token| / |wanted token|; where the scale
            is free, at the scale that the patch was exposed to.
        reach_err: the same before rounding.
        predicted_round_err: what rounding should cost, from the closed form.
        oob_fraction: share of pixels outside [0, 255] before rounding.
        saturated_fraction: share of uint8 pixels at 0 or 255.
        scale: exposure of the prompt; 1 unless ``scale="auto"``.
        ln_rel_err: error after the norm that follows the token assembly; empty where the
            backbone has none.
        min_level, max_level: of the uint8 pixels.
        output_rel_err: error of the backbone's features against the latent path, one an image;
            empty where it was not run.
    """

    source: str
    token_rel_err: list[float] = field(repr=False)
    reach_err: list[float] = field(repr=False)
    predicted_round_err: list[float] = field(repr=False)
    oob_fraction: list[float] = field(repr=False)
    saturated_fraction: list[float] = field(repr=False)
    scale: list[float] = field(repr=False)
    ln_rel_err: list[float] = field(repr=False)
    min_level: list[int] = field(repr=False)
    max_level: list[int] = field(repr=False)
    output_rel_err: list[float] = field(default_factory=list, repr=False)

    @property
    def mean(self) -> float:
        """Mean relative token error."""
        return sum(self.token_rel_err) / max(1, len(self.token_rel_err))

    @property
    def max(self) -> float:
        """Largest relative token error."""
        return max(self.token_rel_err, default=0.0)

    def ok(self, tol: float) -> bool:
        """Whether every prompt's relative token error is at most ``tol``."""
        return self.max <= tol

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the summary."""
        return {**asdict(self), "mean": self.mean, "max": self.max}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        count = max(1, len(self.predicted_round_err))
        predicted = sum(self.predicted_round_err) / count
        saturated = sum(self.saturated_fraction) / count
        text = (
            f"{len(self.token_rel_err)} prompts ({self.source}): relative token error "
            f"{self.mean:.2e} mean, {self.max:.2e} largest (predicted for rounding "
            f"{predicted:.2e}, before rounding {max(self.reach_err, default=0.0):.1e} largest); "
            f"levels {min(self.min_level, default=0)}..{max(self.max_level, default=0)}, "
            f"{saturated:.2%} saturated"
        )
        if self.ln_rel_err:
            text += f"; after the norm {sum(self.ln_rel_err) / len(self.ln_rel_err):.2e} mean"
        if self.output_rel_err:
            text += f"; features {max(self.output_rel_err):.2e} largest"
        return text


def measure(
    patch_map: PatchMap,
    source: str,
    *,
    wanted: Tensor,
    levels: Tensor,
    rounded_tokens: Tensor,
    rounded: Tensor,
    scale: Tensor,
    positions: Tensor | None,
    round_err: float,
    output_rel_err: list[float] | None = None,
) -> InversionReport:
    """Compare tokens with what was wanted; rows are prompts.

    Args:
        patch_map: of the backbone.
        source: see InversionReport.
        wanted: content (canvas) or whole token (none) of each prompt, (R, D) float64.
        levels: pixels before rounding, (R, n).
        rounded_tokens: the server's tokens without position, (R, D).
        rounded: uint8 pixels, (R, n).
        scale: (R,).
        positions: position embedding of each prompt's cell where it must be cancelled, (R, D);
            None: the prompt keeps its position.
        round_err: predicted absolute token error of the rounding.
    """
    factor = scale.double()[:, None]
    offset = patch_map.constant if positions is None else -positions
    target = factor * wanted + offset  # the token that the server should compute, scaled
    size = patch_map.center(factor * wanted).norm(dim=1).clamp_min(1e-30)

    def relative(tokens: Tensor) -> Tensor:
        return patch_map.center(tokens.double() - target).norm(dim=1) / size

    ln_error: list[float] = []
    if patch_map.scale_free:
        shape = (patch_map.embed_dim,)
        seen = rounded_tokens.double() if positions is None else rounded_tokens + positions
        ideal = factor * wanted + patch_map.constant if positions is None else wanted
        after, before = (torch.nn.functional.layer_norm(t, shape) for t in (seen, ideal))
        ln_error = ((after - before).norm(dim=1) / before.norm(dim=1)).tolist()
    return InversionReport(
        source=source,
        token_rel_err=relative(rounded_tokens).tolist(),
        reach_err=relative(patch_map.tokens(levels)).tolist(),
        predicted_round_err=(round_err / size).tolist(),
        oob_fraction=((levels < 0) | (levels > 255)).double().mean(dim=1).tolist(),
        saturated_fraction=((rounded == 0) | (rounded == 255)).double().mean(dim=1).tolist(),
        scale=scale.tolist(),
        ln_rel_err=ln_error,
        min_level=rounded.amin(dim=1).tolist(),
        max_level=rounded.amax(dim=1).tolist(),
        output_rel_err=output_rel_err or [],
    )
