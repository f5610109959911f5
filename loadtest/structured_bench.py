"""`make bench-structured`: what a grammar adds to a decode step of 8 streams, all of them with one or none, in turns.

On a CPU the built-in model as it is served. On a GPU Llama 3.1 8B's shape with random weights, and a made-up tokenizer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from headrace.engine.engine import Engine, EngineConfig
from headrace.grammar import Matcher, of_json_schema
from headrace.loadtest.engine_bench import STEPS_BEFORE, decode_step_seconds
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, servable_folder
from headrace.messages.request import SamplingParams
from headrace.models.locate import BUILT_IN, locate_model

STREAMS, TOKENS_IN = 8, 64
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer"},
        "member": {"type": "boolean"},
    },
    "required": ["name", "age", "member"],
    "additionalProperties": False,
}
PLAIN = SamplingParams(max_tokens=9999, temperature=0.8, seed=1)
CONSTRAINED = SamplingParams(
    max_tokens=9999,
    temperature=0.8,
    seed=1,
    grammar=of_json_schema({"type": "array", "items": PERSON, "minItems": 999}),
)


class TimedMatcher(Matcher):
    """Counts masks and what they and tokens took, in seconds."""

    masks, seconds = 0, 0.0

    def fill(self, masks: np.ndarray, draft: Sequence[int]) -> None:
        """See `Matcher`."""
        started = time.perf_counter()
        super().fill(masks, draft)
        TimedMatcher.seconds += time.perf_counter() - started
        TimedMatcher.masks += len(masks)

    def advance(self, token_ids: Sequence[int]) -> None:
        """See `Matcher`."""
        started = time.perf_counter()
        super().advance(token_ids)
        TimedMatcher.seconds += time.perf_counter() - started


def step_seconds(engine: Engine, sampling: SamplingParams, steps: int) -> float:
    """The mean time of a step."""

    def new_matcher() -> Matcher | None:
        return None if sampling.grammar is None else TimedMatcher(engine.grammars, sampling.grammar, sampling)

    return decode_step_seconds(engine, [TOKENS_IN] * STREAMS, steps, sampling, new_matcher)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    rounds = 3 if parser.parse_args().quick else 11
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as made_up:
        folder = Path(made_up)
        if on_gpu:
            servable_folder(LLAMA_8B | {"eos_token_id": 255}, folder)
        else:
            folder = locate_model(BUILT_IN).path
        engine = Engine.load(EngineConfig(folder, max_num_seqs=STREAMS, max_model_len=1024, random_weights=on_gpu))
        engine.warm_up()
        engine.prepare_decode(lambda what, fraction: None)
        step_seconds(engine, CONSTRAINED, STEPS_BEFORE)
        TimedMatcher.masks, TimedMatcher.seconds = 0, 0.0
        turns = [(step_seconds(engine, PLAIN, 96), step_seconds(engine, CONSTRAINED, 96)) for _ in range(rounds)]
    plain, constrained = (statistics.median(own) for own in zip(*turns, strict=True))
    ratio = statistics.median(with_grammar / without for without, with_grammar in turns)
    figures = [
        Figure(f"a step of {STREAMS} streams without grammars", plain * 1e3, "ms"),
        Figure("with one each", constrained * 1e3, "ms"),
        Figure("with over without", ratio, "ratio", "<= 1.05"),
        Figure("a token's mask and its way through the grammar", TimedMatcher.seconds / TimedMatcher.masks * 1e6, "us"),
    ]
    card = torch.cuda.get_device_name() if on_gpu else None
    publish("structured-gpu" if on_gpu else "structured", figures, card)


if __name__ == "__main__":
    main()
