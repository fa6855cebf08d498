"""What a training run is: every choice, its default, and where the defaults come from.

No torch here: the command line reads this module to answer ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..methods import METHODS, Method, find_method

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
SCHEDULES = ("cosine", "cosine-pgn", "cosine-vpt", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Build it with ``TrainConfig.make``, which fills in a method's defaults.

    Names are those of timm's ``train.py`` where timm has the option. Rates are per optimizer step,
    sizes are images per process, lengths are epochs.
    """

    # data
    data: str = "digits"  # a folder, a name such as torch/cifar10, or "digits"
    data_dir: str | None = None  # root of a named data set
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None
    val_fraction: float = 0.1  # carved from train where there is no validation split
    dataset_download: bool = False
    num_classes: int | None = None  # None: as many as the data has

    # model
    model: str = "pgn_demo_vit"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    method: str = "pgn"
    method_kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of its constructor
    num_prompts: int = 16
    library_size: int = 256
    generator: str = "resnet10"
    generator_kwargs: dict[str, Any] = field(default_factory=dict)
    resolution: int | None = None  # pixels, of the generator's input; None: the backbone's own
    activation: str = "softmax"
    prompt_dropout: float = 0.0
    project_dim: int | None = None
    deploy: str | None = None  # "rgb": PGN's prompts as pixels, see pgn_fast.inversion
    layout: str = "border"  # of the canvas that is deployed: "border" or "enlarged"
    image_grid: tuple[int, int] | None = None  # border: patches of the shrunk image
    canvas_grid: tuple[int, int] | None = None  # enlarged: patches of the canvas
    allow_blank: bool = False  # enlarged: accept cells without image or prompt
    compensate: bool = True  # enlarged: image patches keep the positions of pretraining
    server: dict[str, Any] = field(default_factory=dict)  # fields of ServerSpec that differ
    fast: bool = True
    backend: str | None = None

    # optimization
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    sched: str = "cosine"
    epochs: int = 30
    warmup_epochs: float = 3
    min_lr: float | None = None  # None: 0, or the official schedule's own
    warmup_lr: float = 0.0
    batch_size: int = 64
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    smoothing: float = 0.0

    # pixels
    no_aug: bool = False
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    color_jitter_prob: float | None = None
    grayscale_prob: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    mean: tuple[float, ...] | None = None  # None: the backbone's own
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None

    # the run
    amp: bool = False
    amp_dtype: str = "bfloat16"
    torchcompile: str | None = None
    seed: int = 42
    workers: int | None = None  # processes that read images; None: the cores, up to 8
    recovery_interval: int = 0  # batches between checkpoints inside an epoch; 0: none
    log_interval: int = 20  # batches between looks at the loss
    tensorboard: bool = False

    @classmethod
    def make(cls, recipe: str | None = None, **given: Any) -> TrainConfig:
        """The configuration for these choices; what is not given is the method's default.

        Precedence, last wins: the field's default, the data set's, the method's, the recipe's,
        ``given``.

        Args:
            recipe: "pgn-official" or "vpt-official"; None for this library's own defaults.
            given: fields of this class.

        Raises:
            UserError: an unknown name, or a value out of its range.
        """
        method = given.get("method", RECIPES.get(recipe or "", {}).get("method", cls.method))
        try:
            row = find_method(method)
        except ValueError as error:
            raise UserError(
                f"--method is {method!r}; known: {', '.join(METHODS)}. A method of your own has to "
                "be registered first: an installed package names its module as an entry point of "
                "the group 'pgn_fast.methods'."
            ) from error
        _check_options(row, given)
        if recipe is not None:
            _check_choice("recipe", recipe, tuple(RECIPES))
        values = {
            **DATA_DEFAULTS.get(given.get("data", cls.data), {}),
            **_generator_defaults(
                given.get("data", cls.data), given.get("generator", cls.generator)
            ),
            **row.training,
            **RECIPES.get(recipe or "", {}),
            **_deploy_defaults(given.get("deploy"), given.get("model", cls.model)),
            **given,
        }
        # tuples, whether the values come from the command line, JSON or Python
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        config = cls(**values)
        config._check()
        return config

    def as_dict(self) -> dict[str, Any]:
        """Every field, in types that JSON and ``weights_only`` loading keep."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    def _check(self) -> None:
        _check_choice("sched", self.sched, SCHEDULES)
        _check_choice("amp-dtype", self.amp_dtype, ("bfloat16", "float16"))
        _check_choice("deploy", self.deploy, (None, "rgb"))
        _check_choice("layout", self.layout, ("border", "enlarged"))
        of_rgb = ("layout", "image_grid", "canvas_grid", "allow_blank", "compensate", "server")
        defaults = TrainConfig()
        given = [name for name in of_rgb if getattr(self, name) != getattr(defaults, name)]
        if given and not self.deploy:
            flag = "no-compensate" if given[0] == "compensate" else given[0].replace("_", "-")
            raise UserError(
                f"--{flag} says how prompts become pixels: add --deploy rgb, or leave it out."
            )
        if self.deploy and (self.method != "pgn" or self.activation != "softmax"):
            raise UserError(
                f"--deploy rgb trains --method pgn with --activation softmax, got {self.method} "
                f"and {self.activation}. VPT-Shallow needs no training of its own: pgn-fast invert."
            )
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise UserError(f"--{name.replace('_', '-')} is {value}; give {low} or more.")
        for name in ("lr", "batch_size", "epochs", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; give > 0.")
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; give 0 ... 1.")
        for name, top in (("scale", 1.0), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise UserError(
                    f"--{name} is {low:g} {high:g}; give the smallest and the largest, above 0"
                    + (" and up to 1." if top == 1 else ".")
                )
        if self.seed >= 2**63:
            raise UserError(f"--seed is {self.seed}; give less than 2**63.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise UserError(f"--crop-pct is {self.crop_pct}; give a share above 0, up to 1.")
        if self.std is not None and not all(s > 0 for s in self.std):
            raise UserError(f"--std is {' '.join(map(str, self.std))}; give three above 0.")
        _check_choice("interpolation", self.interpolation, (None, *INTERPOLATIONS))
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"--val-fraction is {self.val_fraction}; give a share of the training images "
                "from 0 (no validation) to below 1."
            )
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g} is more than --epochs {self.epochs}: "
                "the full rate would never be reached."
            )


def _check_options(row: Method, given: dict[str, Any]) -> None:
    """Refuse a choice that belongs to other methods, rather than pass it over.

    Methods of this package ignore each other's: a script may give all of them to each.
    """
    if row.registered:
        others = {option for other in METHODS.values() for option in other.options.values()}
        for name in sorted(others & set(given)):
            raise UserError(
                f"--{name.replace('_', '-')} is not an option of --method {row.name}; pass its own "
                f"arguments as --method-kwargs {name}={given[name]}."
            )


def _generator_defaults(data: str, generator: str) -> dict[str, Any]:
    """8 pixels leave nothing to pool away; only the paper's network has that switch."""
    tiny = data == "digits" and generator == "resnet10"
    return {"generator_kwargs": {"max_pool": False}} if tiny else {}


def _deploy_defaults(deploy: str | None, model: str) -> dict[str, Any]:
    """The packaged backbone's 4 x 4 patches have 7 cells around an image of 3 x 3."""
    return {"num_prompts": 7} if deploy == "rgb" and model == "pgn_demo_vit" else {}


def _check_choice(name: str, value: object, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise UserError(f"--{name} is {value!r}; known: {', '.join(filter(None, known))}.")


_AT_LEAST = {
    "num_prompts": 1,
    "library_size": 1,
    "resolution": 1,
    "num_classes": 1,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "min_lr": 0,
    "warmup_lr": 0,
    "grad_accum_steps": 1,
    "workers": 0,
    "color_jitter": 0,
    "seed": 0,
    "recovery_interval": 0,
    "log_interval": 1,
}
_SHARES = (
    "smoothing",
    "momentum",
    "prompt_dropout",
    "hflip",
    "vflip",
    "color_jitter_prob",
    "grayscale_prob",
    "reprob",
)

# Digits are not mirrored or cropped, a "6" would be no "6" any more.
DATA_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.0,
        "crop_pct": 1.0,
    },
}

# The published recipes, as far as they are known. The official PGN run also solarizes a fifth of
# its images, at an unknown threshold, and picks the model by test images: neither is done here.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RECIPES: dict[str, dict[str, Any]] = {
    "pgn-official": {
        "method": "pgn",
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
