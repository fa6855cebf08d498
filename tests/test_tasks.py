"""TaskBank: every image's result is that of its own task's model, whatever else is in the batch."""

from __future__ import annotations

import os
import random
import threading

import pytest
import timm
import torch
from torch import Tensor, nn

import pgn_fast
import pgn_fast.cli
from pgn_fast import PGN, VPT, TaskBank
from pgn_fast.adapters import WEIGHTS_FILE
from pgn_fast.models import FineTuned, LinearProbe
from pgn_fast.tasks import UnknownTask

SIZE, DEPTH, D = 32, 4, 32
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "clip": ("vit_base_patch32_clip_224", {"num_classes": 24}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 1.0}),
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "rotary": ("vit_small_patch16_rope_224", {}),
}


def backbone(family: str = "vit", dtype: torch.dtype = torch.float32) -> nn.Module:
    name, options = FAMILIES[family]
    sizes = {"img_size": SIZE, "patch_size": 8, "depth": DEPTH, "embed_dim": D, "num_heads": 4}
    torch.manual_seed(0)
    vit = timm.create_model(name, **{"num_classes": 0, **sizes, **options}).to(dtype)
    for parameter in vit.parameters():  # no weight that is zero or one by construction
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vit.eval().requires_grad_(False)


def models(vit: nn.Module) -> dict[str, nn.Module]:
    """Tasks of every method, of different P, K, C, places of the prompts, pools and heads."""
    torch.manual_seed(1)
    features = vit.num_features
    found: dict[str, nn.Module] = {
        "deep": VPT(vit, 3, num_prompts=5),
        "deep too": VPT(vit, 7, num_prompts=5),
        "deep, long": VPT(vit, 4, num_prompts=11),
        "shallow": VPT(vit, 2, num_prompts=3, deep=False),
        "last blocks": VPT(vit, 5, num_prompts=2, layers=[2, 3]),
        "first blocks": VPT(vit, 5, num_prompts=2, layers=[0, 1]),
        "leave early": VPT(vit, 3, num_prompts=2, layers=[1, 2], expand=False),
        "projected, shared": VPT(vit, 3, num_prompts=4, project_dim=6, shared=True),
        "prompts pooled": VPT(vit, 3, num_prompts=4, pool="imgprompt_pool"),
        "patches pooled": VPT(vit, 3, num_prompts=4, pool="img_pool"),
        "added": VPT(vit, 3, location="add"),
        "border": VPT(vit, 3, num_prompts=2, location="pad"),
        "pgn": PGN(vit, 6, num_prompts=4, library_size=9, resolution=16),
        "pgn, sigmoid": PGN(vit, 2, num_prompts=2, library_size=5, activation="sigmoid"),
        "linear": LinearProbe(vit, 9),
        "texts": VPT(
            vit, head="zero_shot", class_embeddings=torch.randn(5, features), num_prompts=3
        ),
    }
    for model in found.values():
        model.eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return found


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def filled(vit: nn.Module, **options) -> tuple[TaskBank, dict[str, nn.Module]]:
    bank, tasks = TaskBank(vit, **options), models(vit)
    del tasks["border"]  # takes images of another size
    for name, model in tasks.items():
        bank.add(name, model)
    return bank, tasks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_image_is_answered_as_by_its_own_model(family, dtype):
    bank, tasks = filled(backbone(family, dtype))
    batch = images(3 * len(tasks)).to(dtype)
    names = list(tasks) * 3
    random.Random(0).shuffle(names)
    answers = bank(batch, names)
    allowed = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    with torch.no_grad():
        for image, name, answer in zip(batch, names, answers, strict=True):
            expected = tasks[name].eval()(image[None])[0]
            assert answer.shape == expected.shape, name
            scale = expected.abs().max().clamp_min(1)
            assert (answer - expected).abs().max() <= allowed * scale, name


def test_without_the_engine_too():
    bank, tasks = filled(backbone(), fast=False)
    assert "fast=False" in bank.explain()
    names = list(tasks)
    batch = images(len(names))
    for image, name, answer in zip(batch, names, bank(batch, names), strict=True):
        with torch.no_grad():
            expected = tasks[name].forward_reference(image[None])[0] if name != "linear" else None
        if expected is not None:
            assert torch.allclose(answer, expected, atol=2e-5), name


def test_batch_mates_and_order_leave_no_trace():
    bank, tasks = filled(backbone())
    names = list(tasks)[::2] * 2
    batch = images(len(names))
    answers = bank(batch, names)
    order = torch.randperm(len(names)).tolist()
    moved = bank(batch[order], [names[i] for i in order])
    for at, i in enumerate(order):
        assert torch.equal(moved[at], answers[i]), names[i]
    alone = bank(batch[:1], names[:1])[0]
    assert torch.allclose(alone, answers[0], atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "clip", "rotary"])
def test_every_task_on_the_same_images(family):
    bank, tasks = filled(backbone(family))
    batch = images(3)
    answers = bank.every(batch)
    assert list(answers) == sorted(tasks)
    with torch.no_grad():
        for name, logits in answers.items():
            assert torch.allclose(logits, tasks[name](batch), atol=1e-5, rtol=1e-5), name
    some = bank.every(batch, ["deep", "linear", "deep"])
    assert list(some) == ["deep", "linear"]


def test_what_lies_below_the_first_prompt_runs_once():
    """Counted by the rows that go through the blocks' first GEMM."""
    vit = backbone()
    bank = TaskBank(vit)
    for i in range(6):
        bank.add(f"task {i}", VPT(vit, 2, num_prompts=2, layers=[DEPTH - 1]))
    batch, rows = images(2), []
    blocks = pgn_fast.tasks.mixed.blocks
    project = blocks.project
    try:
        blocks.project = lambda w, x, *rest: rows.append(x.shape[1]) or project(w, x, *rest)
        bank.every(batch)
    finally:
        blocks.project = project
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    # the last block is absorbed; those below it see each image once, whatever the tasks
    assert rows == [2 * tokens] * (DEPTH - 1)


def test_unequal_prompts_are_not_padded():
    vit = backbone()
    bank = TaskBank(vit)
    for P in (1, 4, 9):
        bank.add(f"P={P}", VPT(vit, 2, num_prompts=P))
    seen = []
    attend = pgn_fast.tasks.mixed.blocks.attend
    blocks = pgn_fast.tasks.mixed.blocks
    try:
        blocks.attend = lambda w, q, k, v, keys, *rest: (
            seen.append((q.shape[0], keys[0].shape[-2])) or attend(w, q, k, v, keys, *rest)
        )
        bank(images(6), ["P=1", "P=4", "P=9"] * 2)
    finally:
        blocks.attend = attend
    assert set(seen) == {(2, 1), (2, 4), (2, 9)}


class FromTokens(pgn_fast.Prompter):
    """Prompts that are computed from the block's input, and free keys and values in block 2."""

    def __init__(self, backbone, *, num_prompts: int = 2) -> None:
        super().__init__()
        D, heads = backbone.embed_dim, backbone.blocks[0].attn.num_heads
        self.mix = nn.Linear(D, D)
        self.num_prompts = num_prompts
        self.k = nn.Parameter(torch.randn(heads, 3, D // heads))
        self.v = nn.Parameter(torch.randn(heads, 3, D // heads))

    def schedule(self, images: Tensor) -> pgn_fast.PromptSchedule:
        prompts = lambda x: self.mix(x[:, : self.num_prompts].to(self.mix.weight.dtype)).to(x.dtype)
        keys = pgn_fast.KeyValues(self.k, self.v)
        return pgn_fast.PromptSchedule("append", {1: prompts, 2: keys, 3: (prompts, keys)})


def test_registered_methods_mix_with_the_others():
    if "from-tokens" not in pgn_fast.methods.METHODS:
        pgn_fast.register_method("from-tokens")(FromTokens)
    try:
        vit = backbone()
        bank, tasks = filled(vit)
        tasks["registered"] = pgn_fast.create_model("from-tokens", vit, 4).eval()
        bank.add("registered", tasks["registered"])
        names = ["registered", "deep", "registered", "pgn"]
        batch = images(4)
        with torch.no_grad():
            for image, name, answer in zip(batch, names, bank(batch, names), strict=True):
                expected = tasks[name](image[None])[0]
                assert torch.allclose(answer, expected, atol=1e-5, rtol=1e-5), name
            every = bank.every(batch, ["registered", "linear"])["registered"]
            assert torch.allclose(every, tasks["registered"](batch), atol=1e-5, rtol=1e-5)
    finally:
        del pgn_fast.methods.METHODS["from-tokens"]


def test_weights_that_change_are_followed():
    vit = backbone()
    bank, tasks = filled(vit)
    batch = images(2)
    before = bank(batch, ["deep", "deep too"])
    with torch.no_grad():
        vit.blocks[1].attn.qkv.weight.mul_(1.5)
        after = bank(batch, ["deep", "deep too"])
        assert not torch.allclose(before[0], after[0], atol=1e-3)
        assert torch.allclose(after[0], tasks["deep"](batch[:1])[0], atol=1e-5)
        assert torch.allclose(
            after[1], tasks["deep too"].forward_reference(batch[1:])[0], atol=1e-4
        )


@pytest.fixture
def demo(tmp_path):
    """Three adapters of the packaged backbone, the second of them a linear probe."""
    vit = pgn_fast.models.VPT("pgn_demo_vit", 2).backbone
    made = {
        "cats": VPT(vit, 2, num_prompts=3),
        "dogs": LinearProbe(vit, 4),
        "owls": PGN(vit, 3, num_prompts=2, library_size=4, resolution=32),
    }
    for name, model in made.items():
        labels = [f"{name} {i}" for i in range(model.num_classes)]
        pgn_fast.adapters.save_pretrained(model.eval(), tmp_path / name, class_names=labels)
    return vit, made, tmp_path


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
    rounds = -(-int(os.environ.get("PGN_FAST_CANARY", "400")) // (4 * 8))
    vit = backbone()
    vit_images = images(8)
    count, wrong, asked = 24, [], [0]
    bank = TaskBank(vit)

    def task(number: int) -> nn.Module:
        model = VPT(vit, 2, num_prompts=1 + number % 3)
        model.head.weight.data.zero_()
        model.head.bias.data[:] = torch.tensor([number, -number])
        return model

    tasks = [task(n) for n in range(count)]
    for n in range(count // 2):
        bank.add(str(n), tasks[n])
    bank.max_bytes = bank.resident_bytes // 2
    stop = threading.Event()

    def come_and_go() -> None:
        chance = random.Random(0)
        while not stop.is_set():
            n = chance.randrange(count // 2, count)
            if str(n) in bank:
                bank.remove(str(n))
            else:
                bank.add(str(n), task(n))

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            names = [chance.choice(bank.names) for _ in range(8)]
            try:
                answers = bank(vit_images, names)
            except UnknownTask:
                continue
            asked[0] += len(names)
            wrong.extend(
                (name, answer.tolist())
                for name, answer in zip(names, answers, strict=True)
                if answer.tolist() != [float(name), -float(name)]
            )

    churn = threading.Thread(target=come_and_go)
    churn.start()
    askers = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in askers:
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    churn.join()
    assert wrong == [] and asked[0] > 16 * rounds


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
