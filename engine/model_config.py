"""What the engine needs to know of a model, from its config.json (importing transformers would take seconds)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.engine.errors import EngineError
from headrace.kernels.gated_activation import Activation

FUSED_TYPES = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"}
ROPE_TYPES = {"default", "linear", "llama3"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and its scaling."""

    theta: float
    rope_type: str
    rotary_dim: int
    scaling: dict[str, float]

    def inverse_frequencies(self) -> torch.Tensor:
        """[rotary_dim / 2], float32."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        frequencies = 1.0 / (self.theta**exponents)
        if self.rope_type == "linear":
            return frequencies / self.scaling["factor"]
        if self.rope_type == "llama3":
            return self._llama3(frequencies)
        return frequencies

    def _llama3(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
        factor, low, high = (self.scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
        context = self.scaling["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / frequencies
        smooth = (context / wavelengths - low) / (high - low)
        blended = (1 - smooth) * frequencies / factor + smooth * frequencies
        scaled = torch.where(wavelengths > context / low, frequencies / factor, blended)
        return torch.where(wavelengths < context / high, frequencies, scaled)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. The flags at the end are what sets the fused families apart."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    dtype: str
    tied_head: bool
    rope: RopeConfig
    activation: Activation
    norm_plus_one: bool
    """Gemma stores norm weights minus one."""
    embedding_scale: float
    unsupported: str
    """Why the fused path can't run this model; empty where it can."""

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Parse config.json. Raises `EngineError` where it is not a text model's."""
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw = raw.get("text_config", raw)
        try:
            return cls._parse(raw)
        except KeyError as error:
            raise EngineError(
                f"{folder}/config.json lacks {error}: this is not a decoder-only language model"
            ) from error

    @classmethod
    def _parse(cls, raw: dict[str, Any]) -> ModelConfig:
        kind, heads, hidden = str(raw["model_type"]), int(raw["num_attention_heads"]), int(raw["hidden_size"])
        head_dim = int(raw.get("head_dim") or hidden // heads)
        rope = _rope(raw, head_dim)
        gemma = kind == "gemma"
        return cls(
            model_type=kind,
            num_layers=int(raw["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(raw.get("intermediate_size") or 4 * hidden),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            vocab_size=int(raw["vocab_size"]),
            max_position_embeddings=int(raw["max_position_embeddings"]),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
            tied_head=bool(raw.get("tie_word_embeddings", gemma)),
            rope=rope,
            activation="gelu_tanh" if gemma else "silu",
            norm_plus_one=gemma,
            embedding_scale=hidden**0.5 if gemma else 1.0,
            unsupported=_why_not_fused(raw, kind, rope),
        )


def _rope(raw: dict[str, Any], head_dim: int) -> RopeConfig:
    """Both the older `rope_theta` and `rope_scaling` and the newer `rope_parameters`."""
    parameters: dict[str, Any] = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    partial = float(parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0)
    numbers = {name: float(value) for name, value in parameters.items() if isinstance(value, int | float)}
    return RopeConfig(theta, kind, int(head_dim * partial), numbers)


def _why_not_fused(raw: dict[str, Any], kind: str, rope: RopeConfig) -> str:
    if kind not in FUSED_TYPES:
        return f"model type {kind}"
    if rope.rope_type not in ROPE_TYPES:
        return f"rope type {rope.rope_type}"
    windowed = raw.get("sliding_window") and (kind not in ("qwen2", "qwen3") or raw.get("use_sliding_window"))
    if windowed and int(raw["sliding_window"]) < int(raw["max_position_embeddings"]):
        return "sliding-window attention"
    if raw.get("mlp_bias") or raw.get("quantization_config"):
        return "quantized or biased projections"
    if raw.get("hidden_act", "silu") not in ("silu", "gelu_pytorch_tanh"):
        return f"activation {raw['hidden_act']}"
    return ""
