"""Two processes compute what one would: gradients, BatchNorm, scores, uneven batches, stops."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from small_world import MODEL, tiny_vit_kwargs, write_images

from pgn_fast.adapters import read_adapter
from pgn_fast.cli import main
from pgn_fast.train import checkpoints
from pgn_fast.train.distributed import Processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    # 23 images: the last two batches of 8 are shared, and the parts of two processes uneven
    write_images(root / "data" / "train", 8)
    (root / "data" / "train" / "red" / "7.png").unlink()
    write_images(root / "data" / "val", 3, seed=1)
    tiny_vit_kwargs(root)
    return root


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
MPIRUN = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")


def _rank(rank, world, port, words, output, launcher):
    """One process of a run, as a launcher starts it; port None: none is told."""
    os.environ |= dict(zip(launcher, map(str, (rank, rank, world)), strict=True))
    if port is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with open(f"{output}.{rank}", "w") as file, redirect_stdout(file), redirect_stderr(file):
        code = main(words)
    sys.exit(code)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a command in as many processes; what each prints is in ``printed(rank)``."""
    # the processes import this module by the name that pytest gave it
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])
    # a server that has imported everything, and forks: seconds less a process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgn_fast.train.loop", "timm", "yaml"])

    def begin(count, *words, launcher=TORCHRUN, meet=True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = (port if meet else None, list(map(str, words)), tmp_path / "printed", launcher)
        ranks = [context.Process(target=_rank, args=(rank, count, *given)) for rank in range(count)]
        for process in ranks:
            process.start()
        return ranks

    return begin


@pytest.fixture
def finished(start, tmp_path):
    def run(count, *words, **options):
        ranks = start(count, *words, **options)
        for process in ranks:
            process.join()
        printed = (tmp_path / "printed.0").read_text()
        assert [process.exitcode for process in ranks] == [0] * count, printed
        return printed

    return run


def flags(world, *more):
    kwargs = [f"{k}={v!r}" for k, v in tiny_vit_kwargs(world).items()]
    return [
        *("train", world / "data", "--model", MODEL, "--model-kwargs", *kwargs),
        *("--num-prompts", "2", "--library-size", "4", "--device", "cpu", "--head-init", "zero"),
        *("--opt", "sgd", "--lr", "0.05", "--no-aug", "--epochs", "2", "-j", "0", *more),
    ]


def history(folder):
    """Epoch, rate, losses and accuracies of each epoch."""
    lines = (folder / "history.csv").read_text().splitlines()[1:]
    return [[float(x) for x in line.split(",")[:6]] for line in lines]


def test_two_processes_are_one(world, tmp_path, finished):
    """PGN, whose BatchNorm sees the images of both: the adapters and every row of the history."""
    for processes, batch in ((1, 8), (2, 4)):
        output = tmp_path / str(processes)
        finished(processes, *flags(world, "--method", "pgn", "-b", batch, "--output", output))
    one, two = (read_adapter(tmp_path / name / "last")[1] for name in "12")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-6, atol=1e-6)
    for row, row2 in zip(*(history(tmp_path / n) for n in "12"), strict=True):
        assert row == pytest.approx(row2, rel=1e-5)

    # and the same figures from eval, each image once, by one process as by two
    words = ["eval", tmp_path / "1", world / "data", "--device", "cpu"]
    alone, both = finished(1, *words), finished(2, *words)
    assert "9 of 9 images" in alone and alone == both


def test_other_launchers_start_the_run_that_torchrun_does(world, tmp_path, start, finished):
    words = flags(world, "--method", "vpt-shallow", "-b", "4", "--output")
    finished(2, *words, tmp_path / "torchrun")
    one = read_adapter(tmp_path / "torchrun" / "last")[1]
    for name, launcher in (("srun", SRUN), ("mpirun", MPIRUN)):
        finished(2, *words, tmp_path / name, launcher=launcher)
        two = read_adapter(tmp_path / name / "last")[1]
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("launcher", [SRUN, MPIRUN], ids=["srun", "mpirun"])
def test_a_launcher_that_tells_no_address_is_one_sentence(world, tmp_path, start, launcher):
    words = flags(world, "--method", "vpt-shallow", "-b", "4", "--output")
    for rank in start(2, *words, tmp_path / "lost", launcher=launcher, meet=False):
        rank.join()
        assert rank.exitcode == 2
    assert "MASTER_ADDR" in (tmp_path / "printed.0").read_text()
    assert "Traceback" not in (tmp_path / "printed.0").read_text()
    assert not (tmp_path / "lost").exists()


def test_a_killed_process_ends_the_others_and_the_run_resumes(world, tmp_path, start, finished):
    more = ["--method", "vpt-shallow", "-b", "2", "--prompt-dropout", "0.2"]
    more += ["--recovery-interval", "2", "--log-interval", "1"]
    finished(2, *flags(world, *more, "--output", tmp_path / "whole"))
    first, second = start(2, *flags(world, *more, "--output", tmp_path / "torn"))
    while not (tmp_path / "torn" / "checkpoint.pt").exists() and first.is_alive():
        time.sleep(0.01)
    second.kill()
    first.join(timeout=60)
    assert first.exitcode == 1
    line = (tmp_path / "printed.0").read_text().strip().splitlines()[-1]
    assert "another process of this run has ended" in line and "the last good checkpoint is" in line

    assert len(checkpoints.load(tmp_path / "torn")["processes"]) == 2
    finished(2, "train", "--resume", tmp_path / "torn", "--device", "cpu")
    one, two = (read_adapter(tmp_path / name / "last")[1] for name in ("whole", "torn"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(AssertionError, match=r"the run has 2 process\(es\), this is one of 1"):
        finished(1, "train", "--resume", tmp_path / "torn", "--epochs", "3")


def test_cuda_without_a_number_is_the_current_gpu(monkeypatch):
    """``torch.cuda.set_device`` refuses a device that has none, which ``--device cuda`` is."""
    taken = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with Processes(torch.device("cuda")) as processes:
        assert processes.device == torch.device("cuda:1")
    with Processes(torch.device("cuda:0")) as processes:
        assert processes.device == torch.device("cuda:0")
    assert taken == [torch.device("cuda:1"), torch.device("cuda:0")]
