"""`headrace decode`: one decode worker."""

from __future__ import annotations

from headrace.data_lines import data_listener
from headrace.decode.worker import DecodeWorker
from headrace.engine.startup import loaded_model
from headrace.kvtransfer.layout import layout_of
from headrace.node import join_mesh, until_stopped
from headrace.settings import Settings


async def run(settings: Settings) -> None:
    """Serve until told to stop. Raises `SettingsError`, `ModelError`, `EngineError` or `MeshMismatch`."""
    async with (
        loaded_model(settings, decodes=True) as model,
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
        )
        await worker.run(until_stopped(), settings.drain_timeout)
