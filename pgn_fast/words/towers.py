"""Text towers: from a model, or from the name that its image tower was loaded by."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import hub
from ..backbone.load import OPEN_CLIP_CONFIG, parse_name
from ..backbone.twins import TwinRefused
from ..errors import UserError, as_user_error, shown
from ..models.heads import backbone_logits

_EXTRAS = {"transformers": "hf", "open_clip": "clip"}
# image features of one model and of its twin differ by rounding; of the same weights with another
# activation (timm's plain and quickgelu variants) visibly; of two models in every direction
_SAME, _RELATED = 0.99, 0.5


class Tower(Protocol):
    """A text tower beside its image tower."""

    title: str

    @property
    def logit_scale(self) -> float: ...

    def encode(self, texts: list[str]) -> Tensor:
        """Texts to embeddings (n, E), of any length. Raises UserError where one is too long."""

    def check_backbone(self, backbone: Any) -> None:
        """Raises UserError: a backbone that is not this model's image tower."""


def find_tower(model: str | nn.Module, tokenizer: Callable[..., Any] | None = None) -> Tower:
    """The text tower of a model, or of the model that a name means.

    Raises:
        UserError: it has none, or what is needed to load it is missing.
        TypeError: neither a name nor a module.
    """
    if isinstance(model, str):
        return _by_name(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model takes a name or a module, got {type(model).__name__}")
    package, title = type(model).__module__.partition(".")[0], type(model).__name__
    facts: Any = model
    if package == "open_clip" and hasattr(facts, "encode_text"):
        if tokenizer is None:
            raise UserError(
                "`tokenizer`: an open_clip model does not name its own; pass "
                "tokenizer=open_clip.get_tokenizer(...) with the model's name."
            )
        return _OpenClip(title, facts, tokenizer)
    if package == "transformers" and hasattr(facts, "get_text_features"):
        return _Transformers(title, facts, tokenizer or _hf_tokenizer(facts.config._name_or_path))
    raise _no_text(f"a {title}")


def _by_name(name: str) -> Tower:
    parsed = parse_name(name)
    if parsed.kind == "timm":
        return _of_timm(parsed.value)
    if parsed.kind == "folder":
        read: Callable[[str], Path | None] = lambda file: _existing(Path(parsed.value) / file)
        schema = "local-dir"
    elif parsed.kind == "hub":
        read = lambda file: hub.download(parsed.value, file)
        schema = "hf-hub"
    else:
        raise _no_text(name)
    if (config := read("config.json")) is not None:
        settings = _json(config)
        if "text_config" in settings or "text_config_dict" in settings:
            _need("transformers", name)
            return _transformers(name, parsed.value, settings)
    if read(OPEN_CLIP_CONFIG) is not None:
        _need("open_clip", name)
        return _open_clip(name, f"{schema}:{parsed.value}")
    raise _no_text(name)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}).") from error
    return content if isinstance(content, dict) else {}


def _of_timm(name: str) -> Tower:
    """The open_clip model whose weights the hub keeps where timm loads the image tower from."""
    from timm.models import get_pretrained_cfg

    _need("open_clip", name)
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg as open_clip_cfg

    with as_user_error(RuntimeError):
        about = get_pretrained_cfg(name)
    repository = getattr(about, "hf_hub_id", None)
    found = []
    for model, tag in open_clip.list_pretrained():
        cfg = open_clip_cfg(model, tag)
        if repository and str(cfg.get("hf_hub") or "").strip("/") == repository:
            # under several names of open_clip's: the one with the activation of these weights
            own = (open_clip.get_model_config(model) or {}).get("quick_gelu", False)
            found.append((own != cfg.get("quick_gelu", False), model, tag))
    if not found:
        raise UserError(
            f"`text_model`: {name} is an image tower, and open_clip knows no whole model with "
            "these weights; name the whole model, a repository or a folder of transformers' or "
            "open_clip's."
        )
    _, model, tag = min(found)
    return _open_clip(f"{model}, {tag}", model, tag)


def _open_clip(title: str, name: str, tag: str | None = None) -> Tower:
    import open_clip

    with hub.asked(f"the text tower of {title}"), as_user_error(RuntimeError):
        try:
            model = open_clip.create_model(name, pretrained=tag, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
        except OSError as error:
            raise UserError(f"`text_model`: {title} cannot be loaded ({error}).") from error
    return _OpenClip(title, model.eval(), tokenizer)


def _transformers(title: str, location: str, settings: dict[str, Any]) -> Tower:
    import transformers

    from ..backbone.twins.transformers import from_pretrained

    folder = Path(location).is_dir()
    name, revision = (location, None) if folder else hub.split_revision(location)
    options = {"trust_remote_code": False, "revision": revision or "main"}
    architecture = (settings.get("architectures") or [""])[0]
    kind = getattr(transformers, str(architecture), transformers.AutoModel)
    if not hasattr(kind, "get_text_features"):
        kind = transformers.AutoModel
    with hub.asked(f"the text tower of {title}"), as_user_error(RuntimeError):
        try:
            model = from_pretrained(kind, name, **options)
        except (OSError, TwinRefused) as error:
            raise UserError(f"`text_model`: {title} cannot be loaded ({error}).") from error
    if not hasattr(model, "get_text_features"):
        raise _no_text(title)
    return _Transformers(title, model.eval(), _hf_tokenizer(name, **options))


def _hf_tokenizer(name: str, **options: Any) -> Callable[..., Any]:
    import transformers

    try:
        with hub.asked(f"the tokenizer of {name}"):
            found: Callable[..., Any] = transformers.AutoTokenizer.from_pretrained(name, **options)
            return found
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"`text_model`: no tokenizer in {name or 'the model'} ({' '.join(str(error).split())})."
        ) from error


def _no_text(what: str) -> UserError:
    return UserError(
        f"`text_model`: {what} has no text tower. Zero-shot heads need a model of images and "
        "texts, such as openai/clip-vit-base-patch32 or vit_base_patch32_clip_quickgelu_224.openai."
    )


def _need(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"the text tower of {name} is a model of {package}, which is not installed: "
            f"pip install 'pgn_fast[{_EXTRAS[package]}]'"
        )


def _too_long(text: str, longest: int) -> UserError:
    return UserError(
        f"`template`: {shown(text)} fills the text tower, which reads {longest} tokens: its end "
        "would be cut off. Shorten the template or the name."
    )


@dataclass
class _OpenClip:
    title: str
    model: Any
    tokenizer: Callable[..., Any]

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    def encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts)
        # a text that leaves no padding may have been cut
        padding = self.tokenizer([""])[0, -1]
        full = (tokens[:, -1] != padding).nonzero()
        if len(full):
            raise _too_long(texts[int(full[0])], tokens.shape[1])
        return self.model.encode_text(tokens.to(self.model.logit_scale.device))

    def check_backbone(self, backbone: Any) -> None:
        size = getattr(self.model.visual, "image_size", None)
        _compare(self, backbone, size, self.model.encode_image)


@dataclass
class _Transformers:
    title: str
    model: Any
    tokenizer: Callable[..., Any]

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    def encode(self, texts: list[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        # SigLIP was trained on texts that are padded to its whole length, without a mask
        siglip = str(self.model.config.model_type).startswith("siglip")
        shape = {"padding": "max_length", "max_length": longest} if siglip else {"padding": True}
        tokens = self.tokenizer(texts, return_tensors="pt", **shape)
        if tokens["input_ids"].shape[1] > longest:
            raise _too_long(max(texts, key=len), longest)
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        given = {name: tokens[name].to(self.model.device) for name in names if name in tokens}
        return _pooled(self.model.get_text_features(**given))

    def check_backbone(self, backbone: Any) -> None:
        size = getattr(self.model.config.vision_config, "image_size", None)
        image = lambda images: _pooled(self.model.get_image_features(pixel_values=images))
        _compare(self, backbone, size, image)


def _pooled(output: Any) -> Tensor:
    """transformers 5 gives the tower's whole output, with the projected features pooled."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def _compare(
    tower: Tower, backbone: Any, size: Any, encode_image: Callable[[Tensor], Tensor]
) -> None:
    """Features of one random image by the model's own image tower and by the backbone.

    Raises:
        UserError: they have nothing to do with each other.
    """
    own = tuple(getattr(backbone.patch_embed, "img_size", None) or ())
    size = (size, size) if isinstance(size, int) else tuple(size or ())
    if own != size:
        return  # position embeddings were resampled
    like = next(backbone.parameters())
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = encode_image(images)
    given = images.to(like.device, like.dtype)
    pooled = backbone.forward_head(backbone.forward_features(given), pre_logits=True)
    projects = getattr(backbone.head, "out_features", None) == expected.shape[-1]
    features = backbone_logits(backbone, pooled) if projects else pooled
    if features.shape[-1] != expected.shape[-1]:
        raise UserError(
            f"`text_model`: the features of {tower.title} are {expected.shape[-1]} wide, those of "
            f"the backbone {features.shape[-1]}: they are two models, or the backbone was loaded "
            "without its projection (num_classes=0)."
        )
    alike = float(F.cosine_similarity(features.float().cpu(), expected.float().cpu()))
    if not alike >= _RELATED:
        raise UserError(
            f"`text_model`: the image tower of {tower.title} is not the backbone: their features "
            f"of one image have a cosine of {alike:.2f}. Texts and images must be of one model."
        )
    if alike < _SAME:
        warnings.warn(
            f"the image tower of {tower.title} and the backbone differ: their features of one "
            f"image have a cosine of {alike:.3f}. timm's plain and quickgelu variants of a CLIP "
            "model differ like this: take the one that the weights were trained with",
            stacklevel=3,
        )
