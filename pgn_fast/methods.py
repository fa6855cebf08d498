"""The methods that adapt a frozen backbone: one list for models, adapters, trainer and commands.

No torch here: the command line reads the list to answer ``--help``.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

# what a registered method takes beside the arguments of its prompter
MODEL_ARGUMENTS = ("num_classes", "head", "class_embeddings", "logit_scale", "backend", "fast")
# what an adapter's configuration says beside the constructor's values
ABOUT_ADAPTER = (
    "pgn_fast_version",
    "method",
    "base_model_name_or_path",
    "base_model_kwargs",
    "base_model_weights",
    "backbone_digest",
    "embed_dim",
    "depth",
    "patch_size",
    "in_chans",
    "img_size",
    "global_pool",
    "num_prefix_tokens",
    "class_token",
    "dtype",
    "class_names",
    "preprocessing",
    "task",
    "weights_digest",
    "config_digest",
)
_PrompterClass = TypeVar("_PrompterClass", bound=type)


@dataclass(frozen=True)
class Method:
    """A row of ``METHODS``: how to build the models of one method.

    Attributes:
        name: as in ``create_model``, ``--method`` and an adapter's configuration.
        target: the class that is built, or "module:class", imported when it is first needed: a
            model, or a ``Prompter`` for a method that was registered.
        help: one line for the command line.
        fixed: constructor values that make this method out of the class (``deep`` of VPT).
        training: fields of ``TrainConfig`` whose defaults differ for this method.
        options: constructor argument -> the field of ``TrainConfig`` that sets it.
        trains_backbone: the backbone is trained as a whole, and no part of it is frozen.
    """

    name: str
    target: str | type
    help: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    trains_backbone: bool = False

    @property
    def constructor(self) -> type:
        """The class behind ``target``."""
        if isinstance(self.target, type):
            return self.target
        module, _, name = self.target.partition(":")
        found: type = getattr(importlib.import_module(module), name)
        return found

    @property
    def registered(self) -> bool:
        """Whether ``register_method`` made this row."""
        return isinstance(self.target, type)

    @property
    def prompts(self) -> bool:
        """Whether the class is a ``Prompter``, in front of which a model still has to be built."""
        from .prompts import Prompter

        return issubclass(self.constructor, Prompter)

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The constructor's arguments by name, without ``backbone`` and what the method fixes.

        An adapter's configuration may set these and no others.
        """
        found = dict(inspect.signature(self.constructor).parameters)
        if self.prompts:
            found = {**dict(list(found.items())[1:]), **_model_parameters()}
        return {k: v for k, v in found.items() if k != "backbone" and k not in self.fixed}

    def types(self) -> dict[str, Any]:
        """The annotation of each of ``parameters``, as ``typing.get_type_hints`` resolves it;
        ``Any`` where there is none. A reader of foreign values checks them against it."""
        hints = _hints(self.constructor)
        if self.prompts:
            hints |= _hints(_prompted_vit())
        return {name: hints.get(name, Any) for name in self.parameters()}

    def build(self, backbone: Any, num_classes: int | None = None, **values: Any) -> nn.Module:
        """The model: ``values`` are arguments of the constructor, by name.

        Raises:
            ValueError, TypeError: an argument that the method does not take, or that cannot work.
        """
        known = self.parameters()
        if unknown := sorted(set(values) - set(known)):
            takes = ", ".join(name for name in known if name != "num_classes")
            raise ValueError(
                f"method {self.name!r} takes no {', '.join(unknown)}; it takes "
                f"{takes or 'num_classes only'}"
            )
        if self.prompts:
            return _prompted_vit()(self.name, self.constructor, backbone, num_classes, **values)
        return self.constructor(backbone, num_classes, **self.fixed, **values)


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            "pgn",
            "pgn_fast.models:PGN",
            "prompts that a small network generates from each image",
            training={"num_prompts": 16},
            options={
                "num_prompts": "num_prompts",
                "library_size": "library_size",
                "generator": "generator",
                "generator_kwargs": "generator_kwargs",
                "resolution": "resolution",
                "activation": "activation",
            },
        ),
        *(
            Method(
                f"vpt-{name}",
                "pgn_fast.models:VPT",
                f"learned prompts at {where}",
                fixed={"deep": name == "deep"},
                training={"num_prompts": 50, "lr": 1e-2},
                options={
                    "num_prompts": "num_prompts",
                    "project_dim": "project_dim",
                    "dropout": "prompt_dropout",
                },
            )
            for name, where in (("deep", "every block"), ("shallow", "the first block"))
        ),
        Method(
            "linear",
            "pgn_fast.models:LinearProbe",
            "a linear layer on the frozen features",
            training={"lr": 1e-2, "head_init": "zero"},
        ),
        Method(
            "full",
            "pgn_fast.models:FineTuned",
            "the whole backbone is trained",
            training={"lr": 1e-4, "weight_decay": 0.05, "head_init": "zero"},
            trains_backbone=True,
        ),
    )
}
_BUILT_IN = frozenset(METHODS)


def register_method(
    name: str, *, help: str = "", training: Mapping[str, Any] | None = None
) -> Callable[[_PrompterClass], _PrompterClass]:
    """Class decorator: make a ``Prompter`` a method that is built, trained and loaded by its name.

    Args:
        name: lower-case letters, digits, ``-``, ``_`` and ``.``.
        help: one line for the command line.
        training: defaults of ``TrainConfig`` that differ for this method, e.g. ``{"lr": 0.01}``.

    Raises:
        TypeError: not a ``Prompter``, or its constructor does not take the backbone first and
            everything else by keywords that are named.
        ValueError: the name is taken, or an argument has the name of one of the model's.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise ValueError(
            f"register_method: name={name!r}; lower-case letters, digits, '-', '_' and '.' would do"
        )

    def register(prompter: _PrompterClass) -> _PrompterClass:
        _check_prompter(prompter)
        taken = METHODS.get(name)
        # a notebook's cell that runs again defines its class again
        again = taken is not None and name not in _BUILT_IN and _same(taken.target, prompter)
        if taken is not None and not again:
            raise ValueError(f"register_method: {name!r} is {taken.constructor.__name__} already")
        METHODS[name] = Method(name, prompter, help, training=dict(training or {}))
        return prompter

    return register


def create_model(
    method: str, backbone: Any, num_classes: int | None = None, **values: Any
) -> nn.Module:
    """A model of any registered method in front of a frozen backbone.

    Args:
        method: a name in ``pgn_fast.methods.METHODS``: "pgn", "vpt-deep", "vpt-shallow", "linear",
            "full", or one of ``register_method``'s.
        backbone: as for ``PGN``.
        num_classes: C; None: as many as the backbone has.
        values: the method's own arguments, and for prompts ``head``, ``class_embeddings``,
            ``logit_scale``, ``backend`` and ``fast`` as for ``PGN``.

    Raises:
        ValueError, TypeError: no such method, or an argument that cannot work.
    """
    return find_method(method).build(backbone, num_classes, **values)


def find_method(name: str) -> Method:
    """The row of a method.

    Raises:
        ValueError: no method of this name is registered.
    """
    if name not in METHODS:
        for point in entry_points(group="pgn_fast.methods", name=name):
            point.load()  # an installed package's module, which registers it
    if name not in METHODS:
        raise ValueError(
            f"method={name!r} is not registered; known: {', '.join(METHODS)}. Import the module "
            "that registers it first, or let its package name it as an entry point of the group "
            "'pgn_fast.methods'"
        )
    return METHODS[name]


def method_of(model: Any) -> str | None:
    """The name of the method that built a model; None for a model of another package."""
    return getattr(model, "method", None)


def _check_prompter(prompter: Any) -> None:
    from .prompts import Prompter

    if not (isinstance(prompter, type) and issubclass(prompter, Prompter)):
        raise TypeError(f"register_method takes a subclass of pgn_fast.Prompter, got {prompter!r}")
    name, (first, *rest) = prompter.__name__, _parameters_of(prompter)
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise TypeError(f"register_method: {name}(...) must take the backbone first")
    if wrong := [str(p) for p in rest if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        raise TypeError(
            f"register_method: {name} takes {', '.join(wrong)}; name each argument, an adapter is "
            "rebuilt from their names and values"
        )
    if wrong := sorted({p.name for p in rest} & {*MODEL_ARGUMENTS, *ABOUT_ADAPTER}):
        raise ValueError(
            f"register_method: {name} takes {', '.join(wrong)}, which is the model's or the "
            "adapter's own; use another name"
        )


def _parameters_of(prompter: type) -> Iterator[inspect.Parameter]:
    found = list(inspect.signature(prompter).parameters.values())
    if not any("__init__" in vars(kind) for kind in prompter.__mro__[: -len(_base().__mro__)]):
        raise TypeError(
            f"register_method: {prompter.__name__} has no constructor; define "
            "__init__(self, backbone, *, ...)"
        )
    return iter(found)


def _base() -> type:
    from .prompts import Prompter

    return Prompter


def _same(target: str | type, prompter: type) -> bool:
    return (
        isinstance(target, type)
        and target.__module__ == prompter.__module__
        and target.__qualname__ == prompter.__qualname__
    )


def _prompted_vit() -> Any:
    """The function that puts a model around a registered prompter."""
    from .models.create import prompted_vit

    return prompted_vit


def _model_parameters() -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(_prompted_vit()).parameters
    return {name: parameters[name] for name in MODEL_ARGUMENTS}


def _hints(constructor: Any) -> dict[str, Any]:
    function = getattr(constructor, "__init__") if isinstance(constructor, type) else constructor  # noqa: B009
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations that exist for a type checker only
        return {}
