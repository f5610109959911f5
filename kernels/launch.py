"""What Triton kernels of a decode step share: launching before the kernel ahead has ended."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on the CPU, for tests; it knows no inline assembly and no dependent launches."""

ALIGNMENT = 16
"""Bytes: kernels load faster from, and are compiled once for, tensors that start at a multiple of it."""


def dependent_launch(wanted: bool = True) -> dict[str, Any]:
    """Arguments for a kernel with a `PDL` flag: programmatic dependent launch, where the device has it.

    Such a kernel starts while the one ahead of it ends, may read weights and whatever is older than that kernel, and
    waits (`gdc_wait`) before it reads or writes anything else. It lets its own successor start after that wait only, so
    that what is older than the kernel ahead is always complete. Kernels that read nothing but weights before the wait
    let theirs start at once: it may read before its own wait what is older than the last kernel ahead that does not.
    """
    return {"PDL": True, "launch_pdl": True} if wanted and _has_dependent_launch() else {"PDL": False}


@cache
def _has_dependent_launch() -> bool:
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@cache
def is_hopper() -> bool:
    """Whether kernels run on a chip with compute capability 9.0: H100, H200, GH200."""
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few where kernels are interpreted."""
    if device.type != "cuda":
        return 5
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()
