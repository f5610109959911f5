"""The device's thread: what it was given, in order, and what came of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from headrace.engine.device_thread import DeviceThread


@pytest.fixture
def thread() -> Iterator[DeviceThread]:
    """Ended after the test."""
    with DeviceThread() as device_thread:
        yield device_thread


async def test_all_that_it_is_given_runs_on_one_thread_in_order(thread: DeviceThread) -> None:
    """Whichever way it was given."""
    ran: list[tuple[int, int]] = []
    loop = asyncio.get_running_loop()

    def job(number: int) -> int:
        ran.append((number, threading.get_ident()))
        return number

    others = [loop.run_in_executor(thread, job, number) for number in (0, 1)]
    assert await thread.run(job, 2) == 2
    assert [number for number, _ in ran] == [0, 1, 2]
    assert await asyncio.gather(*others) == [0, 1]
    assert {ident for _, ident in ran} != {threading.get_ident()}
    assert len({ident for _, ident in ran}) == 1


async def test_errors_come_back_and_the_thread_goes_on(thread: DeviceThread) -> None:
    """Also those of an executor's way."""

    def broken() -> None:
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            await thread.run(broken)
        with pytest.raises(ValueError, match="broken"):
            await asyncio.get_running_loop().run_in_executor(thread, broken)


async def test_who_is_cancelled_does_not_stop_a_job(thread: DeviceThread) -> None:
    """It runs to its end, and nobody is told."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        may_end.wait(10)
        ended.set()

    waiting = thread.run(job)
    await asyncio.to_thread(begun.wait, 10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    may_end.set()
    await thread.run(lambda: None)
    assert ended.is_set()


def test_a_job_may_outlive_the_loop_that_waited_for_it(thread: DeviceThread) -> None:
    """The thread then has nobody to tell, and goes on."""
    may_end = threading.Event()

    async def give() -> None:
        thread.run(may_end.wait, 10)

    async def five() -> int:
        return await thread.run(lambda: 5)

    asyncio.run(give())
    may_end.set()
    assert asyncio.run(five()) == 5
