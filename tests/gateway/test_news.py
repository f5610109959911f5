"""The event that writers of answers wait for."""

from __future__ import annotations

import asyncio

from headrace.gateway.news import News


async def test_news_are_taken_once_and_waits_end() -> None:
    """Those that came before the wait, too; a timer that an earlier wait left behind ends no later one too soon."""
    news = News()
    news.set()
    assert await news.wait(60.0)
    assert not await news.wait(0.0)
    asyncio.get_running_loop().call_soon(news.set)
    assert await news.wait(0.01)  # leaves its timer
    waiting = asyncio.create_task(news.wait(60.0))
    await asyncio.sleep(0.03)
    assert not waiting.done()
    news.set()
    assert await waiting
    news.close()


async def test_a_wait_that_is_given_up_takes_nothing() -> None:
    """And the next one goes on."""
    news = News()
    waiting = asyncio.create_task(news.wait(60.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    news.set()
    assert await news.wait(60.0)
    news.close()
