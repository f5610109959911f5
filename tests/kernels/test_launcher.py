"""When the launcher may reuse what a kernel was compiled to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.kernels import launcher
from headrace.kernels.launcher import Launcher


class Kernel:
    """Counts analyses of arguments; what it returns counts launches, and is indexed by the grid as well."""

    def __init__(self) -> None:
        self.analysed = 0
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def analyse(*arguments: Any, **options: int) -> Compiled:
            self.analysed += 1
            return Compiled(self)

        return analyse


class Compiled:
    """A compiled kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self._kernel.launched.append((grid, *arguments))


def test_arguments_are_analysed_once_for_each_of_their_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers and tensors of the same kind are launched; dtypes, presence, constants and options count."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    kernel = Kernel()
    launch = Launcher(kernel)
    x, y = torch.zeros(64), torch.zeros(32)
    launch((1, 1, 1), (x, None, 5), (8,), num_warps=4)
    launch((2, 1, 1), (y, None, 7), (8,), num_warps=4)
    assert kernel.analysed == 1
    assert kernel.launched == [((2, 1, 1), y.data_ptr(), None, 7, 8)]
    for count, (arguments, constant, warps) in enumerate(
        [((x.half(), None, 5), 8, 4), ((x, y, 5), 8, 4), ((x, None, 5), 16, 4), ((x, None, 5), 8, 8)], start=2
    ):
        launch((1, 1, 1), arguments, (constant,), num_warps=warps)
        assert kernel.analysed == count
    assert len(kernel.launched) == 1


def test_tensors_that_are_not_aligned_are_always_analysed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for aligned ones would load them wrongly."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    kernel = Kernel()
    launch = Launcher(kernel)
    x = torch.zeros(64)
    for tensor in (x, x[1:], x[1:]):
        launch((1, 1, 1), (tensor,), (), num_warps=4)
    assert kernel.analysed == 3
    assert not kernel.launched
