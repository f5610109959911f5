"""What a client sees when a worker dies, and what is left when the mesh stops."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from headrace.loadtest.client import StreamClient
from headrace.loadtest.local_mesh import local_mesh
from headrace.loadtest.prompts import unique_tokens

MODEL = "smollm2"


@pytest.mark.timeout(240)  # four engines on however few cores there are
async def test_killed_workers_lose_no_request_and_nothing_is_left_behind() -> None:
    """SIGKILL a prefill worker, then a decode worker, under load: every answer is what it is undisturbed."""
    flags = ("--dtype", "float32", "--prefill", "2", "--decode", "2", "--max-num-seqs", "16")
    async with local_mesh(*flags) as mesh, StreamClient(mesh.url, MODEL) as client:
        prompts = [unique_tokens(100, number) for number in range(6)]
        undisturbed = [(await client.complete(prompt, 24)).text for prompt in prompts]
        for victim in ("prefill-0", "decode-0"):
            load = [
                asyncio.create_task(client.complete([*prompt[1:], number], 24)) for number, prompt in enumerate(prompts)
            ]
            await mesh.until_pages_are_used(victim)
            mesh.kill(victim)
            answers = await asyncio.gather(*load)
            assert [len(answer.token_times) for answer in answers] == [24] * len(prompts)
        assert [(await client.complete(prompt, 24)).text for prompt in prompts] == undisturbed
        await mesh.until_no_page_is_used()
        pids = set(mesh.pids.values())
    assert not [pid for pid in pids if _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
