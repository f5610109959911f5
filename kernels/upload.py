"""Small arrays to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headrace.kernels.launch import ALIGNMENT


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays, of any dtypes and one dimension each, as tensors on the device.

    They travel in one copy from pinned memory, which later work on the device waits for and the host does not. On a CPU
    they share the arrays' memory.
    """
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    starts = np.cumsum([0, *sizes]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    memory = host.numpy()
    for start, array in zip(starts, arrays, strict=False):
        memory[start : start + array.nbytes] = array.view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for start, array in zip(starts, arrays, strict=False)
    ]
