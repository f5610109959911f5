"""Measures what steps of a model cost on this machine and writes them as JSON, for `headrace simulate` and `synthetic`.

`python -m headrace.loadtest.measure_costs costs.json --cpu-threads 1`: further flags are those of `headrace decode`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from headrace.cli import build_parser
from headrace.engine.engine import Engine, PrefillChunk
from headrace.engine.startup import loaded_model
from headrace.loadtest.engine_bench import decode_step_seconds
from headrace.loadtest.prompts import unique_tokens
from headrace.loadtest.report import machine
from headrace.messages.request import SamplingParams
from headrace.scaling.step_costs import Cost, Handoff, Limits, StepCosts
from headrace.settings import Settings

CHUNKS = (16, 64, 128, 256, 512, 1024, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHORT, LONG, LONG_ROWS = 32, 512, 8
"""Contexts of decode steps, and the rows of the long ones."""
ROUNDS, ENOUGH_SECONDS = 5, 1.0
"""What takes long is measured less often, but twice at least, the first of which does not count."""
STEPS = 3
GREEDY = SamplingParams(max_tokens=64, temperature=0)


def measure(engine: Engine, settings: Settings) -> StepCosts:
    """Medians of some rounds. Belongs on the engine's device thread."""
    budget = settings.max_num_batched_tokens or (512 if engine.device.type == "cpu" else 2048)
    longest = min(budget, engine.max_model_len // 2)
    chunks = {size: _median(_prefill, engine, 0, size) for size in CHUNKS if size <= longest}
    largest = max(chunks)
    behind = _median(_prefill, engine, largest, largest)
    room = min(settings.max_num_seqs, engine.pool.num_pages // engine.pool.pages_for(SHORT + STEPS + 8))
    steps = {rows: _median(_decode, engine, rows, SHORT) for rows in ROWS if rows <= room}
    some = min(LONG_ROWS, max(steps))
    far = _median(_decode, engine, some, LONG)
    layout = engine.layout
    return StepCosts(
        machine=f"{settings.model} on {machine()}",
        prefill=_cost(chunks, (behind - chunks[largest]) / largest**2, lambda size: size / 2),
        decode=_cost(steps, (far - steps[some]) / (some * (LONG - SHORT)), lambda rows: SHORT),
        handoff=Handoff(bytes_per_token=layout.page_bytes // layout.page_size),
        limits=Limits(
            page_size=layout.page_size,
            pages=engine.pool.num_pages,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=budget,
            max_num_prefills=settings.max_num_prefills,
        ),
    )


def _cost(seconds: Mapping[int, float], per_pair: float, context: Callable[[int], float]) -> Cost:
    """Take the contexts' part out of what was measured; more never takes less time."""
    per_pair = max(per_pair, 0.0)
    points, least = [], 0.0
    for size, measured in sorted(seconds.items()):
        least = max(least, measured - per_pair * size * context(size))
        points.append((size, round(least, 7)))
    return Cost(points, per_pair)


def _median(run: Callable[[Engine, int, int], float], engine: Engine, first: int, second: int) -> float:
    run(engine, first, second)
    took: list[float] = []
    end = time.monotonic() + ENOUGH_SECONDS
    while not took or (len(took) < ROUNDS and time.monotonic() < end):
        took.append(run(engine, first, second))
    return statistics.median(took)


def _prefill(engine: Engine, start: int, length: int) -> float:
    """Seconds of one chunk behind `start` tokens whose KV is whatever lies there."""
    pages = engine.pool.allocate(engine.pool.pages_for(start + length))
    chunk = PrefillChunk(unique_tokens(start + length, 0), start, length, pages, GREEDY)
    began = time.perf_counter()
    engine.prefill([chunk])
    took = time.perf_counter() - began
    engine.pool.release(pages)
    return took


def _decode(engine: Engine, rows: int, context: int) -> float:
    """Seconds of one of some steps."""
    return decode_step_seconds(engine, [context] * rows, STEPS)


async def measured(settings: Settings) -> StepCosts:
    """Load the model that `settings` name and measure it."""
    async with loaded_model(settings, decodes=True) as model:
        work = asyncio.get_running_loop().run_in_executor(model.device_thread, measure, model.engine, settings)
        return await work


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="where to write them")
    out, flags = parser.parse_known_args()
    options = vars(build_parser().parse_args(["decode", *flags]))
    settings = Settings.load({name: value for name, value in options.items() if name in Settings.model_fields})
    costs = asyncio.run(measured(settings))
    costs.write(out.out)
    print(out.out.read_text())


if __name__ == "__main__":
    main()
