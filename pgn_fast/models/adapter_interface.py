"""PEFT's side of a prompted ViT: what is trained, saved and published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

from torch import Tensor, nn

from .._stored import check_shapes, plain_name
from .checkpoints import AdapterCheckpoints

# what PEFT's and timm's models have, and what does it here
MANY = "a model holds one adapter; pgn_fast.TaskBank(backbone) holds many and mixes them in a batch"
_ELSEWHERE = {
    "load_adapter": MANY,
    "add_adapter": MANY,
    "set_adapter": MANY,
    "delete_adapter": MANY,
    "active_adapter": MANY,
    "merge_and_unload": "prompts are tokens, there is nothing to merge; the model runs as it is",
    "get_base_model": "the frozen backbone is .backbone",
    "base_model": "the frozen backbone is .backbone",
    "set_input_size": (
        "the adapter belongs to its image size; build it on a backbone of the other size: "
        "timm.create_model(..., img_size=...)"
    ),
}


class AdapterInterface(AdapterCheckpoints):
    """What code written for PEFT asks a model for. The adapter is all but the backbone."""

    # of PromptedViT
    _disabled: bool
    _follow_backbone: Callable[[], None]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the bare backbone with its own head inside the ``with`` block, as PEFT does."""
        was, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = was

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
            for name, value in nn.Module.state_dict(self).items()
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
        own = {plain_name(name): name for name in nn.Module.state_dict(self)}
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
