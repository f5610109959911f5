"""`headrace colocate`: a prefill and a decode worker in one process.

They are the same workers as elsewhere, each with its own place in the mesh, so that others may hand over to this one
and it to others. What differs: both use one engine and one page pool, so pages change owner without a copy; and they
take turns on the device.

On a CPU both run on one thread, one after the other. On a GPU each has a thread and a stream, decode's the urgent one,
and these make that safe:

- Buffers: a decode step uses the graph decoder's, which nothing else touches; a prompt's come from the allocator, which
  gives memory that was freed on a stream to that stream alone. Samplers belong to one batch or one call.
- A prompt's pages are read by a decode step only once its first token has been read on the host, which follows from all
  of them. A page is written to by a prompt only once the steps that wrote to it have been collected, and by a step only
  once the chunk that wrote to it has ended: chunks are waited for here (`Pacing.computing`), and a prefill worker keeps
  the pages of a job that was given up until then.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from headrace.colocate.pacing import Pacing
from headrace.data_lines import DataLines, data_listener
from headrace.decode.main import speculator_for
from headrace.decode.speculator import Speculator
from headrace.decode.worker import DecodeWorker
from headrace.engine.device import use_urgent_stream
from headrace.engine.startup import LoadedModel, loaded_model
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.transports import Beside
from headrace.node import join_mesh, until_stopped
from headrace.prefill.main import TOKEN_BUDGET
from headrace.prefill.worker import PrefillWorker
from headrace.settings import Settings

TARGET_MS = {"cuda": 12.0, "cpu": 200.0}
"""Between two tokens of a stream, where --itl-target is not given."""
FEWEST_TOKENS = {"cuda": 256, "cpu": 32}
"""Of a chunk. Fewer take hardly less time: a GPU's host launches as many kernels, a CPU reads all weights."""
SWITCH_SECONDS = 0.0005
"""How long a thread of Python may keep the others waiting: a decode step's thread waits for the one that launches a
prompt's kernels."""


async def run(settings: Settings) -> None:
    """Serve until told to stop. Raises `SettingsError`, `ModelError`, `EngineError` or `MeshMismatch`."""
    async with loaded_model(settings, decodes=True) as model:
        await serve(settings, model, until_stopped(), await speculator_for(settings, model))


async def serve(
    settings: Settings, model: LoadedModel, stopped: Awaitable[None], speculator: Speculator | None = None
) -> None:
    """Both workers, until `stopped` is done and what they hold is finished."""
    name = settings.worker_id or secrets.token_hex(3)
    as_prefill = settings.model_copy(update={"worker_id": f"prefill-{name}"})
    as_decode = settings.model_copy(update={"worker_id": f"decode-{name}"})
    async with (
        data_listener(settings.bind, settings.mesh_key) as listener,
        join_mesh(as_decode, "decode", model.identity, listener.address) as decode_node,
        join_mesh(as_prefill, "prefill", model.identity) as prefill_node,
        DataLines(prefill_node.registry, settings.mesh_key) as lines,
    ):
        engine, kind = model.engine, model.engine.device.type
        layout = layout_of(model.folder.fingerprint, engine.layout, engine.model_config.vocab_size)
        most = settings.max_num_batched_tokens or TOKEN_BUDGET[kind]
        target = (settings.itl_target or TARGET_MS[kind]) / 1000
        pacing = Pacing(target, FEWEST_TOKENS[kind], most, engine.synchronize)
        prefill = PrefillWorker(
            prefill_node,
            engine,
            model.device_thread,
            layout,
            turns=pacing,
            max_jobs=settings.max_num_prefills,
            lease_seconds=settings.lease_seconds,
            lines=lines,
            wire_dtype=settings.kv_wire_dtype,
            beside=decode_node.id,
        )
        with decode_thread(model) as thread:
            decode = DecodeWorker(
                decode_node,
                engine,
                thread,
                layout,
                max_num_seqs=settings.max_num_seqs,
                listener=listener,
                speculator=speculator,
                beside=Beside(prefill_node.id, prefill.pages_of),
                on_step=pacing.stepped,
            )
            async with asyncio.TaskGroup() as group:
                prefilling = group.create_task(prefill.run(stopped, settings.drain_timeout))
                # decode stops last: what the other one still holds is handed over to it
                group.create_task(decode.run(_end_of(prefilling), settings.drain_timeout))


async def _end_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])


@contextmanager
def decode_thread(model: LoadedModel) -> Iterator[ThreadPoolExecutor]:
    """That of decode steps: on a CPU the one that there is, since no other may run torch's parallel operations."""
    if model.engine.device.type == "cpu":
        yield model.device_thread
        return
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with ThreadPoolExecutor(
            1, thread_name_prefix="decode", initializer=use_urgent_stream, initargs=(model.engine.device,)
        ) as thread:
            yield thread
    finally:
        sys.setswitchinterval(interval)
