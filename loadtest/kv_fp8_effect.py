"""What `--kv-wire-dtype fp8` changes: the next token after prompts whose pages travelled in half their bytes."""

from __future__ import annotations

import statistics

from tokenizers import Tokenizer

from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.sampler import SampledToken
from headrace.kvtransfer import fp8
from headrace.loadtest.prompts import sample_prompts
from headrace.loadtest.report import Figure
from headrace.messages.request import SamplingParams
from headrace.models.locate import locate_model

GREEDY = SamplingParams(max_tokens=1, temperature=0, logprobs=20)


def fp8_effect(count: int) -> list[Figure]:
    """Greedy next tokens, and log probabilities, with pages as they were computed and as they would arrive."""
    folder = locate_model("smollm2").path
    engine = Engine.load(EngineConfig(folder, dtype="float32"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    same, shifts = 0, []
    for prompt in sample_prompts(count):
        before, after = _next_token(engine, tokenizer.encode(prompt.text).ids)
        same += before.token_id == after.token_id
        assert before.logprobs is not None
        assert after.logprobs is not None
        there = dict(after.logprobs.top)
        shifts += [abs(value - there[token]) for token, value in before.logprobs.top[:5] if token in there]
    return [
        Figure("4 fp8: same greedy next token", same, f"of {count}"),
        Figure("4 fp8: change of the 5 likeliest tokens' log probabilities", statistics.median(shifts), "nats"),
        Figure("4 fp8: the same, 95th percentile", statistics.quantiles(shifts, n=20)[-1], "nats"),
    ]


def _next_token(engine: Engine, token_ids: list[int]) -> tuple[SampledToken, SampledToken]:
    """After a prompt, without and with the trip of all tokens' KV but the last one's."""
    token_ids = token_ids if len(token_ids) > 1 else [0, *token_ids]
    pages = engine.pool.allocate(engine.pool.pages_for(len(token_ids)))
    last = PrefillChunk(token_ids, len(token_ids) - 1, 1, pages, GREEDY)
    engine.prefill([PrefillChunk(token_ids, 0, len(token_ids) - 1, pages, GREEDY)])
    tokens = []
    for travels in (False, True):
        for layer in range(engine.layout.num_layers) if travels else ():
            data = engine.cache.read_pages(layer, pages)
            arrived = fp8.unpack(fp8.pack(data, engine.layout.dtype), len(data), engine.layout.dtype)
            engine.cache.write_pages(layer, pages, arrived)
        (output,) = engine.prefill([last])
        assert output.token is not None
        tokens.append(output.token)
    engine.pool.release(pages)
    return tokens[0], tokens[1]
