"""TaskBank: every image's result is that of its own task's model, whatever else is in the batch."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from task_world import DEPTH, FAMILIES, backbone, images
from torch import Tensor, nn

import pgn_fast
from pgn_fast import PGN, VPT, TaskBank
from pgn_fast.backbone.engine import FastBackbone
from pgn_fast.models import LinearProbe


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
        blocks.project = lambda w, x, *rest, **options: (
            rows.append(x.shape[:-1].numel()) or project(w, x, *rest, **options)
        )
        bank.every(batch)
    finally:
        blocks.project = project
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    # the last block is absorbed; those below it see each image once, whatever the tasks
    assert rows == [2 * tokens] * (DEPTH - 1)


def test_unequal_prompts_share_one_call_without_padding(monkeypatch):
    """Attention of all images at once: every image sees the rows of its own task, once each."""
    vit = backbone()
    bank = TaskBank(vit)
    for P in (1, 4, 9):
        bank.add(f"P={P}", VPT(vit, 2, num_prompts=P))
    bank.add("linear", LinearProbe(vit, 2))
    blocks, seen = pgn_fast.tasks.mixed.blocks, []

    def attend(w, q, k, v, keys, fused, backend, ranges=None):
        lengths = None if ranges is None else (ranges[:, 1] - ranges[:, 0]).tolist()
        seen.append((q.shape[0], keys[0].shape[-2], lengths))
        return original(w, q, k, v, keys, fused, backend, ranges)

    original = blocks.attend
    monkeypatch.setattr(blocks, "attend", attend)
    bank(images(7), ["P=1", "P=4", "P=9", "linear", "P=9", "P=4", "P=1"])
    # the last block is absorbed
    assert seen == [(7, 14, [0, 1, 1, 4, 4, 9, 9])] * (DEPTH - 1)


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


def test_without_a_kernel_equal_lengths_run_together():
    """Where no backend is preferred for ragged rows: one call for each P, by eager PyTorch."""
    vit = backbone()
    bank, tasks = filled(vit, backend="reference")
    assert "a call for each P, eager PyTorch" in bank.explain()
    names = list(tasks) * 2
    batch = images(len(names))
    for image, name, answer in zip(batch, names, bank(batch, names), strict=True):
        with torch.no_grad():
            expected = tasks[name](image[None])[0]
        assert torch.allclose(answer, expected, atol=1e-5, rtol=1e-5), name


def test_prompts_that_change_are_followed():
    """What is made beforehand of a model in memory does not outlive what it was made from."""
    vit = backbone()
    bank, tasks = filled(vit)
    batch = images(2)
    before = bank(batch, ["deep", "deep too"])
    with torch.no_grad():
        tasks["deep"].prompter.prompts += torch.randn_like(tasks["deep"].prompter.prompts)
    after = bank(batch, ["deep", "deep too"])
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0], atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(after[0], tasks["deep"](batch[:1])[0], atol=1e-5)


def test_what_is_made_beforehand_keeps_no_old_weights():
    vit = backbone()
    bank, _ = filled(vit)
    batch = images(1)
    old = weakref.ref(bank._answers.engine.cache.weights(torch.float32)[0])
    with torch.no_grad():
        vit.blocks[1].attn.qkv.weight.mul_(1.5)
    bank(batch, ["linear"])
    gc.collect()
    assert old() is None


def test_embedding_runs_once_for_many_tasks(monkeypatch):
    """Also where ``every`` takes them in several turns; and the blocks below are gone on with."""
    vit = backbone()
    bank = TaskBank(vit)
    for n in range(6):
        bank.add(str(n), VPT(vit, 2, num_prompts=2, layers=[1 + n % 3]))
    embedded, below = [], []
    embed, run = FastBackbone.embed, FastBackbone.below
    monkeypatch.setattr(pgn_fast.tasks.bank, "_AT_ONCE", 2)
    monkeypatch.setattr(
        FastBackbone, "embed", lambda self, *rest: embedded.append(1) or embed(self, *rest)
    )
    monkeypatch.setattr(
        FastBackbone,
        "below",
        lambda self, x, rope, begin, end: (
            below.append((begin, end)) or run(self, x, rope, begin, end)
        ),
    )
    answers = bank.every(images(1))
    assert embedded == [1] and below == [(0, 1), (1, 2), (2, 3)] and len(answers) == 6


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


@pytest.mark.parametrize("pruned", ["before", "after"])
def test_blocks_that_were_pruned_take_their_prompts_with_them(pruned):
    """Also where the head reads the prompts that are left after what is now the last block."""
    vit = backbone()
    models = {
        "deep": VPT(vit, 2, num_prompts=2),
        "last": VPT(vit, 2, num_prompts=3, layers=[DEPTH - 1]),
        "reads prompts": VPT(vit, 2, num_prompts=2, pool="prompt_pool"),
    }
    bank = TaskBank(vit)

    def prune() -> None:
        del vit.blocks[DEPTH - 1]

    if pruned == "before":
        prune()
    for name, model in models.items():
        bank.add(name, model.eval())
    if pruned == "after":
        bank(images(1), ["deep"])
        prune()
    batch = images(len(models))
    every = bank.every(batch)
    with torch.no_grad():
        for i, (name, answer) in enumerate(zip(models, bank(batch, list(models)), strict=True)):
            assert torch.allclose(answer, models[name](batch)[i], atol=1e-5, rtol=1e-5), name
            assert torch.allclose(every[name], models[name](batch), atol=1e-5, rtol=1e-5), name


def test_every_answers_with_the_tasks_as_they_are_when_it_begins(monkeypatch):
    """A task that is removed while the first of them run still has its answer."""
    vit = backbone()
    bank = TaskBank(vit)
    for n in range(4):
        bank.add(str(n), VPT(vit, 2, num_prompts=2))
    expected = bank.every(images(1))
    monkeypatch.setattr(pgn_fast.tasks.bank, "_AT_ONCE", 1)
    loaded = bank._residents.loaded

    def removed_meanwhile(tasks):
        if "3" in bank:
            bank.remove("3")
        return loaded(tasks)

    monkeypatch.setattr(bank._residents, "loaded", removed_meanwhile)
    answers = bank.every(images(1))
    assert list(bank.names) == ["0", "1", "2"] and list(answers) == ["0", "1", "2", "3"]
    assert torch.allclose(answers["3"], expected["3"], atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_a_single_logit_is_the_same_in_any_order(fast):
    """A product with one column may add in another order for another row."""
    vit = backbone()
    bank, batch = TaskBank(vit, fast=fast), images(14)
    for n, location in enumerate(("add", "add-1", "below", "prepend")):
        torch.manual_seed(n)
        bank.add(location, VPT(vit, 1, num_prompts=3, location=location))
    names = [("add", "add-1", "below", "prepend")[i % 4] for i in range(14)]
    answers = bank(batch, names)
    for seed in range(20):
        order = torch.randperm(14, generator=torch.Generator().manual_seed(seed)).tolist()
        moved = bank(batch[order], [names[i] for i in order])
        assert all(torch.equal(moved[at], answers[i]) for at, i in enumerate(order))


def test_a_linear_probe_takes_pixels_as_the_others_do():
    vit = pgn_fast.load_backbone("pgn_demo_vit")
    probe = LinearProbe(vit, 3).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for fast in (True, False):
        bank = TaskBank(vit, fast=fast)
        bank.add("probe", probe)
        answers = torch.stack(bank(pixels, ["probe", "probe"]))
        assert torch.allclose(answers, probe(pixels), atol=1e-5)
