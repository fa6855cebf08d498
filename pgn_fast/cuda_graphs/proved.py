"""A step that replays as one CUDA graph where that is proved to be the step, and runs eagerly else.

No machine is trusted: the first replay, the second, the fourth, the eighth and so on are held
against an eager step on the same batch from the same state. That step's results are the ones that
count, and the state is as it leaves it. Where recording fails, or a number differs, every step from
there on is eager, and one line says so. A value that Python has frozen into the graph, such as a
rate that changes between steps, shows at the second replay and not at the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only

from . import record
from .record import Recorded, Recorder, made_of, signature, unsupported_reason

State = Mapping[str, Tensor]

# eager calls before a recording: kernels are chosen and buffers made in them
WARMUP = 3
# calls on one shape until its graph has been held twice against eager steps
CALLS_TO_PROVE = WARMUP + 2
# allowed difference from an eager step, as a fraction of the norm of what the step makes or
# changes. The kernels are the same; what room there is, is for a library that chooses another
# algorithm while it is recorded, and for sums in the order of arrival. A batch, a rate or a
# gradient that is not this step's is wrong by about one.
TOLERANCE = {"float32": 1e-3, "half": 5e-2}


@dataclass
class _Shape:
    """One graph, for inputs of one signature."""

    calls: int = 0
    replays: int = 0
    worst: float = 0.0
    recorded: Recorded | None = None
    inputs: tuple[Tensor, ...] = ()
    made_of: Any = None


class GraphedStep:
    """Call it like the step; see ``graphed``.

    Attributes:
        off: why every step is eager from now on; None while graphs are used.
        sizes: batch sizes that get a graph; None: the largest that has come.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        what: str,
        tell: Callable[[str], None],
        recorder: Recorder,
        made_of: Callable[[], Any],
        state: Callable[[], State],
        half: bool,
        copies: bool,
    ) -> None:
        self.off: str | None = None
        self.sizes: Collection[int] | None = None
        self._step, self._what, self._tell = step, what, tell
        self._recorder, self._made_of, self._state = recorder, made_of, state
        self._tolerance = TOLERANCE["half" if half else "float32"]
        self._copies, self._largest = copies, 0
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._lock = threading.RLock()

    def __call__(self, *inputs: Tensor) -> Any:
        """The step's outputs."""
        with self._lock:
            if self.off is None and self._is_wanted(len(inputs[0])):
                return self._graphed(inputs)
            return self._eager(inputs)

    def _is_wanted(self, size: int) -> bool:
        if self.sizes is not None:
            return size in self.sizes
        self._largest = max(size, self._largest)
        return size == self._largest

    def _graphed(self, inputs: tuple[Tensor, ...]) -> Any:
        key = signature(inputs)
        shape = self._shapes.setdefault(key, _Shape())
        if shape.recorded is not None and shape.made_of != self._made_of():
            shape = self._shapes[key] = _Shape()  # its tensors are elsewhere now
        shape.calls += 1
        if shape.calls <= WARMUP:
            return self._recorder.beside(self._step, inputs)
        if shape.recorded is None and not self._record(shape, inputs):
            return self._step(*inputs)
        shape.replays += 1
        if shape.replays & (shape.replays - 1):
            return self._replay(shape, inputs)
        return self._prove(shape, inputs)

    def _record(self, shape: _Shape, inputs: tuple[Tensor, ...]) -> bool:
        before = self._keep()
        reason = None
        try:
            with torch.inference_mode(False):
                shape.inputs = tuple(t.detach().clone() for t in inputs)
            shape.recorded = self._recorder.record(partial(self._step, *shape.inputs))
        except Exception as error:
            reason = f"it cannot be recorded ({_first_line(error)})"
        self._put_back(before)
        if reason is not None:
            self._stop(reason)
            return False
        shape.made_of = self._made_of()
        return True

    def _replay(self, shape: _Shape, inputs: tuple[Tensor, ...]) -> Any:
        assert shape.recorded is not None
        with torch.no_grad():
            for own, given in zip(shape.inputs, inputs, strict=True):
                own.copy_(given, non_blocking=True)
            shape.recorded.replay()
        outputs = shape.recorded.outputs
        # inside of the lock: another thread's replay overwrites them
        return tree_map_only(Tensor, torch.clone, outputs) if self._copies else outputs

    def _prove(self, shape: _Shape, inputs: tuple[Tensor, ...]) -> Any:
        """An eager step, against which a replay is held first."""
        before = self._keep()
        try:
            got = self._replay(shape, inputs)
            got_state = self._keep()[0]
        except Exception as error:
            self._put_back(before)
            self._stop(f"its replay failed ({_first_line(error)})")
            return self._step(*inputs)
        self._put_back(before)
        expected = self._eager(inputs)
        if self.off is not None:  # the eager step had no memory beside the graph
            return expected
        for name, distance in self._distances(got, expected, got_state, before[0]).items():
            shape.worst = max(shape.worst, distance)
            if distance > self._tolerance:
                since = f" at replay {shape.replays}" if shape.replays > 1 else ""
                self._stop(f"{name} differs by {distance:.1e} from the eager step's{since}")
                return expected
        if shape.replays == 2:
            self._tell(
                f"{self._what} of {len(inputs[0])} images: one CUDA graph, within "
                f"{shape.worst:.0e} of eager steps"
            )
        return expected

    def _distances(
        self, got: Any, expected: Any, got_state: State, before: State
    ) -> dict[str, float]:
        pairs = zip(_named(got).items(), _named(expected).values(), strict=True)
        found = {f"the {name}": _distance(a, b) for (name, a), b in pairs}
        for name, value in self._state().items():
            found[name] = _distance(got_state[name], value.detach(), before[name])
        return found

    def _eager(self, inputs: tuple[Tensor, ...]) -> Any:
        """The step itself; a graph that keeps it from having enough memory goes."""
        if not any(shape.recorded for shape in self._shapes.values()):
            return self._step(*inputs)
        before = self._keep()
        try:
            return self._step(*inputs)
        except torch.OutOfMemoryError:
            self._put_back(before)
        self._stop("eager steps need its memory")
        return self._step(*inputs)

    def _keep(self) -> tuple[State, Any]:
        state = {name: t.detach().clone() for name, t in self._state().items()}
        return state, self._recorder.random_state()

    @torch.no_grad()
    def _put_back(self, kept: tuple[State, Any]) -> None:
        for name, tensor in self._state().items():
            tensor.copy_(kept[0][name])
        self._recorder.set_random_state(kept[1])

    def _stop(self, reason: str) -> None:
        self.off = reason
        self._shapes.clear()
        self._recorder.release()
        self._tell(f"{self._what}: no CUDA graph, {reason}; it runs eagerly")


def graphed(
    step: Callable[..., Any],
    model: nn.Module,
    *,
    what: str,
    tell: Callable[[str], None],
    state: Callable[[], State] = dict,
    half: bool = False,
    copies: bool = True,
    refused: str | None = None,
) -> Callable[..., Any]:
    """A step on a CUDA device as a graph that proves itself; on another device the step itself.

    Args:
        step: function of tensors on the model's device, batch first, that returns tensors (or
            tuples, lists, dicts of them) and changes nothing but ``state``.
        model: what the step runs. Where its tensors move, or a module changes its mode, the step is
            recorded again.
        what: the step's name in what is told.
        tell: called with a line when graphs are used, and when they are not and why.
        state: tensors, by name, that the step changes in place.
        half: the step computes in half precision.
        copies: of the outputs; without, they are to be read before the next call.
        refused: why the caller's step cannot be one; None where it can.

    Returns:
        A function of the same arguments, for one thread at a time or many.
    """
    recorder = record.recorder_for(next(model.parameters()).device)
    if recorder is None:
        return step
    if reason := refused or unsupported_reason(model):
        tell(f"{what}: no CUDA graph, {reason}; it runs eagerly")
        return step
    return GraphedStep(
        step,
        what=what,
        tell=tell,
        recorder=recorder,
        made_of=partial(made_of, model),
        state=state,
        half=half,
        copies=copies,
    )


def graphed_forward(
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[Any]],
    tell: Callable[[str], None],
) -> Callable[[Tensor], Tensor]:
    """``graphed`` for inference: images on the model's device to logits, without gradients.

    Args:
        autocast: a fresh context for each forward.
    """

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:
        with autocast():
            logits: Tensor = model(images)
        return logits

    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    with autocast():
        wide = wide and not torch.is_autocast_enabled(next(model.parameters()).device.type)
    return graphed(forward, model, what="inference", tell=tell, half=not wide)


def _named(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their places in it."""
    leaves = tree_flatten_with_path(outputs)[0]
    return {_place(path): t.detach() for path, t in leaves if isinstance(t, Tensor)}


def _place(path: Any) -> str:
    return keystr(path).replace("']['", " ").strip("[']") or "output"


def _distance(got: Tensor, expected: Tensor, before: Tensor | None = None) -> float:
    """The norm of the difference, as a fraction of that of what is expected, or of its change.

    Integers are right or wrong: 0 or infinite. NaN equals NaN.
    """
    same = (got == expected) | (got.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0
    if not expected.is_floating_point():
        return float("inf")
    a, b = (torch.where(same, 0, t).double() for t in (got, expected))
    scale = expected.double().norm()
    if before is not None:
        # of what a step does not change, a thousandth counts as its change
        scale = torch.maximum((expected.double() - before.double()).norm(), scale / 1000)
    found = float((a - b).norm() / scale)
    return found if found == found else float("inf")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
