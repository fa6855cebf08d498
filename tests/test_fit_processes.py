"""``pgn_fast.fit`` in several processes: the one run that a single process makes, or a sentence."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from given_world import OPTIONS, Batches, model, pictures, tensors
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, TensorDataset

import pgn_fast
from pgn_fast.adapters import read_adapter
from pgn_fast.errors import UserError
from pgn_fast.train.distributed import Processes
from pgn_fast.train.given_loader import GivenLoader

BATCH = 8  # of all processes together
PLAIN = {**OPTIONS, "opt": "sgd", "no_aug": True, "epochs": 2, "head_init": "zero"}


def data(count):
    return TensorDataset(*tensors(pictures(count)))


def loader(count, rank, world, shuffle=False, in_batches=False):
    """The data of one process as people's scripts load them."""
    images = data(count)
    if world == 1:
        return DataLoader(images, BATCH)
    sampler = DistributedSampler(images, world, rank, shuffle=shuffle)
    if in_batches:
        inner = BatchSampler(sampler, BATCH // world, drop_last=False)
        return DataLoader(images, batch_sampler=inner)
    return DataLoader(images, BATCH // world, sampler=sampler)


def train(kind, rank, world, output):
    """One process of a script."""
    if kind == "own group":  # made by the script, which torchrun did not start
        dist.init_process_group("gloo", rank=rank, world_size=world)
    if kind == "data sets":
        splits = data(23), data(7)
    else:
        splits = loader(23, rank, world, in_batches=kind == "in batches"), loader(7, rank, world)
    options = {**PLAIN, "batch_size": BATCH // world}
    result = pgn_fast.fit(model(), *splits, output=output, **options)
    assert (result.train["images"], result.validation["images"]) == (23, 7)
    if kind == "own group":
        dist.barrier()  # it is still there
        dist.destroy_process_group()


def torn(kind, rank, world, output):
    """A loader that ends an epoch early in one of the processes."""
    images = loader(24, rank, world)
    if rank == 1:
        short = Batches(list(images)[:-1])
        short.sampler, short.dataset = images.sampler, images.dataset
        short.__class__ = type("Short", (Batches,), {"__len__": lambda self: 3})
        images = short
    try:
        pgn_fast.fit(model(), images, output=output, **{**PLAIN, "batch_size": BATCH // world})
    except Exception as error:
        Path(f"{output}.{rank}").write_text(f"{type(error).__name__}: {error}")


def _rank(work, kind, rank, world, port, output, told):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if told:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        os.environ |= dict(zip(names, map(str, (rank, rank, world)), strict=True))
    work(kind, rank, world, output)


@pytest.fixture
def started(monkeypatch):
    """Runs a script in two processes; their exit codes."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgn_fast.train.loop", "timm", "yaml"])

    def run(work, kind, output, told=True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            context.Process(target=_rank, args=(work, kind, rank, 2, port, output, told))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        return [process.exitcode for process in ranks]

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the same steps."""
    root = tmp_path_factory.mktemp("alone")
    found = {}
    for kind in ("data sets", "loaders"):
        train(kind, 0, 1, root / kind)
        found[kind] = read_adapter(root / kind / "last")[1]
    return found


@pytest.mark.parametrize("kind", ["data sets", "loaders", "in batches", "own group"])
def test_two_processes_are_one(tmp_path, started, alone, kind):
    """23 images in steps of 8: the sampler repeats one, and the parts are uneven."""
    assert started(train, kind, tmp_path / "two", told=kind != "own group") == [0, 0]
    two = read_adapter(tmp_path / "two" / "last")[1]
    one = alone["data sets" if kind == "data sets" else "loaders"]
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-6, atol=1e-6)


def test_a_loader_that_ends_early_ends_all_processes(tmp_path, started):
    assert started(torn, "", tmp_path / "run") == [0, 0]
    first, second = (Path(f"{tmp_path / 'run'}.{rank}").read_text() for rank in range(2))
    assert "gave 2 batches, its len() is 3: of several processes" in second
    assert first.startswith("TrainingStopped: another process of this run has ended")


class Ranks(Processes):
    """This process as one of several that were never started."""

    def __init__(self, rank, world, others=()):
        self.rank, self.world, self.others = rank, world, list(others)

    def collect(self, thing):
        return [thing, *self.others] if self.others else [thing] * self.world


class Sized(Dataset):
    def __len__(self):
        return 7


@pytest.mark.parametrize(
    "sampler, processes, message",
    [
        (None, Ranks(0, 2), "with 2 processes a loader needs torch's DistributedSampler"),
        ((1, 0), Ranks(1, 2), "num_replicas=1 and rank=0, this is process 1 of 2"),
        ((2, 0), Ranks(1, 2), "num_replicas=2 and rank=0, this is process 1 of 2"),
        ((2, 0), Ranks(0, 1), "num_replicas=2 and rank=0, this is process 0 of 1"),
        ((2, 0), Ranks(0, 2, [3]), "the loaders of the processes have 2, 3 batches"),
    ],
)
def test_processes_that_would_see_other_images_are_refused(sampler, processes, message):
    images = Sized()
    sampler = sampler and DistributedSampler(images, *sampler)
    given = GivenLoader(DataLoader(images, 2, sampler=sampler), "it", "multiclass")
    with pytest.raises(UserError, match=message):
        given.batches(0, processes, paces=True)


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_a_distributed_sampler_repeats_comes_once(shuffle):
    images, _ = tensors(pictures(7))
    seen = []
    for rank in (0, 1):
        given = GivenLoader(loader(7, rank, 2, shuffle), "it", "multiclass")
        seen += list(given.batches(0, Ranks(rank, 2)))
    places = torch.cat([batch.indices for batch in seen])
    assert sorted(places.tolist()) == list(range(7))
    if not shuffle:
        assert torch.equal(torch.cat([batch.images for batch in seen]), images[places])


@pytest.mark.parametrize(
    "claims, told", [(2, "gave more batches, its len"), (3, None), (5, "gave 3")]
)
def test_a_wrong_length_is_said_once(claims, told):
    images, labels = tensors(pictures(6))
    batches = Batches([(images[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)])
    batches.__class__ = type("Claims", (Batches,), {"__len__": lambda self: claims})
    given = GivenLoader(batches, "it", "multiclass").batches(0, Ranks(0, 1), paces=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [sum(len(b.labels) for b in given) for _ in range(2)] == [6, 6]
    assert [told in str(w.message) for w in said] == ([True] if told else [])
