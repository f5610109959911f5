"""`make bench-spec-gpu`: decoding with drafts against decoding without, on one GPU.

Two parts. *Emulated*: the 8B shape with random weights and an `EmulatedHead`, which computes what an EAGLE-3 head does
and is right with given rates: assumed ones, and those of a head in vLLM. Its figures say what drafting and verification
cost, and nothing about text. *Built-in*: the built-in model with its head and `ngram` on real prompts. What is timed is
all that a decode worker does in a step: drafting, scheduling, the model, and taking the tokens.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headrace.decode.drafting import new_speculator
from headrace.decode.sequence import Sequence as Request
from headrace.decode.speculator import Speculator
from headrace.engine.draft_head import TorchHead
from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.model_config import ModelConfig
from headrace.engine.step_timing import StepSeconds, time_steps
from headrace.kvtransfer.layout import layout_of
from headrace.loadtest.emulated_head import EmulatedHead, write_random_head
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.shapes import LLAMA_8B, TINY, model_folder
from headrace.loadtest.spec_bench import Prompts, tokens_a_second
from headrace.loadtest.spec_prompts import KINDS, chat_messages
from headrace.loadtest.spec_side import Side, Step, new_request
from headrace.messages.request import SamplingParams
from headrace.models.errors import ModelError
from headrace.models.locate import BUILT_IN_HEAD, locate_model

RATES = {
    # By depth. Nobody measured these: a good head's, as we assume, which falls off slowly. Five drafted tokens give 3.5
    # tokens a step.
    "assumed rates": (0.80, 0.78, 0.76, 0.74, 0.72, 0.70, 0.68, 0.66),
    # Published: chains of seven of an EAGLE-3 head for Llama 3.1 8B gave 3.53 tokens a step in vLLM (its issue 26191),
    # which is 0.744 at any depth.
    "EAGLE-3 in vLLM": (0.744,) * 7,
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
INPUT, OUTPUT = 512, 256
QUICK_INPUT, QUICK_OUTPUT = 20, 7
QUICK_SHAPE = TINY | {"num_hidden_layers": 1, "tie_word_embeddings": False}
FEWEST_REQUESTS = 8
"""Of a cell: with fewer, chance has too large a part in what is accepted."""
BUILT_IN_OUTPUT = 128
BUILT_IN_PROMPTS = 16
GPU_TARGETS = {("editing", 1): ">= 2", ("open chat", 1): ">= 1.6"}
"""Of the built-in model; of all other cells, that drafts are no slower."""
WARM_STEPS = 2
"""That are not timed."""


_names = itertools.count()


def load_random(shape: dict[str, Any], largest: int, longest: int) -> tuple[Engine, EmulatedHead]:
    """An engine with random weights whose next token follows from the last one, by a wide margin, and its head.

    So outputs don't depend on how sums are rounded, which differs with the number of rows, and it is known what comes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float16"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as head_folder:
        target = model_folder(shape, Path(folder))
        write_random_head(Path(head_folder), ModelConfig.from_folder(target), getattr(torch, dtype), device)
        config = EngineConfig(
            target,
            device=device.type,
            dtype=dtype,
            max_model_len=longest,
            max_num_seqs=largest,
            random_weights=True,
            kv_cache_bytes=largest * longest * 4 * (shape["num_hidden_layers"] + 1)
            * shape["num_key_value_heads"] * shape["head_dim"] + 2**28,
            draft_head=Path(head_folder),
        )  # fmt: skip
        engine = Engine.load(config)
    assert isinstance(engine.model, FusedDecoder)
    weights = engine.model.weights
    followers = torch.randperm(shape["vocab_size"], generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        for layer in weights.layers:  # little is added to the token's own embedding
            for projection in (layer.output, layer.down):
                projection.weight.mul_(0.1)
        weights.head.weight.copy_(weights.embedding[followers])
    engine.model.norms_are_folded = True  # random ones are ones, on any device
    assert isinstance(engine.head, TorchHead)
    own = engine.head.weights  # on a CPU in a mapped file, where kernels find them unaligned
    engine.head.weights = replace(own, fc=own.fc.clone(), output=own.output.clone(), down=own.down.clone())
    engine.prepare_decode(lambda what, fraction: None, drafts=True)
    assert engine.graph_head is not None
    assert engine.graph_decoder is not None
    with torch.inference_mode():
        head = EmulatedHead(engine.graph_head, engine.graph_decoder.state, followers.argsort())
    engine.graph_head = head  # type: ignore[assignment]
    return engine, head


def random_requests(engine: Engine, count: int, input_tokens: int, output_tokens: int) -> list[Request]:
    """Requests with prompts of which nothing was computed: what their pages hold changes no kernel's time."""
    rng = random.Random(0)
    layout = layout_of("random", engine.layout, engine.model_config.vocab_size)
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0)
    found = []
    for _ in range(count):
        tokens = [rng.randrange(engine.model_config.vocab_size) for _ in range(input_tokens)]
        pages = engine.pool.allocate(engine.pool.pages_for(input_tokens))
        found.append(new_request(f"{next(_names)}", layout, tokens, pages, sampling, engine.max_model_len))
    return found


def run_full(
    engine: Engine, new_requests: Callable[[], list[Request]], batch: int, speculator: Speculator | None
) -> list[Step]:
    """The steps of a turn, which goes on as long as the batch is full."""
    requests = new_requests()
    side = Side(engine, iter(requests), batch, speculator)
    for _ in range(WARM_STEPS):
        side.step()
    side.steps.clear()
    while len(side.ended) <= len(requests) - batch:
        side.step()
    side.close()
    return side.steps


def in_turns(sides: Sequence[Callable[[], list[Step]]], seconds: float) -> list[list[Step]]:
    """The steps of each side, which take turns until all of them have had so long."""
    found = [list[Step]() for _ in sides]
    while not found[0] or min(sum(step.seconds for step in steps) for steps in found) < seconds:
        for steps, turn in zip(found, sides, strict=True):
            steps += turn()
    return found


def compare(
    name: str, batch: int, plain: list[Step], drafted: list[Step], speculator: Speculator, target: str
) -> list[Figure]:
    """One cell. All of each side's steps count: what is accepted is a matter of chance."""
    speculator.propose([])  # counts what the last step brought
    counters, total = speculator.counters, speculator.counters.total
    without, with_drafts = (batch / tokens_a_second(steps) for steps in (plain, drafted))
    step_seconds = sum(step.seconds for step in drafted) / len(drafted)
    figures = [
        Figure(f"{name}: speed with drafts over speed without", without / with_drafts, "", target),
        Figure(f"{name}: without drafts", without * 1e3, "ms/token"),
        Figure(f"{name}: with drafts", with_drafts * 1e3, "ms/token"),
        Figure(f"{name}: a step with drafts", step_seconds * 1e3, "ms"),
        Figure(f"{name}: tokens of a draft", total.drafted / max(total.drafts, 1), "tokens"),
        Figure(f"{name}: accepted of a draft", total.accepted / max(total.drafts, 1), "tokens"),
        Figure(f"{name}: steps without drafts", counters.steps_without_drafts / max(counters.steps, 1), ""),
    ]
    print(*[f"{figure.name} {figure.value:.3f} {figure.unit}" for figure in figures], sep="; ", flush=True)
    return figures


def emulated(
    shape: dict[str, Any], batches: Sequence[int], lengths: tuple[int, int], heads: Sequence[str], least: float
) -> list[Figure]:
    """The `EmulatedHead` at all batch sizes, for `least` seconds of each side at least."""
    started = time.perf_counter()
    engine, head = load_random(shape, max(batches), sum(lengths) + 64)
    seconds = time_steps(engine)
    print(f"ready after {time.perf_counter() - started:.1f} s", flush=True)
    figures = step_figures("8B", seconds)
    fewest = FEWEST_REQUESTS if max(batches) > 1 else 1
    for batch in batches:

        def requests(batch: int = batch) -> list[Request]:
            return random_requests(engine, max(batch, fewest), *lengths)

        def turn(
            name: str, speculator: Speculator, batch: int = batch, requests: Callable[[], list[Request]] = requests
        ) -> list[Step]:
            head.be_right(RATES[name])
            return run_full(engine, requests, batch, speculator)

        speculators = {name: new_speculator(engine, seconds, seconds.guess) for name in heads}
        drafting = [partial(turn, name, speculator) for name, speculator in speculators.items()]
        plain, *with_drafts = in_turns([partial(run_full, engine, requests, batch, None), *drafting], least)
        for (name, speculator), drafted in zip(speculators.items(), with_drafts, strict=True):
            target = ">= 2.5" if batch == 1 and name == "assumed rates" else ">= 0.97"
            figures += compare(f"emulated {name}, 8B, batch {batch}", batch, plain, drafted, speculator, target)
    return figures


def step_figures(name: str, seconds: StepSeconds) -> list[Figure]:
    """What was timed at the start."""
    plain = [Figure(f"{name}: a step of {rows}", s * 1e3, "ms") for rows, s in sorted(seconds.plain.items())]
    drafted = [
        Figure(f"{name}: a step of {rows} with drafts", s * 1e3, "ms") for rows, s in sorted(seconds.drafted.items())
    ]
    ahead = [
        Figure(f"{name}: a step of {rows} with a head's drafts", s * 1e3, "ms")
        for rows, s in sorted(seconds.ahead.items())
    ]
    guesses = [
        Figure(f"{name}: a guessed token of {n} requests", s * 1e3, "ms") for n, s in sorted(seconds.guess.items())
    ]
    figures = plain + drafted + ahead + guesses
    print(*[f"{figure.name} {figure.value:.3f}" for figure in figures], sep="; ", flush=True)
    return figures


def built_in(kinds: Sequence[str], batches: Sequence[int], least: float) -> list[Figure]:
    """The built-in model with its head and `ngram`, and how many of its outputs are the same."""
    try:
        folder = locate_model("smollm2").path
    except ModelError as error:
        return [Figure("built-in model", None, "", ">= 0.97", why=str(error))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = EngineConfig(
        folder, device=device, max_model_len=1024, max_num_seqs=max(batches), kv_cache_bytes=2**32,
        draft_head=BUILT_IN_HEAD,
    )  # fmt: skip
    engine = Engine.load(config)
    engine.warm_up()
    engine.prepare_decode(lambda what, fraction: None, drafts=True)
    prompts = Prompts(engine)
    figures = step_figures("135M", prompts.step_seconds)
    for kind, batch in itertools.product(kinds, batches):
        several = itertools.cycle(chat_messages(kind, BUILT_IN_PROMPTS))
        messages = list(itertools.islice(several, max(batch, FEWEST_REQUESTS)))

        def requests(messages: Sequence[str] = messages) -> list[Request]:
            return [prompts.request(message, BUILT_IN_OUTPUT) for message in messages]

        speculator = prompts.speculator()
        plain, drafted = in_turns(
            [partial(run_full, engine, requests, batch, side) for side in (None, speculator)], least
        )
        target = GPU_TARGETS.get((kind, batch), ">= 0.97")
        figures += compare(f"{kind}, 135M, batch {batch}", batch, plain, drafted, speculator, target)
    figures += same_outputs(engine, prompts, kinds)
    return figures


def same_outputs(engine: Engine, prompts: Prompts, kinds: Sequence[str]) -> list[Figure]:
    """In 16 bits, sums of few and of many rows are rounded differently, and now and then two tokens are as likely."""
    messages = [message for kind in kinds for message in chat_messages(kind, BUILT_IN_PROMPTS)]

    def outputs(batch: int, speculator: Speculator | None) -> dict[tuple[int, ...], list[int]]:
        requests = iter([prompts.request(message, BUILT_IN_OUTPUT) for message in messages])
        side = Side(engine, requests, batch, speculator)
        while side.step():
            pass
        return {tuple(each.offer.token_ids): each.token_ids for each in side.ended}

    plain = outputs(8, None)
    others = {"with drafts": outputs(8, prompts.speculator()), "without drafts, batch 1": outputs(1, None)}
    return [
        Figure(
            f"greedy outputs of {len(plain)} that are those without drafts at batch 8: {name}",
            sum(other[prompt] == tokens for prompt, tokens in plain.items()),
            "outputs",
        )
        for name, other in others.items()
    ]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and batch 1, on whatever device there is")
    parser.add_argument("--only", choices=["emulated", "built-in"], help="one part alone")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each side of a cell at least")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS), help="of built-in prompts")
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not (has_gpu or options.quick):
        parser.error("this machine has no GPU; --quick runs a tiny model on the CPU")
    figures: list[Figure] = []
    parts = ["spec-gpu", *([options.only] if options.only else []), *(["quick"] if options.quick else [])]
    try:
        if options.only != "built-in":
            lengths = (QUICK_INPUT, QUICK_OUTPUT) if options.quick else (INPUT, OUTPUT)
            shape, batches = (QUICK_SHAPE, [1]) if options.quick else (LLAMA_8B, options.batches)
            heads = list(RATES)[: 1 if options.quick else None]
            figures += emulated(shape, batches, lengths, heads, 0.0 if options.quick else options.seconds)
        if options.only != "emulated" and not options.quick:
            figures += built_in(options.kinds, options.batches, options.seconds)
    finally:
        publish("-".join(parts), figures, card=torch.cuda.get_device_name() if has_gpu else None)


if __name__ == "__main__":
    main()
