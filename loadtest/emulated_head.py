"""A draft head for benchmarks alone: it takes a head's time, and is right with given probabilities.

It shows what a trained head of known acceptance would bring on a machine. It says nothing about text, and no result on
text may be taken with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.engine.graph_head import GraphHead
from headrace.engine.model_config import ModelConfig
from headrace.kernels.draft_rows import RequestState
from headrace.kernels.draft_tree import CHOICES

DRAFT_VOCABULARY = 32000
"""Of the published EAGLE-3 heads for Llama 3.1 (arXiv:2503.01840)."""

OF_MISSES = (0.28, 0.13)
"""How often the second and the third choice are right where the first is not: as those of the built-in model's head are
in open chat, see docs/log.md."""


def write_random_head(folder: Path, target: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """A head of random weights in the published layout, of the target's width, with an output projection of its own."""
    hidden, inner, vocabulary = target.hidden_size, target.intermediate_size, min(DRAFT_VOCABULARY, target.vocab_size)
    heads, kv_heads = target.num_heads * target.head_dim, target.num_kv_heads * target.head_dim
    layers = [0, 0, 0] if target.num_layers < 6 else [2, target.num_layers // 2, target.num_layers - 3]
    sizes = {
        "fc": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj": (heads, 2 * hidden),
        "midlayer.self_attn.k_proj": (kv_heads, 2 * hidden),
        "midlayer.self_attn.v_proj": (kv_heads, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, heads),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
        "lm_head": (vocabulary, hidden),
    }
    tensors = {
        f"{name}.weight": torch.empty(size, dtype=dtype, device=device).normal_(std=size[1] ** -0.5).cpu()
        for name, size in sizes.items()
    }
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"midlayer.{name}.weight"] = torch.ones(hidden, dtype=dtype)
    tensors |= {"norm.weight": torch.ones(hidden, dtype=dtype), "d2t": torch.zeros(vocabulary, dtype=torch.int64)}
    save_file(tensors, folder / "model.safetensors")
    config = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": layers}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


class EmulatedHead:
    """Stands for a `GraphHead`: computes what that does, then replaces what it has guessed.

    The likeliest token of place i is right with probability `rates[i]`, whatever those before it are, and where it is
    not, the others are with `OF_MISSES`.
    """

    def __init__(self, head: GraphHead, state: RequestState, following: torch.Tensor) -> None:
        """`following` [vocabulary] int64: the token that comes after each."""
        self.sizes, self.max_requests = head.sizes, head.max_requests
        self._head = head
        self._state = state
        comes = [following]
        while len(comes) < MAX_HEAD_DEPTH:
            comes.append(following[comes[-1]])
        self._comes = torch.stack(comes, 1)
        self._low = self._high = torch.zeros(MAX_HEAD_DEPTH, CHOICES, device=following.device)
        """Between which a number drawn for a place lies where a choice is right."""

    @torch.inference_mode()
    def be_right(self, rates: Sequence[float]) -> None:
        """With these probabilities from now on, the last one at all further places, too."""
        every = torch.tensor([rates[min(place, len(rates) - 1)] for place in range(MAX_HEAD_DEPTH)])
        shares = torch.stack((every, *((1 - every) * share for share in OF_MISSES)), 1).to(self._low.device)
        self._high = shares.cumsum(1)
        self._low = self._high - shares

    def read(self, rows: int, report: int, *, is_greedy: bool = False) -> None:
        """See `GraphHead`."""
        self._head.read(rows, report, is_greedy=is_greedy)

    def guess(self, requests: int, depth: int) -> None:
        """See `GraphHead`."""
        self._head.guess(requests, depth)
        comes = self._comes[self._state.tokens[:requests]].unsqueeze(2)
        chance = torch.rand(comes.shape, device=comes.device)
        wrong = (chance < self._low) | (chance >= self._high)
        self._state.guesses[:requests] = (comes ^ wrong).flatten(1)
