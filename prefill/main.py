"""`headrace prefill`: one prefill worker."""

from __future__ import annotations

from headrace.data_lines import DataLines
from headrace.engine.startup import loaded_model
from headrace.kvtransfer.layout import layout_of
from headrace.kvtransfer.nixl import nixl_endpoint
from headrace.node import join_mesh, until_stopped
from headrace.prefill.turns import OwnDevice
from headrace.prefill.worker import PrefillWorker
from headrace.settings import Settings
from headrace.telemetry.endpoint import worker_endpoint

TOKEN_BUDGET = {"cuda": 2048, "cpu": 512}
"""Prompt tokens that keep the device busy; more would only make the first of several prompts wait for the last."""
WHOLE = {"cuda": 8192, "cpu": 0}
"""A prompt of up to so many tokens is computed at once: attention is faster without a prefix, and those who wait behind
it would wait for all of it anyway."""


async def run(settings: Settings) -> None:
    """Serve until told to stop. Raises `SettingsError`, `ModelError`, `EngineError` or `MeshMismatch`."""
    async with (
        worker_endpoint(settings, "prefill") as endpoint,
        loaded_model(settings, decodes=False) as model,
        join_mesh(settings, "prefill", model.identity, endpoint=endpoint) as node,
        DataLines(node.registry, settings.mesh_key) as lines,
        nixl_endpoint(settings, model.engine.cache) as nixl,
    ):
        worker = PrefillWorker(
            node,
            model.engine,
            layout_of(model.kv_fingerprint, model.engine.layout, model.engine.model_config.vocab_size),
            turns=OwnDevice(
                model.engine,
                model.device_thread,
                settings.max_num_batched_tokens
                or model.engine.model.prompt_tokens
                or TOKEN_BUDGET[model.engine.device.type],
                whole=0 if settings.max_num_batched_tokens else WHOLE[model.engine.device.type],
            ),
            max_jobs=settings.max_num_prefills,
            lease_seconds=settings.lease_seconds,
            lines=lines,
            wire_dtype=settings.kv_wire_dtype,
            nixl=nixl,
        )
        await worker.run(until_stopped(), settings.drain_timeout)
