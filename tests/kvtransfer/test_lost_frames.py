"""Real sockets through a proxy that breaks or forgets connections: pages that were on them are sent again."""

from __future__ import annotations

import asyncio
import functools

import pytest

from headrace.data_line import DataLine
from headrace.kvtransfer import on_the_way
from headrace.loadtest.fault_proxy import FaultProxy
from headrace.tcp_line import TcpConnection
from tests.kvtransfer.test_ranks import SOURCE, TARGET, Worker, both

PROXY = "127.0.0.2"
NUM_PROMPTS = 3


@pytest.mark.parametrize("in_place", [False, True], ids=["travels", "in place"])
@pytest.mark.parametrize("accident", ["drop", "forget"])
async def test_a_handoff_outlives_its_connections(
    accident: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt arrives in its first attempt, also where neither end was told that its connection is gone."""
    monkeypatch.setattr(on_the_way, "PATIENCE_SECONDS", 0.05)
    async with both(Worker(1, 16), Worker(1, 16), in_place) as workers:
        port = int(workers.address.rpartition(":")[2])
        async with FaultProxy(PROXY, port, "127.0.0.1") as proxy:
            through_proxy = functools.partial(TcpConnection, f"{PROXY}:{port}", f"{SOURCE}@1")
            unused, workers.line = workers.line, DataLine(through_proxy, TARGET, stripes=1)  # all take what breaks
            unused.end()
            for number in range(NUM_PROMPTS):
                handoff = workers.handoff(str(number), list(range(number, 64 + number)))
                delivering = asyncio.create_task(workers.deliver(handoff))
                workers.compute(handoff)
                if number:  # the first one opens them
                    getattr(proxy, accident)()
                handoff.finish(7, None)
                await delivering
                assert [workers.error(request) for request in workers.received] == [0.0]
                if number and accident == "forget":
                    assert handoff.repeats
                await workers.until_nothing_is_held()
            assert not workers.refused
            workers.line.end()
            await asyncio.to_thread(workers.line.join)
