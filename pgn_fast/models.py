"""Frozen vision transformers with prompts: ``PGN``, ``VPT`` and what both are, ``PromptedViT``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .frozen.explain import backend_of, explain
from .frozen.images import check_images, normalized
from .frozen.load import load_backbone
from .frozen.plan import FastOptions
from .frozen.reference import pool, pool_mean, rows_read
from .frozen.schedule import Position, PromptSchedule
from .frozen.trunk import FastTrunk, encode_plainly
from .heads import KeptHead, build_head, count_classes, linear_head, trained_dtype
from .ops.backends import BACKENDS
from .prompts import PixelPrompts, PromptGenerator, VisualPrompts
from .prompts.pixels import LOCATIONS as PIXEL_LOCATIONS
from .prompts.sizes import require_sizes

POOLS = ("original", "img_pool", "prompt_pool", "imgprompt_pool")
TOKEN_LOCATIONS = ("prepend", "add", "add-1")


class PromptedViT(nn.Module):
    """A frozen timm vision transformer, something that makes prompts for it, and a head.

    Images (B, C, H, W), normalized as the backbone wants them, to logits (B, num_classes); uint8
    images are normalized by the backbone's own mean and standard deviation. Built by ``PGN`` or
    ``VPT``. Only the prompter and the head are trained; the backbone stays in eval mode
    and without gradients, and ``train()`` does not change that.

    The trained parts are float32, also on a half-precision backbone (float64 on a float64 one).

    Attributes:
        backbone: the frozen transformer.
        prompter: ``PromptGenerator``, ``VisualPrompts`` or ``PixelPrompts``.
        head: a module from pooled features (B, D) to logits.
        config: the constructor's values, by their names; the class embeddings are in the head.
        backend: which backend the ops run on; None is the fastest.
        class_names: of the logits, in their order, where a loaded adapter knew them; else None.
        trunk: the engine with exact savings that runs the backbone; None: timm's own blocks run it.
    """

    _head_init = "torch"

    def __init__(
        self,
        backbone: nn.Module,
        prompter: nn.Module,
        head: nn.Module,
        *,
        config: Mapping[str, Any],
        pool: str = "original",
        backend: str | None = None,
        fast: bool | str | Mapping[str, Any] | FastOptions = True,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        like = next(backbone.parameters())
        self.prompter: Any = prompter.to(like.device, trained_dtype(like.dtype))
        self.head = head
        self.class_names: Sequence[str] | None = None  # in label order, where an adapter knew them
        self.config = {**config, "num_classes": count_classes(head, config["num_classes"])}
        if backend not in (None, *BACKENDS):
            raise ValueError(f"backend={backend!r}; known: {', '.join(BACKENDS)}, or None")
        self.pool = pool
        self.backend = backend
        options = FastOptions.of(fast)
        self.trunk = None if options is None else FastTrunk(backbone, options, backend)
        if isinstance(fast, FastOptions):
            self.config["fast"] = asdict(fast)
        self.train()

    @property
    def embed_dim(self) -> int:
        """D, the width of the backbone's tokens."""
        return self.backbone.embed_dim

    @property
    def num_prompts(self) -> int:
        """P, prompt tokens per block, as the constructor was told."""
        return self.config["num_prompts"]

    @property
    def num_classes(self) -> int:
        """C, the length of the logits; 0 without a head, or where a given module does not say."""
        return self.config["num_classes"]

    @property
    def num_features(self) -> int:
        """The width of the pooled features that the head reads."""
        return self.backbone.num_features

    @property
    def pretrained_cfg(self) -> Any:
        """timm's facts about the backbone's weights: input size, mean, standard deviation."""
        return getattr(self.backbone, "pretrained_cfg", None)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        images, schedule = self._prompted(images, self.backend)
        reads = self._reads_prompts()
        tokens = self._encode(images, schedule, self._rows_read(), reads)
        return self._classify(tokens, schedule.num_prompts_left if reads else 0)

    def forward_reference(self, images: Tensor) -> Tensor:
        """The same logits by timm's own blocks, ``torch.cat`` and plain torch ops."""
        images, schedule = self._prompted(images, "reference")
        reads, rows = self._reads_prompts(), self._rows_read()
        tokens = encode_plainly(self.backbone, images, schedule, rows=rows, prompts_read=reads)
        return self._classify(tokens, schedule.num_prompts_left if reads else 0)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens after the final norm, prompts removed: (B, S + N, D)."""
        images, schedule = self._prompted(images, self.backend)
        return self._encode(images, schedule, prompts_read=False)

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
        if not schedule.layers:
            raise ValueError(
                f"location={self.config['location']!r} prompts the image itself; it has no tokens"
            )
        return schedule.layers[schedule.first].expand(images.shape[0], -1, -1)

    def explain(self) -> str:
        """Which backend runs each op, which exact savings are on, and why the others are off."""
        text = explain(self.trunk, self._outline(), self._rows_read(), self._reads_prompts())
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
        self.head = linear_head(self.backbone, num_classes, self._head_init)
        self.config |= {"num_classes": num_classes, "head": "linear"}
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

    def train(self, mode: bool = True) -> PromptedViT:
        """Training mode for prompter and head; the backbone stays in eval mode."""
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
        """The state dict without the backbone: what training changes, and what the head needs."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("backbone.")}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``adapter_state_dict`` gave.

        Raises:
            RuntimeError: tensors are missing, unknown or of another shape; all are named.
        """
        expected = self.adapter_state_dict().keys()
        problems = [f"missing: {name}" for name in expected - state.keys()]
        problems += [f"unknown: {name}" for name in state.keys() - expected]
        if problems:
            raise RuntimeError(f"adapter state does not fit: {'; '.join(sorted(problems))}")
        self.load_state_dict(state, strict=False)

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
        from . import adapters

        adapters.save_pretrained(
            self, directory, class_names=class_names, preprocessing=preprocessing
        )

    def _prompted(self, images: Tensor, backend: str | None) -> tuple[Tensor, PromptSchedule]:
        """Check the images; the images that the backbone gets, and which prompts enter where."""
        raise NotImplementedError

    def _outline(self) -> PromptSchedule:
        """A schedule like those of ``_prompted``, without values: for ``explain``."""
        raise NotImplementedError

    def _encode(
        self,
        images: Tensor,
        schedule: PromptSchedule,
        rows: int | None = None,
        prompts_read: bool = True,
    ) -> Tensor:
        """The tokens behind the final norm, by the engine that this model was built with.

        Returns:
            (B, S + P + N, D) with prompts where the schedule puts them, or (B, S + N, D) where
            nobody reads them; with ``rows`` only the first ones, (B, rows, D).
        """
        if self.trunk is not None:
            return self.trunk.encode(images, schedule, rows=rows, prompts_read=prompts_read)
        return encode_plainly(self.backbone, images, schedule, rows=rows, prompts_read=prompts_read)

    def _rows_read(self) -> int | None:
        """How many leading tokens the pooling reads; None: all."""
        return rows_read(self.backbone) if self.pool == "original" else None

    def _reads_prompts(self) -> bool:
        return self.pool in ("prompt_pool", "imgprompt_pool")

    def _classify(self, tokens: Tensor, num_prompts: int) -> Tensor:
        """Tokens of which ``num_prompts`` behind the prefix tokens are prompts, to logits."""
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


class PGN(PromptedViT):
    """A frozen ViT whose prompts a small network generates from each image.

    The prompts enter behind the patch tokens, without position embedding, before ``norm_pre`` where
    the backbone has one (CLIP), and stay to the end; pooling never sees them.

    Args:
        backbone: a timm vision transformer, or a timm model name (pretrained weights are loaded).
            It is frozen in place.
        num_classes: C of a new linear head; None: as many as the backbone has, 0: no head.
        num_prompts: P, prompt tokens per image.
        library_size: K, tokens in the token library.
        generator: "resnet10" (the paper's), any timm model name, a module from (B, 3, R, R) to
            (B, P * K), or a ready ``PromptGenerator``, which then says all sizes.
        generator_kwargs: for a generator that is named; see ``PromptGenerator``.
        resolution: R in pixels, what the generator sees.
        activation: "softmax" (the paper's) or "sigmoid".
        token_library: a module that yields the library (K, D); None: a plain Parameter.
        head: "linear" (new, trained), "keep" (the backbone's own, frozen), "zero_shot" (CLIP:
            similarity to ``class_embeddings``), or a module on the pooled features (B, D).
        class_embeddings: (C, E), one encoded text per class, for "zero_shot".
        logit_scale: for "zero_shot", already exponentiated (CLIP: 100).
        backend: "reference", "cpu", "triton" or "cuda" for this package's ops; None: the fastest.
        fast: run the backbone with the exact savings; False: by timm's own blocks. Also a memory
            plan, "fast", "balanced" or "min", or ``FastOptions`` to switch single savings.

    Raises:
        ValueError, TypeError: an argument that cannot work; the message says what would.

    Source: Loedeman et al., "Prompt Generation Networks for Input-Space Adaptation of Frozen Vision
    Transformers", arXiv:2210.06466; official code, github.com/jochemloedeman/PGN.
    """

    prompter: PromptGenerator

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        num_prompts: int = 16,
        library_size: int = 256,
        generator: str | nn.Module = "resnet10",
        generator_kwargs: Mapping[str, Any] | None = None,
        resolution: int = 224,
        activation: str = "softmax",
        token_library: nn.Module | None = None,
        head: str | nn.Module = "linear",
        class_embeddings: Tensor | None = None,
        logit_scale: float = 100.0,
        backend: str | None = None,
        fast: bool | str | Mapping[str, Any] | FastOptions = True,
    ) -> None:
        config = _constructor_values(locals())
        vit: Any = load_backbone(backbone)
        if isinstance(generator, PromptGenerator):
            prompter = _ready_generator(generator, vit, generator_kwargs, token_library)
        else:
            if isinstance(generator, str) and vit.in_chans != 3:
                generator_kwargs = {"in_chans": vit.in_chans, **(generator_kwargs or {})}
            prompter = PromptGenerator(
                vit.embed_dim,
                num_prompts=num_prompts,
                library_size=library_size,
                generator=generator,
                generator_kwargs=generator_kwargs,
                resolution=resolution,
                activation=activation,
                token_library=token_library,
            )
        built = build_head(
            head, vit, num_classes, class_embeddings=class_embeddings, logit_scale=logit_scale
        )
        super().__init__(
            vit, prompter, built, config=config | prompter.config, backend=backend, fast=fast
        )

    def _prompted(self, images: Tensor, backend: str | None) -> tuple[Tensor, PromptSchedule]:
        check_images(self.backbone, images)
        pixels = normalized(self.backbone, images)
        prompts = self.prompter(pixels, backend=backend)
        # a library that is trained for a canvas knows what stands where (inversion.GamutLibrary)
        place = getattr(self.prompter.token_library, "place", None)
        if place is not None:
            return place(pixels, prompts)
        return images, PromptSchedule("append", {0: prompts})

    def _outline(self) -> PromptSchedule:
        prompts = torch.empty(1, self.num_prompts, self.embed_dim, device="meta")
        return PromptSchedule("append", {0: prompts})

    def prompts(self, images: Tensor) -> Tensor:
        """The prompt tokens of each image, (B, P, D); of a GamutLibrary, what a patch adds to the
        token of a mid-gray one."""
        check_images(self.backbone, images)
        return self.prompter(normalized(self.backbone, images), backend=self.backend)


class VPT(PromptedViT):
    """A frozen ViT with learned prompts, the same for every image: VPT-Deep, -Shallow and ablations.

    Prompts stand behind the prefix tokens and before the patch tokens. Those of block 0 enter
    before ``norm_pre`` where the backbone has one (CLIP), those of other blocks before the block.

    Args:
        backbone: a timm vision transformer, or a timm model name (pretrained weights are loaded).
            It is frozen in place.
        num_classes: C of a new linear head; None: as many as the backbone has, 0: no head.
        num_prompts: P, prompt tokens per block. For "pad" pixels of border, for "below" channels,
            for "prepend-pixel" patches; "add" and "add-1" have no tokens and do not use it.
        deep: new prompts at every block; False: VPT-Shallow, prompts at block 0 that stay.
        layers: the block indices, from 0, that get prompts of their own; None: all.
        shared: one set of prompts for all these blocks.
        expand: behind the last such block the prompts stay in the sequence; False: they leave.
        project_dim: the prompts' stored width, projected to D by one shared linear layer.
        dropout: on the prompts, in training; each image and block has its own mask.
        location: "prepend", or the paper's ablations "add" (one vector per token, added), "add-1"
            (one vector for all tokens), "pad", "below", "prepend-pixel" (see ``PixelPrompts``).
            The last three act once, on the image: ``deep`` is without meaning for them.
        pool: "original" (the backbone's), or the mean of patches "img_pool", of prompts
            "prompt_pool", of both "imgprompt_pool".
        head, class_embeddings, logit_scale, backend, fast: as for ``PGN``.

    Raises:
        ValueError, TypeError: an argument that cannot work; the message says what would.

    Source: Jia et al., "Visual Prompt Tuning", arXiv:2203.12119, section 3.2 and, for the
    ablations, section 4.3.
    """

    _head_init = "vpt"

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        num_prompts: int = 50,
        deep: bool = True,
        layers: Sequence[int] | None = None,
        shared: bool = False,
        expand: bool = True,
        project_dim: int | None = None,
        dropout: float = 0.0,
        location: str = "prepend",
        pool: str = "original",
        head: str | nn.Module = "linear",
        class_embeddings: Tensor | None = None,
        logit_scale: float = 100.0,
        backend: str | None = None,
        fast: bool | str | Mapping[str, Any] | FastOptions = True,
    ) -> None:
        config = _constructor_values(locals())
        vit: Any = load_backbone(backbone)
        require_sizes(num_prompts=num_prompts)
        if project_dim is not None:
            require_sizes(project_dim=project_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}; known: {', '.join(POOLS)}")
        if location not in (*TOKEN_LOCATIONS, *PIXEL_LOCATIONS):
            known = ", ".join((*TOKEN_LOCATIONS, *PIXEL_LOCATIONS))
            raise ValueError(f"location={location!r}; known: {known}")
        if location != "prepend" and not expand:
            raise ValueError(f"expand=False removes prompt tokens; location={location!r} has none")
        without_tokens = not location.startswith("prepend") or not expand
        if pool == "prompt_pool" and without_tokens:
            raise ValueError(
                f"pool='prompt_pool' averages prompt tokens, but with location={location!r} and "
                f"expand={expand} none are there behind the last block"
            )
        prompter: nn.Module
        if location in PIXEL_LOCATIONS:
            token_only = {"layers": layers is not None, "project_dim": project_dim is not None}
            token_only |= {"shared": shared, "dropout": dropout > 0}
            if given := [name for name, is_given in token_only.items() if is_given]:
                raise ValueError(
                    f"location={location!r} prompts the image, once: {', '.join(given)} cannot "
                    "apply to it"
                )
            prompter = PixelPrompts(vit, num_prompts, location)
        else:
            every_token = vit.num_prefix_tokens + vit.patch_embed.num_patches
            prompter = VisualPrompts(
                vit.embed_dim,
                tuple(vit.patch_embed.patch_size),
                {"prepend": num_prompts, "add": every_token, "add-1": 1}[location],
                _prompted_blocks(layers, deep, len(vit.blocks)),
                shared=shared,
                project_dim=project_dim,
                dropout=dropout,
            )
        built = build_head(
            head,
            vit,
            num_classes,
            class_embeddings=class_embeddings,
            logit_scale=logit_scale,
            init=self._head_init,
        )
        super().__init__(vit, prompter, built, config=config, pool=pool, backend=backend, fast=fast)

    def _prompted(self, images: Tensor, backend: str | None) -> tuple[Tensor, PromptSchedule]:
        prompter, location = self.prompter, self.config["location"]
        self._check_images(images)
        if isinstance(prompter, VisualPrompts):
            position: Position = "prepend" if location == "prepend" else "add"
            layers = prompter(images.shape[0])
            return images, PromptSchedule(position, layers, keep=self.config["expand"])
        if location.startswith("prepend-pixel"):
            return images, PromptSchedule("prepend", {0: prompter.tokens(self.backbone)})
        images = normalized(self.backbone, images)
        patch_weight = prompter.patch_projection(images.dtype)
        return prompter.images(images), PromptSchedule("add", {}, patch_weight=patch_weight)

    def _outline(self) -> PromptSchedule:
        prompter, location = self.prompter, self.config["location"]
        prompts = torch.empty(self.num_prompts, self.embed_dim, device="meta")
        if not isinstance(prompter, VisualPrompts):
            entering = {0: prompts} if location.startswith("prepend-pixel") else {}
            return PromptSchedule("prepend" if entering else "add", entering)
        if self.training and prompter.dropout > 0:
            prompts = prompts[None]
        position: Position = "prepend" if location == "prepend" else "add"
        layers = dict.fromkeys(prompter.layers, prompts)
        return PromptSchedule(position, layers, keep=self.config["expand"])

    def _check_images(self, images: Tensor) -> None:
        location = self.config["location"]
        border = self.num_prompts if location == "pad" else 0
        check_images(self.backbone, images, border)
        own = tuple(size - 2 * border for size in self.backbone.patch_embed.img_size)
        if location in ("add", "pad", "below") and images.shape[2:] != own:
            raise ValueError(
                f"images are {images.shape[2]}x{images.shape[3]} pixels, but the prompts of "
                f"location={location!r} were made for {own[0]}x{own[1]}"
            )


def _constructor_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's own arguments out of its ``locals()``; class embeddings live in the head."""
    own = ("self", "__class__", "backbone", "class_embeddings")
    # NumPy's whole numbers become Python's, which JSON can hold
    return {
        name: int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
        for name, value in values.items()
        if name not in own
    }


def _ready_generator(
    generator: PromptGenerator,
    backbone: Any,
    generator_kwargs: Mapping[str, Any] | None,
    token_library: nn.Module | None,
) -> PromptGenerator:
    """The given generator, if it fits the backbone and nothing else was given with it."""
    if generator_kwargs or token_library is not None:
        raise ValueError(
            "generator is a ready PromptGenerator, which has its network and token library: leave "
            "out generator_kwargs and token_library"
        )
    if generator.embed_dim != backbone.embed_dim:
        raise ValueError(
            f"generator makes prompts of width {generator.embed_dim}, the backbone's tokens are "
            f"{backbone.embed_dim} wide"
        )
    return generator


def _prompted_blocks(layers: Sequence[int] | None, deep: bool, depth: int) -> tuple[int, ...]:
    """Which blocks get prompts of their own, in order."""
    if layers is None:
        return tuple(range(depth)) if deep else (0,)
    if not deep:
        raise ValueError("layers says which blocks get prompts, deep=False says block 0: give one")
    blocks = tuple(sorted(layers))
    if not blocks or len(set(blocks)) < len(blocks) or blocks[0] < 0 or blocks[-1] >= depth:
        raise ValueError(
            f"layers={list(layers)} must be different block indices from 0 to {depth - 1}, the "
            f"backbone's last; all are range({depth})"
        )
    return blocks
