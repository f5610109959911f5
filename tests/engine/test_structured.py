"""Answers that follow a grammar, on each path that samples: text that a parser takes, and the same text with drafts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers

from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine, PrefillChunk
from headrace.engine.sampler import SampledToken
from headrace.grammar import of_choice, of_json_schema, of_regex
from headrace.messages.request import SamplingParams
from tests.engine.conftest import load

END = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["old", "new"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.2, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 4, "logprobs": 3},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.8, "min_p": 0.05, "seed": 5, "logit_bias": {17: 5.0}},
]


@pytest.fixture(scope="session")
def tokenizer(built_in_folder: Path) -> tokenizers.Tokenizer:
    """The built-in model's."""
    return tokenizers.Tokenizer.from_file(str(built_in_folder / "tokenizer.json"))


def params(grammar: str, tokens: int = 60, **fields: Any) -> SamplingParams:
    """One request's, which the model's end token ends."""
    return SamplingParams(**{"max_tokens": tokens, "stop_token_ids": (END,), "grammar": grammar, **fields})


def answer(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    known: Sequence[Sequence[int]] = (),
    so_far: int = 0,
) -> list[list[SampledToken]]:
    """Run all in one batch to their ends. With `known` outputs, drafts of them that go wrong here and there.

    `so_far`: so many of the known tokens are replayed as those of an earlier attempt.
    """
    pool, chance, batch = engine.pool, random.Random(1), DecodeBatch[int](engine)
    outputs: list[list[SampledToken]] = []
    pages = []
    for key, (prompt, own) in enumerate(zip(prompts, sampling, strict=True)):
        replayed = list(known[key][:so_far]) if so_far else []
        tokens = [*prompt, *replayed]
        pages.append(pool.allocate(pool.pages_for(len(prompt) + own.max_tokens)))
        first = engine.prefill([PrefillChunk(tokens, 0, len(tokens), pages[key], own, len(replayed))])[0].token
        assert first is not None
        outputs.append([*map(SampledToken, replayed), first])
        batch.join(key, [*tokens, first.token_id], len(replayed) + 1, pages[key], own, engine.grammars.matcher(own))

    def ended(key: int) -> bool:
        own = outputs[key]
        return own[-1].token_id in sampling[key].stop_token_ids or len(own) >= sampling[key].max_tokens

    running = set(range(len(prompts)))
    while running:
        for key in [key for key in running if ended(key)]:
            batch.leave(key)
            running.remove(key)
        drafts = {}
        for key in running if known and not so_far else ():
            draft = list(known[key][len(outputs[key]) :][: chance.randrange(6)])
            if draft and chance.random() < 0.4:
                draft[chance.randrange(len(draft))] = chance.randrange(1000)
            if draft:
                drafts[key] = draft
        if running:
            batch.start(drafts)
            for key, token in batch.collect():
                if not ended(key):
                    outputs[key].append(token)
    for held in pages:
        pool.release(held)
    return outputs


def ids(outputs: Sequence[Sequence[SampledToken]]) -> list[list[int]]:
    """Their token ids."""
    return [[token.token_id for token in own] for own in outputs]


def text(tokenizer: tokenizers.Tokenizer, output: Sequence[SampledToken]) -> str:
    """Without the end token."""
    return str(tokenizer.decode([token.token_id for token in output], skip_special_tokens=True))


@pytest.fixture(scope="module", params=["torch", "packed"])
def engine(request: Any, fused_engine: Engine, built_in_folder: Path) -> Engine:
    """The built-in model on both paths that a CPU has."""
    if request.param == "torch":
        return fused_engine
    return load(built_in_folder, "auto", max_model_len=512, quantization="auto")


def prompts_of(tokenizer: tokenizers.Tokenizer, count: int) -> list[list[int]]:
    """Different ones."""
    return [tokenizer.encode(f"Person number {n}, as JSON:").ids for n in range(count)]


def test_every_kind_of_request_gives_text_of_its_schema_also_with_drafts_and_after_a_failover(
    engine: Engine, tokenizer: tokenizers.Tokenizer
) -> None:
    """Greedy, drawn, filtered, penalized and biased rows in one batch, and one row without a grammar."""
    grammar = of_json_schema(SCHEMA)
    sampling = [*[params(grammar, **kind) for kind in KINDS], SamplingParams(max_tokens=20, temperature=0)]
    prompts = prompts_of(tokenizer, len(sampling))
    plain = answer(engine, prompts, sampling)
    for own in plain[:-1]:
        assert own[-1].token_id == END
        jsonschema.validate(json.loads(text(tokenizer, own)), SCHEMA)
    assert ids(answer(engine, prompts, sampling, known=ids(plain))) == ids(plain)
    assert ids(answer(engine, prompts, sampling, known=ids(plain), so_far=7)) == ids(plain)
    (alone,) = answer(engine, prompts[-1:], sampling[-1:])
    assert ids([alone]) == ids(plain[-1:])


def test_log_probabilities_are_those_of_what_the_grammar_allows(
    fused_engine: Engine, tokenizer: tokenizers.Tokenizer
) -> None:
    """As vLLM has them: forbidden tokens are no alternatives, and the allowed ones' chances add up to one."""
    sampling = params(of_choice(["yes", "no"]), temperature=0, logprobs=20)
    (own,) = answer(fused_engine, prompts_of(tokenizer, 1), [sampling])
    assert text(tokenizer, own) in ("yes", "no")
    for token in own:
        assert token.logprobs is not None
        assert token.logprobs.top[0][0] == token.token_id
        assert sum(2.718281828**logprob for _, logprob in token.logprobs.top) == pytest.approx(1, abs=1e-4)


def test_min_tokens_holds_as_long_as_the_grammar_can_go_on(
    fused_engine: Engine, tokenizer: tokenizers.Tokenizer
) -> None:
    """And yields where it has come to its end."""
    longer = params(of_regex("[a-z ]{1,200}"), tokens=40, temperature=0, min_tokens=25)
    over = params(of_choice(["no"]), temperature=0, min_tokens=25)
    outputs = answer(fused_engine, prompts_of(tokenizer, 2), [longer, over])
    assert len(outputs[0]) > 25
    assert text(tokenizer, outputs[1]) == "no"
    assert len(outputs[1]) < 5


def test_an_output_that_its_limit_cuts_is_the_start_of_a_text(
    fused_engine: Engine, tokenizer: tokenizers.Tokenizer
) -> None:
    """And one that may not end goes on with end tokens, which are no text."""
    grammar = of_json_schema(SCHEMA)
    prompts = prompts_of(tokenizer, 1)
    (whole,) = answer(fused_engine, prompts, [params(grammar, temperature=0)])
    (cut,) = answer(fused_engine, prompts, [params(grammar, tokens=6, temperature=0)])
    assert ids([cut])[0] == ids([whole])[0][:6]
    (on,) = answer(fused_engine, prompts, [params(grammar, temperature=0, stop_token_ids=())])
    assert len(on) == 60
    assert text(tokenizer, on) == text(tokenizer, whole)
