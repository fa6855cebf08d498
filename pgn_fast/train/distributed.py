"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


class Processes:
    """Joins the process group that torchrun describes in the environment, where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world > 1 and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def __enter__(self) -> Processes:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def sum(self, *values: float) -> list[float]:
        """Each value, added up over the processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, words: list[str]) -> list[str]:
        """The words of all processes, each once, sorted; nobody goes on before all are here."""
        if self.world == 1:
            return sorted(set(words))
        parts: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, words)
        return sorted({word for part in parts for word in part})
