"""Workers whose pages differ in size, as separate `headrace prefill` and `headrace decode` commands give them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from headrace.loadtest.client import StreamClient
from headrace.loadtest.local_mesh import LocalMesh
from headrace.loadtest.loopback import free_port
from headrace.loadtest.prompts import unique_tokens
from headrace.redis_server import private_redis
from headrace.settings import Settings
from headrace.supervisor import Child, Supervisor
from headrace.tasks import end_task
from headrace.up import _until_ready

MODEL = "smollm2"
BLOCK_SIZES = {"prefill-0": 16, "decode-0": 32, "decode-1": 8}


async def test_tokens_do_not_depend_on_the_page_sizes_of_the_tiers(mesh: LocalMesh, tmp_path: Path) -> None:
    """A prefill worker's pages hold 16 tokens, its decode workers' 32 and 8; some prompts are known there already."""
    first = [unique_tokens(length, length) for length in (5, 40, 64, 100, 131, 200)]
    prompts = [*first, *[[*prompt, 17, 18] for prompt in first]]
    async with StreamClient(mesh.url, MODEL) as client:
        expected = [(await client.complete(prompt, 12)).text for prompt in prompts]
    port = free_port()
    async with private_redis(tmp_path) as url:
        settings = Settings(
            redis=url, port=port, dtype="float32", max_model_len=512, kv_cache_memory_bytes=2**26, max_num_seqs=16
        )
        children = [Child("gateway", "gateway", settings.as_environment())]
        for name, block_size in BLOCK_SIZES.items():
            own = settings.model_copy(update={"worker_id": name, "block_size": block_size})
            children.append(Child(name, name.partition("-")[0], own.as_environment()))
        supervisor = Supervisor(children, lambda child, line: None)
        running = asyncio.create_task(supervisor.run())
        try:
            await _until_ready(settings)
            mixed = LocalMesh(f"http://127.0.0.1:{port}")
            async with StreamClient(mixed.url, MODEL) as client:
                for half in (prompts[: len(first)], prompts[len(first) :]):
                    answers = await asyncio.gather(*[client.complete(prompt, 12) for prompt in half])
                    assert [a.text for a in answers] == expected[prompts.index(half[0]) :][: len(half)]
            await mixed.until_no_page_is_used()
            assert await mixed.metrics("headrace_kv_page_tokens") == {"decode-0": 32.0, "decode-1": 8.0}
            cut_anew = (await mixed.metrics("headrace_handoff_transport_shm_total"))["prefill-0"]
            in_place = await mixed.metrics("headrace_in_place_prompts_total")
            assert cut_anew >= len(first) / 2
            assert cut_anew + sum(in_place.values()) >= len(prompts)
        finally:
            await end_task(running)
            await supervisor.stop()
