"""Which step takes a chunk of prompts along, when its outputs come, and what becomes of it where steps end or fail."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headrace.colocate.row_budget import RowBudget
from headrace.colocate.shared_steps import SharedSteps
from headrace.decode.scheduler import Plan
from headrace.decode.step import run_step
from headrace.engine.engine import PrefillChunk, PrefillOutput, StartedPrefill
from headrace.engine.graph_batch import GraphBatch
from headrace.messages.request import SamplingParams

COSTS = {128: 0.008, 256: 0.01, 384: 0.012, 512: 0.013, 640: 0.02}
OUTPUT = [PrefillOutput(None, [])]


class Batch(GraphBatch[Any]):
    """One whose steps are never computed."""

    def __init__(self) -> None:
        self._keys = [1, 2, 3]
        self._running = deque()
        self.chunks: list[Any] = []
        self.drafts: list[Any] = []
        self.fails = False
        self.collected_late = False

    def start_with_prompts(self, chunks: Any, on_layer: Any = None) -> StartedPrefill:
        """Remember them."""
        if self.fails:
            raise RuntimeError("broken")
        self.chunks += chunks
        return StartedPrefill(lambda: OUTPUT)

    def start(self, drafts: Any = (), depth: int = 0) -> None:
        """Remember them."""
        self.drafts.append(drafts)


class Device:
    """Shared steps, the thread that they run on, and a batch."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.alone: list[PrefillChunk] = []
        self.batch = Batch()
        self.now = 0.0
        engine: Any = self
        self.steps = SharedSteps(RowBudget(0.0151, 256, 2048, COSTS), engine, thread, lambda: self.now)
        self._thread = thread

    def start_shared(self, chunks: list[PrefillChunk], on_layer: Any, running: int) -> StartedPrefill:
        """As an engine's."""
        assert running == 0
        self.alone += chunks
        return StartedPrefill(lambda: OUTPUT)

    def start(self, tokens: int = 8) -> asyncio.Future[list[PrefillOutput]]:
        """Give a chunk."""
        return self.steps.start([PrefillChunk([0] * tokens, 0, tokens, [], SamplingParams(max_tokens=1))], None)

    async def step(self, running: int = 3, ended: bool = True, starts: bool = True) -> None:
        """One turn of a decode worker's loop."""

        def run() -> None:
            if starts:
                self.steps.start_step(self.batch)
            self.steps.stepped(running, ended)

        await asyncio.get_running_loop().run_in_executor(self._thread, run)
        await asyncio.sleep(0)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """The device's."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def test_a_chunk_goes_with_the_next_step_and_ends_with_it(thread: ThreadPoolExecutor) -> None:
    """With a step in flight ahead of it."""
    device = Device(thread)
    await device.step(ended=False)
    computing = device.start()
    await device.step()
    assert len(device.batch.chunks) == 1
    assert not computing.done()
    await device.step()
    assert await computing == OUTPUT
    assert not device.alone


async def test_prompts_go_before_drafts(thread: ThreadPoolExecutor) -> None:
    """A step that takes a chunk along verifies none, and runs ahead as any other; the next one has its drafts."""
    device = Device(thread)
    await device.step(ended=False)
    computing = device.start()
    plans = [Plan(drafts={("a", 0): [7]}), Plan(drafts={("a", 0): [8]})]
    for plan in plans:
        await asyncio.get_running_loop().run_in_executor(thread, run_step, device.batch, plan, device.steps)
    assert len(device.batch.chunks) == 1
    assert [(plan.is_shared, plan.drafts) for plan in plans] == [(True, {}), (False, {("a", 0): [8]})]
    assert device.batch.drafts == [{("a", 0): [8]}]
    await device.step()
    await device.step()
    assert await computing == OUTPUT


async def test_where_nothing_is_decoded_a_chunk_is_computed_alone(thread: ThreadPoolExecutor) -> None:
    """From the start, and when the last request leaves while the chunk waits for a step."""
    device = Device(thread)
    assert await device.start() == OUTPUT
    await device.step(ended=False)
    computing = device.start()
    await device.step(running=0, starts=False)
    assert await computing == OUTPUT
    assert len(device.alone) == 2


async def test_a_turn_comes_with_a_step_when_the_place_is_free(thread: ThreadPoolExecutor) -> None:
    """At once, and for large chunks, where nothing is decoded."""
    device = Device(thread)
    await device.steps.turn()
    assert device.steps.tokens(4096, handing_over=False) == 2048
    await device.step(ended=False)
    computing = device.start()
    turn = asyncio.create_task(device.steps.turn())
    await device.steps.before_step(3)
    assert not turn.done()
    await device.step()
    assert not turn.done()
    await device.steps.before_step(3)
    assert turn.done()
    assert device.steps.tokens(4096, handing_over=False) == 512 - 3
    turn = asyncio.create_task(device.steps.turn())
    await device.step()
    assert not turn.done()
    await device.step(running=0)
    await asyncio.wait_for(turn, 1)
    await computing


async def test_a_step_starts_just_before_the_one_ahead_ends(thread: ThreadPoolExecutor) -> None:
    """As long as that is expected to take."""
    device = Device(thread)
    await device.step(ended=False)
    await device.steps.before_step(3)  # nothing has ended yet
    device.start(100)
    await device.step()
    waiting = asyncio.create_task(device.steps.before_step(3))
    await asyncio.sleep(0)
    assert not waiting.done()
    await asyncio.wait_for(waiting, 1)
    device.now = 0.007
    await asyncio.wait_for(device.steps.before_step(3), 1)


async def test_a_host_that_is_late_starts_steps_earlier(thread: ThreadPoolExecutor) -> None:
    """As early as is worth while: here it always is late. Steps without prompts don't count."""
    device = Device(thread)
    device.batch.collected_late = True
    await device.step(ended=False)

    async def starts_at_once() -> bool:
        waiting = asyncio.create_task(device.steps.before_step(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        at_once = waiting.done()
        await asyncio.wait_for(waiting, 1)
        return at_once

    device.now = 0.0
    for _ in range(30):
        await device.step()
    chunk = device.start(500)
    await device.step()
    device.now = 0.0055  # of the 13 ms that the step with the chunk takes
    assert not await starts_at_once()
    for _ in range(30):
        device.now = 0.0
        chunk = device.start(500)
        await device.step()
    device.now = 0.0055
    assert await starts_at_once()
    device.now = 0.003
    assert not await starts_at_once()
    await device.step()
    await chunk


async def test_a_failed_step_fails_its_chunk_alone(thread: ThreadPoolExecutor) -> None:
    """In flight or as it starts; what waits is computed."""
    device = Device(thread)
    await device.step(ended=False)
    in_flight = device.start()
    await device.step(ended=False)
    device.batch.fails = True
    starting = device.start()
    with pytest.raises(RuntimeError, match="broken"):
        await device.step()
    waiting = device.start()
    device.steps.abandoned()
    assert await waiting == OUTPUT
    for failed in (in_flight, starting):
        with pytest.raises(RuntimeError):
            await failed


def test_rows_are_as_many_as_the_target_allows() -> None:
    """Gaps that take longer than their passes, by contexts or the host, make them fewer, and more again."""
    budget = RowBudget(0.0151, 128, 2048, COSTS)
    assert budget.tokens(20, 5000) == 492
    for _ in range(30):
        budget.saw(512, True, 0.0155)
    assert budget.tokens(20, 5000) == 364
    assert budget.expected(500, True) == pytest.approx(0.0155, abs=2e-4)
    assert budget.expected(384, True) == pytest.approx(0.0132, abs=2e-4)
    for _ in range(30):
        budget.saw(384, True, 0.02)
    assert budget.tokens(20, 5000) == 108
    for _ in range(20):
        budget.saw(128, True, 0.02)
    assert budget.tokens(20, 5000) == 64
    for _ in range(200):
        budget.saw(128, True, 0.008)
    assert [budget.tokens(running, 5000) for running in (20, 400, 500)] == [492, 112, 64]
    budget.saw(128, True, 5.0)  # a machine that was asleep
    assert budget.tokens(20, 5000) == 492


def test_gaps_that_scatter_keep_passes_farther_below_the_target() -> None:
    """Until one in some hundred is over it; those that no smaller pass would have helped don't count."""
    budget = RowBudget(0.0151, 128, 2048, COSTS)
    for _ in range(10):
        budget.scattered(0.025)
    assert budget.tokens(20, 5000) == 492
    for _ in range(6):
        budget.scattered(0.0155)
    assert budget.tokens(20, 5000) == 364
    for _ in range(500):
        budget.scattered(0.014)
    assert budget.tokens(20, 5000) == 492
    for _ in range(1000):
        budget.scattered(0.0155)
        for _ in range(199):
            budget.scattered(0.0148)
    assert budget.tokens(20, 5000) == 492
    for _ in range(100):
        budget.scattered(0.0155)
    assert budget.tokens(20, 5000) == 364  # at most 3 ms below it


def test_what_waits_is_cut_into_equal_parts() -> None:
    """Of as many passes as the largest would need."""
    budget = RowBudget(0.0151, 128, 2048, COSTS)
    assert [budget.tokens(20, waiting) for waiting in (50, 300, 492, 700, 1100)] == [108, 364, 492, 364, 492]


def test_steps_without_prompts_are_expected_to_take_what_they_took() -> None:
    """Whatever their rows."""
    budget = RowBudget(0.0151, 128, 2048, COSTS)
    assert budget.expected(20, False) == 0.0
    budget.saw(20, False, 0.007)
    assert budget.expected(30, False) == 0.007
