"""Processes that train one network together, as `torchrun` starts them."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from model.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of the processes this one is.

    Args:
        rank: From 0; rank 0 writes and speaks.
        count: How many there are.
        local: Number of this process on its machine, which is that of its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process raises a flag; all processes must ask."""
        if self.count == 1:
            return flag
        raised = torch.tensor([float(flag)])
        if distributed.get_backend() == "nccl":
            raised = raised.cuda()
        distributed.all_reduce(raised)
        return bool(raised.item() > 0)

    def gather(self, rows: Tensor) -> Tensor:
        """Stack the rows of all ranks, (N, ...) to (ranks * N, ...), with gradients."""
        if self.count == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows)
        return gathered

    def wait(self) -> None:
        """Wait for all others."""
        if self.count > 1:
            distributed.barrier()


class _Gather(torch.autograd.Function):
    """all_gather whose gradient comes back.

    Every rank computes the loss of the whole batch, so the sum of their gradients is ``count``
    times the gradient of that loss; the mean that data parallelism then takes over ranks
    makes it right.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        context.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        start = distributed.get_rank() * context.rows
        return total[start : start + context.rows]


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes where `torchrun` started several; alone otherwise.

    Raises:
        TrainingError: The environment names several processes but not which one this is.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    if "RANK" not in os.environ:
        raise TrainingError(
            f"expected torchrun's variables beside WORLD_SIZE={count}, got none: start several "
            "processes with torchrun, or unset WORLD_SIZE"
        )
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    # The others wait while the first one asks a teacher about every crop, or measures.
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local)
    try:
        yield Ranks(distributed.get_rank(), count, local)
        distributed.barrier()  # leave together: nobody's connections end under another's hands
    finally:
        # What still holds the group, such as a parallel network in a cycle, goes before it does: at
        # the end of the process its threads would be torn down in any order.
        gc.collect()
        distributed.destroy_process_group()
