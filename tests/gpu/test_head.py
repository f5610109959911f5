"""A draft head's steps on the chip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.engine.decode_batch import new_batch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.model_config import ModelConfig
from headrace.engine.step_timing import time_steps
from headrace.kernels.draft_tree import chain, guess_at
from headrace.loadtest.emulated_head import write_random_head
from headrace.messages.request import SamplingParams
from tests.kernels.comparisons import compare_guesses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [[(7 * i + 11 * n) % 500 + 1 for i in range(length)] for n, length in enumerate((2, 16, 17, 150, 60))]
TOKENS = 40
GREEDY = SamplingParams(max_tokens=99, temperature=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A small random Llama in float16 with a random head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 7, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    path: Path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(path)
    head: Path = tmp_path_factory.mktemp("head")
    write_random_head(head, ModelConfig.from_folder(path), torch.float16, torch.device("cpu"))
    config = EngineConfig(path, device="cuda", dtype="float16", max_num_seqs=32, kv_cache_bytes=2**26, draft_head=head)
    engine = Engine.load(config)
    engine.prepare_decode(lambda what, fraction: None, drafts=True)
    return engine


def generate(engine: Engine, sampling: SamplingParams, depth: int, length: int) -> tuple[list[list[int]], int]:
    """All prompts in one batch with a step in flight, and how many guesses were verified."""
    batch = new_batch(engine)
    outputs: list[list[int]] = []
    held, verified = [], 0
    for key, prompt in enumerate(PROMPTS):
        pages = engine.pool.allocate(engine.pool.pages_for(len(prompt) + TOKENS + 40))
        held.append(pages)
        output = engine.prefill([PrefillChunk(prompt, 0, len(prompt), pages, sampling)])[0]
        assert output.token is not None
        outputs.append([output.token.token_id])
        batch.join(key, [*prompt, output.token.token_id], 1, pages, sampling)
    left = set(range(len(PROMPTS)))
    tree = [*chain(3), guess_at(0, 1), guess_at(1, 1), guess_at(0, 2)]
    while left or batch.in_flight:
        if left:
            batch.start(dict.fromkeys(left, tree[:length]), depth)
        if batch.in_flight > batch.lookahead or not left:
            for key, token in batch.collect():
                outputs[key].append(token.token_id)
            verified += sum(len(one.draft) for one in batch.verified.values())
            for key in [key for key in left if len(outputs[key]) >= TOKENS]:
                left.remove(key)
                batch.leave(key)
    for pages in held:
        engine.pool.release(pages)
    return [tokens[:TOKENS] for tokens in outputs], verified


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(max_tokens=99, temperature=0.7, top_k=5, seed=7)],
    ids=["greedy", "sampled"],
)
def test_outputs_are_those_without_drafts(engine: Engine, sampling: SamplingParams) -> None:
    """But where two tokens are as likely, or a draw falls between two, as sums of more rows are rounded differently."""
    plain, _ = generate(engine, sampling, 0, 0)
    drafted, verified = generate(engine, sampling, 5, 6)
    assert verified > 100
    assert sum(mine == theirs for mine, theirs in zip(drafted, plain, strict=True)) >= 3


def test_guesses_are_those_of_the_head_that_every_device_runs(engine: Engine) -> None:
    """Of a prompt's end and of what follows, read in one go and guess by guess."""
    assert engine.head is not None
    assert engine.graph_decoder is not None
    prompt, same = PROMPTS[3], 0
    pages = engine.pool.allocate(engine.pool.pages_for(len(prompt) + 80))
    batch = new_batch(engine)
    output = engine.prefill([PrefillChunk(prompt, 0, len(prompt), pages, GREEDY)])[0]
    assert output.token is not None
    tokens = [*prompt, output.token.token_id]
    batch.join(0, tokens, 1, pages, GREEDY)
    scratch = engine.pool.allocate(engine.pool.pages_for(len(prompt) + 80))
    for _ in range(12):
        batch.start({}, 1)
        tokens += [token.token_id for _, token in batch.collect()]
        guess = int(engine.graph_decoder.state.guesses[0, 0])
        engine.prefill([PrefillChunk(tokens[:-1], 0, len(tokens) - 1, scratch, GREEDY)])
        with torch.inference_mode():
            chunk = PrefillChunk(tokens[:-1], 0, len(tokens) - 1, scratch, GREEDY)
            engine.hidden_states([chunk])
            packed = engine._pack([chunk])
            packed.token_ids.copy_(torch.tensor(tokens[1:]))
            states = engine.head.forward(engine.head.fuse(engine.model.features), packed, engine.cache)
            same += guess == int(engine.head.draft(states[-1:])[0])
    engine.pool.release(pages)
    engine.pool.release(scratch)
    assert same >= 11


def test_steps_and_guesses_are_timed(engine: Engine) -> None:
    """As a worker does at its start."""
    seconds = time_steps(engine)
    assert min(seconds.ahead) == 2
    assert set(seconds.guess) == {1, 2, 4, 8, 16, 32}
    assert engine.pool.num_in_use == 0


@pytest.mark.parametrize(("requests", "vocabulary", "hidden"), [(1, 8192, 576), (5, 32000, 4096), (64, 100, 64)])
def test_kernels_equal_their_references(requests: int, vocabulary: int, hidden: int) -> None:
    """Those of a head alone."""
    compare_guesses("cuda", torch.bfloat16, requests, vocabulary, hidden)
