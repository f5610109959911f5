"""Which device, which dtype, how much memory."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

from headrace.engine.errors import EngineError


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises `EngineError` where `cuda` was asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError("--device cuda: this machine has no usable GPU; leave --device away to run on the CPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, checkpoint_dtype: str) -> torch.dtype:
    """`auto`: on a GPU 16 bits as in the checkpoint; on a CPU bfloat16 where it multiplies them fast, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.float16 if checkpoint_dtype == "float16" else torch.bfloat16
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


@cache
def can_pack() -> bool:
    """Whether packed weights can be multiplied here: numba is installed, and the processor has AVX2, FMA and F16C."""
    flags = _cpu_flags()
    return {"avx2", "fma", "f16c"} <= flags and importlib.util.find_spec("numba") is not None


@cache
def _cpu_multiplies_bfloat16() -> bool:
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_flags())


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


def available_memory(device: torch.device) -> int:
    """Free bytes on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise EngineError("this system does not tell its free memory; give --kv-cache-memory-bytes")
