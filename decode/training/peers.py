"""The processes that train together, one a GPU. A lone one exchanges nothing, and needs no process group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from headrace.engine.errors import EngineError


@dataclass(frozen=True)
class Peers:
    """Which of so many processes this one is."""

    rank: int = 0
    count: int = 1

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' values, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def share(self, parameters: Iterable[nn.Parameter], done: float) -> torch.Tensor:
        """Average the gradients, and hear the first process's `done`, [1] float32, in the same exchange."""
        learning = list(parameters)
        clock = learning[0].new_full((1,), done if self.rank == 0 else 0.0)
        if self.count == 1:
            return clock
        gradients = [one.grad for one in learning]
        flat = torch.cat([clock, *(one.flatten() for one in gradients if one is not None)])
        dist.all_reduce(flat)
        clock, *shared = torch.split(flat, [1, *(one.numel() for one in learning)])
        for one, gradient in zip(learning, shared, strict=True):
            one.grad = (gradient / self.count).view_as(one)
        return clock


def run_together(count: int, on_gpus: bool, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(Peers, *arguments)` in `count` new processes, each of which sees one GPU; a lone one is this process.

    Raises `EngineError` once one has failed, which ends the others.
    """
    if count == 1:
        return work(Peers(), *arguments)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(count):
                # Before the child starts: what it imports asks for the GPUs, and then counts its threads.
                os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank] if on_gpus else ""
                os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // count, 1))
                process = context.Process(target=_work, args=(Peers(rank, count), folder, on_gpus, work, arguments))
                process.start()
                processes.append(process)
            running = processes
            while running:
                wait([process.sentinel for process in running])
                if any(process.exitcode for process in running):
                    raise EngineError("one of the processes that train failed; what it says stands above")
                running = [process for process in running if process.exitcode is None]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(peers: Peers, folder: str, on_gpus: bool, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    kind, meeting = "nccl" if on_gpus else "gloo", f"file://{folder}/peers"
    dist.init_process_group(kind, init_method=meeting, rank=peers.rank, world_size=peers.count)
    work(peers, *arguments)
    peers.total(torch.zeros(1, device="cuda" if on_gpus else "cpu")).item()  # nobody leaves before the first has saved
    dist.destroy_process_group()
