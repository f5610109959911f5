"""A mesh in this process, whose decode workers can be stopped in the middle of a step, and die."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from headrace.data_lines import DataLines, data_listener
from headrace.decode.worker import DecodeWorker
from headrace.engine.device_thread import DeviceThread
from headrace.gateway.main import serving
from headrace.gateway.tokenizer import Tokenizer
from headrace.kvtransfer.layout import layout_of
from headrace.models.locate import locate_model
from headrace.node import ModelIdentity, join_mesh
from headrace.prefill.turns import OwnDevice
from headrace.prefill.worker import PrefillWorker
from headrace.settings import Settings
from headrace.tasks import end_task
from headrace.telemetry.endpoint import Endpoint, worker_endpoint
from tests.e2e.tiny_mesh import MAX_MODEL_LEN, MODEL, VOCABULARY, tiny_engine

PAGES = 12
STEPS = 5
"""After which the first decode worker that makes so many stalls, if one is to."""
_namespaces = itertools.count()


@dataclass
class DyingMesh:
    """What tests look into and do."""

    url: str
    settings: Settings
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    workers: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    armed: bool = False
    """Whether a worker may stall: not before the gateway's own warm-up is over."""
    stalled: str = ""
    """Which did."""
    has_stalled: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    """Lets the stalled worker's thread end."""

    async def kill(self, name: str) -> None:
        """The worker ends, and with it all that it held."""
        task = self.workers.pop(name)
        task.cancel()
        self.go_on.set()
        await end_task(task)


class Stall:
    """See `Alongside`: computes nothing, and one worker no more after a few steps."""

    def __init__(self, mesh: DyingMesh, name: str) -> None:
        self._mesh = mesh
        self._name = name
        self._steps = itertools.count()
        self._loop = asyncio.get_running_loop()

    async def before_step(self, requests: int) -> None:
        """At once."""

    def start_step(self, batch: object) -> bool:
        """Nothing goes with it."""
        return False

    def stepped(self, running: int, ended: bool) -> None:
        """Wait, if it is time."""
        mesh = self._mesh
        if mesh.armed and running and next(self._steps) >= STEPS and mesh.stalled in ("", self._name):
            mesh.stalled = self._name
            self._loop.call_soon_threadsafe(mesh.has_stalled.set)
            mesh.go_on.wait(60)

    def abandoned(self) -> None:
        """Nothing to do."""


async def _for_ever() -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def dying_mesh(redis_url: str, folder: Path, decode: int = 1, stalls: bool = False) -> AsyncIterator[DyingMesh]:
    """One prefill and some decode workers; `stalls`: one of them makes no more than `STEPS` steps."""
    settings = Settings(
        redis=redis_url, namespace=f"dying-{next(_namespaces)}", port=0, lease_seconds=5.0, worker_id="gateway-0"
    )
    identity = ModelIdentity(MODEL, "0" * 16, MAX_MODEL_LEN)
    tokenizer = Tokenizer.load(locate_model("smollm2").path)
    async with AsyncExitStack() as stack:
        stack.callback(tokenizer.close)
        node = await stack.enter_async_context(join_mesh(settings, "gateway", identity))
        mesh = DyingMesh(await stack.enter_async_context(serving(settings, MODEL, tokenizer, node)), settings)
        stack.callback(mesh.go_on.set)

        async def prefill(name: str, own: Settings) -> None:
            async with worker_endpoint(own, "prefill") as endpoint:
                mesh.endpoints[name] = endpoint
                engine = tiny_engine(folder, PAGES)
                async with (
                    join_mesh(own, "prefill", identity, endpoint=endpoint) as node,
                    DataLines(node.registry, None) as lines,
                ):
                    layout = layout_of("tiny", engine.layout, VOCABULARY)
                    with DeviceThread() as thread:
                        turns = OwnDevice(engine, thread, 64)
                        worker = PrefillWorker(node, engine, layout, turns, 8, own.lease_seconds, lines, "auto")
                        await worker.run(_for_ever(), 0.0)

        async def decoding(name: str, own: Settings) -> None:
            async with worker_endpoint(own, "decode") as endpoint, data_listener("127.0.0.1", None) as listener:
                mesh.endpoints[name] = endpoint
                engine = tiny_engine(folder, PAGES)
                async with (
                    join_mesh(own, "decode", identity, listener.address, endpoint) as node,
                    DataLines(node.registry, None) as lines,
                ):
                    layout = layout_of("tiny", engine.layout, VOCABULARY)
                    with DeviceThread() as thread:
                        stall = Stall(mesh, name) if stalls else None
                        worker = DecodeWorker(node, engine, thread, layout, 16, listener, lines, alongside=stall)
                        await worker.run(_for_ever(), 0.0)

        for name, run in [("prefill-0", prefill), *((f"decode-{index}", decoding) for index in range(decode))]:
            own = settings.model_copy(update={"worker_id": name})
            mesh.workers[name] = asyncio.create_task(run(name, own))
        try:
            yield mesh
        finally:
            for name in list(mesh.workers):
                await mesh.kill(name)
