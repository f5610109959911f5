"""Reads a checkpoint and packs it the way the fused decoder wants it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from headrace.engine.errors import EngineError
from headrace.engine.model_config import ModelConfig
from headrace.kernels.fp8_linear import Fp8Linear
from headrace.kernels.linear import Linear, Projection

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. `qkv` gives Q, K and V in one, `gate_up` gate and up."""

    input_norm: torch.Tensor
    qkv: Projection
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True)
class DecoderWeights:
    """A whole model."""

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: Linear


class Checkpoint:
    """The tensors of a folder's safetensors files by name, read when asked for."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._files = ExitStack()
        self._device, self._dtype = device, dtype
        self._reader_of = {}
        for path in sorted(folder.glob("*.safetensors")):
            reader = self._files.enter_context(safe_open(path, framework="pt", device=str(device)))
            self._reader_of.update(dict.fromkeys(reader.keys(), reader))

    def __contains__(self, name: str) -> bool:
        return name in self._reader_of

    def get(self, name: str) -> torch.Tensor:
        """One tensor in the engine's dtype. Raises `EngineError` where the checkpoint lacks it."""
        if name not in self._reader_of:
            raise EngineError(f"the checkpoint lacks {name}; try --model-impl transformers")
        return self.get_as(name, self._dtype)

    def get_as(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One tensor in another type. Raises `EngineError`."""
        if name not in self._reader_of:
            raise EngineError(f"the checkpoint lacks {name}")
        tensor: torch.Tensor = self._reader_of[name].get_tensor(name)
        return tensor.to(dtype)

    def stacked(self, *names: str) -> torch.Tensor:
        """Several tensors, one below the other."""
        return torch.cat([self.get(name) for name in names])

    def close(self) -> None:
        """Unmap the files."""
        self._files.close()


class RandomCheckpoint:
    """Random weights in place of a checkpoint's, made on the device: for measuring speed."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self._device, self._dtype = device, dtype
        self._shapes = {
            "embed_tokens": (config.vocab_size, hidden),
            "lm_head": (config.vocab_size, hidden),
            "q_proj": (heads, hidden),
            "k_proj": (kv_heads, hidden),
            "v_proj": (kv_heads, hidden),
            "o_proj": (hidden, heads),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        if config.tied_head:
            del self._shapes["lm_head"]
        self._norm = (hidden,)

    def __contains__(self, name: str) -> bool:
        return name.split(".")[-2] in self._shapes and name.endswith(".weight")

    def get(self, name: str) -> torch.Tensor:
        """Normally distributed, such that activations keep their size; norms are ones."""
        if "norm" in name:
            return torch.ones(self._norm, device=self._device, dtype=self._dtype)
        out_size, in_size = self._shapes[name.split(".")[-2]]
        deviation = 1.0 if "embed" in name else in_size**-0.5
        return torch.empty(out_size, in_size, device=self._device, dtype=self._dtype).normal_(std=deviation)

    def stacked(self, *names: str) -> torch.Tensor:
        """Several tensors, one below the other."""
        return torch.cat([self.get(name) for name in names])

    def close(self) -> None:
        """Nothing to close."""


def load_decoder(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    *,
    fold_norms: bool = False,
    fp8: bool = False,
    random: bool = False,
) -> DecoderWeights:
    """Read all weights onto `device`, or make random ones.

    `fold_norms`: the norms' weights go into the projections that follow them and become ones. `fp8`: the layers'
    projections keep 8 bits of each weight. Raises `EngineError` where a weight is missing.
    """
    projection = Fp8Linear if fp8 else Linear
    checkpoint = RandomCheckpoint(config, device, dtype) if random else Checkpoint(folder, device, dtype)
    try:
        layers = []
        for index in range(config.num_layers):
            layers.append(_load_layer(checkpoint, f"model.layers.{index}.", config, fold_norms, projection))
            progress("loading weights", (index + 1) / config.num_layers)
        embedding = checkpoint.get("model.embed_tokens.weight")
        tied = config.tied_head or "lm_head.weight" not in checkpoint
        head = embedding if tied else checkpoint.get("lm_head.weight")
        return DecoderWeights(embedding, layers, _norm(checkpoint, "model.norm.weight", config), Linear(head))
    finally:
        checkpoint.close()


def _load_layer(
    checkpoint: Checkpoint | RandomCheckpoint,
    prefix: str,
    config: ModelConfig,
    fold_norms: bool,
    projection: type[Linear] | type[Fp8Linear],
) -> LayerWeights:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."

    def optional(name: str) -> torch.Tensor | None:
        return checkpoint.get(name) if name in checkpoint else None

    qkv = [f"{attention}{part}_proj" for part in "qkv"]
    packed = f"{attention}qkv_proj.weight" in checkpoint  # as Phi-3 stores them
    biased = f"{qkv[0]}.bias" in checkpoint
    qkv_weight = checkpoint.stacked(
        *([attention + "qkv_proj.weight"] if packed else [name + ".weight" for name in qkv])
    )
    gate_up = checkpoint.stacked(
        *([mlp + "gate_up_proj.weight"] if packed else [mlp + "gate_proj.weight", mlp + "up_proj.weight"])
    )
    input_norm = _norm(checkpoint, prefix + "input_layernorm.weight", config)
    mlp_norm = _norm(checkpoint, prefix + "post_attention_layernorm.weight", config)
    if fold_norms:
        qkv_weight, gate_up = qkv_weight.mul_(input_norm), gate_up.mul_(mlp_norm)
        input_norm, mlp_norm = torch.ones_like(input_norm), torch.ones_like(mlp_norm)
    return LayerWeights(
        input_norm=input_norm,
        qkv=projection(qkv_weight, checkpoint.stacked(*[name + ".bias" for name in qkv]) if biased else None),
        q_norm=optional(attention + "q_norm.weight"),
        k_norm=optional(attention + "k_norm.weight"),
        output=projection(checkpoint.get(attention + "o_proj.weight"), optional(attention + "o_proj.bias")),
        mlp_norm=mlp_norm,
        gate_up=projection(gate_up),
        down=projection(checkpoint.get(mlp + "down_proj.weight")),
    )


def _norm(checkpoint: Checkpoint | RandomCheckpoint, name: str, config: ModelConfig) -> torch.Tensor:
    weight = checkpoint.get(name)
    return weight + 1 if config.norm_plus_one else weight
