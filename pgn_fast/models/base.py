"""``PromptedViT``: a frozen vision transformer with prompts and a head, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from ..backbone import twins
from ..backbone.eager import encode_eager
from ..backbone.engine import FastBackbone
from ..backbone.explain import backend_of, explain
from ..backbone.inputs import normalized
from ..backbone.options import FastOptions
from ..backbone.readout import EVERYTHING, Readout, pool, pool_mean, rows_read
from ..backbone.schedule import FrozenTokens, Mixture, PromptSchedule
from ..ops.dispatch import BACKENDS
from ..prompts import Prompter, PromptGenerator
from .adapter_interface import MANY, AdapterInterface
from .frozen import FrozenBelow
from .heads import KeptHead, count_classes, trained_dtype
from .outputs import classifier_output
from .timm_interface import TimmInterface

POOLS = ("original", "img_pool", "prompt_pool", "imgprompt_pool")


class PromptedViT(TimmInterface, FrozenBelow, AdapterInterface):
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

    def forward(
        self,
        images: Tensor | FrozenTokens | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: None = None,
    ) -> Any:
        """Images (B, C, H, W), or what ``below`` made of them, to logits (B, num_classes).

        With ``pixel_values``, transformers' name for the images, or ``labels``, class indices (B,)
        or probabilities (B, C): an output with ``.loss`` and ``.logits`` in place of the logits.
        PEFT's ``adapter_names`` is refused: ``TaskBank`` mixes tasks in a batch.
        """
        if adapter_names is not None:
            raise ValueError(f"adapter_names: {MANY}")
        if (images is None) == (pixel_values is None):
            raise ValueError("forward takes images or pixel_values, one of them")
        logits = self._logits(pixel_values if images is None else images)  # type: ignore[arg-type]
        if pixel_values is None and labels is None:
            return logits
        return classifier_output(logits, labels)

    def _logits(self, images: Tensor | FrozenTokens) -> Tensor:
        if self._disabled and isinstance(images, Tensor):
            return self.backbone(normalized(self.backbone, images))
        return self._classify(*self._tokens(images))

    def _tokens(self, images: Tensor | FrozenTokens) -> tuple[Tensor, int]:
        """What the head reads of images, (B, M, D), and how many of each image's are prompts."""
        images, schedule = self._prompted(images, self.backend)
        readout = self.readout
        return self._encode(images, schedule, readout), readout.prompts_left(schedule)

    def forward_reference(self, images: Tensor) -> Tensor:
        """The same logits by timm's own blocks, ``torch.cat`` and PyTorch's own ops."""
        self._follow_backbone()
        if self._disabled:
            return self.backbone(normalized(self.backbone, images))
        images, schedule = self._prompted(images, "reference")
        readout = self.readout
        tokens = encode_eager(self.backbone, images, schedule, readout)
        return self._classify(tokens, readout.prompts_left(schedule))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens after the final norm, prompts removed: (B, S + N, D)."""
        if self._disabled:
            return self.backbone.forward_features(normalized(self.backbone, images))
        images, schedule = self._prompted(images, self.backend)
        return self._encode(images, schedule, Readout(prompts=False))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of ``forward_features`` to logits, or to pooled features (B, D)."""
        if self._disabled:
            return self.backbone.forward_head(x, pre_logits=pre_logits)
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
        text = explain(self.engine, example, self.readout)
        if note := twins.copied_note(self.backbone):
            text += f"\nBackbone: {note}."
        if isinstance(self.prompter, PromptGenerator):
            like = next(self.prompter.parameters())
            runs = backend_of("mix_prompts", like.device, like.dtype, self.backend)
            text += f"\nPrompt generator: mixing by {runs}."
        return text

    def refresh(self) -> None:
        """Forget all that was made from the backbone's weights; the next forward makes it again.

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

    def _prompted(self, images: Any, backend: str | None) -> tuple[Any, PromptSchedule]:
        """Check the images; the images that the backbone gets, and which prompts enter where."""
        if isinstance(images, FrozenTokens):
            if getattr(self.prompter, "reads_images", True):
                raise ValueError("these prompts depend on the image: give the images")
            return images, self.prompter.schedule(images)
        self.prompter.check_images(images, self.backbone)
        return self.prompter.prompt(images, self.backbone, backend)

    def _encode(
        self,
        images: Tensor | FrozenTokens,
        schedule: PromptSchedule,
        readout: Readout = EVERYTHING,
        taken: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The tokens after the final norm, by the engine that this model was built with; the
        arguments are those of ``encode_eager``."""
        engine = self.engine
        if engine is not None:
            return engine.encode(images, schedule, readout, taken=taken)
        return encode_eager(
            self.backbone, images, schedule, readout, backend=self.backend, taken=taken
        )

    @property
    def readout(self) -> Readout:
        """Which of the backbone's tokens the pooling reads."""
        if self.pool == "original":
            return Readout(rows=rows_read(self.backbone), prompts=False)
        return Readout(prompts=self.pool in ("prompt_pool", "imgprompt_pool"))

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
