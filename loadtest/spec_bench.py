"""`make bench-spec`: decoding with drafts against decoding without, on a CPU, in one process and in turns.

Two batches with the same prompts take turns of a few steps each, so that both see the same machine. A request that ends
is replaced by the next prompt, so that the batches stay full. What is timed is all that a decode worker does in a step:
drafting, scheduling, the model, and taking the tokens.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import statistics
import sys
import time
from typing import Any

from transformers import AutoTokenizer

from headrace.decode.draft_counters import Counters
from headrace.decode.drafting import chain_drafter, new_speculator
from headrace.decode.sequence import Sequence
from headrace.decode.speculator import Speculator
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.step_timing import time_steps
from headrace.kvtransfer.layout import layout_of
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.spec_prompts import KINDS, chat_messages
from headrace.loadtest.spec_side import Side, Step, new_request
from headrace.messages.request import SamplingParams
from headrace.models.locate import BUILT_IN_HEAD, locate_model

OUTPUT = 128
STEPS_A_TURN = 6
"""Of one request; of more, whose steps take longer, fewer, so that both sides see the same machine."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = 16
"""Of each kind; they come round again."""
FAST_ENOUGH = {("editing", 1): ">= 2", ("open chat", 1): ">= 1.3"}
"""Targets of speed with drafts over speed without; of all others, that it is no slower."""


class Prompts:
    """Prompts whose KV is computed once and copied to the pages of each request."""

    def __init__(self, engine: Engine) -> None:
        folder = locate_model("smollm2")
        self._engine = engine
        self._layout = layout_of(folder.fingerprint, engine.layout, engine.model_config.vocab_size)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder.path)
        self._known: dict[str, tuple[list[int], list[int], int]] = {}
        """By message: its tokens, its pages, and the first token of the answer."""
        self._names = itertools.count()
        self.step_seconds = time_steps(engine)
        chain = chain_drafter(engine)
        self.token_seconds = self.step_seconds.guess if chain is None else chain.time_tokens()

    def request(self, message: str, output: int) -> Sequence:
        """A request for exactly `output` greedy tokens, as the receiver hands it over."""
        engine = self._engine
        sampling = SamplingParams(max_tokens=output, temperature=0)
        if message not in self._known:
            chat = [{"role": "user", "content": message}]
            tokens = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            pages = engine.pool.allocate(engine.pool.pages_for(len(tokens)))
            (prefilled,) = engine.prefill([PrefillChunk(tokens, 0, len(tokens), pages, sampling)])
            assert prefilled.token is not None
            self._known[message] = (tokens, pages, prefilled.token.token_id)
        tokens, source, first = self._known[message]
        pages = engine.pool.allocate(len(source))
        held = engine.cache.pages
        held[:, pages] = held[:, source]
        return new_request(
            f"{next(self._names)}", self._layout, [*tokens, first], pages, sampling, engine.max_model_len
        )

    def speculator(self) -> Speculator:
        """A decode worker's, at its start."""
        return new_speculator(self._engine, self.step_seconds, self.token_seconds)

    def forget(self) -> None:
        """Give all pages back."""
        for _, pages, _ in self._known.values():
            self._engine.pool.release(pages)
        self._known.clear()


def compare_speeds(
    engine: Engine, prompts: Prompts, speculator: Speculator, kind: str, batch: int, seconds: float
) -> list[Figure]:
    """One cell: tokens a second with drafts over those without, for `seconds` of each.

    `speculator` lives through all cells, as in a worker.
    """
    messages = chat_messages(kind, PROMPTS)

    def side(speculator: Speculator | None) -> Side:
        requests = (prompts.request(message, OUTPUT) for message in itertools.cycle(messages))
        return Side(engine, requests, batch, speculator)

    speculator.counters = Counters()
    plain, drafted = side(None), side(speculator)
    for one in (plain, drafted):  # what is new to the machine is not timed
        one.step()
        one.steps.clear()
    turn = max(STEPS_A_TURN // batch, 1)
    while min(plain.seconds, drafted.seconds) < seconds and max(plain.seconds, drafted.seconds) < 2 * seconds:
        for one in (plain, drafted):
            for _ in range(turn):
                one.step()
    plain.close()
    drafted.close()
    speculator.propose([])  # counts what the last step brought
    counters, total, name = speculator.counters, speculator.counters.total, f"{kind}, batch {batch}"
    steps = drafted.undisturbed()
    without, speed = tokens_a_second(plain.undisturbed()), tokens_a_second(steps)
    left_out = 1 - (len(steps) + len(plain.undisturbed())) / (len(drafted.steps) + len(plain.steps))
    step_seconds = statistics.median(step.seconds for step in steps)
    drafting = statistics.median(step.drafting_seconds for step in steps)
    controlling = statistics.median(step.controlling_seconds for step in steps)
    fast_enough = FAST_ENOUGH.get((kind, batch), ">= 0.97")
    return [
        Figure(f"{name}: speed with drafts over speed without", speed / without, "", fast_enough),
        Figure(f"{name}: without drafts", without, "tokens/s"),
        Figure(f"{name}: accepted of a draft", total.accepted / max(total.drafts, 1), "tokens"),
        Figure(f"{name}: accepted of drafted", total.accepted / max(total.drafted, 1), ""),
        *(
            Figure(f"{name}: drafts of {drafter}", each.drafts / counters.steps, "a step")
            for drafter, each in sorted(counters.of.items())
        ),
        Figure(f"{name}: steps without drafts", counters.steps_without_drafts / counters.steps, ""),
        Figure(f"{name}: drafting by lookup", drafting / step_seconds * 100, "% of a step", "<= 1"),
        Figure(f"{name}: the head", counters.head_seconds / drafted.seconds * 100, "% of all steps"),
        Figure(f"{name}: controller", controlling / batch * 1e6, "us/request", "<= 20"),
        Figure(f"{name}: steps left out", left_out * 100, "%"),
    ]


def tokens_a_second(steps: list[Step]) -> float:
    """Of all steps together."""
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cells, within 45 seconds")
    parser.add_argument("--kind", choices=KINDS, help="one kind of prompt alone")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each side of a cell")
    parser.add_argument("--float32", action="store_true", help="not packed, as if there were no numba")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 1 to 64)")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its time on the processor: for a machine that others use",
    )
    options = parser.parse_args()
    if options.cpu_time:
        options.threads, time.perf_counter = 1, time.process_time
    config = EngineConfig(
        locate_model("smollm2").path, device="cpu", dtype="float32" if options.float32 else "auto",
        max_model_len=2048, max_num_seqs=max(BATCHES), kv_cache_bytes=3 * 2**30, cpu_threads=options.threads,
        draft_head=BUILT_IN_HEAD,
    )  # fmt: skip
    engine = Engine.load(config)
    engine.warm_up()
    prompts = Prompts(engine)
    kinds = [options.kind] if options.kind else list(KINDS)
    figures = [
        Figure(f"a step of {rows}", seconds * 1e3, "ms") for rows, seconds in sorted(prompts.step_seconds.plain.items())
    ]
    speculator = prompts.speculator()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: the cells so far are published"))
    try:
        for kind in kinds:
            for batch in options.batch or ((1,) if options.quick else BATCHES):
                seconds = 2.0 if options.quick else options.seconds
                figures += compare_speeds(engine, prompts, speculator, kind, batch, seconds)
                print(f"{kind}, batch {batch}: done", file=sys.stderr, flush=True)
            prompts.forget()
    finally:
        name = "-".join(["spec", *(["quick"] if options.quick else []), *kinds[: 1 if options.kind else 0]])
        publish(name.replace(" ", "-"), figures)


if __name__ == "__main__":
    main()
