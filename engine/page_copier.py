"""Copies pages out of other processes' caches on a GPU: all that wait, in one launch.

A GPU takes turns between processes. While another one computes without a pause, a copy may wait for tens of
milliseconds, and what came meanwhile goes along with the next one instead of waiting for a turn of its own. Even on an
idle GPU it pays: to start a copy takes as long as to move tens of MiB.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.kernels.copy_pages import copy_blocks

log = logging.getLogger(__name__)

MAX_BLOCKS = 65536
"""Of one launch."""


@dataclass(frozen=True, eq=False)
class Part:
    """Blocks to copy out of `source`, uint8 [rows, page_bytes]."""

    source: torch.Tensor
    moves: np.ndarray
    """int32 [N, 2]: a row of the source, and the row of the target where it belongs; at most `MAX_BLOCKS` of them."""
    done: Callable[[Exception | None], None]
    """Called once, on the copier's thread, with what went wrong."""


class PageCopier:
    """A thread that copies into `target`, uint8 [rows, page_bytes], the parts it is given.

    How much waits here is bounded by the windows of those who send it.
    """

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target
        on_gpu = target.is_cuda
        self._here = torch.empty(MAX_BLOCKS, 2, dtype=torch.int32, pin_memory=on_gpu)
        self._moves = self._here.numpy()
        self._there = torch.empty_like(self._here, device=target.device) if on_gpu else self._here
        self._stream = torch.cuda.Stream(target.device, priority=-1) if on_gpu else None  # type: ignore[no-untyped-call]
        self._waiting: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="page copier", daemon=True)
        self._thread.start()

    def submit(self, part: Part) -> None:
        """Copy it soon."""
        self._waiting.put(part)

    def close(self) -> None:
        """Copy what waits, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._warm_up()
        while parts := self._next():
            error = self._try_to_copy(parts)
            for part in parts:
                try:
                    part.done(error)
                except Exception:
                    log.exception("nobody hears that pages are there")

    def _next(self) -> list[Part]:
        """All that wait, and at least one; nothing at the end."""
        parts = []
        while (part := self._waiting.get()) is not None:
            parts.append(part)
            if self._waiting.empty():  # nobody else takes from it
                return parts
        if parts:
            self._waiting.put(None)
        return parts

    def _warm_up(self) -> None:
        """Have the kernel compiled, on other memory than the target, where nothing must be touched."""
        if self._stream is None:
            return
        torch.cuda.set_stream(self._stream)  # of this thread
        page = torch.zeros(1, self._target.shape[1], dtype=torch.uint8, device=self._target.device)
        try:
            copy_blocks(page, page, torch.zeros(1, 2, dtype=torch.int32, device=self._target.device))
            self._stream.synchronize()
        except Exception:  # each copy will say so again, to those who wait for it
            log.exception("pages can't be copied on this GPU")

    def _try_to_copy(self, parts: Sequence[Part]) -> Exception | None:
        try:
            self.copy(parts)
        except Exception as error:
            log.exception("pages could not be copied")
            return error
        return None

    def copy(self, parts: Sequence[Part]) -> None:
        """Copy them all and wait until they are there. For this object's thread (or for who submits nothing)."""
        for source in {id(part.source): part.source for part in parts}.values():
            count = 0
            joined: list[np.ndarray] = []
            for part in parts:
                if part.source is not source:
                    continue
                if count + len(part.moves) > MAX_BLOCKS:
                    self._copy_some(source, joined, count)
                    count, joined = 0, []
                count += len(part.moves)
                joined.append(part.moves)
            self._copy_some(source, joined, count)

    def _copy_some(self, source: torch.Tensor, joined: list[np.ndarray], count: int) -> None:
        np.concatenate(joined, out=self._moves[:count])
        if self._stream is not None:
            self._there[:count].copy_(self._here[:count], non_blocking=True)
        copy_blocks(source, self._target, self._there[:count])
        if self._stream is not None:
            self._stream.synchronize()
