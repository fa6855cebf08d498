"""What a training run is: every choice and its default.

No torch here: the command line reads this module to answer ``--help``. Names and meanings are those
of timm's ``train.py`` where timm has the option; what timm has and this does not is in
``timm_flags``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..methods import METHODS, Method, find_method
from .checks import check, check_choice
from .kinds import typed
from .recipes import (
    DATA_DEFAULTS,
    RECIPES,
    TASK_DEFAULTS,
    deploy_defaults,
    generator_defaults,
)

# ``data`` of a run that a script has started by ``pgn_fast.fit``
GIVEN = "given from Python"


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Build it with ``TrainConfig.make``, which fills in a method's defaults.

    Rates are per optimizer step, sizes are images per process, lengths are epochs.
    """

    # data
    data: str = "digits"  # a folder, a name such as torch/cifar10, or "digits"
    data_dir: str | None = None  # root of a named data set
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None  # "none": the test images are not read
    val_fraction: float = 0.1  # carved from train where there is no validation split
    dataset_download: bool = False
    input_key: str | None = None  # column of a Hugging Face data set
    target_key: str | None = None
    num_classes: int | None = None  # None: as many as the data has
    labels: str | None = None  # a CSV file of names and labels, of the images in data
    task: str = "multiclass"  # or "multilabel": any number of classes an image

    # model
    model: str = "pgn_demo_vit"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained_path: str | None = None  # a file in the place of the hub's weights
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
    head: str = "linear"  # or "zero_shot": similarity to the classes' names
    class_names: str | None = None  # a file of names; None: the data's own
    template: tuple[str, ...] = ()  # sentences around a name; (): the data's, or CLIP's
    text_model: str | None = None  # the whole model, where `model` does not lead to it
    head_init: str = "probe"  # "probe", "zero" or "official"
    init_from: str | None = None  # an adapter whose trained parts are the start
    sync_bn: bool = True  # BatchNorm sees the images of all processes

    # optimization
    opt: str = "adamw"
    opt_eps: float | None = None
    opt_betas: tuple[float, ...] | None = None
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    lr_base: float | None = None  # lr = lr_base * images a step / lr_base_size
    lr_base_size: int = 256
    lr_base_scale: str = ""  # "linear", "sqrt"; "": by the optimizer
    weight_decay: float = 0.0
    momentum: float = 0.9
    layer_decay: float | None = None
    layer_decay_min_scale: float = 0.0
    layer_decay_no_opt_scale: float | None = None
    epochs: int = 30
    sched: str = "cosine"
    sched_on_updates: bool = True  # a rate of its own for every step; False: one an epoch
    warmup_epochs: float | None = None  # None: a tenth of the epochs, 3 at most
    warmup_lr: float | None = None  # None: the first of as many even steps
    warmup_prefix: bool = False
    min_lr: float | None = None  # None: 0, or the official schedule's own
    cooldown_epochs: int = 0
    decay_epochs: float | None = None  # None: timm's own for the schedule
    decay_milestones: tuple[int, ...] = (90, 180, 270)
    decay_rate: float = 0.1
    patience_epochs: int = 10
    lr_noise: tuple[float, ...] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    lr_cycle_mul: float = 1.0
    lr_cycle_decay: float = 0.5
    lr_cycle_limit: int = 1
    lr_k_decay: float = 1.0
    batch_size: int = 64
    validation_batch_size: int | None = None  # None: batch_size
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = "norm"
    smoothing: float = 0.0
    bce_loss: bool = False  # binary cross entropy of each class
    bce_sum: bool = False
    bce_target_thresh: float | None = None
    bce_pos_weight: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, ...] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0
    model_ema: bool = False  # scores and adapters are of averaged weights
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    bn_momentum: float | None = None
    bn_eps: float | None = None
    head_init_scale: float | None = None
    head_init_bias: float | None = None
    grad_checkpointing: bool = False

    # pixels
    no_aug: bool = False
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    color_jitter_prob: float | None = None
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    train_crop_mode: str | None = None
    train_interpolation: str | None = None  # None: as in evaluation
    aa: str | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    mean: tuple[float, ...] | None = None  # None: the backbone's own
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None  # of the evaluation; "squash" with no_aug: of training, too
    interpolation: str | None = None

    # what frozen blocks make of an image, kept
    cache: str = "auto"  # "auto", "off", or a folder that runs may share
    cache_dtype: str | None = None  # None: as it is computed
    views: int = 0  # augmented views of an image that take turns; 0: a new one every epoch

    # the run
    amp: bool = False
    amp_dtype: str = "bfloat16"
    torchcompile: str | None = None
    torchcompile_mode: str | None = None
    synchronize_step: bool = False
    seed: int = 42
    workers: int | None = None  # processes that read images; None: the cores, up to 8
    recovery_interval: int = 0  # batches between checkpoints inside an epoch; 0: none
    log_interval: int = 20  # batches between looks at the loss
    val_interval: int = 1  # epochs from one validation to the next; the last is always one
    eval_metric: str = "top1"  # of validation, what the best epoch is chosen by
    checkpoint_hist: int = 0  # adapters of so many best epochs are kept beside best/
    stats: bool = False  # say where the time of a step goes
    tracker: tuple[str, ...] = ()  # names of TRACKERS
    wandb_project: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_resume_id: str = ""

    @classmethod
    def make(cls, recipe: str | None = None, **given: Any) -> TrainConfig:
        """The configuration for these choices; what is not given is the method's default.

        Precedence, last wins: the field's default, the data set's, the task's, the generator's, the
        method's, the recipe's, the deployment's, ``given``.

        Args:
            recipe: "pgn-official" or "vpt-official"; None for this library's own defaults.
            given: fields of this class.

        Raises:
            UserError: an unknown name, or a value of another kind or out of its range.
        """
        if recipe is not None:
            check_choice("recipe", recipe, tuple(RECIPES))
        method = given.get("method", RECIPES.get(recipe or "", {}).get("method", cls.method))
        try:
            row = find_method(method)
        except ValueError as error:
            raise UserError(
                f"`method` is {method!r}; known: {', '.join(METHODS)}. A method of your own has to "
                "be registered first: an installed package names its module as an entry point of "
                "the group 'pgn_fast.methods'."
            ) from error
        _check_options(row, given)
        data = given.get("data", cls.data)
        values = {
            **DATA_DEFAULTS.get(data, {}),
            **TASK_DEFAULTS.get(given.get("task", cls.task), {}),
            **generator_defaults(data, given.get("generator", cls.generator)),
            **row.training,
            **RECIPES.get(recipe or "", {}),
            **deploy_defaults(given.get("deploy"), given.get("model", cls.model)),
            **given,
        }
        config = cls(**typed(cls, values))
        check(config)
        if config.warmup_epochs is None:
            config = dataclasses.replace(config, warmup_epochs=min(3.0, config.epochs / 10))
        return config

    def as_dict(self) -> dict[str, Any]:
        """Every field, in types that JSON and ``weights_only`` loading keep."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    def schedule_options(self) -> dict[str, Any]:
        """The rest of what timm's ``create_scheduler_v2`` is told, by its names."""
        decay = {} if self.decay_epochs is None else {"decay_epochs": self.decay_epochs}
        return decay | {
            "decay_milestones": self.decay_milestones,
            "cooldown_epochs": self.cooldown_epochs,
            "patience_epochs": self.patience_epochs,
            "decay_rate": self.decay_rate,
            "warmup_prefix": self.warmup_prefix,
            "noise": self.lr_noise,
            "noise_pct": self.lr_noise_pct,
            "noise_std": self.lr_noise_std,
            "noise_seed": self.seed,
            "cycle_mul": self.lr_cycle_mul,
            "cycle_decay": self.lr_cycle_decay,
            "cycle_limit": self.lr_cycle_limit,
            "k_decay": self.lr_k_decay,
        }


def _check_options(row: Method, given: dict[str, Any]) -> None:
    """Refuse a choice that belongs to other methods, rather than pass it over.

    Methods of this package ignore each other's: a script may give all of them to each.
    """
    if row.registered:
        others = {option for other in METHODS.values() for option in other.options.values()}
        for name in sorted(others & set(given)):
            raise UserError(
                f"`{name}` is not an option of `method` {row.name}; pass its own arguments as "
                f"`method_kwargs` {name}={given[name]}."
            )
