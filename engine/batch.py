"""The inputs of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.kernels.paged_attention import DecodePlan, PagedPlan, decode_attention
from headrace.kernels.prefill_attention import TilePlan, TorchPlan, prefill_attention

NO_SLOTS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens, packed one request after the other; all tensors are on the model's device."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    slot_pages: torch.Tensor
    """[T] int64: the page that each token's K and V go to; `NO_SLOTS` where the plan is followed by what finds them."""
    slot_offsets: torch.Tensor
    """[T] int64: and where in that page; `NO_SLOTS` likewise."""
    plan: TorchPlan | TilePlan | DecodePlan | PagedPlan
    """Who attends to what, the same in all layers: prompts' tokens, one new token a request, or one and a draft."""
    wants_logits: bool = False
    """Those of all rows are asked for next, so a model may compute them at once."""
    wanted: torch.Tensor | None = None
    """[R] int64: the rows whose final hidden states are asked for; None: all."""

    def attend(
        self,
        queries: torch.Tensor,
        layer_pages: torch.Tensor,
        scaling: float,
        qkv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of queries [T, heads, head_dim] over one layer of the cache; returns [T, heads * head_dim].

        `qkv` is the packed projection of the same tokens: see `prefill_attention`.
        """
        assert not isinstance(self.plan, PagedPlan), "its kernels attend by themselves"
        if isinstance(self.plan, DecodePlan):
            return decode_attention(queries, layer_pages, self.plan, scaling)
        return prefill_attention(queries, layer_pages, self.plan, scaling, qkv=qkv)
