"""Which device, which dtype, how much memory."""

from __future__ import annotations

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


def urgent_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream whose work the device takes up before that of others."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def use_urgent_stream(device: torch.device) -> None:
    """Have all that this thread starts go to such a stream."""
    torch.cuda.set_device(device)
    torch.cuda.set_stream(urgent_stream(device))


def choose_dtype(name: str, device: torch.device, checkpoint_dtype: str) -> torch.dtype:
    """`auto`: on a GPU 16 bits as in the checkpoint; on a CPU bfloat16 where it multiplies them fast, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.float16 if checkpoint_dtype == "float16" else torch.bfloat16
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


@cache
def _cpu_multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def available_memory(device: torch.device) -> int:
    """Free bytes on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise EngineError("this system does not tell its free memory; give --kv-cache-memory-bytes")
