"""The Prompt Generation Network: an image chooses its prompts from a learned token library."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._stored import check_shapes
from ..backbone.inputs import normalized
from ..backbone.schedule import Mixture, PromptSchedule
from ..errors import UserError, brief
from ..ops import mix_prompts
from ..ops.mix_prompts import ACTIVATIONS
from ..reference import mixture
from . import networks
from .base import Prompter
from .official import read_official
from .sizes import require_sizes


class PromptGenerator(Prompter):
    """Images (B, C, H, W) to prompt tokens (B, P, D).

        prompts[b, p] = sum_k activation(generator(image[b]))[p, k] * token_library[k]

    Args:
        embed_dim: D, the width of the backbone's tokens.
        num_prompts: P, prompt tokens per image.
        library_size: K, tokens in the token library.
        generator: "resnet10" (the paper's), a timm model name ("resnet18"), or a module that maps
            (B, C, R, R) to (B, P * K).
        generator_kwargs: for a generator that is named; "resnet10" takes ``channels=16, groups=4,
            blocks_per_group=1, max_pool=True, in_chans=3``, a timm name the plain sizes and
            settings of the architecture, and ``pretrained``, ``checkpoint_path`` and ``cache_dir``,
            which are not recorded: what was trained is saved with the model.
        resolution: R in pixels; images are resized to it first, their shorter side, bilinear with
            antialiasing, the aspect kept. None leaves them as they are.
        activation: "softmax" (the paper's) or "sigmoid".
        token_library: a module that yields the library (K, D) when called without arguments, in
            place of a plain parameter.

    Attributes:
        token_library: Parameter (K, D), normal with standard deviation 0.02; or the given module.
        generator: the network behind ``mixture_logits``.
        config: the constructor's values; ``generator`` is None where it was given as a module,
            and ``token_library`` the class name of the module.

    Raises:
        ValueError: a size below 1, an unknown generator or activation, a library of another size.

    Source: Loedeman et al., arXiv:2210.06466, section 3; official code, ``pgn_models/tlpgn.py``.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_prompts: int = 16,
        library_size: int = 256,
        generator: str | nn.Module = "resnet10",
        generator_kwargs: Mapping[str, Any] | None = None,
        resolution: int | None = 224,
        activation: str = "softmax",
        token_library: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require_sizes(embed_dim=embed_dim, num_prompts=num_prompts, library_size=library_size)
        if resolution is not None:
            require_sizes(resolution=resolution)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}; known: {', '.join(ACTIVATIONS)}")
        num_prompts, library_size = int(num_prompts), int(library_size)
        resolution = None if resolution is None else int(resolution)
        self.embed_dim = int(embed_dim)
        self.num_prompts = num_prompts
        self.library_size = library_size
        self.resolution = resolution
        self.activation = activation
        recorded = None
        if isinstance(generator, str):
            recorded, sources = networks.split_kwargs(generator, generator_kwargs)
            outputs = num_prompts * library_size
            network = networks.build(generator, outputs, **recorded, **sources)
        elif generator_kwargs:
            raise ValueError(
                f"generator_kwargs {dict(generator_kwargs)}: given with a generator that is "
                "already there"
            )
        elif isinstance(generator, nn.Module):
            network = generator
        else:
            raise TypeError(
                f"generator takes a name or a module from images to P * K numbers, got "
                f"{type(generator).__name__}"
            )
        self.config = {
            "num_prompts": num_prompts,
            "library_size": library_size,
            "generator": None if recorded is None else generator,
            "generator_kwargs": recorded,
            "resolution": resolution,
            "activation": activation,
            "token_library": None if token_library is None else type(token_library).__name__,
        }
        self.generator = network
        self.token_library: nn.Parameter | nn.Module
        if token_library is None:
            self.token_library = nn.Parameter(torch.empty(library_size, embed_dim))
            nn.init.normal_(self.token_library, std=0.02)
        else:
            self.token_library = token_library
            got = tuple(self.library().shape)
            if got != (library_size, embed_dim):
                way = f"; pass library_size={got[0]}" if got[1:] == (embed_dim,) else ""
                raise ValueError(
                    f"token_library yields {got}, but library_size and the backbone's width ask "
                    f"for {(library_size, embed_dim)}{way}"
                )

    def forward(self, images: Tensor, *, backend: str | None = None) -> Tensor:
        """Images (B, C, H, W) to prompt tokens (B, P, D).

        ``backend`` is ``pgn_fast.ops.mix_prompts``'s. Under autocast the generator and the mixing
        run in the autocast dtype.
        """
        library = self.library()
        logits = self.mixture_logits(images).to(library.dtype)
        return mix_prompts(logits, library, self.activation, backend=backend)

    def schedule(self, images: Tensor) -> PromptSchedule:
        """A mixture of the token library for each image, after the patches of block 0."""
        library = self.library()
        logits = self.mixture_logits(images).to(library.dtype)
        return PromptSchedule("append", {0: Mixture(logits, library, self.activation)})

    def prompt(
        self, images: Tensor, backbone: Any, backend: str | None
    ) -> tuple[Tensor, PromptSchedule]:
        """As ``Prompter.prompt``; a library that is trained for a canvas places its tokens itself
        (``pgn_fast.inversion.GamutLibrary.place``)."""
        pixels = normalized(backbone, images)
        place = getattr(self.token_library, "place", None)
        if place is not None:
            return place(pixels, self(pixels, backend=backend))
        return images, self.schedule(pixels)

    def example(self, backbone: Any) -> PromptSchedule:
        """As ``Prompter.example``, without running the network."""
        P, K, D = self.num_prompts, self.library_size, self.embed_dim
        with torch.no_grad():
            dtype = self.library().dtype
        library = torch.empty(K, D, device="meta", dtype=dtype)
        logits = torch.empty(1, P, K, device="meta", dtype=dtype)
        return PromptSchedule("append", {0: Mixture(logits, library, self.activation)})

    def mixture_logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to mixture coefficients before the activation, (B, P, K)."""
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                "images must be normalized and floating-point, (B, C, H, W), got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        images = resize_shorter_side(images, self.resolution)
        own = next(self.generator.parameters(), None)
        logits = self.generator(images if own is None else images.to(own.dtype))
        expected = (images.shape[0], self.num_prompts * self.library_size)
        if logits.shape != expected:
            raise ValueError(
                f"generator: {type(self.generator).__name__} gives {tuple(logits.shape)}; for "
                f"num_prompts={self.num_prompts} and library_size={self.library_size} it must give "
                f"{expected}, one row an image"
            )
        return logits.view(-1, self.num_prompts, self.library_size)

    def mixture(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to mixture coefficients (B, P, K): how much of each library token."""
        return mixture(self.mixture_logits(images), self.activation)

    def library(self) -> Tensor:
        """The token library (K, D), from a parameter or from the module that yields it."""
        library = self.token_library
        return library() if isinstance(library, nn.Module) else library

    @classmethod
    def from_official(
        cls, source: str | PathLike[str] | Mapping[str, Any], **overrides: Any
    ) -> PromptGenerator:
        """Load a checkpoint that the official code has published or written.

        Args:
            source: the path of a ``.pt`` or Lightning ``.ckpt`` file, or its state dict. Of a file
                nothing is run, and its checksums must be right.
            **overrides: what tensors do not tell: ``activation``, ``resolution`` and
                ``generator_kwargs={"max_pool": ...}``. Sizes are read off the tensors; a size that
                is given must agree with them.

        Raises:
            ValueError: the file is damaged or holds something else; tensors are missing, unknown,
                of another shape or not finite; or a given size differs from theirs.
        """
        settings, state = read_official(source)
        in_network = {**settings.pop("generator_kwargs"), **overrides.pop("generator_kwargs", {})}
        for name, found in settings.items():
            if overrides.get(name, found) != found:
                raise ValueError(
                    f"{name}={overrides[name]} was given, but the checkpoint's tensors have {found}"
                )
        values = {**overrides, **settings, "generator_kwargs": in_network}
        try:
            # shapes first: what the file says must not decide how much memory is taken
            with torch.device("meta"):
                check_shapes(cls(**values).state_dict(), state)
        except ValueError as error:
            of = "" if isinstance(source, Mapping) else f"{source}: "
            raise UserError(f"{of}{brief(error, 1000)}") from error
        generator = cls(**values)
        generator.load_state_dict(state)
        return generator


def resize_shorter_side(images: Tensor, size: int | None) -> Tensor:
    """Scale images (B, C, H, W) so that their shorter side has ``size`` pixels, bilinear with
    antialiasing; the longer side is cut to whole pixels, as torchvision's ``Resize`` does."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if size is None or short == size:
        return images
    new = (int(size * height / short), int(size * width / short))
    # half precision has no antialiased kernel on CPU, and would lose pixels' last bits
    exact = images if images.dtype == torch.float64 else images.float()
    return F.interpolate(exact, new, mode="bilinear", antialias=True).to(images.dtype)
