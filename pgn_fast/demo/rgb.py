"""Prompts as pixels, on the packaged backbone: trained in gamut, sent as 8-bit canvases.

A PGN learns digits in the canvas layout of its deployment: the image shrunk to 3 x 3 of the 4 x 4
patches, seven prompts around it. Then the test images go to the bare backbone twice over: by the
latent path of training, and as uint8 canvases that carry their prompts as pixels.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import plots
from .._files import write_files
from ..inversion import CanvasLayout, GamutLibrary, PatchMap, ServerSpec, invert, verify
from ..inversion.pictures import save_overview
from ..models import PGN
from . import backbone
from .experiment import NUM_CLASSES, load, train
from .recipes import RECIPES, Recipe

PROMPTS = 7


@dataclass(frozen=True)
class RgbResult:
    """What came of one run, in percent of the test images.

    Attributes:
        seed: of initial values, order and augmentation.
        latent: accuracy by the latent path, as in training.
        canvases: accuracy from uint8 canvases through the untouched backbone.
        plain: accuracy of the same head on the same images without prompts, as they are.
        agreement: images of which both paths say the same class.
        token_error: mean relative error of a prompt's token after 8-bit rounding.
        picture: image, canvas and prompt patches of four test images; None: not drawn.
    """

    seed: int
    latent: float
    canvases: float
    plain: float
    agreement: float
    token_error: float
    picture: Path | None = None

    def __str__(self) -> str:
        return (
            f"prompts as pixels, seed {self.seed}: {self.canvases:.1f} % from uint8 canvases "
            f"through the untouched backbone, {self.latent:.1f} % by the latent path "
            f"({self.agreement:.1f} % of the images agree), {self.plain:.1f} % without prompts; "
            f"token error of 8 bits {self.token_error:.2g}"
            + (f". Picture: {self.picture}" if self.picture else "")
        )


def run(output: Path | None, seed: int = 0, *, recipe: Recipe | None = None) -> RgbResult:
    """Train in gamut, deploy as canvases, compare, and draw the picture ``output``/rgb.png where
    matplotlib is installed.

    Args:
        output: a folder, made where it is missing; None: no picture.
        seed: of initial values, order and augmentation.
        recipe: in place of PGN's own.
    """
    recipe = recipe or RECIPES["pgn"]
    torch.manual_seed(seed)
    frozen = backbone()
    layout = CanvasLayout.border((4, 4), (3, 3), PROMPTS)
    patch_map = PatchMap.from_backbone(frozen, ServerSpec.from_backbone(frozen), layout)
    options = {**recipe.options, "num_prompts": PROMPTS}
    model = PGN(
        frozen,
        NUM_CLASSES,
        **options,
        token_library=GamutLibrary(options["library_size"], patch_map),
    )
    data = load()
    train(model, data, recipe, seed)
    model.eval()

    prompter = invert(model)
    images, labels = data.test_images, data.test_labels
    with torch.no_grad():
        latent = torch.cat([model(part).argmax(dim=1) for part in images.split(256)])
        served = _classes(model, prompter(images))
        plain = _classes(model, prompter.server.levels(images))
    right = lambda classes: 100 * (classes == labels).double().mean().item()
    result = RgbResult(
        seed=seed,
        latent=right(latent),
        canvases=right(served),
        plain=right(plain),
        agreement=100 * (latent == served).double().mean().item(),
        token_error=verify(prompter, model, images[:64]).mean,
        picture=None if output is None or plots.missing() else output / "rgb.png",
    )
    if output is None or result.picture is None:
        return result
    output.mkdir(parents=True, exist_ok=True)
    shown = [int((labels == digit).nonzero()[0]) for digit in (0, 3, 5, 8)]
    save_overview(
        prompter.server.levels(images[shown]).byte(),
        prompter(images[shown]),
        layout,
        patch_map.patch_size,
        result.picture,
        [f"a {labels[i]}; without prompts read as {plain[i]}" for i in shown],
        [f"read as {served[i]}" for i in shown],
    )
    return result


def write(
    results: list[RgbResult], output: Path, command: str, record: Path | None = None
) -> list[Path]:
    """``rgb.json`` into the folder ``output``: the runs, their means, and what made them.

    Args:
        results: of ``run``, one a seed.
        command: that made them, for the JSON.
        record: a second place for it.

    Returns:
        The files written.
    """
    runs = [{n: v for n, v in asdict(result).items() if n != "picture"} for result in results]
    content: dict[str, Any] = {
        "command": command,
        "images": "797 test images of the digits",
        "versions": {name: version(name) for name in ("torch", "timm", "numpy")},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "mean": {
            name: sum(run[name] for run in runs) / len(runs) for name in runs[0] if name != "seed"
        },
        "runs": runs,
    }
    text = (json.dumps(content, indent=1) + "\n").encode()
    files = [output / "rgb.json", *([] if record is None else [record])]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_files(dict.fromkeys(files, text))
    return files


def _classes(model: PGN, pixels: Tensor) -> Tensor:
    """What the untouched backbone, and the head after it, make of pixels (n, 3, 32, 32)."""
    server = ServerSpec.from_backbone(model.backbone)
    return torch.cat(
        [model.head(model.backbone(server.normalize(p))).argmax(dim=1) for p in pixels.split(256)]
    )
