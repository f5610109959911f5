"""A server with known timings: answers a completion with so many tokens at a fixed pace, and nothing else.

It stands in for a real one where the load generator itself is measured: what a client should see is what was asked of
it. One process, one timer for all streams that are due at a time, whole events in one write each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvloop
from aiohttp import web

from headrace.loadtest.loopback import serving

MODEL = "paced"


@dataclass
class Pace:
    """Seconds. With `slots`, no more streams than that are served at once; others wait their turn."""

    first: float = 0.05
    gap: float = 0.02
    slots: int | None = None
    takes_token_ids: bool = True
    failing: int = 0
    """Every so-manieth request is refused; 0 is none."""


class PacedServer:
    """`served` has what each request's stream really did: seconds from its arrival to each of its writes."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.served: list[list[float]] = []
        self.running = self.most_running = 0
        self.prompts: list[list[int] | str] = []
        self._requests = 0
        self._slots = asyncio.Semaphore(pace.slots or 2**31)

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/served", self._tell)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _tell(self, request: web.Request) -> web.Response:
        """What was served since the last time that somebody asked."""
        served, self.served = self.served, []
        return web.json_response(served)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        body = await request.json()
        is_chat = request.path.endswith("/chat/completions")
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        if is_chat and isinstance(prompt, list):  # of parts
            prompt = "".join(part["text"] for part in prompt)
        if isinstance(prompt, list) and not self.pace.takes_token_ids:
            return web.json_response({"error": {"message": "prompt must be a string"}}, status=400)
        prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split()) + 10 * is_chat
        count = int(body.get("max_completion_tokens") or body["max_tokens"])
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": " word" * count, "index": 0}], "usage": usage})
        self.prompts.append(prompt)
        self._requests += 1
        if self.pace.failing and self._requests % self.pace.failing == 0:
            return web.json_response({"error": {"message": "the queue is full"}}, status=503)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            async with self._slots:
                return await self._stream(request, arrived, count, is_chat, usage)
        finally:
            self.running -= 1

    async def _stream(
        self, request: web.Request, arrived: float, count: int, is_chat: bool, usage: dict[str, int]
    ) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        choice = {"index": 0, "delta": {"content": " word"}} if is_chat else {"index": 0, "text": " word"}
        event = f"data: {json.dumps({'model': MODEL, 'choices': [choice]})}\n\n".encode()
        due = loop.time() + self.pace.first
        times = []
        last = f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()
        try:
            await response.prepare(request)
            for _ in range(count):
                await asyncio.sleep(max(due - loop.time(), 0))
                await response.write(event)
                times.append(loop.time() - arrived)
                due += self.pace.gap
            await response.write(last)
            await response.write_eof()
        except ConnectionResetError:
            return response  # the client left
        self.served.append(times)
        return response


@asynccontextmanager
async def paced_server(pace: Pace) -> AsyncIterator[tuple[str, PacedServer]]:
    """Serve inside the block, on a free port; yields the URL too."""
    server = PacedServer(pace)
    async with serving(server.app()) as url:
        yield url, server


async def _serve(pace: Pace) -> None:
    async with paced_server(pace) as (url, _):
        print(url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serve until killed; the first line of output is the URL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=float, default=0.05, help="seconds to the first token")
    parser.add_argument("--gap", type=float, default=0.02, help="seconds between tokens")
    parser.add_argument("--slots", type=int, help="streams at once")
    options = parser.parse_args()
    uvloop.run(_serve(Pace(options.first, options.gap, options.slots)))


if __name__ == "__main__":
    main()
