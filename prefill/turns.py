"""When a prefill step may run, how large it may be, and who computes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

from headrace.engine.base import LayerAnnounced
from headrace.engine.engine import Engine, PrefillChunk, PrefillOutput, StartedPrefill
from headrace.kvtransfer.messages import Commit


class Turns(Protocol):
    """Asked before each step, and given it; belongs on the event loop."""

    @property
    def join(self) -> Callable[[Commit], None] | None:
        """Takes requests into the decode step that is to be started with the next chunks, and computes their last
        tokens. None where there is none.
        """

    @property
    def depth(self) -> int:
        """How many steps may have been started and not ended."""

    @property
    def whole(self) -> int:
        """A prompt of up to so many tokens is not cut, where a step computes it alone."""

    async def turn(self) -> None:
        """Wait for the next step's turn. What it computes is to be decided without a wait after that."""

    def tokens(self, waiting: int, handing_over: bool) -> int:
        """How many prompt tokens it may compute, of so many that wait.

        `handing_over`: there are requests whose prompts are computed and that no decode worker has acknowledged.
        """

    def start(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None
    ) -> asyncio.Future[list[PrefillOutput]]:
        """Have a step computed; steps end in the order in which they were started."""


class OwnDevice:
    """There is nobody to take turns with. On a GPU a step is started while the one ahead runs, which so follow each
    other without a gap.
    """

    join = None

    def __init__(self, engine: Engine, device_thread: Executor, token_budget: int, whole: int = 0) -> None:
        """`whole`: see `Turns`."""
        self.whole = whole
        self._engine = engine
        self._device_thread = device_thread
        self._token_budget = token_budget
        self._waiting = ThreadPoolExecutor(1, "prefill steps") if engine.device.type == "cuda" else None
        self.depth = 1 if self._waiting is None else 2

    async def turn(self) -> None:
        """See `Turns`."""

    def tokens(self, waiting: int, handing_over: bool) -> int:
        """See `Turns`."""
        return self._token_budget

    def start(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None
    ) -> asyncio.Future[list[PrefillOutput]]:
        """See `Turns`."""
        if self._waiting is None:
            loop = asyncio.get_running_loop()
            return loop.run_in_executor(self._device_thread, self._engine.prefill, chunks, on_layer)
        return asyncio.wrap_future(self._start_on_gpu(self._waiting, chunks, on_layer))

    def _start_on_gpu(
        self, waiting: Executor, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None
    ) -> Future[list[PrefillOutput]]:
        """Start it and take its outputs on the device's thread, which meanwhile does not wait."""
        outputs = Future[list[PrefillOutput]]()

        def run(executor: Executor, part: Callable[[], None]) -> None:
            executor.submit(part).add_done_callback(failed)

        def failed(done: Future[None]) -> None:
            if (error := done.exception()) is not None:
                outputs.set_exception(error)

        def start() -> None:
            started = self._engine.start_prefill(chunks, on_layer)
            run(waiting, partial(wait, started))

        def wait(started: StartedPrefill) -> None:
            if started.ended is not None:
                started.ended.synchronize()
            run(self._device_thread, lambda: outputs.set_result(started.outputs()))

        run(self._device_thread, start)
        return outputs
