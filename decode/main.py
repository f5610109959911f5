"""`headrace decode`: one decode worker."""

from __future__ import annotations

import asyncio
import logging

from headrace.data_lines import data_listener
from headrace.decode.ngram import NgramDrafter
from headrace.decode.speculator import Speculator
from headrace.decode.step_cost import StepCost
from headrace.decode.worker import DecodeWorker
from headrace.engine.startup import LoadedModel, loaded_model
from headrace.engine.step_timing import time_steps
from headrace.kvtransfer.layout import layout_of
from headrace.node import join_mesh, until_stopped
from headrace.settings import Settings

log = logging.getLogger(__name__)


async def run(settings: Settings) -> None:
    """Serve until told to stop. Raises `SettingsError`, `ModelError`, `EngineError` or `MeshMismatch`."""
    async with loaded_model(settings, decodes=True) as model:
        speculator = await speculator_for(settings, model)
        async with (
            data_listener(settings.bind, settings.mesh_key) as listener,
            join_mesh(settings, "decode", model.identity, listener.address) as node,
        ):
            worker = DecodeWorker(
                node,
                model.engine,
                model.device_thread,
                layout_of(model.folder.fingerprint, model.engine.layout, model.engine.model_config.vocab_size),
                max_num_seqs=settings.max_num_seqs,
                listener=listener,
                speculator=speculator,
            )
            await worker.run(until_stopped(), settings.drain_timeout)


async def speculator_for(settings: Settings, model: LoadedModel) -> Speculator | None:
    """What drafts for a decode worker, after steps have been timed; None where drafts are off."""
    if settings.speculation == "off":
        return None
    engine = model.engine
    seconds = await asyncio.get_running_loop().run_in_executor(model.device_thread, time_steps, engine)
    for kind, by_rows in (("", seconds.plain), ("with drafts ", seconds.drafted)):
        log.info("a step %stakes %s", kind, ", ".join(f"{s * 1e3:.2f} ms ({rows})" for rows, s in by_rows.items()))
    cost = StepCost(seconds.plain, settings.max_num_seqs, seconds.drafted)
    return Speculator(NgramDrafter(), cost, engine.max_model_len)
