"""A whole mesh in this process: the real gateway and workers around a model of two tiny layers with random weights."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headrace.colocate.main import serve
from headrace.data_lines import DataLines, data_listener
from headrace.decode.ngram import NgramDrafter
from headrace.decode.speculator import Speculator
from headrace.decode.step_cost import StepCost
from headrace.decode.worker import DecodeWorker
from headrace.engine.engine import Engine, EngineConfig
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

MODEL = "tiny"
VOCABULARY = 49152
"""The built-in model's, whose tokenizer the gateway uses."""
MAX_MODEL_LEN = 96
_namespaces = itertools.count()


@dataclass
class TinyMesh:
    """What tests look into. `engines` by worker id."""

    url: str
    engines: dict[str, Engine] = field(default_factory=dict)
    speculators: list[Speculator] = field(default_factory=list)

    def speculator(self) -> Speculator:
        """One that takes drafted tokens to cost next to nothing, so that it drafts as often as it can."""
        self.speculators.append(Speculator(NgramDrafter(), StepCost({1: 1.0, 2: 1.001}, 16), MAX_MODEL_LEN))
        return self.speculators[-1]


def tiny_engine(folder: Path, num_pages: int) -> Engine:
    """Every engine has the same weights."""
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
    torch.manual_seed(0)
    engine = Engine.load(config)
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
    speculates: bool = False,
) -> AsyncIterator[TinyMesh]:
    """A worker for each number of pages. All share one thread that computes."""
    values: dict[str, Any] = {"redis": redis_url, "namespace": f"tiny-{next(_namespaces)}", "port": 0}
    settings = Settings(**values, lease_seconds=5.0, max_ttft=600.0)
    identity = ModelIdentity(MODEL, "0" * 16, MAX_MODEL_LEN)
    tokenizer = Tokenizer.load(locate_model("smollm2").path)
    async with AsyncExitStack() as stack:
        stack.callback(tokenizer.close)
        device_thread = stack.enter_context(ThreadPoolExecutor(1))
        node = await stack.enter_async_context(join_mesh(settings, "gateway", identity))
        mesh = TinyMesh(await stack.enter_async_context(serving(settings, MODEL, tokenizer, node)))
        stopped = asyncio.Event()
        running: list[asyncio.Task[None]] = []

        async def stop() -> None:
            stopped.set()
            await asyncio.wait(running, timeout=20)
            for task in running:
                await end_task(task)
                task.result()

        for tier, pages in (("prefill", prefill_pages), ("decode", decode_pages)):
            for index, num_pages in enumerate(pages):
                name = f"{tier}-{index}"
                engine = mesh.engines[name] = tiny_engine(folder, num_pages)
                own = settings.model_copy(update={"worker_id": name})
                layout = layout_of("tiny", engine.layout, VOCABULARY)
                worker: PrefillWorker | DecodeWorker
                if tier == "decode":
                    listener = await stack.enter_async_context(data_listener("127.0.0.1", None))
                    node = await stack.enter_async_context(join_mesh(own, "decode", identity, listener.address))
                    worker = DecodeWorker(
                        node,
                        engine,
                        device_thread,
                        layout,
                        max_num_seqs=16,
                        listener=listener,
                        speculator=mesh.speculator() if speculates else None,
                    )
                else:
                    node = await stack.enter_async_context(join_mesh(own, "prefill", identity))
                    lines = await stack.enter_async_context(DataLines(node.registry, None))
                    worker = PrefillWorker(
                        node,
                        engine,
                        device_thread,
                        layout,
                        turns=OwnDevice(64),
                        max_jobs=8,
                        lease_seconds=settings.lease_seconds,
                        lines=lines,
                        wire_dtype="auto",
                    )
                running.append(asyncio.create_task(worker.run(_until(stopped), 5.0)))
        for index, num_pages in enumerate(colocate_pages):
            engine = mesh.engines[f"colocate-{index}"] = tiny_engine(folder, num_pages)
            model = LoadedModel(ModelFolder(folder, MODEL, "tiny"), engine, device_thread, identity)
            own = settings.model_copy(update={"worker_id": f"c{index}", "drain_timeout": 5.0})
            speculator = mesh.speculator() if speculates else None
            running.append(asyncio.create_task(serve(own, model, _until(stopped), speculator)))
        stack.push_async_callback(stop)
        yield mesh
