"""How long decode steps take on this device, by their rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.engine.decode_batch import RunningBatch, new_batch
from headrace.engine.engine import Engine
from headrace.messages.request import SamplingParams

if TYPE_CHECKING:
    from headrace.engine.graph_decoder import GraphDecoder

ROWS = (1, 2, 4, 6, 8, 12, 16, 32)
"""On a CPU. On a GPU, captured sizes say where a further row makes a difference."""
DRAFTED = 15
"""At most so many rows of a request are drafted tokens."""
MORE_TOKENS = 2 * DRAFTED + 1
"""At most so many come to a context in what is timed at a time on a GPU."""
CONTEXT = 128
BUDGET_SECONDS = 0.4
"""All are timed in turns for so long, and once at least."""
STEPS_AHEAD = 4
"""Steps that are timed together where they run ahead."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of greedy steps by rows: the fastest of several, for other work of the machine only adds time."""

    plain: dict[int, float]
    """Of steps with one row a request. Where steps run ahead, from one to the next."""
    drafted: dict[int, float]
    """Of steps with drafts, from start to tokens."""


def time_steps(engine: Engine) -> StepSeconds:
    """Time steps of each number of rows that the engine's settings allow."""
    decoder, pool = engine.graph_decoder, engine.pool
    more = DRAFTED if decoder is None else MORE_TOKENS
    context = max(min(CONTEXT, engine.max_model_len - more), 1)
    each = pool.pages_for(context + more)
    requests = min(engine.config.max_num_seqs, pool.num_free // each)
    if decoder is None:
        # Few requests with long drafts: what a drafted token adds is measured, not what a request does.
        requests = min(-(-ROWS[-1] // (DRAFTED + 1)), requests)
        plain, drafted = [], [rows for rows in ROWS if rows <= requests * (DRAFTED + 1)]
    else:
        plain = [rows for rows in decoder.sizes() if rows <= requests]
        drafted = [rows for rows in _drafted_rows(decoder) if rows <= requests * (DRAFTED + 1)]
    pages = [pool.allocate(each) for _ in range(requests)]
    fastest: dict[tuple[bool, int], float] = {}
    end = time.monotonic() + BUDGET_SECONDS
    while not fastest or time.monotonic() < end:
        for kind, rows in [*((False, rows) for rows in plain), *((True, rows) for rows in drafted)]:
            seconds = (_time_drafted if kind else _time_plain)(engine, pages, context, rows)
            fastest[kind, rows] = min(fastest.get((kind, rows), seconds), seconds)
    for held in pages:
        pool.release(held)
    engine.cpu_share.rest()
    with_drafts = {rows: fastest[True, rows] for rows in drafted}
    return StepSeconds({rows: fastest[False, rows] for rows in plain} or with_drafts, with_drafts)


def _drafted_rows(decoder: GraphDecoder) -> list[int]:
    """The least and the most rows of each captured step with drafts."""
    sizes = decoder.sizes("drafted")
    return sorted({2, *sizes, *[size + 1 for size in sizes[:-1]]})


def _time_plain(engine: Engine, pages: Sequence[Sequence[int]], context: int, rows: int) -> float:
    """The mean of some steps of as many requests, each started while the one before it runs."""
    batch = _joined(engine, pages[:rows], context)
    batch.start()
    batch.start()
    batch.collect()  # the first one brought all requests to the device
    started = time.perf_counter()
    for _ in range(STEPS_AHEAD):
        batch.start()
        batch.collect()
    seconds = (time.perf_counter() - started) / STEPS_AHEAD
    batch.collect()
    return seconds


def _time_drafted(engine: Engine, pages: Sequence[Sequence[int]], context: int, rows: int) -> float:
    """A step of so many rows in as few requests as can have them."""
    counts = [DRAFTED + 1] * (rows // (DRAFTED + 1)) + [rows % (DRAFTED + 1)] * (rows % (DRAFTED + 1) > 0)
    batch = _joined(engine, pages[: len(counts)], context)
    drafts = {key: [0] * (count - 1) for key, count in enumerate(counts) if count > 1}
    if batch.lookahead:  # what is new to the device comes with a first step
        batch.start(drafts)
        batch.collect()
    started = time.perf_counter()
    batch.start(drafts)
    batch.collect()
    return time.perf_counter() - started


def _joined(engine: Engine, pages: Sequence[Sequence[int]], context: int) -> RunningBatch[int]:
    batch = new_batch(engine)
    greedy = SamplingParams(max_tokens=MORE_TOKENS, temperature=0)
    for key, held in enumerate(pages):
        batch.join(key, [0] * context, 1, held, greedy)
    return batch
