"""A prefill worker's own device: what is started while what is ahead runs."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from headrace.engine.device_thread import DeviceThread
from headrace.engine.engine import PrefillChunk, PrefillOutput, StartedPrefill
from headrace.messages.request import SamplingParams
from headrace.prefill.turns import OwnDevice


class Ended:
    """Device work that a test ends."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def synchronize(self) -> None:
        """Wait for it."""
        assert self.event.wait(5)

    def query(self) -> bool:
        """Whether it is over."""
        return self.event.is_set()


class Engine:
    """As one on a GPU: passes start at once, and end when a test says so."""

    def __init__(self) -> None:
        self.device = type("Device", (), {"type": "cuda"})
        self.passes: list[Ended] = []
        self.started = asyncio.Queue[int]()
        self._loop = asyncio.get_running_loop()

    def start_prefill(self, chunks: list[PrefillChunk], on_layer: Any) -> StartedPrefill:
        """The outputs are taken when all has ended."""
        if chunks[0].length == 0:
            raise ValueError("nothing to compute")
        ended = Ended()
        self.passes.append(ended)
        self._loop.call_soon_threadsafe(self.started.put_nowait, chunks[0].length)

        def outputs() -> list[PrefillOutput]:
            assert ended.query()
            return [PrefillOutput(None, [])] * len(chunks)

        return StartedPrefill(outputs, ended=ended)


def chunks(length: int) -> list[PrefillChunk]:
    """One of so many tokens."""
    return [PrefillChunk([0] * length, 0, length, [], SamplingParams(max_tokens=1))]


async def test_a_step_is_started_while_another_runs() -> None:
    """They end in order, each when the device has ended it."""
    with DeviceThread() as thread:
        engine: Any = Engine()
        turns = OwnDevice(engine, thread, 64)
        assert turns.depth == 2
        first, second = turns.start(chunks(3), None), turns.start(chunks(5), None)
        assert [await engine.started.get(), await engine.started.get()] == [3, 5]
        assert not first.done()
        engine.passes[0].event.set()
        assert len(await first) == 1
        assert not second.done()
        engine.passes[1].event.set()
        await second


async def test_what_fails_to_start_fails_alone() -> None:
    """The step ahead goes on."""
    with DeviceThread() as thread:
        engine: Any = Engine()
        turns = OwnDevice(engine, thread, 64)
        first, second = turns.start(chunks(3), None), turns.start(chunks(0), None)
        with pytest.raises(ValueError, match="nothing"):
            await second
        engine.passes[0].event.set()
        await first
