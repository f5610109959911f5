"""A whole mesh in this process: the real gateway and workers around a model of two tiny layers with random weights."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headrace.colocate.main import serve
from headrace.data_lines import DataLines, data_listener
from headrace.decode.chain_choice import ThreadChain
from headrace.decode.controller import HeadCost
from headrace.decode.drafting import chain_drafter
from headrace.decode.ngram import NgramDrafter
from headrace.decode.speculator import Speculator
from headrace.decode.step_cost import Kind, StepCost
from headrace.decode.worker import DecodeWorker
from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.startup import LoadedModel
from headrace.gateway.main import serving
from headrace.gateway.tokenizer import Tokenizer
from headrace.kvtransfer.layout import layout_of
from headrace.loadtest.shapes import TINY, model_folder
from headrace.models.locate import ModelFolder, locate_model
from headrace.node import ModelIdentity, join_mesh
from headrace.prefill.turns import OwnDevice
from headrace.prefill.worker import PrefillWorker
from headrace.settings import Settings
from headrace.tasks import end_task
from tests.e2e.plain_decoder import PlainDecoder

MODEL = "tiny"
VOCABULARY = 49152
"""The built-in model's, whose tokenizer the gateway uses."""
MAX_MODEL_LEN = 96
LEASE_SECONDS = 5.0
_namespaces = itertools.count()


class FreeDrafts(StepCost):
    """Learns nothing: so that drafts go on however the machine is."""

    def observe(self, rows: int, seconds: float, kind: Kind) -> None:
        """See `StepCost`."""


@dataclass
class TinyMesh:
    """What tests look into. `engines` by worker id."""

    url: str
    engines: dict[str, Engine] = field(default_factory=dict)
    speculators: list[Speculator] = field(default_factory=list)
    workers: dict[str, PrefillWorker | DecodeWorker] = field(default_factory=dict)
    """Those of one tier, by id."""
    _running: dict[str, tuple[asyncio.Task[None], asyncio.Event, AsyncExitStack]] = field(default_factory=dict)

    async def stop(self, *names: str) -> None:
        """What SIGTERM does to workers, all at once; returns when they have left the mesh."""
        stopping = [self._running.pop(name) for name in names]
        for _, stopped, _ in stopping:
            stopped.set()
        await asyncio.wait([running for running, _, _ in stopping], timeout=20)
        for running, _, own in stopping:
            await end_task(running)
            await own.aclose()
            running.result()

    async def until_no_page_is_used(self) -> None:
        """What was under way when the last token left ends within a step or two."""
        for engine in self.engines.values():
            freed = asyncio.Event()
            engine.pool.on_freed.append(freed.set)
            async with asyncio.timeout(10):
                while engine.pool.num_in_use:
                    await freed.wait()
                    freed.clear()
            engine.pool.check_integrity()

    async def stop_all(self) -> None:
        """Those that still run."""
        if self._running:
            await self.stop(*self._running)

    def runs(self, name: str, running: asyncio.Task[None], stopped: asyncio.Event, own: AsyncExitStack) -> None:
        """A worker runs until `stopped` is set, and leaves the mesh by closing `own`."""
        self._running[name] = running, stopped, own

    def speculator(self, engine: Engine) -> Speculator:
        """One that takes drafted tokens to cost next to nothing, so that it drafts as often as it can."""
        drafter, cost = chain_drafter(engine), FreeDrafts({1: 1.0, 2: 1.001}, 16)
        chain = ThreadChain(drafter, HeadCost({1: 1e-6})) if drafter is not None else None
        self.speculators.append(Speculator(NgramDrafter(), cost, MAX_MODEL_LEN, chain))
        return self.speculators[-1]


def tiny_engine(folder: Path, num_pages: int, drafts_itself: bool = False) -> Engine:
    """Every engine has the same weights, and so has its draft model, if it is to have one."""
    config = EngineConfig(
        model_folder(TINY | {"vocab_size": VOCABULARY}, folder),
        device="cpu",
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        cpu_threads=1,
        random_weights=True,
        kv_cache_bytes=num_pages * 2 * 2 * 16 * 2 * 16 * 4,  # layers, K and V, page size, heads, head size, bytes
    )
    if drafts_itself:
        assert config.kv_cache_bytes is not None
        config = replace(config, draft_model=config.model_folder, kv_cache_bytes=2 * config.kv_cache_bytes)
    torch.manual_seed(0)
    engine = Engine.load(config)
    if engine.draft is not None:
        assert isinstance(engine.draft.model, FusedDecoder)
        assert isinstance(engine.model, FusedDecoder)
        engine.draft.model.weights = engine.model.weights
    assert engine.pool.num_pages == num_pages
    return engine


async def _until(event: asyncio.Event) -> None:
    await event.wait()


@asynccontextmanager
async def tiny_mesh(
    redis_url: str,
    folder: Path,
    *,
    prefill_pages: Sequence[int] = (),
    decode_pages: Sequence[int] = (),
    colocate_pages: Sequence[int] = (),
    shares_passes: bool = False,
    speculates: bool = False,
    most_prompt_tokens: int = 0,
    drafts_itself: bool = False,
    drain_timeout: float = 5.0,
) -> AsyncIterator[TinyMesh]:
    """A worker for each number of pages. All share one thread that computes.

    `shares_passes`: colocated workers do, as on a GPU. `drafts_itself`: the model is its own draft model.
    """
    values: dict[str, Any] = {"redis": redis_url, "namespace": f"tiny-{next(_namespaces)}", "port": 0}
    settings = Settings(**values, lease_seconds=LEASE_SECONDS, max_ttft=600.0)
    identity = ModelIdentity(MODEL, "0" * 16, MAX_MODEL_LEN)
    tokenizer = Tokenizer.load(locate_model("smollm2").path)
    async with AsyncExitStack() as stack:
        stack.callback(tokenizer.close)
        device_thread = stack.enter_context(DeviceThread())
        node = await stack.enter_async_context(join_mesh(settings, "gateway", identity))
        mesh = TinyMesh(await stack.enter_async_context(serving(settings, MODEL, tokenizer, node)))
        for tier, pages in (("prefill", prefill_pages), ("decode", decode_pages)):
            for index, num_pages in enumerate(pages):
                name = f"{tier}-{index}"
                engine = mesh.engines[name] = tiny_engine(folder, num_pages, drafts_itself)
                values = {"worker_id": name}
                layout = layout_of("tiny", engine.layout, VOCABULARY)
                stopped, own = asyncio.Event(), await stack.enter_async_context(AsyncExitStack())
                worker: PrefillWorker | DecodeWorker
                if tier == "decode":
                    listener = await own.enter_async_context(data_listener("127.0.0.1", None))
                    joining = join_mesh(settings.model_copy(update=values), "decode", identity, listener.address)
                    node = await own.enter_async_context(joining)
                    worker = DecodeWorker(
                        node,
                        engine,
                        device_thread,
                        layout,
                        max_num_seqs=16,
                        listener=listener,
                        lines=await own.enter_async_context(DataLines(node.registry, None)),
                        speculator=mesh.speculator(engine) if speculates else None,
                        most_prompt_tokens=most_prompt_tokens,
                    )
                else:
                    joining = join_mesh(settings.model_copy(update=values), "prefill", identity)
                    node = await own.enter_async_context(joining)
                    worker = PrefillWorker(
                        node,
                        engine,
                        layout,
                        turns=OwnDevice(engine, device_thread, 64),
                        max_jobs=8,
                        lease_seconds=settings.lease_seconds,
                        lines=await own.enter_async_context(DataLines(node.registry, None)),
                        wire_dtype="auto",
                    )
                mesh.workers[name] = worker
                mesh.runs(name, asyncio.create_task(worker.run(_until(stopped), drain_timeout)), stopped, own)
        for index, num_pages in enumerate(colocate_pages):
            name = f"colocate-{index}"
            engine = mesh.engines[name] = tiny_engine(folder, num_pages, drafts_itself)
            if shares_passes:
                decoder: Any = PlainDecoder(engine, settings.max_num_seqs)
                engine.graph_decoder = decoder
            model = LoadedModel(ModelFolder(folder, MODEL, "tiny"), engine, device_thread, identity)
            values = {"worker_id": f"c{index}", "drain_timeout": drain_timeout}
            speculator = mesh.speculator(engine) if speculates else None
            stopped = asyncio.Event()
            serving_both = serve(settings.model_copy(update=values), model, _until(stopped), speculator)
            mesh.runs(name, asyncio.create_task(serving_both), stopped, AsyncExitStack())
        stack.push_async_callback(mesh.stop_all)
        yield mesh
