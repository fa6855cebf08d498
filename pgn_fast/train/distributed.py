"""The processes of a run: one, or as many as torchrun, SLURM or MPI started."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import (
    init_distributed_device_so,
    is_distributed_env,
    world_info_from_env,
)

from ..errors import UserError, as_user_error, brief


def refuse_many(what: str) -> None:
    """Raises UserError: a launcher that timm knows has started ``what`` as several processes."""
    if (world := world_info_from_env()[2]) > 1:
        raise UserError(
            f"{what} runs in one process, and {world} were started: start it without torchrun or "
            "mpirun, and under SLURM with srun --ntasks=1."
        )


class Processes:
    """Joins the process group that the launcher describes in the environment, where there is one.

    timm reads the environment: torchrun's variables, or SLURM's or MPI's with MASTER_ADDR and
    MASTER_PORT. Each process gets the accelerator of its local rank. A group that the user's own
    script has made is taken as it is, and stays.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._joined = device, False
        self._local_rank, self.rank, self.world = world_info_from_env()
        if dist.is_available() and dist.is_initialized():
            self.world, self.rank = dist.get_world_size(), dist.get_rank()
        if self.world == 1:
            self.rank = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def __enter__(self) -> Processes:
        if self.world > 1 and not dist.is_initialized():
            with as_user_error(RuntimeError):
                joined = self._join()
            self.world, self.rank = joined["world_size"], joined["global_rank"]
            self.device, self._joined = torch.device(joined["device"]), True
        elif self.device.type == "cuda":
            if self.device.index is None:  # set_device wants a number
                self.device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.set_device(self.device)
        return self

    def _join(self) -> dict[str, Any]:
        if not is_distributed_env():
            # timm reads MPI's variables too, but begins by torchrun's and SLURM's only
            numbers = {"RANK": self.rank, "LOCAL_RANK": self._local_rank, "WORLD_SIZE": self.world}
            os.environ |= {name: str(number) for name, number in numbers.items()}
        try:
            return init_distributed_device_so(self.device.type)
        except RuntimeError as error:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                raise
            # torch's issue 135712: the store of the processes before is used again
            raise RuntimeError(
                f"{brief(error)}. After a restart processes find each other where torchrun runs "
                "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
            ) from error

    def __exit__(self, *exception: object) -> None:
        if self._joined:
            dist.destroy_process_group()

    def sum(self, *values: float) -> list[float]:
        """Each value, added up over the processes."""
        if self.world == 1:
            return list(values)
        # float64, but for Apple's devices, which have none
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def collect(self, thing: Any) -> list[Any]:
        """One thing of each process, in the order of ranks; every process gets all."""
        if self.world == 1:
            return [thing]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, thing)
        return parts

    def gather(self, words: list[str]) -> list[str]:
        """The words of all processes, each once, sorted; no process goes on before all are here."""
        return sorted({word for part in self.collect(words) for word in part})
