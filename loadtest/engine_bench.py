"""`make bench-engine`: the engine alone, on one GPU, against what the chip allows.

Random weights in the shapes of published models. Decode: 512 tokens in, 256 out, mean time of a step. Prefill: one
prompt, from tokens on the host to its first token on the host.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headrace.engine.decode_batch import new_batch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.grammar import Matcher
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, SMOLLM2_135M, TINY, model_folder
from headrace.messages.request import SamplingParams

READ_BYTES_A_SECOND = 3.05e12
"""What an H100's memory gives to a kernel that only reads, as measured."""
PRODUCT_FLOPS = 720e12
"""What an H100 reached in large bf16 products, as measured."""
INPUT, OUTPUT = 512, 256
STEPS_BEFORE = 4
"""That are not timed."""
GREEDY = SamplingParams(max_tokens=9999, temperature=0)


@dataclass(frozen=True)
class Shape:
    """A model's shape and what is measured with it: (batch or prompt length, target)."""

    name: str
    config: dict[str, Any]
    decode: tuple[tuple[int, str], ...]
    """Milliseconds a step, or for the model that the chip bounds, its ratio to the bound."""
    prefill: tuple[tuple[int, str], ...] = ()
    decode_is_ratio: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Of `EngineConfig`."""


SHAPES = [
    Shape(
        "8B",
        LLAMA_8B,
        tuple((batch, "<= 1.12") for batch in (1, 8, 32, 64, 128, 256)),
        ((128, "<= 8"), (512, "<= 15.5"), (2048, "<= 52"), (8192, "<= 212")),
        decode_is_ratio=True,
    ),
    Shape("135M", SMOLLM2_135M, ((1, "<= 0.6"), (32, "<= 0.8"), (256, "<= 2.5"))),
    Shape("8B fp8", LLAMA_8B, ((1, ""), (64, "")), ((2048, ""),), options={"quantization": "fp8"}),
    Shape("8B fp8 KV", LLAMA_8B, ((256, ""),), options={"kv_cache_dtype": "fp8"}),
]
GAINS = [("8B fp8", 1, ">= 1.6"), ("8B fp8", 64, ">= 1.35"), ("8B fp8 KV", 256, ">= 1.25")]
"""Decode steps of 8B over those of the same with fewer bits."""
MANY_PROMPTS = (32, 2048, ">= 43500")


def bound_seconds(config: dict[str, Any], batch: int, context: float) -> float:
    """The least time of a decode step: weights but for the embedding, and KV, read once, or their arithmetic."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]
    layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    weights = layer * config["num_hidden_layers"] + hidden * config["vocab_size"]
    cached = 4 * kv_heads * head_dim * config["num_hidden_layers"] * batch * context
    products = max(2 * weights / READ_BYTES_A_SECOND, 2 * weights * batch / PRODUCT_FLOPS)
    return float(products + cached / READ_BYTES_A_SECOND)


def load(shape: Shape, largest_batch: int, device: str, longest: int = INPUT + OUTPUT) -> tuple[Engine, float]:
    """An engine with random weights that is ready for requests of `longest` tokens, and how long that took."""
    started = time.perf_counter()
    longest = min(max([longest, *[length for length, _ in shape.prefill]]) + 64, 16384)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model_folder(shape.config, Path(folder)),
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            max_model_len=min(longest, shape.config["max_position_embeddings"]),
            max_num_seqs=largest_batch,
            random_weights=True,
            **shape.options,
        )
        engine = Engine.load(config)
    engine.warm_up()
    engine.prepare_decode(lambda what, fraction: None)
    if device == "cuda":
        torch.cuda.synchronize()
    return engine, time.perf_counter() - started


def decode_step_seconds(
    engine: Engine,
    contexts: Sequence[int],
    steps: int,
    sampling: SamplingParams = GREEDY,
    new_matcher: Callable[[], Matcher | None] = lambda: None,
) -> float:
    """Mean time of `steps` steps of requests that have so many tokens before the first of them."""
    batch = new_batch(engine)
    held = [engine.pool.allocate(engine.pool.pages_for(context + steps + 8)) for context in contexts]
    for key, (pages, context) in enumerate(zip(held, contexts, strict=True)):
        batch.join(key, [1] * (context - STEPS_BEFORE), 0, pages, sampling, new_matcher())
    for _ in range(STEPS_BEFORE):  # the first one sends all rows to the device
        batch.start()
        if batch.in_flight > batch.lookahead:
            batch.collect()
    started = time.perf_counter()
    for _ in range(steps):
        batch.start()
        batch.collect()
    elapsed = time.perf_counter() - started
    while batch.in_flight:
        batch.collect()
    for pages in held:
        engine.pool.release(pages)
    return elapsed / steps


def prefill_seconds(engine: Engine, prompts: int, length: int) -> float:
    """Time from prompts to their first tokens, in passes as a prefill worker with `--max-num-batched-tokens 8192` has
    them.
    """
    params = SamplingParams(max_tokens=1, temperature=0)
    vocabulary = engine.model_config.vocab_size
    rng = random.Random(length)
    chunks = []
    for _ in range(prompts):
        tokens = [rng.randrange(vocabulary) for _ in range(length)]
        chunks.append(PrefillChunk(tokens, 0, length, engine.pool.allocate(engine.pool.pages_for(length)), params))
    together = max(8192 // length, 1)
    started = time.perf_counter()
    for first in range(0, prompts, together):
        engine.prefill(chunks[first : first + together])
    elapsed = time.perf_counter() - started
    for chunk in chunks:
        engine.pool.release(chunk.pages)
    return elapsed


def measure(shape: Shape, device: str, quick: bool) -> list[Figure]:
    """All figures of one shape."""
    figures = []
    largest = max(batch for batch, _ in shape.decode)
    engine, seconds = load(shape, largest, device)
    figures.append(Figure(f"{shape.name} start", seconds, "s"))
    for batch, target in shape.decode:
        seconds = decode_step_seconds(engine, [INPUT] * batch, 8 if quick else OUTPUT)
        bound = bound_seconds(shape.config, batch, INPUT + OUTPUT / 2)
        figures += [
            Figure(
                f"{shape.name} decode, batch {batch}",
                seconds * 1000,
                "ms a step",
                "" if shape.decode_is_ratio else target,
            ),
            Figure(f"{shape.name} decode, batch {batch}", batch / seconds, "tokens/s"),
            Figure(f"{shape.name} decode, batch {batch}, bound", bound * 1000, "ms a step"),
            Figure(
                f"{shape.name} decode, batch {batch}, over the bound",
                seconds / bound,
                "ratio",
                target if shape.decode_is_ratio else "",
            ),
        ]
    for length, target in shape.prefill:
        times = [prefill_seconds(engine, 1, length) for _ in range(3 if quick else 12)][1:]
        figures.append(Figure(f"{shape.name} prefill, {length} tokens", statistics.median(times) * 1000, "ms", target))
    if shape.prefill:
        prompts, length, target = (2, 64, "") if quick else MANY_PROMPTS
        seconds = min(prefill_seconds(engine, prompts, length) for _ in range(2))
        name = f"{shape.name} prefill, {prompts} x {length} tokens"
        figures.append(Figure(name, prompts * length / seconds, "tokens/s", target))
    return figures


def start_seconds(shape: Shape) -> float:
    """How long an engine takes to be ready."""
    return load(shape, max(batch for batch, _ in shape.decode), "cuda")[1]


def gains(figures: list[Figure]) -> list[Figure]:
    """How much faster steps are with fewer bits, where both were measured."""
    steps = {figure.name: figure.value for figure in figures if figure.unit == "ms a step"}
    found = []
    for name, batch, target in GAINS:
        plain, fewer = steps.get(f"8B decode, batch {batch}"), steps.get(f"{name} decode, batch {batch}")
        if plain is not None and fewer is not None:
            found.append(Figure(f"{name} over 8B, batch {batch}", plain / fewer, "times as fast", target))
    return found


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, on whatever device there is")
    parser.add_argument("--only", nargs="+", metavar="SHAPE", help="names of shapes")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [Shape("tiny", TINY, ((1, ""), (4, "")), ((64, ""),))] if options.quick else SHAPES
    if device == "cpu" and not options.quick:
        parser.error("this machine has no GPU; --quick runs a tiny model on the CPU")
    figures = []
    for shape in shapes:
        if options.only is None or shape.name in options.only:
            # a process of its own: an engine takes the whole device
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                figures += process.submit(measure, shape, device, options.quick).result()
                print(*[f"{figure.name}: {figure.value:.3f} {figure.unit}" for figure in figures], sep="\n", flush=True)
    figures += gains(figures)
    if device == "cuda" and options.only is None:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            figures.append(
                Figure("8B start, warm caches", process.submit(start_seconds, SHAPES[0]).result(), "s", "<= 12")
            )
    publish(
        "engine-quick" if options.quick else "engine",
        figures,
        card=torch.cuda.get_device_name() if device == "cuda" else None,
    )


if __name__ == "__main__":
    main()
