"""What the compiled decoder of `packed_decoder` is given: weights, sizes, inputs, and room to work in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Weights(NamedTuple):
    """All flat. `records` of a projection are those of all layers, one after the other."""

    input_norms: np.ndarray
    """Of a draft head: for the token's embedding, then for the state."""
    qkv: np.ndarray
    output: np.ndarray
    mlp_norms: np.ndarray
    gate_up: np.ndarray
    """Rows in turn: 32 of the gate, the same 32 of up."""
    down: np.ndarray
    norm: np.ndarray
    head: np.ndarray
    inverse_frequencies: np.ndarray
    pages: np.ndarray
    """The KV cache, bits of float16; a page of a layer is [2, KV heads, page size, head size]."""
    pages_at: np.ndarray
    """int64 [layers]: where each layer's first page begins."""


class Shape(NamedTuple):
    """Numbers of the model and its cache."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    head_copies: int
    page_stride: int
    """Numbers from one page of a layer to the next."""
    page_size: int
    table_width: int
    longest: int
    """Room for the scores of a context and of three keys more, a multiple of 8."""
    eps: float
    qkv_inputs: int
    """The hidden size; twice that for a draft head, whose layer reads a token's embedding beside the state."""
    num_features: int
    """Numbers of a row in `Buffers.features`: a hidden size for each of `feature_layers`, or 0."""
    feature_layers: tuple[int, int, int]
    """Layers whose inputs are kept, in ascending order; -1 for none."""


class Inputs(NamedTuple):
    """int64; `tables` is [requests, table_width], and `request` names each row's."""

    positions: np.ndarray
    request: np.ndarray
    tables: np.ndarray


class Buffers(NamedTuple):
    """float32; a row for each token, and for the head one for each row of logits."""

    residual: np.ndarray
    cosines: np.ndarray
    sines: np.ndarray
    hidden: np.ndarray
    qkv: np.ndarray
    attended: np.ndarray
    gate_up: np.ndarray
    """[threads, rows, 64]: a block of the gate, and of up, before the activation; reused while it is in the cache."""
    logits: np.ndarray
    inputs: np.ndarray
    """Of QKV, of gate and up, and of the head: see `packed_linear.quantize`."""
    inner_inputs: np.ndarray
    """Of the output projection, and of down."""
    shares: np.ndarray
    """[threads, query heads of a KV head]: one over the sum of a softmax."""
    scores: np.ndarray
    """[threads, query heads of a KV head, longest context]: before and after the softmax."""
    features: np.ndarray
    embedded: np.ndarray
    """A draft head's tokens."""
