"""The processes of a local mesh: which there are, and how they are replaced while it serves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from headrace.control import Handler, Say
from headrace.settings import Settings
from headrace.supervisor import STOP_TIMEOUT_SECONDS, Child, Supervisor

MAX_WORKERS = 256
"""At a time, successors of leaving ones among them."""
SPIN_COUNT = "30000"
"""How long a worker's idle OpenMP thread spins before it sleeps: a fraction of a millisecond, since others want the
core."""
LARGE_COPIES = "glibc.cpu.x86_non_temporal_threshold=4194304"
"""For a worker's GLIBC_TUNABLES: copies of 4 MiB and more (KV alone is that large) go past the
caches, which is half as fast again."""


class Fleet:
    """Makes the processes of one mesh.

    `children` are in the order in which they are stopped: the gateway first, so that nothing new comes in.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        """`settings` are those of `headrace up`; `folder` is for what the processes share."""
        self._settings = settings
        self._cpu_share = folder / "cpu-share"
        self._cpu_share.write_bytes(bytes(MAX_WORKERS))
        self.children = [Child("gateway", "gateway", settings.as_environment())]
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
            "HEADRACE_CPU_SHARE": slot,
        }
        return Child(f"{tier}-{index}", tier, self._settings.as_environment() | own)

    def forget(self, worker: Child) -> None:
        """It is gone: it needs no part of the cores any more, however it ended."""
        _, _, slot = worker.environment["HEADRACE_CPU_SHARE"].rpartition(":")
        with self._cpu_share.open("r+b") as file:
            file.seek(int(slot))
            file.write(b"\0")

    @property
    def patience_seconds(self) -> float:
        """How long a worker that is told to stop may take."""
        return self._settings.drain_timeout + STOP_TIMEOUT_SECONDS


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

    return {"restart": restart}
