"""`headrace colocate`: a prefill and a decode worker in one process.

They are the same workers as elsewhere, each with its own place in the mesh, so that others may hand over to this one
and it to others. What differs: both use one engine and one page pool, so pages change owner without a copy; and they
take turns on the device.

Both run on one thread and, on a GPU, one stream. On a CPU a chunk of prompts and a decode step take turns; a GPU
computes them in one forward pass. So device work is in the order in which it was asked for, and pages need no events
between the tiers: a prefill worker keeps the pages of a job that was given up until the chunk that writes to
them has ended, and a decode worker those of an ended request until the steps that write to them have been collected.
And a request can join the very pass that has the last chunk of its prompt: the last token is a row of the decode step.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING

from headrace.colocate.chunk_size import ChunkSize
from headrace.colocate.turns import TakingTurns
from headrace.data_lines import DataLines, data_listener
from headrace.decode.main import speculator_for
from headrace.decode.speculator import Speculator
from headrace.decode.worker import DecodeWorker
from headrace.engine.startup import LoadedModel, loaded_model
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.nixl import nixl_endpoint
from headrace.kvtransfer.transports import Beside
from headrace.node import join_mesh, until_stopped
from headrace.prefill.main import TOKEN_BUDGET
from headrace.prefill.worker import PrefillWorker
from headrace.settings import Settings
from headrace.telemetry.endpoint import Endpoint, worker_endpoint

if TYPE_CHECKING:
    from headrace.colocate.shared_steps import SharedSteps

log = logging.getLogger(__name__)

TARGET_MS = {"cuda": 14.8, "cpu": 200.0}
"""Between two tokens of a stream, where --itl-target is not given. On their way to a client gaps grow and shrink a
little: 15 ms there, of which one in a hundred is longer."""
FEWEST_TOKENS = {"cuda": 256, "cpu": 32}
"""Of a chunk. Fewer take hardly less time: all weights are read, and a GPU's host launches as many kernels."""
SWITCH_SECONDS = 0.0002
"""After which a thread must let another one have the interpreter, on a GPU. Starting a pass lets go of it with each of
a hundred operations; with Python's 5 ms, one that finds the event loop busy then comes too late."""


async def run(settings: Settings) -> None:
    """Serve until told to stop. Raises `SettingsError`, `ModelError`, `EngineError` or `MeshMismatch`."""
    async with worker_endpoint(settings, "decode") as endpoint, loaded_model(settings, decodes=True) as model:
        await serve(settings, model, until_stopped(), await speculator_for(settings, model), endpoint)


async def serve(
    settings: Settings,
    model: LoadedModel,
    stopped: Awaitable[None],
    speculator: Speculator | None = None,
    endpoint: Endpoint | None = None,
) -> None:
    """Both workers, until `stopped` is done and what they hold is finished."""
    name = settings.worker_id or secrets.token_hex(3)
    as_prefill = settings.model_copy(update={"worker_id": f"prefill-{name}"})
    as_decode = settings.model_copy(update={"worker_id": f"decode-{name}"})
    async with (
        data_listener(settings.bind, settings.mesh_key, settings.advertise) as listener,
        join_mesh(as_decode, "decode", model.identity, listener.address, endpoint) as decode_node,
        join_mesh(as_prefill, "prefill", model.identity, endpoint=endpoint) as prefill_node,
        DataLines(prefill_node.registry, settings.mesh_key) as lines,
        DataLines(decode_node.registry, settings.mesh_key) as decode_lines,
        nixl_endpoint(settings, model.engine.cache) as nixl,
    ):
        engine, kind = model.engine, model.engine.device.type
        layout = layout_of(model.kv_fingerprint, engine.layout, engine.model_config.vocab_size)
        most = settings.max_num_batched_tokens or TOKEN_BUDGET[kind]
        target = (settings.itl_target or TARGET_MS[kind]) / 1000
        turns = await _turns(model, target, FEWEST_TOKENS[kind], most)
        prefill = PrefillWorker(
            prefill_node,
            engine,
            layout,
            turns=turns,
            max_jobs=settings.max_num_prefills,
            lease_seconds=settings.lease_seconds,
            lines=lines,
            wire_dtype=settings.kv_wire_dtype,
            beside=decode_node.id,
            nixl=nixl,
        )
        decode = DecodeWorker(
            decode_node,
            engine,
            model.device_thread,
            layout,
            max_num_seqs=settings.max_num_seqs,
            listener=listener,
            lines=decode_lines,
            wire_dtype=settings.kv_wire_dtype,
            nixl=nixl,
            transport=settings.kv_transport,
            speculator=speculator,
            beside=Beside(prefill_node.id, prefill.pages_of),
            alongside=turns,
        )
        if not isinstance(turns, TakingTurns):
            turns.decode = partial(decode.join, prefill_node.id)
        async with asyncio.TaskGroup() as group:
            prefilling = group.create_task(prefill.run(stopped, settings.drain_timeout))
            # decode stops last: what the other one still holds is handed over to it
            group.create_task(decode.run(_end_of(prefilling), settings.drain_timeout))


async def _turns(model: LoadedModel, target: float, fewest: int, most: int) -> TakingTurns | SharedSteps:
    engine, device_thread = model.engine, model.device_thread
    if engine.graph_decoder is None:
        return TakingTurns(ChunkSize(target, fewest, most), engine, device_thread)
    from headrace.colocate.row_budget import RowBudget, measurable, time_passes
    from headrace.colocate.shared_steps import SharedSteps

    sys.setswitchinterval(SWITCH_SECONDS)
    sizes = measurable(engine, engine.graph_decoder.sizes("shared"), most)
    pages = engine.pool.allocate(engine.pool.pages_for(max(sizes, default=0)))
    seconds = await asyncio.get_running_loop().run_in_executor(device_thread, time_passes, engine, sizes, pages)
    engine.pool.release(pages)
    for size in [size for size in sizes if any(seconds[size] >= seconds[larger] for larger in sizes if larger > size)]:
        engine.graph_decoder.drop_size(size, "shared")
        del seconds[size]
    log.info("a pass takes %s", ", ".join(f"{took * 1000:.1f} ms ({rows} rows)" for rows, took in seconds.items()))
    return SharedSteps(RowBudget(target, fewest, most, seconds), engine, device_thread)


async def _end_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
