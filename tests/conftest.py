"""A real Redis-compatible server for the whole session, and a namespace of its own for each test."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before anything imports Triton

from headrace.redis_client import Keys
from headrace.redis_server import private_redis
from tests.browser import Browser, chromium

_namespaces = itertools.count()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def redis_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The URL of a server that lives as long as the session."""
    async with private_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def keys() -> Keys:
    """Redis keys that no other test uses."""
    return Keys(f"unit-{next(_namespaces)}")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """One headless Chromium for all tests that look at the page; they are skipped where there is none."""
    async with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running
