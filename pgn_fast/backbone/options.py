"""Which savings are on: ``FastOptions``, what a model's argument ``fast`` means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Memory = Literal["fast", "balanced", "min"]
Weights = Literal["float", "int8", "fp8"]
# the options that are words; all others are switches
WORDS = {"memory": Memory, "weights": Weights}


@dataclass(frozen=True)
class FastOptions:
    """Switches of the savings. All but ``weights`` leave the numbers as they are, up to rounding.

    Attributes:
        kv_only: prompts whose outputs are discarded (deep prompts) enter attention as keys and
            values only; no query, projection or MLP rows for them.
        last_rows: the last block computes only the rows that the head reads.
        absorb: for so few rows, the last block's key and value projections move over to them.
        first: the block where prompts enter gives no gradient to the tokens below it.
        fold: LayerNorm, LayerScale and the attention scale are folded into the next weights, in
            float64, rounded once. Costs a copy of the folded weights (``explain`` says how much).
        biases: the key bias is dropped, the value bias is moved into the output projection's.
        packed: frozen weights are packed once for the GEMM library (CPU, float32):
            oneDNN, or MKL on Intel's processors. Costs a further copy of the weights for each
            direction, with MKL also for each number of rows; up to a tenth less time.
        embed: patches are cut, normalized, embedded and put beside prefix and position embedding
            in one op, where a kernel runs it.
        memory: what backward stores of a block of D wide tokens. "fast": the normalized inputs,
            queries, keys, values, attention output and the hidden layer (10 D per token);
            "balanced": all but the hidden layer, whose GEMM runs again (6 D, about an eighth more
            time); "min": the block's input, the block runs again (1 D, about 40 % more time).
        weights: in which numbers the blocks' frozen matrices are multiplied in inference, which is
            under ``torch.no_grad`` or ``torch.inference_mode``: "int8" on a CPU with VNNI (float32
            models; one scale an output channel, and one a token, found at each call), "fp8" on an
            NVIDIA GPU of compute capability 8.9 or above. Not exact: ``explain`` measures the
            error. Where gradients are enabled the float weights multiply, as without it.
    """

    kv_only: bool = True
    last_rows: bool = True
    absorb: bool = True
    first: bool = True
    fold: bool = True
    biases: bool = True
    packed: bool = False
    embed: bool = True
    memory: Memory = "fast"
    weights: Weights = "float"

    def __post_init__(self) -> None:
        for name, kind in WORDS.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(
                    f"{name} takes {', '.join(map(repr, get_args(kind)))}, got {value!r}"
                )

    @classmethod
    def of(cls, fast: bool | str | Mapping[str, Any] | FastOptions) -> FastOptions | None:
        """What a model's argument ``fast`` says: True, a memory plan's name, or the switches.

        Returns:
            None for False: the reference path.
        """
        if isinstance(fast, FastOptions):
            return fast
        if isinstance(fast, Mapping):
            return cls(**fast)
        if isinstance(fast, str):
            return cls(memory=fast)  # type: ignore[arg-type]
        return cls() if fast else None
