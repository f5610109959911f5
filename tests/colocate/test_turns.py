"""How many prompt tokens a chunk beside decode steps may have, on simulated devices."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headrace.colocate.chunk_size import ChunkSize
from headrace.colocate.turns import TakingTurns
from headrace.engine.engine import PrefillChunk, PrefillOutput
from headrace.messages.request import SamplingParams

TARGET = 0.060


class Device:
    """Steps and chunks in simulated time, in seconds."""

    def __init__(self, target: float = TARGET, fewest: int = 16, most: int = 512) -> None:
        self.now = 0.0
        self._work: Callable[[], None] = lambda: None
        self.thread = ThreadPoolExecutor(1)
        engine: Any = self
        self.turns = TakingTurns(ChunkSize(target, fewest, most), engine, self.thread, lambda: self.now)

    def prefill(self, chunks: Sequence[PrefillChunk], on_layer: object) -> list[PrefillOutput]:
        """As an engine's."""
        self._work()
        return []

    async def compute(self, tokens: int, work: Callable[[], None]) -> None:
        """A chunk, during which `work` happens."""
        self._work = work
        await self.turns.start([PrefillChunk([0] * tokens, 0, tokens, [], SamplingParams(max_tokens=1))], None)

    def advance(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds

    def step(self, seconds: float, running: int = 4) -> None:
        """A decode step that takes so long."""
        self.now += seconds
        self.turns.stepped(running, True)

    async def turn(self) -> int:
        """The next chunk's tokens; a step has ended before."""
        async with asyncio.timeout(0.5):
            await self.turns.turn()
        return self.turns.tokens(10_000, False)


async def alternate(device: Device, rounds: int, step: float, fixed: float, a_token: float, noise: float = 0) -> float:
    """A CPU: step, chunk, step, chunk. Returns the last gap between two steps."""
    chance, gap = random.Random(1), 0.0
    device.step(step)
    for _ in range(5):
        device.step(step)
    for _ in range(rounds):
        tokens, before = await device.turn(), device.now
        took = (fixed + tokens * a_token) * (1 + noise * chance.random())
        await device.compute(tokens, functools.partial(device.advance, took))
        device.step(step)
        gap = device.now - before
    return gap


@pytest.mark.parametrize("fixed", [0.0, 0.008, 0.02])
async def test_gaps_come_close_to_the_target_and_not_over_it(fixed: float) -> None:
    """Whatever part of a chunk's time does not depend on its size."""
    device = Device()
    gap = await alternate(device, 60, step=0.015, fixed=fixed, a_token=0.0005)
    assert 0.9 * TARGET < gap < 1.02 * TARGET


async def test_noise_makes_chunks_smaller_not_gaps_longer() -> None:
    """What took too long counts more than what did not."""
    device = Device()
    gap = await alternate(device, 60, step=0.015, fixed=0.005, a_token=0.0005, noise=0.3)
    assert gap < 1.1 * TARGET


async def test_prompts_go_on_where_steps_alone_take_the_target() -> None:
    """With the fewest tokens a chunk."""
    device = Device()
    await alternate(device, 30, step=0.1, fixed=0.0, a_token=0.0005)
    assert await device.turn() == 16


async def test_a_chunk_that_costs_steps_little_may_grow() -> None:
    """A GPU: three steps run beside a chunk of 14 ms, each a little longer than alone."""
    device = Device(target=0.012, fewest=128, most=2048)
    for _ in range(6):
        device.step(0.0065)

    def two_steps() -> None:
        device.step(0.009)
        device.step(0.009)

    for _ in range(60):
        await device.compute(await device.turn(), two_steps)
        device.step(0.008)
    assert await device.turn() == 2048


async def test_a_chunk_that_makes_steps_too_long_shrinks_until_it_does_not() -> None:
    """Beside a chunk a step takes up to 20 ms, in short ones no longer than the chunk's own work."""
    device = Device(target=0.012, fewest=128, most=2048)
    for _ in range(6):
        device.step(0.0065)
    gap = 0.0
    for _ in range(60):
        tokens = await device.turn()
        gap = 0.0065 + min(tokens * 24e-6, 0.0135)
        await device.compute(tokens, functools.partial(device.advance, gap / 2))
        device.step(gap / 2)
        device.step(0.0065)
    assert 0.9 * 0.012 < gap < 1.02 * 0.012


async def test_without_decoding_a_chunk_is_as_large_as_may_be() -> None:
    """Until requests are about to be decoded."""
    device = Device()
    await device.turns.turn()
    assert device.turns.tokens(10_000, False) == 512
    assert device.turns.tokens(10_000, True) == 16


async def test_one_chunk_begins_between_two_steps() -> None:
    """The second one waits for a step to end, or for the batch to be empty."""
    device = Device()
    device.step(0.01)
    await device.turn()
    for running in (4, 0):
        second = asyncio.create_task(device.turns.turn())
        await asyncio.wait([second], timeout=0.01)
        assert not second.done()
        device.step(0.01, running)
        await asyncio.wait([second], timeout=0.5)
        assert second.done()


async def test_a_chunk_that_fails_says_so() -> None:
    """And the next one may begin."""

    def fail() -> None:
        raise ValueError("broken")

    device = Device()
    with pytest.raises(ValueError, match="broken"):
        await device.compute(16, fail)
    assert await device.turn() == 512
