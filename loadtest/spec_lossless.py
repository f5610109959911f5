"""`make lossless`: drafts change nothing. Greedy answers are the same token by token; drawn ones are distributed alike.

Greedy: 200 prompts to the built-in model in float32, with each drafter, alone and 16 at a time, against answers without
drafts. `model` drafts with the built-in model itself, so nearly all of its guesses stand. Drawn: 50,000 requests to a
tiny model with random weights, of which all answers' probabilities can be computed, and a chi-squared test at the first
position that drafts reach.

All of it takes some 20 minutes. It runs in pieces: `--seconds` ends it after the piece that is running, what is done is
kept in `build/`, and the next run goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.decode.chain_choice import ThreadChain
from headrace.decode.controller import HeadCost
from headrace.decode.drafter import Draft
from headrace.decode.drafting import chain_drafter
from headrace.decode.ngram import NgramDrafter
from headrace.decode.sequence import Key, Sequence
from headrace.decode.speculator import Speculator
from headrace.decode.step_cost import Kind, StepCost
from headrace.decode.training.head_module import HeadModule
from headrace.decode.training.main import save
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.sampler import BatchSampler
from headrace.kvtransfer.layout import layout_of
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.spec_bench import Prompts
from headrace.loadtest.spec_prompts import KINDS, chat_messages
from headrace.loadtest.spec_side import Side, new_request
from headrace.messages.request import SamplingParams
from headrace.models.locate import BUILT_IN_HEAD, locate_model

DRAFTERS = ("ngram", "head", "model")
PROMPTS, PIECE, OUTPUT = 200, 25, 8
BATCHES = (1, 16)


class FixedCost(StepCost):
    """Learns nothing: so that drafts go on however the machine is."""

    def observe(self, rows: int, seconds: float, kind: Kind) -> None:
        """See `StepCost`."""


class FixedHeadCost(HeadCost):
    """Learns nothing, either."""

    def observe(self, num_requests: int, depth: int, seconds: float) -> None:
        """See `HeadCost`."""


COST = FixedCost({1: 1e3, 16: 2e3, 48: 2.4e3, 256: 17e3}, 16)
"""Of steps, in seconds: drafts pay for one request and for 16, however long it takes to find some."""
HEAD_COST = FixedHeadCost({1: 50.0, 16: 100.0})
DRAWS, TOGETHER = 50_000, 100
FREE = FixedCost({1: 1e3, 256: 1.001e3}, TOGETHER, verifying={1: 500.0, 256: 501.0})
FREE_HEAD = FixedHeadCost({1: 1e-3})
"""For drawn answers: a tiny model's guesses are seldom right, and all of them are to be verified."""
TEMPERATURES = (0.5, 1.0, 1.5)
TOP_K, TOP_P = 12, 0.95
VOCABULARY = 16
POSITION, DRAWN = 2, 4
"""Of a drawn answer's tokens, this one is looked at: the first that a drafter reaches which works behind a step."""
DRAWN_PROMPT = 8 * 16
"""Its tokens, in whole pages: so many that `ngram` finds most pairs in them."""
STATE = Path("build/spec-lossless.json")


class Silent(NgramDrafter):
    """Has no guesses: so that a head's or a model's are all there are."""

    def draft(self, limits: Mapping[Key, int]) -> dict[Key, Draft]:
        """See `Drafter`."""
        return {}


def speculator(engine: Engine, drafter: str, cost: StepCost, head_cost: HeadCost) -> Speculator:
    """With this drafter alone."""
    longest = engine.max_model_len
    if drafter == "ngram":
        return Speculator(NgramDrafter(), cost, longest)
    behind = chain_drafter(engine)
    assert behind is not None, "the engine has neither a head nor a draft model"
    return Speculator(Silent(), cost, longest, ThreadChain(behind, head_cost))


def finished(engine: Engine, requests: Iterator[Sequence], batch: int, drafts: Speculator | None) -> list[Sequence]:
    """All requests, run to their ends in batches of this size."""
    side = Side(engine, requests, batch, drafts)
    while side.step():
        pass
    if drafts is not None:
        drafts.propose([])  # counts what the last step brought
    return side.ended


@cache
def built_in(drafter: str) -> tuple[Engine, Prompts]:
    """The built-in model in float32 with what this drafter needs."""
    folder = locate_model("smollm2").path
    engine = Engine.load(
        EngineConfig(
            folder, device="cpu", dtype="float32", max_model_len=1024, max_num_seqs=16, kv_cache_bytes=2**31,
            draft_head=BUILT_IN_HEAD if drafter == "head" else None, draft_model=folder if drafter == "model" else None,
            cpu_threads=1,
        )
    )  # fmt: skip
    engine.warm_up()
    return engine, Prompts(engine)


@cache
def plain_answers(piece: int) -> dict[tuple[int, ...], list[int]]:
    """Without drafts, by prompt."""
    return answers("ngram", piece, 16, None)


def answers(drafter: str, piece: int, batch: int, drafts: Speculator | None) -> dict[tuple[int, ...], list[int]]:
    """Greedy ones of one piece of the prompts, by prompt."""
    each = -(-PROMPTS // len(KINDS))
    messages = [message for kind in KINDS for message in chat_messages(kind, each)][:PROMPTS]
    engine, prompts = built_in(drafter)
    requests = (prompts.request(message, OUTPUT) for message in messages[piece * PIECE : (piece + 1) * PIECE])
    found = finished(engine, requests, batch, drafts)
    prompts.forget()  # all of them would not fit
    return {tuple(one.offer.token_ids): one.token_ids[len(one.offer.token_ids) :] for one in found}


def compare_greedy(drafter: str, batch: int, piece: int) -> dict[str, float]:
    """Counts of one piece."""
    plain, drafts = plain_answers(piece), speculator(built_in(drafter)[0], drafter, COST, HEAD_COST)
    drafted = answers(drafter, piece, batch, drafts)
    same = sum(drafted[prompt] == tokens for prompt, tokens in plain.items())
    counts = drafts.counters.of[drafter]
    return {"prompts": len(plain), "same": same, "drafted": counts.drafted, "accepted": counts.accepted}


def tiny_folders(folder: Path) -> tuple[Path, Path]:
    """A tiny model with random weights and a random head for it."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=160, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.25)
    model.save_pretrained(folder / "model")
    layers = (0, 1, 2)
    engine = load_tiny(folder / "model", None)
    save(folder / "head", HeadModule(engine.model_config, len(layers)), engine, torch.arange(VOCABULARY), layers, {})
    return folder / "model", folder / "head"


def load_tiny(target: Path, head: Path | None, draft: Path | None = None) -> Engine:
    """With a head, a draft model or neither."""
    config = EngineConfig(
        target, device="cpu", dtype="float32", max_model_len=160, max_num_seqs=TOGETHER, cpu_threads=1
    )
    return Engine.load(replace(config, kv_cache_bytes=2**24, draft_head=head, draft_model=draft))


def distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """[..., V] float64, by the definition of temperature, top-k and top-p."""
    p = (logits / temperature).double().softmax(-1)
    order = p.argsort(-1, descending=True)
    ranked = p.gather(-1, order)
    ranked[..., TOP_K:] = 0
    ranked /= ranked.sum(-1, keepdim=True)
    ranked[ranked.cumsum(-1) - ranked >= TOP_P] = 0
    return torch.zeros_like(p).scatter_(-1, order, ranked / ranked.sum(-1, keepdim=True))


@torch.inference_mode()
def said_by_itself(model: LlamaForCausalLM) -> list[int]:
    """A prompt that the model is likely to go on with as it began."""
    torch.manual_seed(3)
    tokens = [1]
    while len(tokens) < DRAWN_PROMPT:
        tokens.append(int(torch.multinomial(model(torch.tensor([tokens])).logits[0, -1].softmax(-1), 1)))
    return tokens


@torch.inference_mode()
def expected_marginal(model: LlamaForCausalLM, prompt: list[int], temperature: float) -> torch.Tensor:
    """[V] float64: over all ways to get to the position."""
    weights = torch.ones(1, dtype=torch.float64)
    contexts = torch.tensor([prompt])
    for _ in range(POSITION + 1):
        logits = torch.cat([model(part).logits[:, -1].float() for part in torch.split(contexts, 512)])
        joint = weights.unsqueeze(1) * distribution(logits, temperature)
        kept = joint.reshape(-1) > 0
        tokens = torch.arange(VOCABULARY).repeat(len(contexts)).unsqueeze(1)
        contexts = torch.cat((contexts.repeat_interleave(VOCABULARY, 0), tokens), 1)[kept]
        weights = joint.reshape(-1)[kept]
    return joint.sum(0)


def compare_drawn(drafter: str, temperature: float, draws: int) -> dict[str, float]:
    """Chi-squared over what is exceeded with probability 0.001."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        target, head = tiny_folders(Path(folder))
        engine = load_tiny(target, head if drafter == "head" else None, target if drafter == "model" else None)
        model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    prompt = said_by_itself(model)
    expected = expected_marginal(model, prompt, temperature)
    counts = torch.zeros(VOCABULARY, dtype=torch.float64)
    drafts = speculator(engine, drafter, FREE, FREE_HEAD)
    pages = engine.pool.allocate(engine.pool.pages_for(len(prompt)))
    whole = PrefillChunk(prompt, 0, len(prompt), pages, SamplingParams(max_tokens=1))
    with torch.inference_mode():
        logits = engine.model.logits(engine.hidden_states([whole])[-1:])
    engine.prefill([whole])
    for first in range(0, draws, TOGETHER):
        seeds = range(first, min(first + TOGETHER, draws))
        requests = _drawn_requests(engine, prompt, temperature, seeds, pages, logits)
        for one in finished(engine, iter(requests), TOGETHER, drafts):
            counts[one.token_ids[len(prompt) + POSITION]] += 1
    support = expected > 0
    hoped = draws * expected[support]
    chi_squared = float(((counts[support] - hoped) ** 2 / hoped).sum())
    of_drafter = drafts.counters.of[drafter]
    return {
        "chi squared": chi_squared / chi_squared_limit(int(support.sum()) - 1),
        "excluded": float(counts[~support].sum()),
        "drafted": of_drafter.drafted,
        "accepted": of_drafter.accepted,
    }


def _drawn_requests(
    engine: Engine, prompt: list[int], temperature: float, seeds: range, pages: list[int], logits: torch.Tensor
) -> list[Sequence]:
    """Requests with their first tokens; all begin with the prompt's pages. `logits` [1, V] follow the prompt."""
    layout = layout_of("tiny", engine.layout, VOCABULARY)
    params = [
        SamplingParams(max_tokens=DRAWN, temperature=temperature, top_k=TOP_K, top_p=TOP_P, seed=seed) for seed in seeds
    ]
    sampler = BatchSampler([engine.sampling_row(one, prompt, 0) for one in params], VOCABULARY, engine.device)
    tokens = sampler.sample(logits.repeat(len(seeds), 1), torch.zeros(len(seeds), dtype=torch.int64)).tolist()
    requests = []
    for seed, one, token in zip(seeds, params, tokens, strict=True):
        engine.pool.share(pages)
        requests.append(new_request(f"{seed}", layout, [*prompt, token], list(pages), one, engine.max_model_len))
    return requests


def chi_squared_limit(freedom: int) -> float:
    """What is exceeded with probability 0.001 (Wilson and Hilferty)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3)


def pieces(quick: bool) -> Mapping[str, Callable[[], dict[str, float]]]:
    """What is to be done, by name."""
    draws = DRAWS // 25 if quick else DRAWS
    drawn = {
        f"drawn, {drafter}, temperature {temperature}": partial(compare_drawn, drafter, temperature, draws)
        for drafter, temperature in itertools.product(DRAFTERS, TEMPERATURES)
    }
    greedy = {
        f"greedy, {drafter}, batch {batch}, {piece}": partial(compare_greedy, drafter, batch, piece)
        for piece, batch, drafter in itertools.product(range(PROMPTS // PIECE), BATCHES, DRAFTERS)
    }
    return drawn if quick else drawn | greedy


def figures(done: Mapping[str, Mapping[str, float]], wanted: Mapping[str, Any]) -> list[Figure]:
    """Of all pieces together; one that was not run leaves its figure without a value."""
    found = []
    for drafter, batch in itertools.product(DRAFTERS, BATCHES):
        name = f"greedy, {drafter}, batch {batch}"
        names = [one for one in wanted if one.startswith(f"{name}, ")]
        parts = [done[one] for one in names if one in done]
        if not names:
            continue
        why = "" if len(parts) == len(names) else "not run to its end"
        prompts, same, drafted, accepted = (
            sum(part[column] for part in parts) for column in ("prompts", "same", "drafted", "accepted")
        )
        target = f"= {PROMPTS}"
        found += [
            Figure(f"{name}: answers that are the same", None if why else same, f"of {prompts:.0f}", target, why),
            Figure(f"{name}: drafted tokens", drafted, ""),
            Figure(f"{name}: of them accepted", accepted, ""),
        ]
    for name in wanted:
        if name.startswith("drawn"):
            part = done.get(name, {})
            why = "" if part else "not run"
            chi_squared, excluded = part.get("chi squared"), part.get("excluded")
            found.append(Figure(f"{name}: chi-squared over its limit", chi_squared, "", "<= 1", why))
            found.append(Figure(f"{name}: tokens that the filters exclude", excluded, "", "= 0", why))
            found.append(Figure(f"{name}: drafted tokens", part.get("drafted"), "", "", why))
            share = part["accepted"] / max(part["drafted"], 1) if part else None
            found.append(Figure(f"{name}: accepted of drafted", share, "", "", why))
    return found


def main() -> None:
    """Run what is left and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 draws each, no greedy answers")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further piece is begun")
    options = parser.parse_args()
    wanted, state = pieces(options.quick), STATE.with_suffix(".quick.json") if options.quick else STATE
    done = json.loads(state.read_text()) if state.is_file() else {}
    end = time.monotonic() + options.seconds
    for name, piece in wanted.items():
        if name in done or time.monotonic() > end:
            continue
        started = time.monotonic()
        done[name] = piece()
        print(f"{name}: {done[name]}, {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        state.parent.mkdir(exist_ok=True)
        state.write_text(json.dumps(done))
    publish("spec-lossless" + ("-quick" if options.quick else ""), figures(done, wanted))
    if len(done) < len(wanted):
        sys.exit(f"{len(wanted) - len(done)} pieces are left: run this again")


if __name__ == "__main__":
    main()
