"""The processes of a local mesh: which there are, and how they are replaced while it serves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.control import Handler, Say
from headrace.errors import StartError
from headrace.settings import Settings
from headrace.supervisor import STOP_TIMEOUT_SECONDS, Child, Supervisor

MAX_WORKERS = 256
"""At a time, successors of leaving ones among them."""
MAX_TIER = 64
"""Workers of one tier."""
SPIN_COUNT = "30000"
"""How long a worker's idle OpenMP thread spins before it sleeps: a fraction of a millisecond, since others want the
core."""
LARGE_COPIES = "glibc.cpu.x86_non_temporal_threshold=262144"
"""For a worker's GLIBC_TUNABLES: copies of 256 KiB and more, KV above all, go past the caches, which
makes them up to twice as fast."""


class Fleet:
    """Makes the processes of one mesh.

    `children` are in the order in which they are stopped: gateways first, so that nothing new comes in.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        """`settings` are those of `headrace up`; `folder` is for what the processes share."""
        self.settings = settings
        self._cpu_share = folder / "cpu-share"
        self._cpu_share.write_bytes(bytes(MAX_WORKERS))
        environment = settings.as_environment()
        if settings.gateways == 1:
            self.children = [Child("gateway", "gateway", environment)]
        else:
            shared = environment | {"HEADRACE_REUSE_PORT": "true"}
            self.children = [Child(f"gateway-{index}", "gateway", shared) for index in range(settings.gateways)]
        tiers = {"colocate": 1} if settings.colocate else {"prefill": settings.prefill, "decode": settings.decode}
        for tier, count in tiers.items():
            for _ in range(count):
                self.children.append(self.worker(tier))

    @property
    def workers(self) -> list[Child]:
        """All but the gateway."""
        return [child for child in self.children if child.command != "gateway"]

    def worker(self, tier: str) -> Child:
        """One more of a tier, under the lowest number that is free; the caller adds it to `children`."""
        names = {child.name for child in self.children}
        index = next(index for index in range(MAX_WORKERS) if f"{tier}-{index}" not in names)
        slots = {child.environment["HEADRACE_CPU_SHARE"] for child in self.workers}
        slot = next(slot for n in range(MAX_WORKERS) if (slot := f"{self._cpu_share}:{n}") not in slots)
        own = {
            "GOMP_SPINCOUNT": SPIN_COUNT,
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", LARGE_COPIES),
            "HEADRACE_WORKER_ID": str(index) if tier == "colocate" else f"{tier}-{index}",
            "HEADRACE_METRICS_PORT": "0",  # whatever the environment says: they can't all have it
            "HEADRACE_CPU_SHARE": slot,
        }
        return Child(f"{tier}-{index}", tier, self.settings.as_environment() | own)

    def missing(self, tier: str, wanted: str) -> int:
        """How many workers a tier has fewer than `wanted`; negative where it has more. Raises `StartError`."""
        if tier not in ("prefill", "decode"):
            raise StartError(f"{tier} is no tier: name prefill=N, decode=N or both")
        if self.settings.colocate:
            raise StartError("this mesh is one worker that is both tiers (--colocate): there is nothing to scale")
        if not wanted.isdecimal() or not 1 <= int(wanted) <= MAX_TIER:
            raise StartError(f"{tier}={wanted}: give a number from 1 to {MAX_TIER}")
        return int(wanted) - sum(child.command == tier for child in self.workers)

    def forget(self, worker: Child) -> None:
        """It is gone: it needs no part of the cores any more, however it ended."""
        _, _, slot = worker.environment["HEADRACE_CPU_SHARE"].rpartition(":")
        with self._cpu_share.open("r+b") as file:
            file.seek(int(slot))
            file.write(b"\0")

    @property
    def patience_seconds(self) -> float:
        """How long a worker that is told to stop may take."""
        return self.settings.drain_timeout + STOP_TIMEOUT_SECONDS


def orders(fleet: Fleet, supervisor: Supervisor) -> Mapping[str, Handler]:
    """What a running mesh can be told to do, by command."""

    async def restart(arguments: Mapping[str, str], say: Say) -> None:
        """Each worker leaves when its successor serves, so that requests always have where to go."""
        for old in fleet.workers:
            new = fleet.worker(old.command)
            say(f"{old.name}: starting {new.name} in its place")
            await supervisor.add(new)
            await supervisor.remove(old, fleet.patience_seconds)
            fleet.forget(old)
            say(f"{old.name}: gone, {new.name} serves")

    async def start(tier: str, say: Say) -> None:
        new = fleet.worker(tier)
        say(f"{new.name}: starting")
        await supervisor.add(new)
        say(f"{new.name}: serves")

    async def stop(old: Child, say: Say) -> None:
        say(f"{old.name}: finishing what it holds")
        await supervisor.remove(old, fleet.patience_seconds)
        fleet.forget(old)
        say(f"{old.name}: gone")

    async def scale(arguments: Mapping[str, str], say: Say) -> None:
        """Start and stop workers until each tier named has so many: first those that come, then those that go."""
        changes = {tier: fleet.missing(tier, count) for tier, count in arguments.items()}
        await _all_of([start(tier, say) for tier, missing in changes.items() for _ in range(missing)])
        leaving: list[Child] = []
        for tier, missing in changes.items():
            workers = [child for child in fleet.workers if child.command == tier]
            leaving += workers[len(workers) + min(missing, 0) :]
        await _all_of([stop(child, say) for child in leaving])

    async def describe(arguments: Mapping[str, str], say: Say) -> None:
        """What an autoscaler needs to know, a `name=value` a line."""
        for tier in ("prefill", "decode"):
            say(f"{tier}={sum(child.command == tier for child in fleet.workers)}")
        say(f"namespace={fleet.settings.namespace}")
        say(f"redis={fleet.settings.redis}")

    return {"restart": restart, "scale": scale, "describe": describe}


async def _all_of(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """At the same time; the first failure ends all."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
