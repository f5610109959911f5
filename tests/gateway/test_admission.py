"""Who comes in, in which order, and what the others are told: over real sockets, with workers of a known speed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from headrace.gateway.callers import ANYBODY, ApiKeys
from headrace.queue import Delivery
from headrace.settings import Settings, SettingsError
from tests.gateway.conftest import MODEL, Gateway, OpenGateway
from tests.gateway.workers import Workers, keep_silent

PATH = "/v1/completions"
PROMPT_TOKENS = 100
KEYS = """
[ann]
key = "key-of-ann"
[bob]
key = "key-of-bob"
[eve]
key = "key-of-eve"
weight = 2
[ops]
key = "key-of-ops"
priority = 1
"""


def _body(mark: int = 5, tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    return {"model": MODEL, "prompt": [mark] * tokens, "max_tokens": 1}


def _paced(tokens_a_second: float) -> Callable[[Workers, Delivery], Awaitable[None]]:
    """Workers that compute one prompt after the other."""
    turn = asyncio.Lock()

    async def answer(workers: Workers, delivery: Delivery) -> None:
        async with turn:
            await asyncio.sleep(len(delivery.entry.token_ids) / tokens_a_second)
        await workers.report(delivery)
        await workers.tokens(delivery, 0, [100], "length")

    return answer


class _Clients:
    """Many requests at once, and how they ended."""

    def __init__(self, gateway: Gateway) -> None:
        self._url = gateway.url + PATH
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._tasks: list[asyncio.Task[int]] = []
        self.statuses: Counter[int] = Counter()

    async def __aenter__(self) -> _Clients:
        return self

    async def __aexit__(self, *failure: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.close()

    def ask(self, count: int, **options: Any) -> list[asyncio.Task[int]]:
        """Send so many requests; each task ends with the status."""
        tasks = [asyncio.create_task(self.post(**options)) for _ in range(count)]
        self._tasks += tasks
        return tasks

    async def post(self, mark: int = 5, tokens: int = PROMPT_TOKENS, **headers: str) -> int:
        """Send one."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._http.post(self._url, json=_body(mark, tokens), headers=names) as response:
            await response.read()
            self.statuses[response.status] += 1
            return response.status

    async def until_refused(self) -> dict[str, str]:
        """Ask until the answer is a 429; its headers."""
        async with asyncio.timeout(10):
            while True:
                async with self._http.post(self._url, json=_body()) as response:
                    if response.status == 429:
                        return dict(response.headers)


async def _until_all_wait(gateway: Gateway, asked: int) -> None:
    """Until the workers, who keep silent, or the gateway's queue have so many requests."""
    async with asyncio.timeout(20):
        while _queued(gateway) + len(gateway.workers.client_deliveries()) < asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _queued(gateway: Gateway) -> int:
    return int(gateway.node.registry.me.stats.get("requests_queued", 0))


async def _go_on(gateway: Gateway) -> list[Delivery]:
    """Have workers that kept silent answer; returns what they had been given until then."""
    at_once = gateway.workers.script = _paced(1e9)
    before = gateway.workers.client_deliveries()
    for delivery in before:
        await at_once(gateway.workers, delivery)
    return before


async def test_retry_after_is_right_within_a_factor_of_two(open_gateway: OpenGateway) -> None:
    """Nobody else comes meanwhile: half of it is too early, twice is enough."""
    async with open_gateway(max_ttft=0.4) as gateway, _Clients(gateway) as clients:
        gateway.workers.script = _paced(2000)
        load = clients.ask(90)
        await asyncio.wait(load[:30])
        asked = time.monotonic()
        headers = await clients.until_refused()
        promised = int(headers["Retry-After-Ms"]) / 1000
        assert promised <= int(headers["Retry-After"]) < promised + 1
        while await clients.post() == 429:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        # the request that was let in also waited for its own first token
        admitted = time.monotonic() - asked - 0.4
        assert promised / 2 <= admitted <= promised * 2, (promised, admitted)
        assert {task.result() for task in load if task.done()} == {200}


async def test_keys_share_by_weight_and_hundreds_of_requests_starve_nobody(
    open_gateway: OpenGateway, tmp_path: Path
) -> None:
    """Shares of what the workers were given, while three keys wait, are within a tenth of 1 : 1 : 2."""
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    async with open_gateway(api_keys_file=file) as gateway, _Clients(gateway) as clients:
        gateway.workers.script = keep_silent
        clients.ask(300, mark=1, Authorization="Bearer key-of-ann")
        await _until_all_wait(gateway, 300)
        clients.ask(60, mark=2, Authorization="Bearer key-of-bob")
        clients.ask(110, mark=3, Authorization="Bearer key-of-eve")
        await _until_all_wait(gateway, 470)
        clients.ask(5, mark=4, Authorization="Bearer key-of-ops")
        await _until_all_wait(gateway, 475)
        before = await _go_on(gateway)
        await gateway.workers.until(lambda: len(gateway.workers.client_deliveries()) >= len(before) + 205)
        given = [delivery.entry.token_ids[0] for delivery in gateway.workers.client_deliveries()[len(before) :]]
    assert given[:16].count(4) == 5
    shares = Counter(given[:205])
    assert shares[1] == pytest.approx(50, abs=5)
    assert shares[2] == pytest.approx(50, abs=5)
    assert shares[3] == pytest.approx(100, abs=10)


async def test_a_key_that_fills_the_queue_leaves_room_for_others(open_gateway: OpenGateway, tmp_path: Path) -> None:
    """Its own requests get the 429."""
    file = tmp_path / "keys.toml"
    file.write_text(KEYS)
    async with (
        open_gateway(api_keys_file=file, max_queued_requests=40) as gateway,
        _Clients(gateway) as clients,
    ):
        gateway.workers.script = keep_silent
        clients.ask(100, Authorization="Bearer key-of-ann")
        async with asyncio.timeout(20):
            while clients.statuses[429] < 76:  # noqa: ASYNC110 - 20 for whoever comes, a fifth of 20 of its own
                await asyncio.sleep(0.01)
        others = clients.ask(4, Authorization="Bearer key-of-bob")
        assert await clients.post(Authorization="Bearer key-of-ann") == 429
        await _until_all_wait(gateway, 28)
        assert not any(task.done() for task in others)


async def test_priority_orders_a_caller_s_own_requests(open_gateway: OpenGateway) -> None:
    """The urgent come before those that wait, the others after."""
    async with open_gateway() as gateway, _Clients(gateway) as clients:
        gateway.workers.script = keep_silent
        clients.ask(30, mark=1)
        await _until_all_wait(gateway, 30)
        clients.ask(3, mark=2, X_Priority="-3")
        clients.ask(3, mark=3, X_Priority="5")
        await _until_all_wait(gateway, 36)
        before = await _go_on(gateway)
        await gateway.workers.until(lambda: len(gateway.workers.client_deliveries()) == 36)
        given = [delivery.entry.token_ids[0] for delivery in gateway.workers.client_deliveries()[len(before) :]]
        for value in ("11", "high", "1.5"):
            assert await clients.post(X_Priority=value) == 400
    assert given[:12].count(3) == 3  # a moment's worth is put into Redis at once, in any order
    assert given[-12:].count(2) == 3


async def test_a_request_that_waits_here_expires_here(open_gateway: OpenGateway) -> None:
    """With a 504, and no worker ever hears of it."""
    async with open_gateway() as gateway, _Clients(gateway) as clients:
        gateway.workers.script = keep_silent
        clients.ask(30, mark=1)
        await _until_all_wait(gateway, 30)
        assert await clients.post(mark=2, X_Request_Timeout="0.2") == 504
        assert await clients.post(X_Request_Timeout="0") == 400
        assert await clients.post(X_Request_Timeout="soon") == 400
        assert all(delivery.entry.token_ids[0] == 1 for delivery in gateway.workers.client_deliveries())


async def test_clients_that_leave_make_room(open_gateway: OpenGateway) -> None:
    """Whether they waited here or at the workers: nothing is counted that nobody waits for."""
    async with open_gateway() as gateway, _Clients(gateway) as clients:
        gateway.workers.script = keep_silent
        load = clients.ask(40)
        await _until_all_wait(gateway, 40)
        for task in load:
            task.cancel()
        async with asyncio.timeout(10):
            while _queued(gateway):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        gateway.workers.script = _paced(1e9)
        assert await clients.post() == 200


async def test_a_deadline_travels_with_the_request(open_gateway: OpenGateway) -> None:
    """Workers know when nobody waits any more."""
    async with open_gateway(request_timeout=50) as gateway, _Clients(gateway) as clients:
        gateway.workers.script = _paced(1e9)
        await clients.post(X_Request_Timeout="7")
        await clients.post(X_Request_Timeout="1000")
        left = [
            delivery.entry.deadline - delivery.entry.enqueued_at for delivery in gateway.workers.client_deliveries()
        ]
    assert left == [pytest.approx(7, abs=1), pytest.approx(50, abs=1)]


def test_a_keys_file_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    """File, place and remedy."""
    file = tmp_path / "keys.toml"
    settings = Settings(api_key="the one key", api_keys_file=file)
    for text, message in [
        ("[a]\nkey = 'short'", "length >= 8"),
        ("[a]\nkey = 'long enough'\nwieght = 2", "wieght"),
        ("[a]\nkey = 'long enough'\nweight = 0", r"\[a\]|weight"),
        ("[a]\nkey = 'the one key'", "same key"),
        ("[default]\nkey = 'another key'", "same name"),
        ("['a b']\nkey = 'another key'", "no name"),
        ("a = ", "Invalid value"),
    ]:
        file.write_text(text)
        with pytest.raises(SettingsError, match=message):
            ApiKeys.load(settings)
    file.write_text(KEYS)
    keys = ApiKeys.load(settings)
    found = [keys.find(key) for key in ("the one key", "key-of-eve", "key-of-eva", "")]
    assert [caller and caller.name for caller in found] == ["default", "eve", None, None]
    assert ApiKeys.load(Settings()).find("") is ANYBODY
