"""Steps that replay as one graph, held against eager ones: on the CPU, by a stand-in."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from graph_stand_in import CannotRecord, StandIn, Tape
from small_world import tiny_vit
from test_backbone_works_with import pgn, vpt
from torch import Tensor, nn

import pgn_fast
from pgn_fast.backbone import cache
from pgn_fast.cuda_graphs import CALLS_TO_PROVE, GraphedStep, graphed, record
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.distributed import Processes
from pgn_fast.train.objective import Objective
from pgn_fast.train.step import Stepper

CPU = torch.device("cpu")


@pytest.fixture
def recorders(monkeypatch):
    """Stand-ins take the place of CUDA's, and backbones are read as on a GPU: nothing is copied,
    since writes could not be seen. The recorders that were made, in order."""
    made: list[StandIn] = []

    def recorder_for(device: torch.device) -> StandIn:
        made.append(StandIn())
        return made[-1]

    monkeypatch.setattr(record, "recorder_for", recorder_for)
    monkeypatch.setattr(cache, "copies_unsupported_reason", lambda backbone: "as on a GPU")
    return made


def batches(count: int = 12, size: int = 4, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(size, 3, 32, 32, generator=draw),
            torch.randint(5, (size,), generator=draw),
        )


def train(model: nn.Module, groups, **options) -> tuple[Stepper, list[str]]:
    """Some steps of the training loop, under a rate that changes at each."""
    told: list[str] = []
    model.preprocessing = {"input_size": (3, 32, 32)}
    config = TrainConfig.make(method="vpt-deep", batch_size=4, **options)
    torch.manual_seed(1)
    np.random.seed(1)
    objective = Objective(config, 5, CPU)
    stepper = Stepper(config, model, objective, Processes(CPU), lambda images: images, told.append)
    stepper.optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    for n, group in enumerate(groups):
        stepper.optimizer.param_groups[0]["lr"] = 1e-2 / (n + 1)
        stepper.step(group, 0, n + 1)
    return stepper, told


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("make", [vpt, pgn, lambda: vpt("min")], ids=["vpt", "pgn", "recomputing"])
@pytest.mark.parametrize("options", [{}, {"mixup": 0.5, "smoothing": 0.1}, {"clip_grad": 0.1}])
def test_training_by_graphs_is_training(recorders, make, options) -> None:
    torch.manual_seed(0)
    model = make()
    eager = copy.deepcopy(model)
    _, told = train(model, ([batch] for batch in batches()), **options)
    assert [line.partition(", within")[0] for line in told] == [
        "training step of 4 images: one CUDA graph"
    ]
    (played,) = recorders[0].recorded
    assert len(played.tape.calls) > 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "recorder_for", lambda device: None)
        train(eager, ([batch] for batch in batches()), **options)
    assert_same(model, eager)


def test_gradients_of_a_step_of_several_batches_add_up(recorders) -> None:
    torch.manual_seed(0)
    model = vpt()
    eager = copy.deepcopy(model)
    given = list(batches(21))
    # the last group has one batch: its share of a step is another one
    groups = [given[i : i + 2] for i in range(0, 20, 2)] + [given[20:]]
    _, told = train(model, groups)
    assert len(told) == 1 and "one CUDA graph" in told[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "recorder_for", lambda device: None)
        train(eager, groups)
    assert_same(model, eager)


def test_a_ragged_batch_is_eager(recorders) -> None:
    model = vpt()
    whole, rest = list(batches(9)), list(batches(6, size=3))
    train(model, [[b] for b in [*whole, *rest]])
    assert len(recorders[0].recorded) == 1
    assert recorders[0].beside_calls == CALLS_TO_PROVE - 2


def test_a_recording_that_fails_leaves_an_eager_run(recorders, monkeypatch) -> None:
    torch.manual_seed(0)
    model = vpt()
    eager = copy.deepcopy(model)
    looks = model.prompter.prompt

    def prompt(images: Tensor, *rest):
        assert float(images.sum()) != 1.0  # waits for the device
        return looks(images, *rest)

    model.prompter.prompt = prompt
    stepper, told = train(model, ([batch] for batch in batches()))
    assert told == [
        "training step: no CUDA graph, it cannot be recorded (aten::_local_scalar_dense waits for "
        "a value on the device); it runs eagerly"
    ]
    assert isinstance(stepper._graphed, GraphedStep) and stepper._graphed.off
    del model.prompter.prompt
    monkeypatch.setattr(record, "recorder_for", lambda device: None)
    train(eager, ([batch] for batch in batches()))
    assert_same(model, eager)


@pytest.mark.parametrize("bug, where", [
    ("stale inputs", "the loss"),
    ("gradient", "the gradient of prompter.prompts"),
    ("state", "prompter.generator."),
])  # fmt: skip
def test_a_number_that_differs_leaves_an_eager_run(recorders, monkeypatch, bug, where) -> None:
    """The step that found it, and what it changes, are the eager one's."""

    class Wrong(StandIn):
        def record(self, run):
            played = super().record(run)
            right = played.replay

            def replay() -> None:
                if bug == "stale inputs":
                    played.outputs["loss"].mul_(1.1)
                    return
                right()
                if bug == "gradient":
                    played.outputs["gradient of"]["prompter.prompts"][0].zero_()
                if bug == "state":
                    means = (b for name, b in model.named_buffers() if "running_mean" in name)
                    next(means).add_(1)

            played.replay = replay
            return played

    monkeypatch.setattr(record, "recorder_for", lambda device: Wrong())
    torch.manual_seed(0)
    model = pgn() if bug == "state" else vpt()
    eager = copy.deepcopy(model)
    _, told = train(model, ([batch] for batch in batches()))
    assert len(told) == 1 and told[0].startswith(f"training step: no CUDA graph, {where}"), told
    assert "differs by" in told[0] and told[0].endswith("it runs eagerly")
    monkeypatch.setattr(record, "recorder_for", lambda device: None)
    train(eager, ([batch] for batch in batches()))
    assert_same(model, eager)


def step_with(model: nn.Module, told: list[str], step, **options):
    return graphed(step, model, what="a step", tell=told.append, **options)


def test_a_number_that_python_changes_is_found_at_a_later_replay(recorders) -> None:
    """The first replay agrees: the number is the one that was recorded."""
    model, told, rate = nn.Linear(3, 2), [], [1.0]
    step = step_with(model, told, lambda x: model(x).detach() * rate[0])
    x = torch.randn(4, 3)
    for n in range(CALLS_TO_PROVE + 2):
        rate[0] = 1.0 if n < CALLS_TO_PROVE else 2.0
        found = step(x)
    # replay 3 is stale and cannot be known to be; replay 4 is held against an eager step
    assert told[-1].startswith("a step: no CUDA graph, the output differs by 5.0e-01 from the")
    assert told[-1].endswith("at replay 4; it runs eagerly")
    assert torch.equal(found, model(x) * 2)


def test_tensors_that_moved_are_recorded_anew(recorders) -> None:
    model, told = nn.Linear(3, 2), []
    step = step_with(model, told, lambda x: model(x).detach())
    x = torch.randn(4, 3)
    for _ in range(8):
        step(x)
    model.weight = nn.Parameter(torch.randn(2, 3))
    for _ in range(8):
        assert torch.equal(step(x), model(x))
    model.eval()
    assert torch.equal(step(x), model(x))
    assert len(recorders[0].recorded) == 2 and "no CUDA graph" not in "".join(told)


def test_a_hook_is_called_at_every_step(recorders) -> None:
    model, told, seen = nn.Linear(3, 2), [], []
    model.register_forward_hook(lambda *_: seen.append(1))
    step = step_with(model, told, lambda x: model(x).detach())
    for _ in range(8):
        step(torch.randn(4, 3))
    assert len(seen) == 8
    assert told == ["a step: no CUDA graph, a hook is registered on the model; it runs eagerly"]


def test_memory_that_eager_steps_need_is_given_back(recorders) -> None:
    model, told = nn.Linear(3, 2), []

    def run(x: Tensor) -> Tensor:
        if len(x) == 2 and recorders[0].recorded:
            raise torch.OutOfMemoryError("the graph holds it")
        return model(x).detach()

    step = step_with(model, told, run)
    for _ in range(CALLS_TO_PROVE):
        step(torch.randn(4, 3))
    x = torch.randn(2, 3)
    assert torch.equal(step(x), model(x))
    assert told[-1] == "a step: no CUDA graph, eager steps need its memory; it runs eagerly"


def test_random_numbers_are_those_of_eager_steps(recorders) -> None:
    model, told = nn.Linear(3, 2), []
    step = step_with(model, told, lambda x: nn.functional.dropout(model(x), 0.5).detach())
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    drawn = [step(x).clone() for _ in range(12)]
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    assert all(torch.equal(a, nn.functional.dropout(model(x), 0.5)) for a in drawn)
    assert "one CUDA graph" in told[0] and len(told) == 1


def test_threads_get_their_own_answers(recorders) -> None:
    model, told = nn.Linear(3, 2), []
    step = step_with(model, told, lambda x: model(x).detach())
    wrong = []

    def ask(seed: int) -> None:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        for _ in range(40):
            if not torch.allclose(step(x), model(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "step, reason",
    [
        (lambda x: x.nonzero(), "aten::nonzero has a size that depends on values"),
        (lambda x: x[x > 0], "aten::index.Tensor by a mask has a size that depends on values"),
        (lambda x: x * float(x.sum()), "aten::_local_scalar_dense waits for a value on the device"),
        (lambda x: x if torch.equal(x, x) else -x, "aten::equal waits for a value on the device"),
        (lambda x: x + torch.tensor([1.0]), "a tensor is made of numbers in Python"),
    ],
)
def test_the_stand_in_refuses_what_cuda_could_not_record(step, reason) -> None:
    with pytest.raises(CannotRecord, match=reason), Tape():
        step(torch.randn(3))


def test_the_stand_in_finds_memory_that_is_gone() -> None:
    held = [torch.ones(3)]
    recorder, x = StandIn(), torch.zeros(3)
    played = recorder.record(lambda: x + held[0])
    played.replay()
    held.clear()
    with pytest.raises(RuntimeError, match="memory that was freed"):
        played.replay()


# whole runs: fit, evaluate, predict, serve


def test_fit_and_its_validation_run_by_graphs(recorders, tmp_path, capsys) -> None:
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 16, 16, generator=draw), i % 3) for i in range(24)]
    results = []
    for name, patched in (("graphed", True), ("eager", False)):
        torch.manual_seed(0)
        model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2)
        with pytest.MonkeyPatch.context() as patch:
            if not patched:
                patch.setattr(record, "recorder_for", lambda device: None)
            options = {"epochs": 4, "batch_size": 6, "lr": 0.05, "workers": 0}
            results.append(pgn_fast.fit(model, data, data, output=tmp_path / name, **options))
        results.append(model)
    said = capsys.readouterr().out
    assert "training step of 6 images: one CUDA graph" in said
    assert "inference of 6 images: one CUDA graph" in said
    assert_same(results[1], results[3])
    keys = ("train_loss", "validation_loss", "validation_top1")
    for one, other in zip(results[0].history, results[2].history, strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]


@pytest.mark.parametrize("max_batch", [1, 6])
def test_a_server_answers_every_size_by_a_graph(recorders, max_batch, caplog) -> None:
    serving = pytest.importorskip("serving")
    from pgn_fast.serve import load_served_model

    served = load_served_model(serving.tiny_vit(), name="tiny")
    caplog.set_level("INFO", logger="pgn_fast.serve")
    served.warm_up(max_batch)
    assert sum("one CUDA graph" in line for line in caplog.messages) == 2 * (
        1 if max_batch < 2 else 4
    )
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 32, 32), dtype=np.uint8) for _ in range(7)]
    calls = [(images[:count], "logits") for count in (1, 3, 7)]
    for call in calls:  # alone: in one batch they would be of one size
        (found,) = served.run([call])
        levels = served.preprocessing.normalize(served.preprocessing.stack(call[0]))
        with torch.no_grad():
            expected = served.model(levels)
        assert torch.allclose(found, expected, atol=1e-5), len(call[0])


def test_predictions_are_those_of_the_model(recorders, tmp_path, monkeypatch, capsys) -> None:
    from small_world import write_images

    from pgn_fast.backbone import load
    from pgn_fast.cli import main

    monkeypatch.setattr(load, "load_backbone", lambda name, **options: tiny_vit())
    torch.manual_seed(0)
    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "run")
    write_images(tmp_path / "new", 8)
    words = ["predict", str(tmp_path / "run"), str(tmp_path / "new"), "--device", "cpu", "-j", "0"]
    words += ["--model", "tiny", "-b", "3", "--logits", "--output"]
    assert main([*words, str(tmp_path / "graphed.csv")]) == 0
    assert "inference of 3 images: one CUDA graph" in capsys.readouterr().err
    monkeypatch.setattr(record, "recorder_for", lambda device: None)
    assert main([*words, str(tmp_path / "eager.csv")]) == 0
    assert (tmp_path / "graphed.csv").read_text() == (tmp_path / "eager.csv").read_text()


@pytest.mark.parametrize(
    "options, reason", [({"torchcompile": "eager"}, "`torchcompile` is given")]
)
def test_what_cannot_be_a_graph_says_so(recorders, options, reason) -> None:
    _, told = train(vpt(), [[batch] for batch in batches(2)], **options)
    assert len(told) == 1 and reason in told[0] and told[0].endswith("it runs eagerly")


def test_on_a_cpu_nothing_is_said_and_nothing_recorded() -> None:
    stepper, told = train(vpt(), [[batch] for batch in batches(5)])
    assert told == [] and stepper._graphed is None


def test_graphs_can_be_switched_off(monkeypatch) -> None:
    monkeypatch.setenv("PGN_FAST_CUDA_GRAPHS", "off")
    assert record.recorder_for(torch.device("cuda")) is None
