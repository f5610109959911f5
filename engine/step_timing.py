"""How long decode steps take on this device, by their rows."""

from __future__ import annotations

import time
from collections.abc import Sequence

from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine
from headrace.messages.request import SamplingParams

ROWS = (1, 2, 4, 6, 8, 12, 16, 32)
DRAFTED = 15
"""At most so many rows of a request are drafted tokens."""
CONTEXT = 128
BUDGET_SECONDS = 0.4
"""All are timed in turns for so long, and once at least."""


def time_steps(engine: Engine) -> dict[int, float]:
    """Seconds of a greedy step with each number of rows that the engine's settings allow: the fastest of several,
    for other work of the machine only adds time.
    """
    context = min(CONTEXT, engine.max_model_len - DRAFTED)
    # Few requests with long drafts: what a drafted token adds is measured, not what a request does.
    requests = min(-(-ROWS[-1] // (DRAFTED + 1)), engine.config.max_num_seqs)
    pages = [engine.pool.allocate(engine.pool.pages_for(context + DRAFTED)) for _ in range(requests)]
    fastest: dict[int, float] = {}
    end = time.monotonic() + BUDGET_SECONDS
    while not fastest or time.monotonic() < end:
        for rows in ROWS:
            if rows <= requests * (DRAFTED + 1):
                seconds = _time_step(engine, pages, context, rows)
                fastest[rows] = min(fastest.get(rows, seconds), seconds)
    for held in pages:
        engine.pool.release(held)
    engine.cpu_share.rest()
    return fastest


def _time_step(engine: Engine, pages: Sequence[Sequence[int]], context: int, rows: int) -> float:
    greedy = SamplingParams(max_tokens=DRAFTED + 2, temperature=0)
    batch: DecodeBatch[int] = DecodeBatch(engine)
    drafts: dict[int, list[int]] = {}
    for key, held in enumerate(pages):
        if rows > 0:
            drafts[key] = [0] * min(rows - 1, DRAFTED)
            batch.join(key, [0] * context, 1, held, greedy)
            rows -= len(drafts[key]) + 1
    started = time.perf_counter()
    batch.start({key: draft for key, draft in drafts.items() if draft})
    batch.collect()
    return time.perf_counter() - started
