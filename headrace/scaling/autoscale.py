"""`headrace autoscale`: look, decide, have it done; every few seconds until stopped."""

from __future__ import annotations

import argparse
import asyncio
import logging
import time

from headrace.errors import StartError
from headrace.node import DEFAULT_REDIS, until_stopped
from headrace.redis_client import Keys, RedisError, connect
from headrace.scaling.executors import DockerCompose, Executor, Kubernetes, LocalProcesses
from headrace.scaling.policy import TIERS, Bounds, Fleet, ScaledTier, Signals, Targets, TierState, decide
from headrace.scaling.signals import Look, MeshReader, signals_between
from headrace.tasks import end_task

log = logging.getLogger(__name__)

DEFAULT_NAMESPACE = "headrace"


class Autoscaler:
    """Keeps the policy's memory. What somebody else changed meanwhile counts as decided."""

    def __init__(
        self, reader: MeshReader, executor: Executor, targets: Targets, bounds: dict[ScaledTier, Bounds], dry_run: bool
    ) -> None:
        self._reader = reader
        self._executor = executor
        self._targets = targets
        self._bounds = bounds
        self._dry_run = dry_run
        self._before: Look | None = None
        self._fleet: Fleet = {}

    async def step(self) -> None:
        """One look, and what follows from it. Trouble with Redis or the executor is logged; the next look may do."""
        try:
            look = await self._reader.look()
        except RedisError as error:
            log.warning("Redis is away, nothing is changed: %s", error)
            self._before = None
            return
        before, self._before = self._before, look
        if before is None:
            return
        try:
            await self._apply(look.at, signals_between(before, look))
        except StartError as error:
            log.warning("%s", error)

    async def _apply(self, now: float, signals: Signals) -> None:
        current = await self._executor.current()
        for tier in TIERS:
            if tier not in self._fleet:
                self._fleet[tier] = TierState(current[tier])
            elif self._fleet[tier].workers != current[tier] and not self._dry_run:
                self._fleet[tier] = TierState(current[tier], now)
        log.debug("%s", signals)
        fleet = decide(now, self._fleet, signals, self._targets, self._bounds)
        changes = {tier: fleet[tier].workers for tier in TIERS if fleet[tier].workers != self._fleet[tier].workers}
        if not changes:
            self._fleet = fleet
            return
        log.info(
            "%s (prefill %.0f %% busy, %.0f tokens wait; decode %.0f %% of pages, %.0f ms a token)",
            ", ".join(f"{tier} {self._fleet[tier].workers} -> {count}" for tier, count in changes.items()),
            signals.prefill_busy * 100,
            signals.backlog_tokens,
            signals.pages_in_use * 100,
            signals.inter_token * 1000,
        )
        if not self._dry_run:
            await self._executor.scale(changes)
        self._fleet = fleet  # decided only once it could be done


async def autoscale(options: argparse.Namespace) -> None:
    """Until SIGTERM or SIGINT. Raises `StartError` where the executor can't be used at all."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    executor: Executor
    redis, namespace = options.redis or DEFAULT_REDIS, options.namespace or DEFAULT_NAMESPACE
    match options.executor:
        case "local":
            executor = local = LocalProcesses(options.port)
            described = await local.describe()
            redis, namespace = described["redis"], described["namespace"]
        case "compose":
            executor = DockerCompose(options.compose_file)
        case _:
            executor = Kubernetes(options.kubernetes_namespace)
    await executor.current()
    bounds: dict[ScaledTier, Bounds] = {"prefill": Bounds(*options.prefill), "decode": Bounds(*options.decode)}
    client = connect(redis)
    reader = MeshReader(client, Keys(namespace), time.monotonic)
    scaler = Autoscaler(reader, executor, Targets(options.ttft, options.itl), bounds, options.dry_run)
    looking = asyncio.create_task(_look_for_ever(scaler, options.every))
    stopping = asyncio.create_task(until_stopped())
    try:
        await asyncio.wait([looking, stopping], return_when=asyncio.FIRST_COMPLETED)
        if looking.done():
            looking.result()
    finally:
        await end_task(looking)
        await end_task(stopping)
        await client.aclose()


async def _look_for_ever(scaler: Autoscaler, every: float) -> None:
    while True:
        await scaler.step()
        await asyncio.sleep(every)
