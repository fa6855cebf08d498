"""What frozen blocks make of an image runs once: the same bits, never stale, never half written."""

from __future__ import annotations

import csv
import errno
import functools
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from small_world import MODEL, tiny_vit, tiny_vit_kwargs, write_images

import pgn_fast
from pgn_fast.adapters import read_adapter
from pgn_fast.backbone.schedule import FrozenTokens
from pgn_fast.errors import UserError
from pgn_fast.models import LinearProbe
from pgn_fast.train import frozen, loop, token_store
from pgn_fast.train.config import TrainConfig
from pgn_fast.train.run import Run
from pgn_fast.train.step import Stepper
from pgn_fast.train.token_store import TokenStore, row_key

CPU = torch.device("cpu")
LAST = {"method": "vpt-deep", "method_kwargs": {"layers": [2]}}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def world(tmp_path):
    write_images(tmp_path / "data", 8)
    return tmp_path


def configure(world, **changes):
    kwargs = tiny_vit_kwargs(world) | {"depth": 3}
    path = world / "deep.safetensors"
    if not path.exists():
        safetensors.torch.save_file(tiny_vit(depth=3).state_dict(), path)
    values = {
        "data": str(world / "data"),
        "model": MODEL,
        "model_kwargs": kwargs | {"checkpoint_path": str(path)},
        "num_prompts": 2,
        "batch_size": 5,
        "epochs": 3,
        "lr": 0.02,
        "workers": 0,
        "no_aug": True,
        "head_init": "zero",
        "cache": str(world / "cache"),
        **LAST,
    }
    return TrainConfig.make(**values | changes)


def train(config, output, **options):
    return loop.train(config, output, device=CPU, **{"show": False} | options)


def losses(folder: Path):
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


@functools.cache
def rows_are_alike() -> bool:
    """Whether torch's libraries give an image the same bits in a batch of any size: oneDNN of
    torch 2.10 does not."""
    model = pgn_fast.VPT(tiny_vit(depth=3), 3, num_prompts=2, layers=[2]).eval()
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.below(images).tokens
        return all(
            torch.equal(torch.cat([model.below(x).tokens for x in images.split(size)]), whole)
            for size in range(1, 6)
        )


def tolerance() -> float:
    return 0 if rows_are_alike() else 1e-4


def assert_same_bits(one: Path, other: Path) -> None:
    """The same run; to the last digits where the libraries round by the size of a batch."""
    for mine, theirs in zip(losses(one), losses(other), strict=True):
        assert {k: float(v) for k, v in mine.items()} == pytest.approx(
            {k: float(v) for k, v in theirs.items()}, rel=tolerance(), abs=0
        )
    for name in ("best", "last"):
        mine, theirs = (read_adapter(folder / name)[1] for folder in (one, other))
        for key in mine:
            torch.testing.assert_close(mine[key], theirs[key], rtol=tolerance(), atol=tolerance())


@pytest.fixture
def counted(monkeypatch):
    """How many images went through frozen blocks to be kept."""
    seen = []
    below = frozen.FrozenCache.below

    def count(self, images):
        seen.append(len(images))
        return below(self, images)

    monkeypatch.setattr(frozen.FrozenCache, "below", count)
    # each run first asks for two noise images
    return lambda runs=1: sum(seen) - 2 * runs


# --- the seam


EVA = ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "num_heads": 2, "depth": 3})


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": [2]},
        {"layers": [1, 2], "expand": False},
        {"layers": [1], "location": "add"},
        {"layers": [2], "pool": "imgprompt_pool"},
        {"layers": [1, 2], "project_dim": 8, "shared": True},
    ],
    ids=str,
)
def test_tokens_go_on_where_the_images_would_have(options, fast):
    model = pgn_fast.VPT(tiny_vit(depth=3), 3, num_prompts=2, fast=fast, **options)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    grads, logits = [], []
    for given in (images, model.below(images)):
        model.zero_grad()
        logits.append(model(given))
        torch.nn.functional.cross_entropy(logits[-1], labels).backward()
        grads.append([p.grad.clone() for p in model.trainable_parameters()])
    assert torch.equal(*logits)
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    reference = model.forward_reference(model.below(images))
    torch.testing.assert_close(reference, model.forward_reference(images))


def test_rotary_positions_and_a_probe_go_on_too():
    name, sizes = EVA
    eva = timm.create_model(name, pretrained=False, **sizes).eval()
    images = torch.randn(3, 3, 28, 28)
    model = pgn_fast.VPT(eva, 3, num_prompts=2, layers=[2])
    assert torch.equal(model(images), model(model.below(images)))
    probe = LinearProbe(tiny_vit(), 3)
    images = torch.randn(3, 3, 16, 16)
    kept = probe.below(images)
    assert kept.shape == (3, 32) and torch.equal(probe(images), probe(kept))


def test_prompts_that_see_all_blocks_or_the_image_keep_nothing():
    vit = tiny_vit()
    for model in (
        pgn_fast.VPT(vit, 3, num_prompts=2),
        pgn_fast.VPT(vit, 3, num_prompts=2, location="pad"),
        pgn_fast.PGN(vit, 3, num_prompts=2, library_size=4),
    ):
        assert model.frozen_blocks == 0
        with pytest.raises(ValueError, match="nothing is frozen below"):
            model.below(torch.randn(2, 3, 16, 16))
    tokens = FrozenTokens(torch.randn(2, 5, 32), 1)
    with pytest.raises(ValueError, match="enter block 0; give the images"):
        pgn_fast.VPT(vit, 3, num_prompts=2)(tokens)
    with pytest.raises(ValueError, match="depend on the image"):
        pgn_fast.PGN(vit, 3, num_prompts=2, library_size=4)(tokens)


# --- runs


@pytest.mark.parametrize(
    "changes",
    [
        LAST,
        {"method": "linear", "method_kwargs": {}},
        {**LAST, "no_aug": False, "views": 2, "prompt_dropout": 0.3, "head_init": "probe"},
        {**LAST, "fast": False, "grad_accum_steps": 2},
    ],
    ids=["last block", "linear", "two views", "plain, accumulated"],
)
def test_a_cached_run_is_the_uncached_one_to_the_bit(world, counted, changes):
    (world / "data" / "red" / "0.png").write_bytes(b"no picture")
    config = configure(world, **changes)
    cached = train(config, world / "cached")
    # 7 + 8 + 8 images, two of them for validation (a tenth of each class, rounded)
    views = config.views or 1
    images = cached["train"]["images"]
    assert counted() == views * images + cached["validation"]["images"]
    plain = train(configure(world, **changes, cache="off"), world / "plain")
    assert_same_bits(world / "cached", world / "plain")
    assert cached["train"] == plain["train"] and cached["unreadable"] == plain["unreadable"]
    assert cached["validation"].pop("loss") == pytest.approx(
        plain["validation"].pop("loss"), rel=tolerance(), abs=0
    )
    assert cached["validation"] == plain["validation"]
    assert len(cached["unreadable"]["images"]) == 1


def test_auto_leaves_nothing_behind_and_a_folder_is_shared(world, counted, capsys):
    train(configure(world, cache="auto"), world / "own", show=True)
    said = capsys.readouterr().out
    assert f"{world / 'own' / 'frozen'}" in said.replace("\n", "") and "kB" in said
    assert not (world / "own" / "frozen").exists()
    images = counted()
    train(configure(world), world / "one")
    # another rate, another validation split, the same images
    train(configure(world, lr=0.1, seed=7), world / "two")
    assert images < counted(runs=3) <= images + 24 + 6
    before = counted(runs=3)
    train(configure(world, lr=0.3), world / "three")
    assert counted(runs=4) == before


def test_fit_keeps_what_tensors_become(tmp_path, counted):
    torch.manual_seed(0)
    data = [(torch.randn(3, 16, 16), i % 3) for i in range(10)]

    def run(name, **options):
        torch.manual_seed(1)
        model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2, layers=[1])
        return pgn_fast.fit(
            model, data, data, epochs=3, output=tmp_path / name, show=False, batch_size=4, **options
        )

    run("cached")
    assert counted() == 10 + 10
    run("plain", cache="off")
    assert_same_bits(tmp_path / "cached", tmp_path / "plain")


def test_a_data_set_that_draws_anew_is_not_kept(tmp_path, capsys):
    class Drawn:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.randn(3, 16, 16), index % 3

    model = pgn_fast.VPT(tiny_vit(), 3, num_prompts=2, layers=[1])
    result = pgn_fast.fit(model, Drawn(), epochs=2, output=tmp_path / "run", batch_size=4)
    assert len(result.history) == 2
    assert "without a cache" in (said := " ".join(capsys.readouterr().out.split()))
    assert "was another image when it was opened again" in said


def test_other_weights_pixels_or_bytes_are_computed_anew(world, counted):
    train(configure(world), world / "first")
    all_images = counted()
    train(configure(world, mean=(0.4, 0.4, 0.4)), world / "pixels")
    assert counted(runs=2) == 2 * all_images
    other = world / "other.safetensors"
    state = tiny_vit(seed=1, depth=3).state_dict()
    safetensors.torch.save_file(state, other)
    kwargs = configure(world).model_kwargs | {"checkpoint_path": str(other)}
    train(configure(world, model_kwargs=kwargs), world / "weights")
    assert counted(runs=3) == 3 * all_images
    # one image has other bytes: one image runs again, the validation split included
    path = world / "data" / "blue" / "3.png"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    train(configure(world), world / "bytes")
    assert counted(runs=4) == 3 * all_images + 1
    train(configure(world, cache="off"), world / "plain")
    assert_same_bits(world / "bytes", world / "plain")


def test_resume_goes_on_to_the_bit(world, monkeypatch, counted):
    changes = {"no_aug": False, "views": 2}
    train(configure(world, **changes), world / "whole")
    step, calls = Stepper.step, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(self, *args)

    images = counted()
    monkeypatch.setattr(Stepper, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(configure(world, **changes, cache="auto"), world / "parts")
    monkeypatch.setattr(Stepper, "step", step)
    train(configure(world, **changes, cache="auto"), world / "parts", resume=True)
    assert_same_bits(world / "whole", world / "parts")
    # the stopped run's own files served the resumed one
    assert counted(runs=3) == 2 * images


def test_half_precision_is_stored_and_its_error_said(world, capsys):
    train(configure(world, cache_dtype="bfloat16"), world / "half", show=True)
    said = " ".join(capsys.readouterr().out.split())
    error = float(said.partition("differ by at most ")[2].split()[0])
    assert 0 < error <= 2**-8
    train(configure(world), world / "whole")
    half, whole = (float(losses(world / name)[0]["train_loss"]) for name in ("half", "whole"))
    assert half != whole and abs(half - whole) < 0.05


def test_tokens_that_do_not_fit_half_precision_are_not_kept(world, capsys):
    vit = tiny_vit(depth=3)
    with torch.no_grad():
        vit.blocks[0].mlp.fc2.bias.fill_(1e5)
    path = world / "large.safetensors"
    safetensors.torch.save_file(vit.state_dict(), path)
    kwargs = configure(world).model_kwargs | {"checkpoint_path": str(path)}
    config = configure(world, model_kwargs=kwargs, cache_dtype="float16", fast=False)
    assert train(config, world / "run", show=True)["validation"]
    assert "do not fit into float16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"method": "pgn", "method_kwargs": {}}, "every block sees prompts"),
        ({"method": "full", "method_kwargs": {}}, "every block sees prompts, or is trained"),
        ({"mixup": 0.2}, "other images in every step"),
        ({"no_aug": False}, "with `views` 4 four take turns"),
        ({"torchcompile": "eager"}, "compiles the forward"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_could_hold_nothing_is_refused(world, changes, reason):
    with pytest.raises(UserError, match=reason):
        train(configure(world, **changes), world / "run")
    assert not (world / "run").exists() and not (world / "cache").exists()


# --- full disks, kills, neighbors


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(world, monkeypatch, capsys, when):
    train(configure(world, cache="off"), world / "plain")
    if when == "before":
        usage = lambda path: type("Usage", (), {"free": 1000})()
        monkeypatch.setattr(token_store.shutil, "disk_usage", usage)
    else:
        add, calls = TokenStore.add, []

        def full(self, keys, rows):
            calls.append(1)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            add(self, keys, rows)

        monkeypatch.setattr(TokenStore, "add", full)
    left = []
    finish = Run.finish
    monkeypatch.setattr(
        Run, "finish", lambda self: (left.extend(world.glob("run/frozen/*")), finish(self))[1]
    )
    train(configure(world), world / "run", show=True)
    assert not left  # the checkpoints need the room
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("goes on without a cache") == 1
    assert ("1.0 kB are free" if when == "before" else "No space left") in said
    assert_same_bits(world / "run", world / "plain")


def keys_and_rows(count, start=0):
    keys = [row_key(i) for i in range(start, start + count)]
    return keys, torch.arange(start, start + count).float()[:, None].repeat(1, 300)


def store(root):
    return TokenStore(root, (300,), torch.float32, {"what": "a test"})


def test_rows_are_found_again_and_about_says_what_they_are(tmp_path):
    one = store(tmp_path)
    keys, rows = keys_and_rows(5)
    with one.writing(lambda: None):
        one.open()
        one.add(keys, rows)
    other = store(tmp_path)
    assert keys[0] not in other
    other.open()
    assert torch.equal(other.read(reversed(keys)), rows.flip(0)) and row_key(9) not in other
    assert "a test" in (other.folder / "about.json").read_text()
    assert TokenStore(tmp_path, (300,), torch.float32, {"what": "another"}).folder != other.folder


@pytest.mark.parametrize("damage", ["torn record", "torn row", "row without record", "old bytes"])
def test_what_a_kill_left_half_written_is_never_read(tmp_path, damage):
    one = store(tmp_path)
    keys, rows = keys_and_rows(4)
    with one.writing(lambda: None):
        one.open()
        one.add(keys, rows)
    index, tokens = (one.folder / name for name in ("index.bin", "tokens.bin"))
    if damage == "torn record":
        os.truncate(index, index.stat().st_size - 5)
    elif damage == "torn row":
        os.truncate(tokens, tokens.stat().st_size - 700)
    elif damage == "row without record":
        os.truncate(index, index.stat().st_size - 32)
    else:  # a power cut kept the record and lost the row's page
        with open(tokens, "r+b") as file:
            file.seek(3 * 1200 + 100)
            file.write(b"\0" * 400)
    again = store(tmp_path)
    again.open()
    assert all(key in again for key in keys[:3]) and keys[3] not in again
    more, new = keys_and_rows(2, start=3)
    with again.writing(lambda: None):
        again.open()
        again.add(more, new)
    again.open()
    assert torch.equal(again.read(keys[:3] + more), torch.cat([rows[:3], new]))


def test_a_killed_writer_leaves_whole_rows_and_no_lock(tmp_path):
    first, second = keys_and_rows(3), keys_and_rows(3, start=3)
    pid = os.fork()
    if pid == 0:
        one = store(tmp_path)
        with one.writing(lambda: None):
            one.open()
            one.add(*first)
            token_store._checksum = lambda row: os.kill(os.getpid(), signal.SIGKILL)
            one.add(*second)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    one = store(tmp_path)
    one.open()
    assert all(key in one for key in first[0]) and not any(key in one for key in second[0])
    with one.writing(lambda: pytest.fail("the dead writer's lock is still there")):
        one.open()
        one.add(*second)
    one.open()
    assert torch.equal(one.read(first[0] + second[0]), torch.cat([first[1], second[1]]))


def test_two_writers_take_turns_and_write_each_row_once(tmp_path):
    waited, inside = [], threading.Event()

    def fill(one, after):
        with one.writing(lambda: waited.append(1)):
            one.open()
            inside.set()
            after()
            keys, rows = keys_and_rows(6)
            new = [i for i, key in enumerate(keys) if key not in one]
            if new:
                one.add([keys[i] for i in new], rows[new])
        one.open()

    stores = [store(tmp_path) for _ in range(2)]
    late = threading.Event()
    first = threading.Thread(target=fill, args=(stores[0], lambda: late.wait(10)))
    first.start()
    assert inside.wait(10)
    second = threading.Thread(target=fill, args=(stores[1], lambda: None))
    second.start()
    while not waited:
        assert second.is_alive()
    late.set()
    first.join()
    second.join()
    keys, rows = keys_and_rows(6)
    assert all(torch.equal(one.read(keys), rows) for one in stores)
    assert (stores[0].folder / "tokens.bin").stat().st_size == rows.nbytes


def test_two_runs_share_a_folder_at_once(world, monkeypatch):
    """Both begin with nothing kept; what one has written the other reads."""
    # where the processes find this module; last, so that the package is the installed one
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])
    spawn = multiprocessing.get_context("spawn")
    runs = [
        spawn.Process(target=train, args=(configure(world, lr=lr), world / str(lr)))
        for lr in (0.02, 0.1)
    ]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    summaries = [losses(world / str(lr)) for lr in (0.02, 0.1)]
    assert len(summaries[0]) == len(summaries[1]) == 3
    for lr in (0.02, 0.1):
        train(configure(world, lr=lr, cache="off"), world / f"plain-{lr}")
        assert_same_bits(world / str(lr), world / f"plain-{lr}")


def test_a_key_is_what_the_transform_reads(world):
    """The key follows from the fields that the transform asked for; other fields are free."""
    from pgn_fast.train.frozen_key import describe
    from pgn_fast.train.loader import preprocessing

    pixels = preprocessing(tiny_vit(), configure(world))
    one = lambda **changes: describe(configure(world, **changes), pixels, 1, False)
    assert one() == one(lr=0.5, epochs=9, weight_decay=0.1, batch_size=7)
    for name, value in {
        "scale": (0.5, 1.0),
        "hflip": 0.1,
        "aa": "rand-m9",
        "no_aug": False,
    }.items():
        assert one(**{name: value}) != one(), name
