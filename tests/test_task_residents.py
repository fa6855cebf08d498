"""Which tasks a TaskBank holds: from where they come, what they take, and who is refused."""

from __future__ import annotations

import gc
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hub_server import hub_in_use
from small_world import tiny_vit
from task_world import D, backbone, images, write_adapters
from torch import nn

import pgn_fast
import pgn_fast.cli
from pgn_fast import VPT, TaskBank
from pgn_fast.adapters import CONFIG_FILE, WEIGHTS_FILE
from pgn_fast.models import FineTuned
from pgn_fast.tasks import UnknownTask, residents


@pytest.fixture
def demo(tmp_path):
    return (*write_adapters(tmp_path), tmp_path)


def test_a_directory_of_adapters(demo):
    _, made, root = demo
    (root / "notes").mkdir()
    bank = TaskBank.from_directory(root)
    assert bank.names == ("cats", "dogs", "owls") and len(bank) == 3 and "cats" in bank
    assert bank.class_names("owls") == ("owls 0", "owls 1", "owls 2")
    assert (bank.method("dogs"), bank.num_classes("dogs")) == ("linear", 4)
    batch = torch.rand(3, 3, 32, 32)
    for name, answer in zip(made, bank(batch, list(made)), strict=True):
        with torch.no_grad():
            expected = made[name](batch[list(made).index(name)][None])[0]
        assert torch.allclose(answer, expected, atol=1e-5, rtol=1e-5), name


def test_a_damaged_adapter_is_named_and_the_rest_serves(demo):
    _, _, root = demo
    path = root / "dogs" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="task 'dogs' is left out"):
        bank = TaskBank.from_directory(root)
    assert bank.names == ("cats", "owls") and "dogs" in bank.failed
    for name in ("cats", "owls"):
        (root / name / WEIGHTS_FILE).write_bytes(b"nothing")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="can be loaded"):
        TaskBank.from_directory(root)


def test_tasks_go_to_disk_and_come_back(demo):
    vit, made, root = demo
    everything = TaskBank.from_directory(root, vit)
    sizes = {name: everything.nbytes(name) for name in made}
    bank = TaskBank(vit, max_bytes=sizes["owls"] + sizes["dogs"])
    for name, model in made.items():
        bank.add(name, model if name == "cats" else root / name)
        assert bank.resident_bytes <= bank.max_bytes
    batch = torch.rand(1, 3, 32, 32)
    random.seed(0)
    for _ in range(30):
        name = random.choice(sorted(made))
        with torch.no_grad():
            expected = made[name](batch)[0]
        assert torch.allclose(bank(batch, [name])[0], expected, atol=1e-5, rtol=1e-5)
        assert bank.resident_bytes <= max(bank.max_bytes, sizes[name])
        assert bank.nbytes(name) == sizes[name]


@torch.inference_mode()
def test_tasks_come_back_for_a_call_in_inference_mode(demo):
    vit, made, root = demo
    bank = TaskBank(vit, max_bytes=1)
    for name in made:
        bank.add(name, root / name)
    batch = torch.rand(3, 3, 32, 32)
    for _ in range(2):
        for i, (name, answer) in enumerate(zip(made, bank(batch, list(made)), strict=True)):
            assert torch.allclose(answer, made[name](batch[i : i + 1])[0], atol=1e-5), name
    parameters = bank._residents.loaded(bank._residents.hold(["owls"]))[0].model.parameters()
    assert not any(p.is_inference() for p in parameters)


def test_what_leaves_memory_leaves_the_disk_with_its_task(demo):
    vit, made, _ = demo
    bank = TaskBank(vit, max_bytes=1)
    bank.add("cats", made["cats"])
    bank.add("dogs", made["dogs"])
    folders = [task.source for task in bank._residents.tasks()]
    assert all((folder / CONFIG_FILE).exists() for folder in folders)
    bank.remove("cats")
    gc.collect()
    assert [folder.exists() for folder in folders] == [False, True]


def test_an_adapter_that_was_replaced_on_disk_is_not_taken_for_the_old_one(demo):
    vit, _, root = demo
    bank = TaskBank(vit, max_bytes=1)
    bank.add("cats", root / "cats")
    bank.add("dogs", root / "dogs")  # the cats leave memory
    VPT(vit, 2, num_prompts=3).save_pretrained(root / "cats")
    batch = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"task 'cats': its adapter .* is another one"):
        bank(batch, ["cats"])
    assert bank(batch, ["dogs"])[0].shape == (4,)


def test_what_a_task_takes_is_what_its_tensors_take(demo):
    vit, made, _ = demo
    bank = TaskBank(vit)
    bank.add("cats", made["cats"])
    own = sum(t.nbytes for t in made["cats"].adapter_state_dict().values())
    depth = len(vit.blocks)
    # keys and values of every block, as wide as the prompts that they come from
    assert bank.nbytes("cats") == own + depth * 2 * made["cats"].prompter.prompts[0].nbytes
    assert bank.resident_bytes == bank.nbytes("cats")


def storages() -> int:
    """Bytes of all tensors of this process, each memory once."""
    found = {}
    for tensor in tensors():
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def tensors() -> list[torch.Tensor]:
    gc.collect()
    plain = torch.Tensor, torch.nn.Parameter  # a compiler's stand-ins have no memory
    found = [thing for thing in gc.get_objects() if type(thing) in plain]
    return [tensor for tensor in found if tensor.device.type == "cpu"]


def test_two_thousand_tasks():
    """What they are said to take is what the process has more; none of them knows the others."""
    vit = tiny_vit().requires_grad_(False)
    bank, some = TaskBank(vit), torch.randn(4, 3, 16, 16)
    make = lambda: VPT(vit, 2, num_prompts=10, fast=False)  # the bank's engine runs them
    bank.add("first", make())
    bank(some[:1], ["first"])
    bank.remove("first")
    others = tensors()  # what earlier tests left must not go in between
    before = storages()
    for n in range(2000):
        bank.add(str(n), make())
    assert len(bank) == 2000
    assert storages() - before == bank.resident_bytes == sum(map(bank.nbytes, bank.names))
    # ten prompts for each of two blocks, their keys and values, and a head of two classes
    assert bank.nbytes("7") == 4 * (3 * 2 * 10 * 32 + 2 * 32 + 2)

    def answers_are_their_models(names: list[str]) -> bool:
        answers = bank(some, names)
        models = [bank._residents.find(name).resident.model for name in names]
        with torch.no_grad():
            expected = [model(image[None])[0] for model, image in zip(models, some, strict=True)]
        return all(torch.allclose(a, e, atol=1e-5) for a, e in zip(answers, expected, strict=True))

    assert answers_are_their_models(["3", "1999", "0", "3"])
    for n in range(2000):
        bank.remove(str(n))
    assert storages() == before and bank.resident_bytes == 0 and others


def test_adding_and_removing_look_at_no_other_task(demo, monkeypatch):
    """Counted, not timed: nothing is hashed without a limit, nobody is asked for a size again."""
    vit, made, _ = demo
    bank = TaskBank(vit)
    for n in range(20):
        bank.add(str(n), made["cats"])
    residents = pgn_fast.tasks.residents
    monkeypatch.setattr(residents, "_digest", lambda model: pytest.fail("a task was hashed"))
    sizes = []
    measured = residents.Resident.nbytes
    seen = property(lambda self: sizes.append(self) or measured.fget(self))
    monkeypatch.setattr(residents.Resident, "nbytes", seen)
    bank.add("new", made["dogs"])
    bank.remove("3")
    assert len(sizes) == 1 and len(bank) == 20


def test_tasks_come_and_go_while_others_are_served(demo):
    """Threads that add, ask and remove tasks of their own; the others' answers stay what they
    are."""
    vit, made, root = demo
    bank, batch, wrong = TaskBank.from_directory(root, vit), torch.rand(3, 3, 32, 32), []
    bank.max_bytes = bank.nbytes("cats")  # adapters go to disk and come back meanwhile
    with torch.no_grad():
        expected = {name: model(batch) for name, model in made.items()}

    def serve(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(10):
            names = [chance.choice(sorted(made)) for _ in batch]
            for i, (name, answer) in enumerate(zip(names, bank(batch, names), strict=True)):
                if not torch.allclose(answer, expected[name][i], atol=1e-5, rtol=1e-5):
                    wrong.append(name)

    def come_and_go(seed: int) -> None:
        for n in range(9):
            name, kind = f"{seed} {n}", sorted(made)[n % 3]
            bank.add(name, root / kind)
            if not torch.allclose(
                bank(batch[:1], [name])[0], expected[kind][0], atol=1e-5, rtol=1e-5
            ):
                wrong.append(name)
            bank.remove(name)

    threads = [threading.Thread(target=t, args=(n,)) for t in (serve, come_and_go) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and bank.names == ("cats", "dogs", "owls")
    assert bank.resident_bytes == sum(
        bank.nbytes(task.name) for task in bank._residents.tasks() if task.resident is not None
    )


@pytest.mark.parametrize(
    "add, message",
    [
        (("cats", "cats"), "task 'cats' is in the bank already"),
        (("", "cats"), "at least one letter"),
        (("full", "full"), "backbone of its own"),
        (("other", "other"), "another backbone than the bank"),
        (("module", "module"), "got Linear"),
        (("nowhere", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_added_is_refused_whole(demo, add, message):
    vit, made, root = demo
    sources = {
        "cats": made["cats"],
        "full": FineTuned("pgn_demo_vit", 2),
        "other": VPT("pgn_demo_vit", 2, num_prompts=1),
        "module": nn.Linear(2, 2),
        "nowhere": root / "nowhere",
    }
    bank = TaskBank(vit)
    bank.add("cats", made["cats"])
    taken = bank.resident_bytes
    with pytest.raises(ValueError, match=message):
        bank.add(add[0], sources[add[1]])
    assert bank.names == ("cats",) and bank.resident_bytes == taken


def test_an_adapter_of_another_backbone_is_refused_with_both_digests(demo):
    vit, _, root = demo
    digest = json.loads((root / "cats" / CONFIG_FILE).read_text())["backbone_digest"]
    other = pgn_fast.load_backbone("pgn_demo_vit")
    with torch.no_grad():
        other.blocks[0].norm1.weight.mul_(2)
    VPT(other, 2, num_prompts=3).save_pretrained(root / "lions")
    bank = TaskBank(vit)
    with pytest.raises(ValueError) as refused:
        bank.add("lions", root / "lions")
    its = json.loads((root / "lions" / CONFIG_FILE).read_text())["backbone_digest"]
    for said in ("task 'lions'", str(root / "lions"), digest[:12], its[:12]):
        assert said in str(refused.value)
    assert bank.names == () and bank.resident_bytes == 0
    with pytest.warns(UserWarning, match="Results will differ"):
        bank.add("lions", root / "lions", strict_backbone=False)
    with pytest.warns(UserWarning, match="task 'lions' is left out"):
        some = TaskBank.from_directory(root, vit)
    assert some.names == ("cats", "dogs", "owls") and digest[:12] in some.failed["lions"]


def test_a_head_that_the_bank_has_not_is_refused(tmp_path):
    """The backbone's own classifier, where the bank's has none; and a head of somebody's code."""
    full = backbone("clip")
    VPT(full, head="keep", num_prompts=2).save_pretrained(tmp_path / "kept")
    bare = backbone("clip")
    bare.reset_classifier(0)
    bank = TaskBank(bare)
    with pytest.raises(ValueError, match=r"task 'kept': .*(head|classifier)"):
        bank.add("kept", tmp_path / "kept")
    own = VPT(bare, head=nn.Sequential(nn.Linear(D, 2)), num_prompts=2)
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"task 'own': .*head was a .*pass from_pretrained"):
        bank.add("own", tmp_path / "own")
    bank.add("own", pgn_fast.from_pretrained(tmp_path / "own", bare, head=own.head))
    # code cannot come back from disk: with a limit such a task stays where it is
    bank.max_bytes = 1
    for n in range(2):
        bank.add(str(n), VPT(bare, 2, num_prompts=2))
    with_limit = TaskBank(bare, max_bytes=1)
    with_limit.add("own", own.eval())
    with_limit.add("0", VPT(bare, 2, num_prompts=2))
    batch = images(1)
    with torch.no_grad():
        expected = own(batch)
    for some in (bank, with_limit):
        assert torch.allclose(some(batch, ["own"])[0], expected[0], atol=1e-5)
        assert some.resident_bytes == some.nbytes("own") + some.nbytes("0")


def test_a_task_from_the_hub(demo, tmp_path, monkeypatch):
    vit, made, root = demo
    with hub_in_use(monkeypatch, tmp_path / "cache") as hub:
        files = {name: (root / "owls" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
        hub.files["me/owls"] = files
        bank = TaskBank(vit, max_bytes=1)
        bank.add("owls", "me/owls")
        bank.add("dogs", made["dogs"])  # the owls leave memory, and come back from the hub's cache
        batch = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            expected = made["owls"](batch)[0]
        assert torch.allclose(bank(batch, ["owls"])[0], expected, atol=1e-5)
        assert bank.class_names("owls") == ("owls 0", "owls 1", "owls 2")
        with pytest.raises(ValueError, match="me/cats"):
            bank.add("cats", "me/cats")
        assert bank.names == ("dogs", "owls")


def test_calls_that_make_no_sense_say_so(demo):
    vit, made, _ = demo
    bank = TaskBank(vit)
    for name, model in made.items():
        bank.add(name, model)
    batch = torch.rand(2, 3, 32, 32)
    with pytest.raises(UnknownTask, match=r"no task 'cast' .* the nearest are 'cats'"):
        bank(batch, ["cats", "cast"])
    with pytest.raises(KeyError):
        bank.nbytes("nothing")
    with pytest.raises(ValueError, match="one task for each of the 2 images, got 1 names"):
        bank(batch, ["cats"])
    with pytest.raises(ValueError, match="got the string 'cats'"):
        bank(batch, "cats")
    bank.remove("cats")
    with pytest.raises(UnknownTask):
        bank(batch, ["cats", "dogs"])
    assert bank(batch[:0], []) == []


def test_never_the_wrong_task_while_tasks_come_and_go():
    """A canary: every task's head answers its own number and nothing else.

    PGN_FAST_CANARY says how many requests are made at least (`make canary`: 100,000).
    """
    vit, at_once, askers = backbone(), 64, 4
    rounds = -(-int(os.environ.get("PGN_FAST_CANARY", "400")) // (at_once * askers))
    batch, count, wrong, asked = images(at_once), 24, [], []
    bank = TaskBank(vit)

    def task(number: int) -> nn.Module:
        model = VPT(vit, 2, num_prompts=1 + number % 3, fast=False)
        model.head.weight.data.zero_()
        model.head.bias.data[:] = torch.tensor([number, -number])
        return model

    for n in range(count // 2):
        bank.add(str(n), task(n))
    bank.max_bytes = bank.resident_bytes * 3 // 4
    stop = threading.Event()

    def come_and_go() -> None:
        chance = random.Random(0)
        while not stop.wait(0.002):
            n = chance.randrange(count // 2, count)
            if str(n) in bank:
                bank.remove(str(n))
            else:
                bank.add(str(n), task(n))

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            names = [chance.choice(bank.names) for _ in batch]
            while True:  # until none of them was removed meanwhile
                try:
                    answers = bank(batch, names)
                    break
                except UnknownTask:
                    names = [name if name in bank else "0" for name in names]
            asked.append(len(names))
            wrong.extend(
                (name, answer.tolist())
                for name, answer in zip(names, answers, strict=True)
                if answer.tolist() != [float(name), -float(name)]
            )

    churn = threading.Thread(target=come_and_go)
    churn.start()
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(askers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    churn.join()
    assert wrong == [] and sum(asked) == at_once * askers * rounds


def test_a_directory_of_tasks_from_the_command_line(demo, tmp_path, capsys):
    _, _, root = demo
    run = lambda *words: pgn_fast.cli.main(["tasks", *map(str, words)])
    tasks = tmp_path / "served"
    assert run("add", tasks, "pets", root / "cats") == 0
    (tmp_path / "run").mkdir()
    (root / "owls").rename(tmp_path / "run" / "best")
    assert run("add", tasks, "birds", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("list", tasks) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["birds", "pets", "2"]
    assert "pgn" in lines[0] and "3 classes" in lines[0] and "vpt-deep" in lines[1]
    assert TaskBank.from_directory(tasks).names == ("birds", "pets")
    assert run("show", tasks, "birds") == 0
    assert '"method": "pgn"' in capsys.readouterr().out
    assert run("add", tasks, "pets", root / "dogs") == 2
    assert "is there already" in capsys.readouterr().err
    assert run("remove", tasks, "pet") == 2
    assert "the nearest are pets" in capsys.readouterr().err
    assert run("add", tasks, "../x", root / "dogs") == 2
    assert run("remove", tasks, "pets") == 0
    (tasks / "birds" / WEIGHTS_FILE).write_bytes(b"?")
    assert run("list", tasks) == 2
    assert "1 of them damaged" in capsys.readouterr().out


def test_a_bank_says_what_it_takes(demo):
    bank = TaskBank.from_directory(demo[2])
    batch = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="source takes a directory, a hub id or a model"):
        bank.add("new", 3)
    with pytest.raises(ValueError, match=r"dense tensor .* got ndarray"):
        bank(batch.numpy(), ["cats", "cats"])
    for given in (None, 3, iter(["cats", "cats"])):
        with pytest.raises(ValueError, match="tasks must name one task for each of the 2 images"):
            bank(batch, given)
    with pytest.raises(ValueError, match="tasks must be several names, or None for all"):
        bank.every(batch, "cats")
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        bank.max_bytes = "5"
    assert {name: tuple(x.shape) for name, x in bank.every(batch[:0]).items()} == {
        "cats": (0, 2),
        "dogs": (0, 4),
        "owls": (0, 3),
    }


def test_a_name_that_is_not_known_is_looked_for_while_others_answer(demo, monkeypatch):
    bank = TaskBank.from_directory(demo[2])
    batch = torch.randn(1, 3, 32, 32)

    def compared(name, names, **options):
        with ThreadPoolExecutor(1) as other:
            assert len(other.submit(bank, batch, ["cats"]).result(timeout=20)) == 1
        assert len(name) < 1000
        return []

    monkeypatch.setattr(residents.difflib, "get_close_matches", compared)
    with pytest.raises(UnknownTask) as refusal:
        bank(batch, ["x" * 1_000_000])
    assert len(str(refusal.value)) < 500
