"""`headrace decode`: one decode worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from headrace.data_lines import DataLines, data_listener
from headrace.decode.drafting import chain_drafter, new_speculator
from headrace.decode.speculator import Speculator
from headrace.decode.worker import DecodeWorker
from headrace.engine.startup import LoadedModel, loaded_model
from headrace.engine.step_timing import time_steps
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.nixl import nixl_endpoint
from headrace.node import join_mesh, until_stopped
from headrace.settings import Settings
from headrace.telemetry.endpoint import worker_endpoint

log = logging.getLogger(__name__)

MOST_PROMPT_TOKENS = 512
"""Of a pass of prompts that a decode worker computes itself: its streams wait for no more than that."""


async def run(settings: Settings) -> None:
    """Serve until told to stop. Raises `SettingsError`, `ModelError`, `EngineError` or `MeshMismatch`."""
    async with worker_endpoint(settings, "decode") as endpoint, loaded_model(settings, decodes=True) as model:
        speculator = await speculator_for(settings, model)
        async with (
            data_listener(settings.bind, settings.mesh_key, settings.advertise) as listener,
            join_mesh(settings, "decode", model.identity, listener.address, endpoint) as node,
            DataLines(node.registry, settings.mesh_key) as lines,
            nixl_endpoint(settings, model.engine.cache) as nixl,
        ):
            worker = DecodeWorker(
                node,
                model.engine,
                model.device_thread,
                layout_of(model.kv_fingerprint, model.engine.layout, model.engine.model_config.vocab_size),
                max_num_seqs=settings.max_num_seqs,
                listener=listener,
                lines=lines,
                wire_dtype=settings.kv_wire_dtype,
                nixl=nixl,
                transport=settings.kv_transport,
                speculator=speculator,
                # the simulator, whom synthetic engines are compared with, knows of none
                most_prompt_tokens=0 if settings.load_format == "synthetic" else MOST_PROMPT_TOKENS,
            )
            await worker.run(until_stopped(), settings.drain_timeout)


async def speculator_for(settings: Settings, model: LoadedModel) -> Speculator | None:
    """What drafts for a decode worker, after steps have been timed; None where drafts are off."""
    if settings.speculation == "off" or settings.load_format == "synthetic":
        return None
    engine = model.engine
    seconds = await asyncio.get_running_loop().run_in_executor(model.device_thread, time_steps, engine)
    for kind, by_rows in (
        ("", seconds.plain),
        ("with drafts ", seconds.drafted),
        ("with drafts of the device ", seconds.ahead),
    ):
        if by_rows:
            log.info("a step %stakes %s", kind, ", ".join(f"{s * 1e3:.2f} ms ({rows})" for rows, s in by_rows.items()))
    of_token: Mapping[int, float] = seconds.guess
    chain = chain_drafter(engine)
    if chain is not None:
        of_token = await asyncio.get_running_loop().run_in_executor(model.device_thread, chain.time_tokens)
    if of_token:
        log.info("a token more of a draft takes %s", ", ".join(f"{s * 1e3:.2f} ms ({n})" for n, s in of_token.items()))
    return new_speculator(engine, seconds, of_token)
