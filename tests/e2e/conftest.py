"""One real mesh for the whole session, as `headrace up` starts it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from headrace.loadtest.local_mesh import LocalMesh, local_mesh


@pytest.fixture(scope="session")
async def mesh() -> AsyncIterator[LocalMesh]:
    """One prefill and one decode worker with the built-in model in float32."""
    async with local_mesh("--dtype", "float32", "--max-num-seqs", "32") as running:
        yield running


@pytest.fixture
async def client(mesh: LocalMesh) -> AsyncIterator[AsyncOpenAI]:
    """The official client; a failed request is not tried again behind the test's back."""
    async with AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0, timeout=60) as openai:
        yield openai
