"""The networks behind a prompt generator, by name: what may be said about them, and nothing else.

A generator's name and its keyword arguments are saved with the model and come back from files that
others wrote. ``timm.create_model`` would fetch, open and write whatever its keywords name, so only
those that are plain sizes and settings of an architecture pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._values import LARGEST_SIDE, Value, either, flag, number, optional, plain, several, whole
from ..errors import shown
from .resnet10 import ResNet10

RESNET10: dict[str, Value] = {
    "channels": whole(1, 8192),
    "groups": whole(1, 8),
    "blocks_per_group": whole(1, 64),
    "max_pool": flag(),
    "in_chans": whole(1, 1024),
}

# a word such as "gelu", "avg" or "deep": no path, no address
_WORD = Value(
    "a short word of letters, digits and _",
    lambda v: isinstance(v, str) and len(v) <= 32 and (v == "" or v.isidentifier()),
)
_COUNT, _WIDTH, _SIDE = whole(0, 128), whole(1, 65_536), whole(1, LARGEST_SIDE)
_FRACTION, _POSITIVE = number(0, 1), number(0, 1000)
_COUNTS, _WIDTHS = several(_COUNT, 1, 8), several(_WIDTH, 1, 8)
_SIDES = either(_SIDE, several(_SIDE, 2, 2))

# keyword arguments of timm's models that are numbers, switches and words of an architecture
TIMM: dict[str, Value] = {
    **dict.fromkeys(("in_chans",), whole(1, 1024)),
    **dict.fromkeys(("img_size", "patch_size", "window_size"), _SIDES),
    **dict.fromkeys(
        (
            *("embed_dim", "base_width", "width", "stem_width", "stem_size", "stem_chs"),
            *("cardinality", "num_features", "head_hidden_size", "pre_patch_size", "base_dim"),
        ),
        either(_WIDTH, _WIDTHS),
    ),
    **dict.fromkeys(
        ("depth", "depths", "layers", "num_heads", "reg_tokens", "num_stages", "patch_stride"),
        either(_COUNT, _COUNTS),
    ),
    **dict.fromkeys(("dims", "channels", "widths", "hidden_sizes"), _WIDTHS),
    **dict.fromkeys(("block_reduce_first", "down_kernel_size", "stem_stride"), whole(1, 16)),
    "output_stride": whole(1, 64),
    **dict.fromkeys(("mlp_ratio", "mlp_ratios"), either(_POSITIVE, several(_POSITIVE, 1, 8))),
    **dict.fromkeys(("init_values", "ls_init_value", "layer_scale_init"), optional(number())),
    **dict.fromkeys(
        (
            *("drop_rate", "drop_path_rate", "drop_block_rate", "pos_drop_rate", "bn_eps"),
            *("patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "bn_momentum"),
        ),
        _FRACTION,
    ),
    **dict.fromkeys(
        (
            *("class_token", "no_embed_class", "dynamic_img_size", "dynamic_img_pad", "use_grn"),
            *("pre_norm", "final_norm", "fc_norm", "qkv_bias", "qk_norm", "proj_bias", "avg_down"),
            *("conv_mlp", "conv_bias", "use_rot_pos_emb", "use_abs_pos_emb", "swiglu_mlp"),
            *("scale_mlp", "scale_norm", "reg_tokens_first", "replace_stem_pool", "zero_init_last"),
        ),
        optional(flag()),
    ),
    **dict.fromkeys(
        (
            *("global_pool", "act_layer", "norm_layer", "pos_embed", "stem_type", "pad_type"),
            *("pool_type", "weight_init"),
        ),
        _WORD,
    ),
}
# where a network's first weights come from: for one's own code, and never recorded, because what
# was trained is in the file
_SOURCES = ("pretrained", "checkpoint_path", "cache_dir")


def check_kwargs(generator: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of a named generator that are no plain settings of it.

    Raises:
        ValueError: names the first such argument, and what it was.
    """
    known = RESNET10 if generator == "resnet10" else TIMM
    for name, value in kwargs.items():
        if name not in known:
            raise ValueError(
                f"generator_kwargs: {shown(name)} is no size or setting of {shown(generator)} that "
                "a saved model may name"
                + (f"; known: {', '.join(known)}" if known is RESNET10 else "")
            )
        known[name].check(f"generator_kwargs: {name}", value)


def split_kwargs(
    generator: str, kwargs: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments that one's own code gives: those to record, as plain values, and those that
    say where first weights come from.

    Raises:
        ValueError, TypeError: one that could not be saved with the model.
    """
    given = dict(kwargs or {})
    by_name = generator != "resnet10"
    sources = {n: given.pop(n) for n in _SOURCES if by_name and n in given}
    try:
        recorded = {n: plain(f"generator_kwargs: {n}", v) for n, v in given.items()}
        check_kwargs(generator, recorded)
    except (TypeError, ValueError) as error:
        if not by_name:
            raise
        raise type(error)(
            f"{error}. Build the network yourself and pass the module: "
            f"generator=timm.create_model({generator!r}, num_classes=P * K, ...)"
        ) from error
    return recorded, sources


def build(generator: str, out_features: int, **kwargs: Any) -> nn.Module:
    """The network of that name, freshly initialized unless ``pretrained`` or the like is given.

    Raises:
        ValueError: neither "resnet10" nor a timm model.
    """
    if generator == "resnet10":
        return ResNet10(out_features, **kwargs)
    import timm

    if not timm.is_model(generator):
        raise ValueError(
            f"generator={shown(generator)} is neither 'resnet10' nor a timm model name; "
            "timm.list_models() names them all"
        )
    return timm.create_model(generator, num_classes=out_features, **kwargs)
