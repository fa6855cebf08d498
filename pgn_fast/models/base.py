"""``PromptedViT``: a frozen vision transformer with prompts and a head, whatever the method."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from typing import Any

from torch import Tensor, nn

from .._stored import check_shapes, plain_name
from ..backbone import twins
from ..backbone.eager import encode_eager, pool, pool_mean, rows_read
from ..backbone.engine import FastBackbone
from ..backbone.explain import backend_of, explain
from ..backbone.inputs import normalized
from ..backbone.load import load_backbone
from ..backbone.schedule import Mixture, PromptSchedule
from ..backbone.support import FastOptions
from ..ops.dispatch import BACKENDS
from ..prompts import Prompter, PromptGenerator
from .features import TimmFeatures
from .heads import KeptHead, build_head, count_classes, linear_head, trained_dtype
from .outputs import classifier_output
from .values import VALUES, constructor_values

# what PEFT's and timm's models have, and what does it here
_MANY = (
    "a model holds one adapter; pgn_fast.TaskBank(backbone) holds many and mixes them in a batch"
)
_ELSEWHERE = {
    "load_adapter": _MANY,
    "add_adapter": _MANY,
    "set_adapter": _MANY,
    "delete_adapter": _MANY,
    "active_adapter": _MANY,
    "merge_and_unload": "prompts are tokens, there is nothing to merge; the model runs as it is",
    "get_base_model": "the frozen backbone is .backbone",
    "base_model": "the frozen backbone is .backbone",
    "set_input_size": (
        "the adapter belongs to its image size; build it on a backbone of the other size: "
        "timm.create_model(..., img_size=...)"
    ),
}

POOLS = ("original", "img_pool", "prompt_pool", "imgprompt_pool")


class PromptedViT(TimmFeatures, nn.Module):
    """A frozen timm vision transformer, something that makes prompts for it, and a head.

    Images (B, C, H, W), normalized as the backbone wants them, to logits (B, num_classes); uint8
    images are normalized by the backbone's own mean and standard deviation. Built by ``PGN``,
    ``VPT`` or ``create_model``. Only the prompter and the head are trained; the backbone stays in
    eval mode and without gradients, and ``train()`` does not change that.

    The trained parts are float32, also on a half-precision backbone (float64 on a float64 one).

    Attributes:
        backbone: the frozen transformer.
        method: the name that built it, a row of ``pgn_fast.methods.METHODS``.
        prompter: ``PromptGenerator``, ``VisualPrompts``, ``PixelPrompts`` or your ``Prompter``.
        head: a module from pooled features (B, D) to logits.
        adapter_config: the constructor's values, by their names; the class embeddings are in the
            head.
        backend: which backend the ops run on; None is the fastest.
        class_names: of the logits, in their order, where a loaded adapter knew them; else None.
    """

    def __init__(
        self,
        backbone: nn.Module,
        prompter: Prompter,
        head: nn.Module,
        *,
        method: str,
        config: Mapping[str, Any],
        pool: str = "original",
        backend: str | None = None,
        fast: bool | str | Mapping[str, Any] | FastOptions = True,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        like = next(backbone.parameters())
        self.method = method
        self._disabled = False
        self.prompter: Any = prompter.to(like.device, trained_dtype(like.dtype))
        self.head = head
        self.class_names: Sequence[str] | None = None  # in label order, where an adapter knew them
        num_classes = count_classes(head, config["num_classes"])
        self.adapter_config = {**config, "num_classes": num_classes}
        if backend not in (None, *BACKENDS):
            raise ValueError(f"backend={backend!r}; known: {', '.join(BACKENDS)}, or None")
        self.pool = pool
        self.backend = backend
        self._options = FastOptions.of(fast)
        self._engine: FastBackbone | None = None
        self._followed = (backbone,)  # in a tuple: a module would become a child
        if self._options is not None:
            self._engine = FastBackbone(backbone, self._options, backend)
        if isinstance(fast, FastOptions):
            self.adapter_config["fast"] = asdict(fast)
        self.train()

    @property
    def engine(self) -> FastBackbone | None:
        """Runs the backbone with exact savings; None: timm's own blocks run it."""
        self._follow_backbone()
        return self._engine

    def _follow_backbone(self) -> None:
        """Take over another module that was assigned to ``backbone``: freeze it, new engine.

        Raises:
            ValueError: its width is not the one that prompts and head were made for.
        """
        backbone, (known,) = self.backbone, self._followed
        if backbone is known:
            return
        width = getattr(backbone, "embed_dim", None)
        if width != known.embed_dim:
            raise ValueError(
                f"model.backbone was replaced by a {type(backbone).__name__} of width {width}; "
                f"prompts and head are made for width {known.embed_dim}. Build a new model on it"
            )
        backbone.requires_grad_(False).eval()
        if self._options is not None:
            self._engine = FastBackbone(backbone, self._options, self.backend)
        self._followed = (backbone,)

    @property
    def embed_dim(self) -> int:
        """D, the width of the backbone's tokens."""
        return self.backbone.embed_dim

    @property
    def num_prompts(self) -> int:
        """P, prompt tokens per block, as the constructor was told; 0 where it takes no such
        argument."""
        return self.adapter_config.get("num_prompts", 0)

    @property
    def num_classes(self) -> int:
        """C, the length of the logits; 0 without a head, or where a given module does not say."""
        return self.adapter_config["num_classes"]

    @property
    def num_features(self) -> int:
        """The width of the pooled features that the head reads."""
        return self.backbone.num_features

    @property
    def pretrained_cfg(self) -> Any:
        """timm's facts about the backbone's weights: input size, mean, standard deviation."""
        return getattr(self.backbone, "pretrained_cfg", None)

    def forward(
        self,
        images: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Images (B, C, H, W) to logits (B, num_classes).

        With ``pixel_values``, transformers' name for the images, or ``labels``, class indices (B,)
        or probabilities (B, C): an output with ``.loss`` and ``.logits`` in place of the logits.
        """
        if (images is None) == (pixel_values is None):
            raise ValueError("forward takes images or pixel_values, one of them")
        logits = self._logits(pixel_values if images is None else images)  # type: ignore[arg-type]
        if pixel_values is None and labels is None:
            return logits
        return classifier_output(logits, labels)

    def _logits(self, images: Tensor) -> Tensor:
        if self._disabled:
            return self.backbone(normalized(self.backbone, images))
        images, schedule = self._prompted(images, self.backend)
        reads = self._reads_prompts()
        tokens = self._encode(images, schedule, self._rows_read(), reads)
        return self._classify(tokens, schedule.num_prompts_left if reads else 0)

    def forward_reference(self, images: Tensor) -> Tensor:
        """The same logits by timm's own blocks, ``torch.cat`` and plain torch ops."""
        self._follow_backbone()
        images, schedule = self._prompted(images, "reference")
        reads, rows = self._reads_prompts(), self._rows_read()
        tokens = encode_eager(self.backbone, images, schedule, rows=rows, prompts_read=reads)
        return self._classify(tokens, schedule.num_prompts_left if reads else 0)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens after the final norm, prompts removed: (B, S + N, D)."""
        if self._disabled:
            return self.backbone.forward_features(normalized(self.backbone, images))
        images, schedule = self._prompted(images, self.backend)
        return self._encode(images, schedule, prompts_read=False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the bare backbone with its own head inside the ``with`` block, as PEFT does."""
        was, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = was

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of ``forward_features`` to logits, or to pooled features (B, D)."""
        if self.pool not in ("original", "img_pool"):
            raise ValueError(
                f"pool={self.pool!r} reads prompt tokens, which forward_features has removed; call "
                "the model on images"
            )
        return self._head_on(x, prompts=slice(0, 0), pre_logits=pre_logits)

    def prompts(self, images: Tensor) -> Tensor:
        """The prompt tokens that enter the first prompted block, one set an image: (B, P, D)."""
        _, schedule = self._prompted(images, self.backend)
        if not schedule.entries:
            prompter = type(self.prompter).__name__
            raise ValueError(f"this {prompter} prompts the image itself; it has no tokens")
        tokens = schedule.parts(schedule.first).tokens
        if isinstance(tokens, Mixture):
            tokens = tokens.tokens(self.backend)
        if not isinstance(tokens, Tensor):
            kind = "no tokens, only keys and values" if tokens is None else "a function"
            raise ValueError(
                f"block {schedule.first} is the first with prompts, and its entry is {kind}"
            )
        return tokens.expand(images.shape[0], -1, -1)

    def explain(self) -> str:
        """Which backend runs each op, which exact savings are on, and why the others are off."""
        example = self.prompter.example(self.backbone)
        text = explain(self.engine, example, self._rows_read(), self._reads_prompts())
        if note := twins.copied_note(self.backbone):
            text += f"\nBackbone: {note}."
        if isinstance(self.prompter, PromptGenerator):
            like = next(self.prompter.parameters())
            runs = backend_of("mix_prompts", like.device, like.dtype, self.backend)
            text += f"\nPrompt generator: mixing by {runs}."
        return text

    def get_classifier(self) -> nn.Module:
        """The head; the backbone's own (a pair in distilled DeiT) with ``head="keep"``."""
        return self.backbone.get_classifier() if isinstance(self.head, KeptHead) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new linear layer; ``num_classes=0`` by none.

        ``global_pool`` may only repeat the backbone's: the backbone is frozen, its pooling too.
        """
        if global_pool not in (None, self.backbone.global_pool):
            raise ValueError(
                f"global_pool={global_pool!r}: the frozen backbone pools by "
                f"{self.backbone.global_pool!r}; create it with another global_pool instead"
            )
        self.head = linear_head(self.backbone, num_classes)
        self.adapter_config |= {"num_classes": num_classes, "head": "linear"}
        self.class_names = None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers must not decay: the frozen backbone's.

        Prompts and library do decay where the recipe has a weight decay, as in the official code.
        """
        names = {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
        own = getattr(getattr(self.prompter, "generator", None), "no_weight_decay", set)
        return names | {f"prompter.generator.{name}" for name in own()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    def refresh(self) -> None:
        """Forget all that was made from the backbone's weights; the next forward makes it anew.

        For all models on this backbone.
        """
        if self.engine is not None:
            self.engine.cache.refresh()

    def train(self, mode: bool = True) -> PromptedViT:
        """Training mode for prompter and head; the backbone stays in eval mode."""
        if mode != self.training and self._engine is not None:
            self._engine.cache.look_at_all()
        super().train(mode)
        self.backbone.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PromptedViT:
        """Switch gradients of prompter and head; the backbone never gets any."""
        super().requires_grad_(requires_grad)
        self.backbone.requires_grad_(False)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer should get: the parameters of prompter and head."""
        self._follow_backbone()
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        trainable = sum(parameter.numel() for parameter in self.trainable_parameters())
        return trainable, sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line: trainable parameters, all parameters, and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """The state dict without the backbone: what training changes, and what the head needs.

        Parts that ``torch.compile`` has wrapped have the names that they have without it.
        """
        return {
            plain_name(name): value
            for name, value in self.state_dict().items()
            if not name.startswith("backbone.")
        }

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``adapter_state_dict`` gave.

        Raises:
            RuntimeError: tensors are missing, unknown or of another shape; all are named.
        """
        try:
            check_shapes(self.adapter_state_dict(), state)
        except ValueError as error:
            raise RuntimeError(f"adapter state: {error}") from error
        own = {plain_name(name): name for name in self.state_dict()}
        self.load_state_dict({own[name]: value for name, value in state.items()}, strict=False)

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into the directory.

        The arguments are those of ``pgn_fast.adapters.save_pretrained``.
        """
        from .. import adapters

        adapters.save_pretrained(
            self, directory, class_names=class_names, preprocessing=preprocessing
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the adapter and a model card to Hugging Face's hub; the address of the commit.

        Args:
            repo_id: "OWNER/NAME".
            **options: ``private``, ``commit_message``, ``revision``, ``create_pr``, ``token``, as
                in huggingface_hub; ``summary``, of a run, for the card's data and scores.
        """
        from ..adapters import repository

        return repository.push_model(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, directory_or_repo_id: str | PathLike[str], *args: Any, **kw: Any
    ) -> Any:
        """``pgn_fast.from_pretrained``, for an adapter of this class.

        Raises:
            ValueError: the adapter is of another class.
        """
        from ..adapters import repository

        model = repository.from_pretrained(directory_or_repo_id, *args, **kw)
        if not isinstance(model, cls):
            raise ValueError(
                f"{directory_or_repo_id} holds a {type(model).__name__}, not a {cls.__name__}; "
                "pgn_fast.from_pretrained loads either"
            )
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in _ELSEWHERE:
                raise
            text = f"{type(self).__name__} has no {name}: {_ELSEWHERE[name]}"
            raise AttributeError(text, name=name, obj=self) from error

    def _prompted(self, images: Tensor, backend: str | None) -> tuple[Tensor, PromptSchedule]:
        """Check the images; the images that the backbone gets, and which prompts enter where."""
        self.prompter.check_images(images, self.backbone)
        return self.prompter.prompt(images, self.backbone, backend)

    def _encode(
        self,
        images: Tensor,
        schedule: PromptSchedule,
        rows: int | None = None,
        prompts_read: bool = True,
    ) -> Tensor:
        """The tokens after the final norm, by the engine that this model was built with.

        Returns:
            (B, S + P + N, D) with prompts where the schedule puts them, or (B, S + N, D) where
            they are not read; with ``rows`` only the first ones, (B, rows, D).
        """
        engine = self.engine
        if engine is not None:
            return engine.encode(images, schedule, rows=rows, prompts_read=prompts_read)
        return encode_eager(
            self.backbone,
            images,
            schedule,
            rows=rows,
            prompts_read=prompts_read,
            backend=self.backend,
        )

    def _rows_read(self) -> int | None:
        """How many leading tokens the pooling reads; None: all."""
        return rows_read(self.backbone) if self.pool == "original" else None

    def _reads_prompts(self) -> bool:
        return self.pool in ("prompt_pool", "imgprompt_pool")

    def _classify(self, tokens: Tensor, num_prompts: int) -> Tensor:
        """Tokens of which ``num_prompts`` after the prefix tokens are prompts, to logits."""
        first = self.backbone.num_prefix_tokens
        return self._head_on(tokens, prompts=slice(first, first + num_prompts))

    def _head_on(self, tokens: Tensor, prompts: slice, pre_logits: bool = False) -> Tensor:
        """Pool tokens whose prompts stand at ``prompts``, and classify."""
        if self.pool == "original":
            if isinstance(self.head, KeptHead) and not pre_logits:
                return self.backbone.forward_head(tokens)
            pooled = pool(self.backbone, tokens)
        else:
            rows = {
                "img_pool": slice(max(prompts.stop, self.backbone.num_prefix_tokens), None),
                "prompt_pool": prompts,
                "imgprompt_pool": slice(self.backbone.num_prefix_tokens, None),
            }[self.pool]
            pooled = pool_mean(self.backbone, tokens[:, rows])
        if pre_logits:
            return pooled
        own = next(self.head.parameters(), None)
        return self.head(pooled if own is None else pooled.to(own.dtype))


def prompted_vit(
    method: str,
    constructor: type[Prompter],
    backbone: str | nn.Module,
    num_classes: int | None = None,
    /,
    *,
    head: str | nn.Module = "linear",
    class_embeddings: Tensor | None = None,
    logit_scale: float = 100.0,
    backend: str | None = None,
    fast: bool | str | Mapping[str, Any] | FastOptions = True,
    **values: Any,
) -> PromptedViT:
    """A registered prompter in front of a frozen backbone; see ``pgn_fast.create_model``.

    Args:
        method: its name.
        constructor: its prompter's class.
        values: the prompter's own arguments.

    Raises:
        ValueError: the prompter keeps the backbone, or an argument cannot work.
    """
    given = locals()
    config = constructor_values({name: given[name] for name in VALUES if name in given})
    vit: Any = load_backbone(backbone)
    bound = inspect.signature(constructor).bind(vit, **values)
    bound.apply_defaults()
    own = dict(list(bound.arguments.items())[1:])
    prompter = constructor(vit, **values)
    frozen = {id(p) for p in vit.parameters()}
    if kept := [name for name, p in prompter.named_parameters() if id(p) in frozen]:
        raise ValueError(
            f"method {method!r}: {type(prompter).__name__} keeps parameters of the backbone as "
            f"its own ({kept[0]} and {len(kept) - 1} more), which would be trained and saved; keep "
            "sizes, or copies, or the module in a tuple"
        )
    built = build_head(
        head, vit, num_classes, class_embeddings=class_embeddings, logit_scale=logit_scale
    )
    return PromptedViT(
        vit,
        prompter,
        built,
        method=method,
        config=config | constructor_values(own, {}),
        backend=backend,
        fast=fast,
    )
