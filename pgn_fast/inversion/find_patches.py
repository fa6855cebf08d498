"""Inverting a token library once: 8-bit patches whose tokens are the library's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExposureWarning, InversionError, UnreachablePromptError
from .gamut import GamutLibrary
from .layout import MID_LEVEL
from .library import InvertedLibrary, largest_scale
from .patch_map import PatchMap

PROMPT_POSITIONS = ("canvas", "none")
# below this standard deviation of a token, LayerNorm's epsilon (1e-5) attenuates it by 0.5 %
MIN_TOKEN_STD = 0.032
_LIBRARY_DTYPE = torch.float32  # of the solver: float64 halves its speed and gains nothing


def invert_library(
    library: Tensor | nn.Module,
    patch_map: PatchMap,
    *,
    prompt_pos: str = "canvas",
    scale: str = "fixed",
    margin: float | str = "auto",
    tol: float = 1e-3,
    iters: int = 200,
    on_unreachable: str = "error",
) -> InvertedLibrary:
    """Find 8-bit patches whose tokens are the library's.

    Args:
        library: tokens (K, D), or a module that yields them. With ``prompt_pos="canvas"`` they are
            contents: what a patch adds to the token of a mid-gray cell. With "none" they are whole
            tokens, as a PGN or VPT trained in latent space has them.
        patch_map: of the backbone, for the server and layout of the deployment.
        prompt_pos: "canvas", or "none" to cancel the position embedding of each prompt's cell.
        scale: "auto" brightens or dims each prompt to fill the gamut, on backbones with a norm
            directly after the token assembly (CLIP); needs ``prompt_pos="none"``.
        margin: levels to keep free at both ends; "auto": what the rounding's feedback needs.
        tol: largest relative token error of a library token, before rounding.
        iters: of the solver, at most.
        on_unreachable: "error", or "project" to take the nearest patches.

    Returns:
        The inverted library. A ``GamutLibrary`` is not solved for: its patches are known.

    Raises:
        UnreachablePromptError: tokens are out of reach; says how many and why.
        InversionError: scale="auto" on a backbone where scale matters, or a cell's position takes
            the gamut up.
    """
    if prompt_pos not in PROMPT_POSITIONS:
        raise ValueError(f"prompt_pos={prompt_pos!r}; known: {', '.join(PROMPT_POSITIONS)}")
    if scale not in ("fixed", "auto"):
        raise ValueError(f"scale={scale!r}; known: fixed, auto")
    if on_unreachable not in ("error", "project"):
        raise ValueError(f"on_unreachable={on_unreachable!r}; known: error, project")
    if scale == "auto" and prompt_pos == "canvas":
        raise ValueError(
            'scale="auto" changes the weight of a prompt against its position embedding, which '
            'prompt_pos="canvas" keeps. Use scale="fixed".'
        )
    if prompt_pos == "none" and patch_map.rotary:
        raise InversionError(
            f"{patch_map.name} rotates queries and keys by position, which no pixel cancels. "
            'Train in the canvas layout (GamutLibrary) and use prompt_pos="canvas".'
        )
    made_here: dict[str, Any] = {
        "rounding": patch_map.rounding,
        "prompt_pos": prompt_pos,
        "scale": scale,
        "layout": patch_map.layout,
        "server": patch_map.server,
        "image_size": patch_map.image_size,
        "patch_size": patch_map.patch_size,
        "key": patch_map.key,
    }
    if isinstance(library, GamutLibrary):
        library.check(patch_map)
        if prompt_pos != "canvas" or scale != "fixed":
            raise ValueError(
                'a GamutLibrary is trained with prompt_pos="canvas" and scale="fixed"; got '
                f"prompt_pos={prompt_pos!r}, scale={scale!r}"
            )
        patches = library.pixels().detach().double().cpu() - MID_LEVEL
        contents = library().detach().double().cpu()
        reached = patch_map.relative_error(patches @ patch_map.A.T, contents)
        mid = torch.full((1, patch_map.patch_values), MID_LEVEL)
        return InvertedLibrary(patches, mid, reached, margin=library.margin, **made_here)

    tokens = library() if isinstance(library, nn.Module) else library
    tokens = tokens.detach().double().cpu()
    if tokens.ndim != 2 or tokens.shape[1] != patch_map.embed_dim:
        raise ValueError(
            f"library must be (K, D) with D = {patch_map.embed_dim}, the backbone's width; got "
            f"{tuple(tokens.shape)}"
        )
    room = patch_map.rounding.margin if margin == "auto" else float(margin)
    invert = _exposed if scale == "auto" else _in_gamut
    patches, baseline, reached = invert(tokens, patch_map, prompt_pos, room, iters)
    if on_unreachable == "error" and bool((reached > tol).any()):
        raise _unreachable(tokens, reached, patch_map, prompt_pos, scale, room, tol)
    return InvertedLibrary(patches, baseline, reached, margin=room, **made_here)


def _in_gamut(
    tokens: Tensor, patch_map: PatchMap, prompt_pos: str, margin: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (K, n), baseline (1 or P, n) and errors (K,), every mixture inside the gamut."""
    mid = torch.full((1, patch_map.patch_values), MID_LEVEL, dtype=torch.float64)
    low: Tensor | float = margin
    high: Tensor | float = 255 - margin
    baseline, wanted = mid, tokens
    if prompt_pos == "none":
        # one patch a cell cancels its position; the library's patches are shared by all cells, in
        # a box that leaves room for every one of them
        cancel = _position_patches(patch_map, margin)  # (P, n)
        low, high = margin - cancel.amin(dim=0), 255 - margin - cancel.amax(dim=0)
        if bool((low > high).any()):
            cell = patch_map.layout.prompt_cells[int(cancel.abs().amax(dim=1).argmax())]
            raise _position_error(cell, cancel.abs().max().item())
        baseline = mid + cancel
        wanted = tokens - patch_map.constant
    solver = patch_map.solver
    y = patch_map.center(wanted)
    target = y + mid @ solver.A.T
    levels = solver.in_box(
        target.to(_LIBRARY_DTYPE), low, high, mid[0], iterations=iters, tolerance=1e-6
    ).double()
    patches = levels - mid
    # relative to the prompt itself, which is what the blocks see
    missed = (patches @ solver.A.T - y).norm(dim=1)
    return patches, baseline, missed / patch_map.center(tokens).norm(dim=1).clamp_min(1e-30)


def _exposed(
    tokens: Tensor, patch_map: PatchMap, prompt_pos: str, margin: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_in_gamut``, for prompts whose scale is free: offsets of any size, a neutral baseline.

    The baseline of a cell produces the token zero (up to a constant), so that baseline + s *
    offset is s times the prompt, whatever s.
    """
    if not patch_map.scale_free:
        raise InversionError(
            'scale="auto" needs a norm directly after token assembly (CLIP norm_pre); '
            f"{patch_map.name or 'this backbone'} keeps token scale in the residual stream."
        )
    solver = patch_map.solver
    mid = torch.full((patch_map.patch_values,), MID_LEVEL, dtype=torch.float64)
    cells = list(patch_map.layout.prompt_cells)
    position = patch_map.center(patch_map.positions[cells])
    y = -patch_map.center(patch_map.d + patch_map.positions[cells])
    largest = position.norm(dim=1).clamp_min(patch_map.center(patch_map.constant).norm())
    # a baseline near gray leaves most room for the prompt; where it does not exist, a wider one
    for room in (40.0, max(15.0, margin)):
        baseline = solver.in_box(y, room, 255 - room, mid, iterations=2 * iters)
        missed = (baseline @ solver.A.T - y).norm(dim=1) / largest.clamp_min(1e-30)
        if missed.max() <= 1e-3:
            break
    else:
        cell = cells[int(missed.argmax())]
        raise _position_error(cell, (baseline - MID_LEVEL).abs().max().item())
    wanted = patch_map.center(tokens)
    zero = torch.zeros(1, patch_map.patch_values, dtype=torch.float64)
    patches = solver.min_norm(wanted, zero)
    reached = (patches @ solver.A.T - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)
    scales = largest_scale(baseline[:1], patches, margin)[:, 0]
    spread = (scales * wanted.std(dim=1, correction=0)).median().item()
    if spread < MIN_TOKEN_STD:
        loss = 1 - (spread**2 / (spread**2 + 1e-5)) ** 0.5
        warnings.warn(
            f"prompt std after scaling {spread:.3f} < {MIN_TOKEN_STD}: LayerNorm eps attenuates it "
            f"by {loss:.1%}.",
            ExposureWarning,
            stacklevel=3,
        )
    return patches, baseline, reached


def _position_patches(patch_map: PatchMap, margin: float) -> Tensor:
    """The smallest offsets (P, n) that take away the position embedding of each prompt's cell."""
    solver = patch_map.solver
    positions = patch_map.center(patch_map.positions[list(patch_map.layout.prompt_cells)])
    zero = torch.zeros(1, patch_map.patch_values, dtype=torch.float64)
    cancel = solver.min_norm(-positions, zero)
    peak = cancel.abs().amax(dim=1)
    worst = int(peak.argmax())
    if peak[worst] > MID_LEVEL - margin:
        raise _position_error(patch_map.layout.prompt_cells[worst], peak[worst].item())
    return cancel


def _position_error(cell: int, peak: float) -> InversionError:
    return InversionError(
        f"cancelling pos[cell {cell}] uses {peak:.0f} of 127 levels; choose other cells or retrain "
        'with prompt_pos="canvas".'
    )


def _unreachable(
    tokens: Tensor,
    reached: Tensor,
    patch_map: PatchMap,
    prompt_pos: str,
    scale: str,
    margin: float,
    tol: float,
) -> UnreachablePromptError:
    """The error with the figures that decide it."""
    outside = patch_map.solver.unreachable(patch_map.center(tokens)).norm() / tokens.norm()
    if patch_map.embed_dim > patch_map.patch_values and outside > tol:
        p = patch_map.patch_size
        return UnreachablePromptError(
            f"embed_dim {patch_map.embed_dim} > 3*{p}*{p} = {patch_map.patch_values}: "
            f"{outside:.0%} of the library's norm cannot be produced by any image. Train with "
            "GamutLibrary."
        )
    mid = torch.full((1, patch_map.patch_values), MID_LEVEL, dtype=torch.float64)
    whole = patch_map.center(tokens if prompt_pos == "canvas" else tokens - patch_map.constant)
    offsets = patch_map.solver.min_norm(whole, torch.zeros_like(mid))
    room = largest_scale(mid, offsets, margin).min().item()
    bad = reached > tol
    hint = (
        ' This backbone\'s prompts have free scale: scale="auto" may fit them.'
        if patch_map.scale_free and scale == "fixed" and prompt_pos == "none"
        else ""
    )
    return UnreachablePromptError(
        f"{int(bad.sum())} of {len(tokens)} library tokens lie outside the gamut (median residual "
        f"{reached[bad].median():.2g}, largest reachable scale {room:.2g}). Train with "
        "GamutLibrary, or convert with GamutLibrary.from_latent(...) and fine-tune; "
        f'on_unreachable="project" deploys the closest patches.{hint}'
    )
