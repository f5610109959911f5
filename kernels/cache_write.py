"""Put new keys and values into the paged cache."""

from __future__ import annotations

import torch


def write_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer_pages: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_offsets: torch.Tensor,
) -> None:
    """Write token t to page slot_pages[t] at slot_offsets[t].

    keys, values: [T, kv_heads, head_dim]; layer_pages: [pages, 2, kv_heads, page_size, head_dim]; slots: int64 [T].
    """
    _reference(keys, values, layer_pages, slot_pages, slot_offsets)


def _reference(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer_pages: torch.Tensor,
    slot_pages: torch.Tensor,
    slot_offsets: torch.Tensor,
) -> None:
    by_slot = layer_pages.permute(0, 3, 1, 2, 4)
    by_slot[slot_pages, slot_offsets] = torch.stack((keys, values), dim=1)
