"""Brings a worker's model up: from settings to an engine that has run once, on the thread that will run it."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.errors import EngineError
from headrace.engine.host_memory import Populating, keep_freed_memory
from headrace.engine.synthetic import SyntheticEngine
from headrace.models.locate import BUILT_IN, BUILT_IN_HEAD, ModelFolder, locate_model
from headrace.models.same_tokens import check_same_tokens
from headrace.node import ModelIdentity
from headrace.scaling.step_costs import StepCosts
from headrace.settings import Settings

log = logging.getLogger(__name__)

MOST_HEX = 48
"""Of the fingerprint that workers compare before they hand over."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. All its device work belongs on `device_thread`."""

    folder: ModelFolder
    engine: Engine
    device_thread: DeviceThread
    identity: ModelIdentity
    draft_folder: ModelFolder | None = None

    @property
    def kv_fingerprint(self) -> str:
        """Of all models whose keys and values are in the cache."""
        models = [self.folder] if self.draft_folder is None else [self.folder, self.draft_folder]
        return "+".join(folder.fingerprint[: MOST_HEX // len(models)] for folder in models)


@asynccontextmanager
async def loaded_model(settings: Settings, *, decodes: bool) -> AsyncIterator[LoadedModel]:
    """Load what `settings` name. Raises `ModelError` or `EngineError`, which say what to do.

    `decodes`: prepare decode steps, too, so that the first one finds its kernels compiled.
    """
    keep_freed_memory()
    loop = asyncio.get_running_loop()
    with DeviceThread() as device_thread:
        folder = await loop.run_in_executor(device_thread, locate_model, settings.model)
        draft_folder = await loop.run_in_executor(device_thread, _locate_draft_model, settings, folder)
        engine = await loop.run_in_executor(device_thread, _load, settings, folder, draft_folder, decodes)
        gc.collect()
        gc.freeze()  # or each full collection looks at all of torch's objects, in the middle of a step
        identity = ModelIdentity(folder.name, folder.fingerprint, engine.max_model_len)
        populating = Populating(engine.cache.pages)
        try:
            yield LoadedModel(folder, engine, device_thread, identity, draft_folder)
        finally:
            populating.stop()


def _load(settings: Settings, folder: ModelFolder, draft_folder: ModelFolder | None, decodes: bool) -> Engine:
    config = EngineConfig(
        model_folder=folder.path,
        device=settings.device,
        dtype=settings.dtype,
        model_impl=settings.model_impl,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        page_size=settings.block_size,
        kv_cache_bytes=settings.kv_cache_memory_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        cpu_threads=settings.cpu_threads,
        random_weights=settings.load_format == "dummy",
        draft_head=_draft_head(settings, folder),
        draft_model=draft_folder.path if draft_folder is not None else None,
    )
    if settings.load_format == "synthetic":
        if settings.step_costs is None:
            raise EngineError("--load-format synthetic sleeps for what steps cost: name a file with --step-costs")
        return SyntheticEngine(config, StepCosts.read(settings.step_costs))
    engine = Engine.load(config, _LoggedProgress())
    engine.grammars.load_soon()
    log.info("warming up")
    engine.warm_up()
    if decodes:
        engine.prepare_decode(_LoggedProgress(), drafts=settings.speculation != "off")
    else:
        engine.prepare_prompts(_LoggedProgress())
    return engine


def _locate_draft_model(settings: Settings, target: ModelFolder) -> ModelFolder | None:
    """The draft model to load. Raises `ModelError` where it has other tokens than its target."""
    if settings.speculation == "off" or settings.draft_model is None or settings.load_format == "synthetic":
        return None
    folder = locate_model(settings.draft_model, "--draft-model")
    check_same_tokens(target.path, folder.path, settings.draft_model)
    return folder


def _draft_head(settings: Settings, folder: ModelFolder) -> Path | None:
    """The head to load: the one that is named, or the built-in model's."""
    if settings.speculation == "off" or settings.draft_head is not None:
        return settings.draft_head if settings.speculation == "auto" else None
    if settings.draft_model is not None:
        return None
    runs_built_in = folder.name == BUILT_IN and settings.model_impl != "transformers"
    if runs_built_in and settings.load_format == "auto":
        return BUILT_IN_HEAD
    return None


class _LoggedProgress:
    """Logs every quarter of the way."""

    def __init__(self) -> None:
        self._next = 0.25

    def __call__(self, what: str, fraction: float) -> None:
        if fraction >= self._next or fraction == 0:
            log.info("%s %d %%", what, fraction * 100)
            self._next = fraction // 0.25 * 0.25 + 0.25
