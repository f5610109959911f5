"""Any causal language model of `transformers`, with our paged attention in the place of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from headrace.engine.base import OnLayer
from headrace.engine.batch import ForwardBatch
from headrace.engine.errors import EngineError
from headrace.engine.kv_cache import PagedLayers
from headrace.kernels.cache_write import write_cache

ATTENTION = "headrace_paged"


class GeneralModel:
    """Loads a folder by `AutoModelForCausalLM`; models whose attention is more than softmax(QK)V are refused."""

    follows_tables = False
    prompt_tokens: int | None = None
    cache_dtype: torch.dtype | None = None

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, max_model_len: int) -> None:
        AttentionInterface.register(ATTENTION, _paged_attention)
        AttentionMaskInterface.register(ATTENTION, lambda *arguments, **options: None)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True, use_safetensors=True
        )
        self._model = model.to(device).eval()
        self.feature_layers: tuple[int, ...] = ()
        self.features = torch.empty(0, 0)
        self._step: tuple[ForwardBatch, PagedLayers, OnLayer | None] | None = None
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._refuse_what_differs(max_model_len)
        for module in self._model.modules():
            if hasattr(module, "layer_idx"):
                module.headrace_model = self

    def _refuse_what_differs(self, max_model_len: int) -> None:
        config = self._model.config
        for name in ("attn_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(config, name, None) not in (None, 1.0):
                raise EngineError(f"models with {name} can't be run yet")
        for module in self._model.modules():
            window = getattr(module, "sliding_window", None)
            if isinstance(window, int) and window < max_model_len:
                raise EngineError(f"this model attends to {window} tokens only; give --max-model-len {window} or less")

    def forward(self, batch: ForwardBatch, cache: PagedLayers, on_layer: OnLayer | None) -> torch.Tensor:
        """See `Model.forward`."""
        self._step = (batch, cache, on_layer)
        output = self._model.base_model(
            input_ids=batch.token_ids.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False
        )
        self._step = None
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden if batch.wanted is None else hidden.index_select(0, batch.wanted)

    def use_threads(self, threads: int) -> None:
        """See `Model.use_threads`."""
        torch.set_num_threads(threads)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Model.logits`."""
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write K and V [1, kv_heads, T, size] to the cache and attend to all of it.

        `query` is [1, heads, T, size]; returns [T, heads, size].
        """
        assert self._step is not None
        batch, cache, on_layer = self._step
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        write_cache(keys, values, cache.layer(layer), batch.slot_pages, batch.slot_offsets)
        if on_layer is not None:
            on_layer(layer)
        queries = query[0].transpose(0, 1).contiguous()
        return batch.attend(queries, cache.layer(layer), scale).view_as(queries)


def _paged_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """The form that `transformers` calls: returns [1, T, heads, size]."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise EngineError("models with attention sinks or capped attention scores can't be run yet")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return module.headrace_model.attend(module.layer_idx, query, key, value, scale).unsqueeze(0), None
