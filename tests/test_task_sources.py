"""What lies where tasks should: runs, links, half copies, adapters that change or vanish."""

from __future__ import annotations

import shutil

import pytest
import torch
from task_world import write_adapters

import pgn_fast
from pgn_fast import VPT, TaskBank
from pgn_fast.adapters import CONFIG_FILE, WEIGHTS_FILE
from pgn_fast.backbone.digest import backbone_digest
from pgn_fast.cli import main
from pgn_fast.models import FineTuned, LinearProbe
from pgn_fast.tasks import UnknownTask


@pytest.fixture
def world(tmp_path):
    return (*write_adapters(tmp_path), tmp_path)


def answers_of(bank: TaskBank, name: str, model: torch.nn.Module) -> bool:
    batch = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(batch)
    return all(
        torch.allclose(a, e, atol=1e-5, rtol=1e-5)
        for a, e in zip(bank(batch, [name] * 2), expected, strict=True)
    )


def test_runs_count_and_hidden_folders_do_not(world):
    _, made, root = world
    (root / "run").mkdir()
    (root / "owls").rename(root / "run" / "best")
    (root / "cats").rename(root / ".cats.adding")
    (root / "loop").symlink_to(root / "loop")
    (root / "gone").symlink_to(root / "nowhere")
    (root / "README").write_text("no task")
    bank = TaskBank.from_directory(root)
    assert bank.names == ("dogs", "run") and bank.failed == {}
    assert answers_of(bank, "run", made["owls"])
    bank.add("again", root / "run")
    assert answers_of(bank, "again", made["owls"])


def test_a_fine_tuned_model_never_writes_into_the_others_backbone(world):
    """Loaded in front of the bank's backbone, its own weights would go there."""
    vit, made, root = world
    full = FineTuned("pgn_demo_vit", 2)
    with torch.no_grad():
        full.backbone.blocks[0].norm1.weight.mul_(2)
    pgn_fast.adapters.save_pretrained(full, root / "a full one")
    before = backbone_digest(vit)
    bank = TaskBank(vit)
    with pytest.raises(ValueError, match=r"task 'full': .*a full one.* backbone of its own"):
        bank.add("full", root / "a full one")
    assert backbone_digest(vit) == before and len(bank) == 0
    # it is the first of the folder, and names no backbone for the rest
    with pytest.warns(UserWarning, match="task 'a full one' is left out"):
        bank = TaskBank.from_directory(root)
    assert bank.names == ("cats", "dogs", "owls") and list(bank.failed) == ["a full one"]
    assert backbone_digest(bank.backbone) == before
    assert answers_of(bank, "cats", made["cats"])
    # nor does one that has come into the place of a task that waits on disk
    bank.max_bytes = 1
    shutil.copytree(root / "a full one", root / "cats", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"task 'cats' cannot come back .* backbone of its own"):
        bank(torch.rand(1, 3, 32, 32), ["cats"])
    assert backbone_digest(bank.backbone) == before


@pytest.mark.parametrize("left", [CONFIG_FILE, WEIGHTS_FILE])
def test_half_a_copy_is_named_or_enough(world, left):
    """The weights carry the configuration; a configuration alone is no task."""
    _, made, root = world
    (root / "cats" / ({CONFIG_FILE, WEIGHTS_FILE} - {left}).pop()).unlink()
    if left == WEIGHTS_FILE:
        assert answers_of(TaskBank.from_directory(root), "cats", made["cats"])
        return
    with pytest.warns(UserWarning, match="task 'cats' is left out"):
        bank = TaskBank.from_directory(root)
    assert bank.names == ("dogs", "owls") and WEIGHTS_FILE in bank.failed["cats"]


def test_a_task_whose_files_vanished_says_so_and_comes_back_with_them(world):
    vit, made, root = world
    bank = TaskBank(vit, max_bytes=1)
    bank.add("cats", root / "cats")
    bank.add("dogs", root / "dogs")  # the cats leave memory
    (root / "cats").rename(root / "away")
    with pytest.raises(ValueError, match=r"task 'cats' cannot come back from disk: .*no folder"):
        bank(torch.rand(1, 3, 32, 32), ["cats"])
    assert answers_of(bank, "dogs", made["dogs"])
    (root / "away").rename(root / "cats")
    assert answers_of(bank, "cats", made["cats"])
    bank.remove("cats")
    (root / "cats").rename(root / "away")
    with pytest.raises(ValueError, match=r"task 'cats': .*there is no folder"):
        bank.add("cats", root / "cats")


def test_the_same_tensors_used_otherwise_are_another_task(world):
    """A digest of the numbers alone would not see another pooling, or other class names."""
    vit, made, root = world
    tensors = made["cats"].adapter_state_dict()
    other = VPT(vit, 2, num_prompts=3, pool="img_pool")
    other.load_adapter_state_dict(tensors)
    for change in (
        lambda: other.eval().save_pretrained(root / "cats"),
        lambda: pgn_fast.adapters.save_pretrained(
            made["cats"], root / "cats", class_names=["one", "two"]
        ),
    ):
        shutil.rmtree(root / "cats")
        pgn_fast.adapters.save_pretrained(made["cats"], root / "cats", class_names=["a", "b"])
        bank = TaskBank(vit, max_bytes=1)
        bank.add("cats", root / "cats")
        bank.add("dogs", root / "dogs")
        change()
        with pytest.raises(ValueError, match="is another one than when it was added"):
            bank(torch.rand(1, 3, 32, 32), ["cats"])


def test_a_link_that_leads_elsewhere_by_now_is_another_task(world):
    vit, made, root = world
    link = root / "linked"
    link.symlink_to(root / "cats", target_is_directory=True)
    bank = TaskBank.from_directory(root, vit)
    assert answers_of(bank, "linked", made["cats"])
    bank.max_bytes = 1
    new = root / ".new"
    new.symlink_to(root / "dogs", target_is_directory=True)
    new.replace(link)  # as an atomic deployment does it
    with pytest.raises(ValueError, match="is another one than when it was added"):
        bank(torch.rand(1, 3, 32, 32), ["linked"])
    bank.remove("linked")
    bank.add("linked", link)
    assert answers_of(bank, "linked", made["dogs"])


NAMES = [
    "cats",
    "Cats",
    "a/b",
    "../a",
    "line\nbreak",
    "\u00e9",
    "e\u0301",
    " ",
    "\udcff",
    "x" * 300,
]


def test_names_are_any_strings_and_never_mixed_up(world):
    """Also of tasks that go to disk, in folders that are not called by them."""
    vit, _, _ = world
    bank, models = TaskBank(vit, max_bytes=1), {}
    for number, name in enumerate(NAMES):
        models[name] = LinearProbe(vit, 2)
        with torch.no_grad():
            models[name].head.weight.zero_()
            models[name].head.bias.copy_(torch.tensor([number, -number]))
        bank.add(name, models[name])
    batch = torch.rand(len(NAMES), 3, 32, 32)
    for number, answer in enumerate(bank(batch, NAMES)):
        assert answer.tolist() == [number, -number]
    with pytest.raises(ValueError, match=r"task 'Cats' is in the bank already"):
        bank.add("Cats", models["cats"])
    with pytest.raises(UnknownTask, match=r"no task 'CATS'"):
        bank(batch[:1], ["CATS"])
    for wrong in (None, 3, ["cats"], b"cats"):
        with pytest.raises(ValueError, match="tasks must be names, got "):
            bank(batch[:1], [wrong])


def test_the_last_task_may_go(world):
    vit, made, _ = world
    bank = TaskBank(vit)
    bank.add("cats", made["cats"])
    bank.remove("cats")
    assert bank.every(torch.rand(2, 3, 32, 32)) == {} and bank.names == ()
    with pytest.raises(UnknownTask, match="no task 'cats' among the bank's 0"):
        bank(torch.rand(1, 3, 32, 32), ["cats"])
    with pytest.raises(UnknownTask):
        bank.remove("cats")
    bank.add("cats", made["cats"])
    assert answers_of(bank, "cats", made["cats"])


def test_a_lower_limit_holds_from_then_on(world):
    vit, made, root = world
    bank = TaskBank.from_directory(root, vit)
    taken = bank.resident_bytes
    bank.max_bytes = taken - 1
    assert bank.resident_bytes < taken
    for name, model in made.items():
        assert answers_of(bank, name, model)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_bytes must be at least 1"):
            bank.max_bytes = wrong
        with pytest.raises(ValueError, match="max_bytes must be at least 1"):
            TaskBank(vit, max_bytes=wrong)
    assert bank.max_bytes == taken - 1


# the command line


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "line\nbreak", ".hidden", "..", "x" * 129])
@pytest.mark.parametrize("action", ["add", "remove", "show"])
def test_names_that_are_none_are_refused(world, action, name, capsys):
    _, _, root = world
    source = [str(root / "cats")] if action == "add" else []
    before = sorted(root.rglob("*"))
    assert main(["tasks", action, str(root), name, *source]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and sorted(root.rglob("*")) == before


def test_removing_a_link_leaves_what_it_leads_to(world, tmp_path, capsys):
    _, made, root = world
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "cats").symlink_to(root / "cats", target_is_directory=True)
    (tasks / "gone").symlink_to(root / "nowhere")
    assert main(["tasks", "add", str(tasks), "gone", str(root / "cats")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["tasks", "remove", str(tasks), "cats"]) == 0
    assert [path.name for path in tasks.iterdir()] == ["gone"]
    assert answers_of(TaskBank.from_directory(root), "cats", made["cats"])


def test_a_copy_that_is_not_whole_is_no_task(world, tmp_path, monkeypatch, capsys):
    """The source changes while it is copied: what was copied counts."""
    _, _, root = world
    copied = shutil.copyfile

    def torn(source, target):
        copied(source, target)
        if target.name == WEIGHTS_FILE:
            target.write_bytes(target.read_bytes()[:-9])

    monkeypatch.setattr(shutil, "copyfile", torn)
    tasks = tmp_path / "tasks"
    assert main(["tasks", "add", str(tasks), "cats", str(root / "cats")]) == 2
    assert list(tasks.iterdir()) == [] and capsys.readouterr().err
    monkeypatch.setattr(shutil, "copyfile", copied)
    assert main(["tasks", "add", str(tasks), "cats", str(root / "cats")]) == 0
    assert [path.name for path in tasks.iterdir()] == ["cats"]


@pytest.mark.parametrize(
    "name, reason",
    [("best", "marks its parent as a training run"), ("\N{GRINNING FACE}" * 100, "400 bytes")],
)
def test_names_that_no_folder_of_a_task_has(world, name, reason, tmp_path, capsys):
    _, _, root = world
    assert main(["tasks", "add", str(tmp_path / "new"), name, str(root / "cats")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
