"""How long decode steps take on this device, by their rows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.engine.decode_batch import RunningBatch, new_batch
from headrace.engine.draft_head import MAX_HEAD_DEPTH
from headrace.engine.engine import Engine
from headrace.kernels.draft_tree import chain, guess_at
from headrace.messages.request import SamplingParams

if TYPE_CHECKING:
    from headrace.engine.graph_decoder import GraphDecoder

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 32)
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
WARM_STEPS = 2
"""That are collected before: the first ones bring requests and layouts to the device, whose clock is behind then."""
GUESSED_TOKENS = (STEPS_AHEAD + WARM_STEPS + 2) * (MAX_HEAD_DEPTH + 1)
"""At most so many come to a context where a head guesses."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of greedy steps by rows: the fastest of several, for other work of the machine only adds time."""

    plain: dict[int, float]
    """Of steps with one row a request. Where steps run ahead, from one to the next."""
    drafted: dict[int, float]
    """Of steps with drafts, from start to tokens."""
    ahead: dict[int, float] = field(default_factory=dict)
    """Of steps with drafts that a head on the device has guessed, from one to the next, without what it takes for each
    guess. Empty where there is no such head."""
    guess: dict[int, float] = field(default_factory=dict)
    """By requests: of a token more that it guesses of each."""


def time_steps(engine: Engine) -> StepSeconds:
    """Time steps of each number of rows that the engine's settings allow."""
    decoder, pool = engine.graph_decoder, engine.pool
    more = DRAFTED if decoder is None else MORE_TOKENS if engine.graph_head is None else GUESSED_TOKENS
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
    head = engine.graph_head
    guessing = [] if head is None else [size for size in head.sizes if size <= requests]
    most = guessing[-1] * (MAX_HEAD_DEPTH + 1) if guessing else 0
    pages = [pool.allocate(each) for _ in range(requests)]

    def runs() -> Iterator[tuple[tuple[str, int], float]]:
        for rows in plain:
            yield ("plain", rows), _time_plain(engine, pages, context, rows)
        for rows in drafted:
            yield ("drafted", rows), _time_drafted(engine, pages, context, rows)
        for rows in [rows for rows in drafted if rows <= most]:
            lengths = [count - 1 for count in _counts(rows, MAX_HEAD_DEPTH + 1)]
            yield ("ahead", rows), _time_ahead(engine, pages, context, lengths, MAX_HEAD_DEPTH)
        for size in guessing:
            for kind, depth in (("shallow", 1), ("deep", MAX_HEAD_DEPTH)):
                yield (kind, size), _time_ahead(engine, pages, context, [1] * size, depth)

    fastest: dict[str, dict[int, float]] = defaultdict(dict)
    end = time.monotonic() + BUDGET_SECONDS
    while not fastest or time.monotonic() < end:
        for (kind, number), seconds in runs():
            fastest[kind][number] = min(fastest[kind].get(number, seconds), seconds)
    for held in pages:
        pool.release(held)
    engine.cpu_share.rest()
    difference = {size: fastest["deep"][size] - fastest["shallow"][size] for size in guessing}
    guess = {size: max(seconds, 0.0) / (MAX_HEAD_DEPTH - 1) for size, seconds in difference.items()}
    ahead = {}
    for rows, seconds in fastest["ahead"].items():
        of = next(size for size in guessing if size >= len(_counts(rows, MAX_HEAD_DEPTH + 1)))
        ahead[rows] = seconds - guess[of] * MAX_HEAD_DEPTH
    with_drafts = fastest["drafted"]
    return StepSeconds(fastest["plain"] or with_drafts, with_drafts, ahead, guess)


def _counts(rows: int, most: int) -> list[int]:
    """So many rows in as few requests as can have them, at most `most` of each."""
    return [most] * (rows // most) + [rows % most] * (rows % most > 0)


def _drafted_rows(decoder: GraphDecoder) -> list[int]:
    """The least and the most rows of each captured step with drafts."""
    sizes = decoder.sizes("drafted")
    return sorted({2, *sizes, *[size + 1 for size in sizes[:-1]]})


def _time_plain(engine: Engine, pages: Sequence[Sequence[int]], context: int, rows: int) -> float:
    """The mean of some steps of as many requests, each started while the one before it runs."""
    batch = _joined(engine, pages[:rows], context)
    batch.start()
    for _ in range(WARM_STEPS):
        batch.start()
        batch.collect()
    started = time.perf_counter()
    for _ in range(STEPS_AHEAD):
        batch.start()
        batch.collect()
    seconds = (time.perf_counter() - started) / STEPS_AHEAD
    batch.collect()
    return seconds


def _time_drafted(engine: Engine, pages: Sequence[Sequence[int]], context: int, rows: int) -> float:
    """A step of so many rows in as few requests as can have them."""
    counts = _counts(rows, DRAFTED + 1)
    batch = _joined(engine, pages[: len(counts)], context)
    drafts = {key: [0] * (count - 1) for key, count in enumerate(counts) if count > 1}
    if batch.lookahead:  # what is new to the device comes with a first step
        batch.start(drafts)
        batch.collect()
    started = time.perf_counter()
    batch.start(drafts)
    batch.collect()
    return time.perf_counter() - started


def _time_ahead(
    engine: Engine, pages: Sequence[Sequence[int]], context: int, lengths: Sequence[int], depth: int
) -> float:
    """The mean of some steps that verify so many tokens of each request and guess `depth`, one behind the other."""
    batch = _joined(engine, pages[: len(lengths)], context)
    # where there is more than one guess the last is a leaf: what moves it is compiled here, too
    trees = [[*chain(max(length - 1, 1)), guess_at(0, 1)][:length] for length in lengths]
    drafts = {key: tree for key, tree in enumerate(trees) if tree}
    batch.start({}, depth)
    for _ in range(WARM_STEPS):
        batch.start(drafts, depth)
        batch.collect()
    started = time.perf_counter()
    for _ in range(STEPS_AHEAD):
        batch.start(drafts, depth)
        batch.collect()
    seconds = (time.perf_counter() - started) / STEPS_AHEAD
    batch.collect()
    return seconds


def _joined(engine: Engine, pages: Sequence[Sequence[int]], context: int) -> RunningBatch[int]:
    batch = new_batch(engine)
    greedy = SamplingParams(max_tokens=MORE_TOKENS, temperature=0)
    for key, held in enumerate(pages):
        batch.join(key, [0] * context, 1, held, greedy)
    return batch
