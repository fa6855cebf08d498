"""Whole models of images and texts, as small as they go, in folders as their libraries write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "picture",
    "blue",
    "green",
    "red",
    "apple",
    "pie",
    "dog",
    "cat",
    "house",
    ",",
    ".",
    "'",
    "s",
    "an",
    "is",
    "this",
    "big",
    "small",
]
SIZE, WIDTH, LENGTH = 16, 24, 12  # pixels; of the embeddings; tokens of a text


def tiny_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words; its last token ends a text, as CLIP's."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    special = ["<pad>", "<unk>", "<bos>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "<eos>"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")],
    )
    named = {"bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", **named
    ).save_pretrained(folder)
    return folder


def tiny_transformers(folder: Path, seed: int = 0, kind: str = "CLIP") -> Any:
    """A transformers CLIP or SigLIP of random weights, saved in ``folder`` with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tiny_tokenizer(folder)
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = {"vocab_size": len(WORDS) + 4, "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": 2, "eos_token_id": len(WORDS) + 3, "pad_token_id": 0}
    vision = {"image_size": SIZE, "patch_size": 8, "projection_dim": WIDTH}
    config = getattr(transformers, f"{kind}Config")(
        text_config=tower | text | {"projection_size": WIDTH},
        vision_config=tower | vision,
        **({"projection_dim": WIDTH} if kind == "CLIP" else {}),
    )
    model = randomized(getattr(transformers, f"{kind}Model")(config), seed)
    model.save_pretrained(folder)
    return model


def tiny_open_clip(folder: Path, seed: int = 0) -> Any:
    """An open_clip CLIP of random weights, saved in ``folder`` with its tokenizer."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.push_to_hf_hub import save_for_hf

    tiny_tokenizer(folder)
    vision = {"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": LENGTH, "vocab_size": len(WORDS) + 4, "width": 16, "heads": 2}
    text |= {"layers": 1, "hf_tokenizer_name": str(folder)}
    model = randomized(open_clip.model.CLIP(WIDTH, vision, text), seed)
    config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}
    half = (0.5, 0.5, 0.5)
    open_clip.model.set_model_preprocess_cfg(model, {"size": SIZE, "mean": half, "std": half})
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=LENGTH)
    save_for_hf(model, tokenizer, config, str(folder), safe_serialization=True)
    return model


def randomized(model: Any, seed: int) -> Any:
    """Weights of one size everywhere: a fresh model's are so small that all texts look alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and parameter.ndim:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * values + (parameter.ndim == 1) * name.endswith("weight"))
    return model.eval()
