"""Launching a Triton kernel at little cost to the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
        key, values = self._key(arguments, constants, options)
        compiled = self._compiled.get(key) if key is not None else None
        if compiled is not None:
            compiled[grid](*values, *constants)  # type: ignore[index]
            return
        compiled = self._kernel[grid](*arguments, *constants, **options)
        if key is not None and not INTERPRETED:
            self._compiled[key] = compiled

    def repeated(
        self, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int
    ) -> Callable[[], None]:
        """The same launch for any number of times, of which only the first looks at the arguments."""
        key, values = self._key(arguments, constants, options)
        if key is None or key not in self._compiled:
            return partial(self, grid, arguments, constants, **options)
        run: Callable[..., Any] = self._compiled[key][grid]  # type: ignore[index]

        def launch(_alive: object = arguments) -> None:
            run(*values, *constants)

        return launch

    @staticmethod
    def _key(
        arguments: tuple[Any, ...], constants: tuple[Any, ...], options: dict[str, int]
    ) -> tuple[tuple[Any, ...] | None, list[Any]]:
        """What a launch is compiled for, None where tensors do not start as they mostly do; and the arguments with
        addresses for tensors, each of which Triton would ask the driver about.
        """
        addresses, device = 0, None
        kinds, values = list[object](), list[Any]()
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                address = argument.data_ptr()
                addresses |= address
                kinds.append(argument.dtype)
                values.append(address)
                device = argument.device
            else:
                kinds.append(type(argument))
                values.append(argument)
        key = (constants, device, *kinds, *options.values()) if addresses % ALIGNMENT == 0 else None
        return key, values
