"""The live page before a real mesh: chat, kill the decode worker that answers, watch it on the page.

`make demo-page` runs this file and leaves the pictures in tests/shots.
"""

from __future__ import annotations

import asyncio

import pytest

from headrace.loadtest.client import StreamClient
from headrace.loadtest.local_mesh import local_mesh
from headrace.loadtest.prompts import unique_tokens
from tests.browser import Browser

LAST = "document.querySelector('#messages li:last-child')"
SERVED_BY = f"{LAST}.querySelector('.facts').innerText.match(/→ (decode-\\d)/)"
LENGTH = f"{LAST}.querySelector('.said').innerText.length"
START_SECONDS = 120.0
"""Until a killed worker has been started again and has loaded the model."""


@pytest.mark.timeout(300)  # three engines on however few cores there are
async def test_a_killed_decode_worker_is_seen_to_die_and_to_come_back_while_its_answer_goes_on(
    browser: Browser,
) -> None:
    """As the README's reader does it: `headrace up`, open the page, ask, kill."""
    async with local_mesh("--dtype", "float32", "--decode", "2") as mesh, browser.page(f"{mesh.url}/") as page:
        await page.until("document.querySelector('#model').textContent === 'smollm2'")
        async with StreamClient(mesh.url, "smollm2") as client:
            await asyncio.gather(*[client.complete(unique_tokens(60 * number, number), 24) for number in range(1, 6)])
        await page.run("document.querySelector('#question').focus()")
        await page.type("Tell me a long story about a water mill and the people who live there.")
        await page.press("Enter")
        await page.until(SERVED_BY, seconds=60)
        victim = str(await page.run(f"{SERVED_BY}[1]"))
        await page.until("document.querySelector('.mote.page')", seconds=60)
        mesh.kill(victim)  # nobody knows of it until its lease ends
        await page.shoot("demo-1-handoff")
        await page.until(f"document.querySelector('[data-worker={victim}].gone')?.textContent.includes('died')")
        await page.shoot("demo-2-died")
        survivor = {"decode-0": "decode-1", "decode-1": "decode-0"}[victim]
        route = f"prefill-0 → {victim}, then prefill-0 → {survivor}"
        await page.until(f"{LAST}.querySelector('.facts').innerText.includes('{route}')", seconds=60)
        length = await page.run(LENGTH)
        await page.until(f"{LENGTH} > {length} + 100 || document.querySelector('#stop').disabled", seconds=60)
        await page.shoot("demo-3-went-on")
        await page.until(f"document.querySelector('[data-worker={victim}]:not(.gone)')", seconds=START_SECONDS)
        assert f"{victim} joined" in await page.run("document.querySelector('#news').textContent")
        await page.run("document.querySelector('#stop').click()")
        await page.until("document.querySelector('#stop').disabled")
        assert not await page.run("document.querySelector('#messages .error')")
        assert await page.run("document.querySelectorAll('#rows li:first-child .lane').length") == 2
        await page.run("document.querySelector('#rows details').open = true")
        await page.shoot("demo-4-came-back")
        assert page.problems == []
