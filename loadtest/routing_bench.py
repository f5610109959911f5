"""`make bench-routing`: what it brings to choose where a prompt is computed, on real processes with random weights.

1. Conversations over two prefill workers: turns that are steered to the worker that holds their prefix, and turns that
   go to whoever takes them.
2. Short prompts beside a backlog of long ones: computed by the decode worker where that is faster, and always handed
   over.

Each is taken alone. Both ways alternate in one run, on the same processes, which a signal tells whether to choose.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import random
import signal
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from headrace.loadtest.chaos_mesh import VOCABULARY, ChaosMesh, chaos_mesh, serve
from headrace.loadtest.report import Figure, conclude
from headrace.loadtest.shapes import TINY
from headrace.loadtest.timed_stream import TimedStream, completion, timed_stream
from headrace.prefill.in_place import InPlaceChoice
from headrace.prefill.steering import Steering
from headrace.tasks import end_task

SHAPE: dict[str, Any] = TINY | {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 768,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
}
OF_WORKERS: dict[str, Any] = {"kv_cache_memory_bytes": 512 * 2**20, "max_model_len": 2048}
CONVERSATIONS = 6
TURNS = 3
THINK_SECONDS = 1.0
"""Between two turns, at most."""
FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 512, 96, 8
LONG_TOKENS, LONG_ANSWER_TOKENS, SHORT_TOKENS = 1024, 32, 24
LONG_AT_ONCE = 2
SHORT_GAP_SECONDS = 0.15
SETTLE_SECONDS = 0.5
"""Workers have the signal, and their figures are known, before anything is asked."""


@dataclass
class Side:
    """One way to choose: times to first token in seconds, and what workers counted."""

    ttft: list[float] = field(default_factory=list)
    hits: float = 0.0
    queries: float = 0.0
    chosen: float = 0.0
    prompts: int = 0
    gaps: list[float] = field(default_factory=list)
    """Mean time between tokens of each stream beside."""

    @property
    def told(self) -> str:
        """So far, for whoever watches."""
        ttft = statistics.median(self.ttft) * 1000
        return f"first token {ttft:.0f} ms, chosen {self.chosen:.0f} of {self.prompts}, found {self.hits:.0f} tokens"


METHODS: dict[type, str] = {Steering: "better", InPlaceChoice: "choose"}
"""Of what chooses; where it returns None, nothing is chosen."""


def serve_either_way(compared: type, name: str, environment: dict[str, str], log: str, apart: bool) -> None:
    """A worker that chooses after SIGUSR1 and does not after SIGUSR2. Of `METHODS` it has but the one compared."""
    own = getattr(compared, METHODS[compared])

    def choose(number: int, frame: object) -> None:
        setattr(compared, METHODS[compared], own if number == signal.SIGUSR1 else _nothing)

    for kind in METHODS.keys() - {compared}:
        setattr(kind, METHODS[kind], _nothing)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, choose)
    serve(name, environment, log, apart)


def _nothing(*arguments: object) -> None:
    """Chosen."""


async def have_choose(mesh: ChaosMesh, chooses: bool) -> None:
    """Have all workers of the prefill tier choose from now on, or not."""
    for name in mesh.workers.processes:
        if name.startswith("prefill"):
            mesh.workers.signal(name, signal.SIGUSR1 if chooses else signal.SIGUSR2)
    await asyncio.sleep(SETTLE_SECONDS)


async def ask(mesh: ChaosMesh, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> TimedStream:
    """One completion."""
    return await timed_stream(session, completion(mesh.model, prompt, tokens))


def prompt_of(length: int, number: int) -> list[int]:
    """Unlike that of any other number, from its first token on."""
    chance = random.Random(number)
    return [chance.randrange(256, VOCABULARY) for _ in range(length)]


async def count(mesh: ChaosMesh, *names: str) -> list[float]:
    """Counters of all workers together, when those of the last request have been published."""
    await asyncio.sleep(SETTLE_SECONDS)
    return [sum((await mesh.local.metrics(f"headrace_{name}")).values()) for name in names]


async def converse(mesh: ChaosMesh, session: aiohttp.ClientSession, numbers: Sequence[int], side: Side) -> None:
    """Conversations at once; every turn but the first has a prefix that was computed before."""
    names = ("prefix_cache_hits_total", "prefix_cache_queries_total", "prompts_steered_total")
    before = await count(mesh, *names)

    async def one(number: int) -> None:
        prompt = prompt_of(FIRST_TOKENS + TURNS * TURN_TOKENS, number)
        pauses = random.Random(number)
        for turn in range(TURNS):
            await asyncio.sleep(pauses.uniform(0, THINK_SECONDS))
            answer = await ask(mesh, session, prompt[: FIRST_TOKENS + turn * TURN_TOKENS], ANSWER_TOKENS)
            side.prompts += 1
            if turn:
                side.ttft.append(answer.ttft)

    await asyncio.gather(*[one(number) for number in numbers])
    hits, queries, steered = [after - at for after, at in zip(await count(mesh, *names), before, strict=True)]
    side.hits, side.queries, side.chosen = side.hits + hits, side.queries + queries, side.chosen + steered


async def ask_short(
    mesh: ChaosMesh, session: aiohttp.ClientSession, numbers: itertools.count[int], shorts: int, side: Side
) -> None:
    """Short prompts, one after the other, beside clients that ask for long ones all the time."""
    before = await count(mesh, "in_place_prompts_total")

    async def keep_asking() -> None:
        while True:
            times = (await ask(mesh, session, prompt_of(LONG_TOKENS, next(numbers)), LONG_ANSWER_TOKENS)).event_times
            side.gaps.append((times[-1] - times[0]) / max(len(times) - 1, 1))

    asking = [asyncio.create_task(keep_asking()) for _ in range(LONG_AT_ONCE)]
    await asyncio.sleep(SETTLE_SECONDS)
    for _ in range(shorts):
        prompt = prompt_of(SHORT_TOKENS, next(numbers))
        side.ttft.append((await ask(mesh, session, prompt, ANSWER_TOKENS)).ttft)
        await asyncio.sleep(SHORT_GAP_SECONDS)
    for task in asking:
        await end_task(task)
    side.prompts += shorts
    side.chosen += (await count(mesh, "in_place_prompts_total"))[0] - before[0]


@asynccontextmanager
async def mesh_of(prefill: int, compared: type) -> AsyncIterator[tuple[ChaosMesh, aiohttp.ClientSession]]:
    """So many prefill workers and a decode worker inside the block, and who asks them."""
    life = functools.partial(serve_either_way, compared)
    with tempfile.TemporaryDirectory() as folder:
        async with (
            chaos_mesh(Path(folder), prefill, 1, shape=SHAPE, serve=life, of_workers=OF_WORKERS) as mesh,
            aiohttp.ClientSession(mesh.local.url) as session,
        ):
            yield mesh, session


async def measure_steering(rounds: int) -> list[Figure]:
    """The first part."""
    steered, unsteered = Side(), Side()
    async with mesh_of(2, Steering) as (mesh, session):
        await converse(mesh, session, range(CONVERSATIONS), Side())
        for turn, chooses in enumerate([True, False] * rounds, start=1):
            await have_choose(mesh, chooses)
            numbers = range(turn * CONVERSATIONS, (turn + 1) * CONVERSATIONS)
            side = steered if chooses else unsteered
            await converse(mesh, session, numbers, side)
            print(f"{'steered' if chooses else 'unsteered'}: {side.told}", flush=True)
    rate, chance = steered.hits / steered.queries, unsteered.hits / unsteered.queries
    return [
        Figure("turns: prompts passed on", steered.chosen / steered.prompts, "of all"),
        Figure("turns: prompt tokens found in a prefix cache", rate, "of all"),
        Figure("turns: the same unsteered", chance, "of all"),
        Figure("turns: found, steered over unsteered", rate / chance, "ratio", ">= 1.3"),
        Figure("turns: median time to first token", statistics.median(steered.ttft) * 1000, "ms"),
        Figure("turns: the same unsteered", statistics.median(unsteered.ttft) * 1000, "ms"),
        Figure("turns: time to first token, steered over unsteered", _over(steered, unsteered), "ratio", "<= 0.9"),
    ]


async def measure_in_place(rounds: int, shorts: int) -> list[Figure]:
    """The second part."""
    chosen, handed_over = Side(), Side()
    async with mesh_of(1, InPlaceChoice) as (mesh, session):
        numbers = itertools.count()
        await ask_short(mesh, session, numbers, 2, Side())
        for chooses in [True, False] * rounds:
            await have_choose(mesh, chooses)
            side = chosen if chooses else handed_over
            await ask_short(mesh, session, numbers, shorts, side)
            print(f"{'where it is faster' if chooses else 'handed over'}: {side.told}", flush=True)
    return [
        Figure("short prompts: computed by the decode worker", chosen.chosen / chosen.prompts, "of all"),
        Figure("short prompts: median time to first token", statistics.median(chosen.ttft) * 1000, "ms"),
        Figure("short prompts: the same handed over", statistics.median(handed_over.ttft) * 1000, "ms"),
        Figure("short prompts: in place over handed over", _over(chosen, handed_over), "ratio", "<= 0.9"),
        Figure("streams beside: median inter-token time", statistics.median(chosen.gaps) * 1000, "ms"),
        Figure("streams beside: the same, all handed over", statistics.median(handed_over.gaps) * 1000, "ms"),
    ]


def _over(one: Side, other: Side) -> float:
    return statistics.median(one.ttft) / statistics.median(other.ttft)


def main() -> None:
    """Run both parts, print, write; exit with 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of each way instead of three")
    rounds, shorts = (1, 5) if parser.parse_args().quick else (3, 10)
    figures = asyncio.run(measure_steering(rounds))
    figures += asyncio.run(measure_in_place(rounds, shorts))
    conclude("routing", figures)


if __name__ == "__main__":
    main()
