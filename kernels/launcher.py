"""Launching a Triton kernel at little cost to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headrace.kernels.launch import ALIGNMENT, INTERPRETED


class Launcher:
    """Launches one kernel; Triton looks at the arguments only where their kinds have not been seen before.

    Its own analysis takes two thirds of a launch's host time, which a prefill of a few tokens waits for. A kernel's
    constants come last. Its integers must be declared `do_not_specialize`, so that their values are no part of what it
    was compiled for; tensors' dtypes, their presence and alignment are.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(
        self, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int
    ) -> None:
        """Launch on the current device and stream; `options` are Triton's: num_warps, num_stages."""
        addresses, device = 0, None
        kinds: list[object] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                addresses |= argument.data_ptr()
                kinds.append(argument.dtype)
                device = argument.device
            else:
                kinds.append(type(argument))
        key = (constants, device, *kinds, *options.values())
        compiled = self._compiled.get(key)
        if compiled is not None and addresses % ALIGNMENT == 0:
            compiled[grid](*arguments, *constants)  # type: ignore[index]
            return
        compiled = self._kernel[grid](*arguments, *constants, **options)
        if addresses % ALIGNMENT == 0 and not INTERPRETED:
            self._compiled[key] = compiled
