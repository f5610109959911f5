"""What an engine is made of: the model in the form that suits its device, what drafts for it, and memory for pages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headrace.engine.device import available_memory, can_pack, choose_device
from headrace.engine.draft_head import DraftHead, TorchHead, load_head
from headrace.engine.errors import EngineError
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.kv_cache import CacheLayout
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import Progress, load_decoder

if TYPE_CHECKING:
    from headrace.engine.base import Model
    from headrace.engine.engine import EngineConfig

CPU_CACHE_BYTES = 2**30
CPU_CACHE_SHARE = 0.25


def load_model(
    config: EngineConfig,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    progress: Progress,
) -> Model:
    """The target. Raises `EngineError` where the device or the model's path can't do what was asked for."""
    fused_on_gpu = device.type == "cuda" and dtype.itemsize == 2 and not model_config.unsupported
    for flag, value in (("--quantization", config.quantization), ("--kv-cache-dtype", config.kv_cache_dtype)):
        if value == "fp8" and (config.model_impl == "transformers" or not fused_on_gpu):
            raise EngineError(f"{flag} fp8 needs a GPU, 16 bits and a model of the fused path; leave the flag away")
    if config.model_impl == "fused" and model_config.unsupported:
        raise EngineError(f"--model-impl fused can't run this model ({model_config.unsupported}); leave the flag away")
    if config.model_impl == "transformers" or model_config.unsupported:
        from headrace.engine.general_model import GeneralModel

        progress("loading through transformers", 0.0)
        return GeneralModel(config.model_folder, device, dtype, max_model_len)
    packs = config.quantization == "auto" and config.dtype == "auto" and device.type == "cpu"
    if packs and not config.random_weights:
        packed = _load_packed(config.model_folder, model_config, max_model_len, progress)
        if packed is not None:
            return packed
    weights = load_decoder(
        config.model_folder,
        model_config,
        device,
        dtype,
        progress,
        fold_norms=fused_on_gpu,  # for the graph decoder, whose kernels are for 16 bits
        fp8=config.quantization == "fp8",
        random=config.random_weights,
    )
    return FusedDecoder(model_config, weights, norms_are_folded=fused_on_gpu)


def load_draft_head(
    config: EngineConfig, folder: Path, model_config: ModelConfig, model: Model, max_model_len: int
) -> DraftHead:
    """A head in the form of its target. Raises `EngineError` where the target is not of the fused path."""
    if isinstance(model, FusedDecoder):
        embedding = model.weights.embedding
        weights = load_head(folder, config.model_folder, model_config, embedding.device, embedding.dtype)
        return TorchHead(model_config, weights.folded() if model.norms_are_folded else weights, embedding)
    if model.follows_tables:
        from headrace.engine.packed_decoder import PackedDecoder
        from headrace.engine.packed_head import PackedHead

        assert isinstance(model, PackedDecoder)
        weights = load_head(folder, config.model_folder, model_config, torch.device("cpu"), torch.float32)
        return PackedHead(model_config, weights, model.embedding, max_model_len)
    raise EngineError("a draft head needs a model of the fused path: leave --draft-head away")


def load_draft_model(
    config: EngineConfig,
    draft_config: ModelConfig,
    target: Model,
    dtype: torch.dtype,
    max_model_len: int,
    progress: Progress,
) -> Model:
    """A draft model that stores keys and values as the target does. Raises `EngineError` where there is none."""
    folder, device = config.draft_model, choose_device(config.device)
    assert folder is not None
    if config.draft_head is not None:
        raise EngineError("--draft-model and --draft-head: give one of them")
    if device.type != "cpu":
        raise EngineError("--draft-model drafts on a CPU only so far: leave it away")
    if not target.follows_tables:
        own = replace(config, model_folder=folder, model_impl="auto", quantization="none")
        return load_model(own, draft_config, device, dtype, max_model_len, progress)
    packed = _load_packed(folder, draft_config, max_model_len, progress, rounds=True)
    if packed is None:
        raise EngineError("--draft-model: beside packed weights a model of Llama's shape drafts: give --dtype float32")
    return packed


def _load_packed(
    folder: Path, model_config: ModelConfig, max_model_len: int, progress: Progress, *, rounds: bool = False
) -> Model | None:
    """The model with packed weights, where they, the processor and what is installed allow it."""
    if not can_pack():
        return None
    from headrace.engine.compiled_kernels import keep_compiled

    if not keep_compiled():
        progress("compiling kernels, once on a machine", 0.0)
    from headrace.engine.packed_decoder import PackedDecoder, load_packed

    weights = load_packed(folder, model_config, progress, rounds=rounds)
    return None if weights is None else PackedDecoder(model_config, weights, max_model_len)


def num_pages(config: EngineConfig, layout: CacheLayout, device: torch.device, max_model_len: int) -> int:
    """As many pages as the budget holds. Raises `EngineError` where they are too few for one request of full length."""
    block = layout.page_bytes * layout.num_layers
    needed = -(-max_model_len // layout.page_size)
    if config.kv_cache_bytes is not None:
        budget = config.kv_cache_bytes
    elif device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = available_memory(device) - int(total * (1 - config.gpu_memory_utilization))
    else:
        budget = max(min(CPU_CACHE_BYTES, int(available_memory(device) * CPU_CACHE_SHARE)), needed * block)
    if budget // block < needed:
        raise EngineError(
            f"a KV cache of {max(budget, 0) / 2**20:.0f} MiB holds less than one request of {max_model_len} tokens: "
            f"give at least --kv-cache-memory-bytes {needed * block} or lower --max-model-len"
        )
    return int(budget // block)
