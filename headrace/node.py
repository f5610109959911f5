"""What every process of a mesh does first and last: connect to Redis, open its mailbox, register, and leave again."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import redis.asyncio
from prometheus_client import CollectorRegistry

from headrace import __version__
from headrace.finished_log import FinishedLog
from headrace.mesh import Mesh
from headrace.queue import RequestQueue
from headrace.redis_client import Keys, RedisError, connect
from headrace.redis_url import without_password
from headrace.registry import Member, Registry, Tier
from headrace.settings import Settings, SettingsError
from headrace.tasks import end_task
from headrace.telemetry.endpoint import Endpoint
from headrace.telemetry.telemetry import Telemetry
from headrace.telemetry.worker_metrics import WorkerHistograms

log = logging.getLogger(__name__)

DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
READY_FD = "HEADRACE_READY_FD"
"""File descriptor on which a supervisor waits for a byte, which says that this process serves."""


@dataclass(frozen=True)
class ModelIdentity:
    """What the processes of a mesh must agree on."""

    name: str
    fingerprint: str
    max_model_len: int


@dataclass(frozen=True)
class Node:
    """This process's place in the mesh."""

    id: str
    registry: Registry
    mesh: Mesh
    queue: RequestQueue
    redis: redis.asyncio.Redis
    keys: Keys
    finished: FinishedLog
    telemetry: Telemetry


@asynccontextmanager
async def join_mesh(
    settings: Settings, tier: Tier, model: ModelIdentity, data_address: str = "", endpoint: Endpoint | None = None
) -> AsyncIterator[Node]:
    """Be a member of the mesh inside the block.

    `data_address` is where this process takes data lines, if it does, and `endpoint` where it shows its metrics.

    Raises `SettingsError` where Redis can't be reached, `MeshMismatch` where this process doesn't fit the mesh and
    `TelemetryError`.
    """
    url = settings.redis or DEFAULT_REDIS
    client, registry_client = connect(url), connect(url, patient=False)
    mesh = Mesh(settings.bind, settings.mesh_key, settings.advertise)
    telemetry: Telemetry | None = None
    try:
        keys = Keys(settings.namespace)
        member = Member(
            id=settings.worker_id or f"{tier}-{secrets.token_hex(3)}",
            epoch=time.time_ns(),
            tier=tier,
            address=mesh.address,
            data_address=data_address,
            metrics_address=endpoint.address if endpoint else "",
            version=__version__,
            model=model.name,
            model_fingerprint=model.fingerprint,
            max_model_len=model.max_model_len,
        )
        histograms = endpoint.histograms if endpoint else WorkerHistograms(CollectorRegistry())
        telemetry = Telemetry(tier, member.id, settings.namespace, model.name, histograms)
        registry = Registry(registry_client, keys, member, settings.lease_seconds)
        mesh.follow(registry)
        queue = RequestQueue(client, keys)
        try:
            await queue.create()
            await registry.join()
        except RedisError as error:
            raise SettingsError(
                f"can't reach Redis at {without_password(url)}: {error}. Start one, or name another with --redis"
            ) from error
        block = asyncio.current_task()
        assert block is not None
        heartbeat = asyncio.create_task(registry.run(), name="registry")
        heartbeat.add_done_callback(lambda task: None if task.cancelled() else block.cancel())
        if endpoint is not None:
            endpoint.memberships.append(registry)
        try:
            yield Node(member.id, registry, mesh, queue, client, keys, FinishedLog(client, keys), telemetry)
        except asyncio.CancelledError:
            if heartbeat.done():  # a process that nobody can see any more must not go on as if it could be seen
                heartbeat.result()
            raise
        finally:
            await end_task(heartbeat)
            try:
                await registry.leave()
            except RedisError as error:
                log.warning("could not leave the registry, the lease will end by itself: %s", error)
    finally:
        if telemetry is not None:
            await telemetry.close()
        mesh.close()
        await client.aclose()
        await registry_client.aclose()


async def until_stopped() -> None:
    """Return at SIGTERM or SIGINT, or when the supervisor that started this process is gone.

    Called when the process serves, of which the supervisor is told.
    """
    if (ready_fd := os.environ.pop(READY_FD, None)) is not None:
        with suppress(BrokenPipeError):
            os.write(int(ready_fd), b"1")
        os.close(int(ready_fd))
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    supervised = os.environ.get("HEADRACE_SUPERVISED") == "1"
    if supervised:  # our standard input is a pipe from the supervisor: it ends when the supervisor does
        loop.add_reader(sys.stdin.fileno(), stopped.set)
    try:
        await stopped.wait()
    finally:
        if supervised:
            loop.remove_reader(sys.stdin.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
