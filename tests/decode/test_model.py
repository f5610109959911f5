"""A draft model: its KV travels with the target's, it is right where it is the target itself, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from headrace.decode.chain import MAX_UNREAD
from headrace.decode.chain_choice import ThreadChain
from headrace.decode.controller import HeadCost
from headrace.decode.model import ModelDrafter
from headrace.decode.ngram import NgramDrafter
from headrace.decode.sequence import Sequence
from headrace.decode.speculator import Speculator
from headrace.decode.step_cost import StepCost
from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.device import can_pack
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.errors import EngineError
from headrace.kernels.round_weights import round_to_4_bits
from headrace.loadtest.spec_side import Side
from headrace.messages.request import SamplingParams
from headrace.models.errors import ModelError
from headrace.models.locate import locate_model
from headrace.models.same_tokens import check_same_tokens
from tests.engine.conftest import generate, prefill
from tests.engine.test_families import save
from tests.kvtransfer.parts import make_offer

pytestmark = pytest.mark.timeout(300)  # packed kernels are compiled once on a machine

PROMPT = [5, 11, 7, 3, 60, 61, 62, 8, 9, 40, 41, 42, 13, 2, 77, 30, 31, 32, 33, 34, 35, 1, 90]
GREEDY = SamplingParams(max_tokens=60, temperature=0)
DEPTH = 6
Key = tuple[str, int]


def load(target: Path, draft: Path | None, **options: Any) -> Engine:
    """A small engine on the CPU, in float32 where it is not said otherwise."""
    config = EngineConfig(
        target, device="cpu", dtype="float32", max_model_len=120, max_num_seqs=4, kv_cache_bytes=2**23, cpu_threads=1,
        draft_model=draft,
    )  # fmt: skip
    return Engine.load(replace(config, **options))


def checkpoint(folder: Path, family: str = "Llama", **options: Any) -> Path:
    """A tiny random model on disk, the same each time: a draft model may say what its target can't."""
    torch.manual_seed(0)
    save(folder, family, {"head_dim": 8} | options if family == "Llama" else options)
    return folder


def hand_over(source: Engine, target: Engine, pages: list[int]) -> list[int]:
    """What a handoff does."""
    landed = target.pool.allocate(len(pages))
    for layer in range(source.layout.num_layers):
        target.cache.write_pages(layer, landed, source.cache.read_pages(layer, pages))
    return landed


def first_draft(source: Engine, target: Engine, prompt: list[int]) -> tuple[list[int], list[int]]:
    """(output, the guess that follows it): a prompt of one engine, handed over, and a first step of the other."""
    pages = source.pool.allocate(source.pool.pages_for(len(prompt)))
    token, _ = prefill(source, prompt, pages, GREEDY, chunk=9)
    landed = hand_over(source, target, pages) + target.pool.allocate(1)
    batch, drafter = DecodeBatch[Key](target), ModelDrafter(target)
    batch.join(("a", 0), [*prompt, token.token_id], 1, landed, GREEDY)
    batch.start()
    output = [token.token_id, *[one.token_id for _, one in batch.collect()]]
    guess = drafter.draft(batch, DEPTH)["a", 0].token_ids
    source.pool.release(pages)
    target.pool.release(landed)
    return output, guess


@pytest.mark.parametrize("kind", ["fused", "transformers", *(["packed"] if can_pack() else [])])
def test_the_first_draft_of_the_model_itself_is_right(tmp_path: Path, kind: str) -> None:
    """So its keys and values of the whole prompt have arrived. A draft ends where its model is in doubt."""
    if kind == "packed":
        folder, options = locate_model("smollm2").path, {"dtype": "auto", "kv_cache_bytes": 2**27}
    else:
        folder = checkpoint(tmp_path / "a") if kind == "fused" else checkpoint(tmp_path / "a", "Olmo2")
        options = {}
    engines = [load(folder, folder, **options) for _ in range(2)]
    if kind == "packed":
        assert engines[0].draft is not None
        assert engines[0].draft.model.follows_tables
    (expected,) = generate(load(folder, None, **options), [PROMPT], [GREEDY], 2 + DEPTH)
    tokens = [token.token_id for token in expected]
    output, guess = first_draft(*engines, PROMPT)
    assert output == tokens[:2]
    assert guess
    assert guess == tokens[2 : 2 + len(guess)]


@pytest.mark.parametrize(
    "shape",
    [
        {"num_hidden_layers": 3, "num_key_value_heads": 1, "num_attention_heads": 2},
        {"num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 4},
        {"num_hidden_layers": 1, "num_key_value_heads": 4},
    ],
)
def test_a_smaller_model_guesses_as_it_does_alone(tmp_path: Path, shape: dict[str, Any]) -> None:
    """With other layers and heads than its target: several of its layers share a page of the cache, or not."""
    target = checkpoint(tmp_path / "target", num_hidden_layers=4, num_key_value_heads=4)
    draft = checkpoint(tmp_path / "draft", hidden_size=16, vocab_size=96 + 8 * len(shape), **shape)
    output, guess = first_draft(load(target, draft), load(target, draft), PROMPT)
    (expected,) = generate(load(draft, None), [[*PROMPT, *output]], [GREEDY], DEPTH)
    assert guess == [token.token_id for token in expected][: len(guess)]


@pytest.mark.skipif(not can_pack(), reason="needs AVX2 and numba")
def test_a_model_of_more_bits_is_packed_beside_a_packed_one(tmp_path: Path) -> None:
    """It guesses as its rounded weights do alone, though its pages lie apart."""
    shape = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32}
    draft = checkpoint(tmp_path / "draft", num_key_value_heads=1, num_hidden_layers=5, **shape)
    target, options = locate_model("smollm2").path, {"dtype": "auto", "kv_cache_bytes": 2**27}
    engines = [load(target, draft, **options) for _ in range(2)]
    assert engines[0].layout.num_layers == 30 + 1
    assert engines[0].draft is not None
    assert engines[0].draft.model.follows_tables
    output, guess = first_draft(*engines, PROMPT)
    tensors = load_file(draft / "model.safetensors")
    rounded = {
        name: value if value.ndim < 2 or "embed" in name else round_to_4_bits(value) for name, value in tensors.items()
    }
    save_file(rounded, draft / "model.safetensors", metadata={"format": "pt"})
    alone = load(draft, None, **options)
    assert alone.model.follows_tables
    (expected,) = generate(alone, [[*PROMPT, *output]], [GREEDY], DEPTH)
    assert guess == [token.token_id for token in expected][: len(guess)]


def test_layers_of_a_draft_model_share_pages(tmp_path: Path) -> None:
    """As many as fit."""
    target = checkpoint(tmp_path / "target", num_hidden_layers=4, num_key_value_heads=4)
    draft = checkpoint(tmp_path / "draft", num_hidden_layers=5, num_key_value_heads=1, num_attention_heads=2)
    engine = load(target, draft)
    assert engine.layout.num_layers == 4 + 2
    announced: list[int] = []
    pages = engine.pool.allocate(2)
    engine.prefill([PrefillChunk(PROMPT, 0, len(PROMPT), pages, GREEDY)], lambda layer, _: announced.append(layer))
    assert announced == list(range(6))


def test_a_draft_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """One with more KV heads."""
    target, draft = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", num_key_value_heads=4)
    with pytest.raises(EngineError, match="smaller draft model"):
        load(target, draft)


@pytest.mark.parametrize("pause", [MAX_UNREAD - 3, MAX_UNREAD + 5])
def test_after_a_pause_it_guesses_as_without_unless_that_was_too_long(tmp_path: Path, pause: int) -> None:
    """What waits is read at once; of more than so many tokens nothing is kept."""
    folder = checkpoint(tmp_path / "a")
    engine = load(folder, folder)
    (expected,) = generate(load(folder, None), [PROMPT], [GREEDY], 90)
    tokens = [token.token_id for token in expected]
    pages = engine.pool.allocate(8)
    token, _ = prefill(engine, PROMPT, pages, GREEDY, chunk=40)
    batch, drafter = DecodeBatch[Key](engine), ModelDrafter(engine)
    batch.join(("a", 0), [*PROMPT, token.token_id], 1, pages, GREEDY)
    for _ in range(pause):
        batch.step()
        assert drafter.draft(batch, 0) == {}
    batch.step()
    guesses = drafter.draft(batch, DEPTH)
    if pause > MAX_UNREAD:
        assert guesses == {}
    else:
        guess = guesses["a", 0].token_ids
        assert guess
        assert guess == tokens[pause + 2 : pause + 2 + len(guess)]
    engine.pool.release(pages)


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_are_those_without_drafts(tmp_path: Path, batch: int) -> None:
    """Requests with their own sampling; the model itself drafts, so nearly all greedy guesses stand."""
    folder = checkpoint(tmp_path / "a")
    engine = load(folder, folder)
    sampling = [GREEDY, GREEDY, SamplingParams(max_tokens=60, temperature=0.8, seed=5), GREEDY]

    def outputs(speculator: Speculator | None) -> dict[str, list[int]]:
        requests = []
        for number, params in enumerate(sampling):
            prompt = PROMPT[number:]
            pages = engine.pool.allocate(engine.pool.pages_for(len(prompt)))
            token, _ = prefill(engine, prompt, pages, params, chunk=10)
            offer = msgspec.structs.replace(make_offer(prompt, f"{number}"), sampling=params)
            requests.append(Sequence(offer, [*prompt, token.token_id], pages, engine.max_model_len))
        side = Side(engine, iter(requests), batch, speculator)
        while side.step():
            pass
        return {one.key[0]: one.token_ids for one in side.ended}

    cost = StepCost({1: 1.0, 16: 1.01}, 4)
    speculator = Speculator(
        NgramDrafter(), cost, engine.max_model_len, ThreadChain(ModelDrafter(engine), HeadCost({1: 0.001}))
    )
    plain, drafted = outputs(None), outputs(speculator)
    assert drafted == plain
    speculator.propose([])  # counts what the last step brought
    of_model = speculator.counters.of["model"]
    assert of_model.accepted > 0.6 * of_model.drafted
    assert of_model.accepted > 40
    engine.pool.check_integrity()
    assert engine.pool.num_in_use == 0


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """The error names a token that differs."""
    folder = locate_model("smollm2").path
    check_same_tokens(folder, folder, "itself")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        check_same_tokens(folder, other, "other")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.save(str(other / "tokenizer.json"), pretty=False)
    check_same_tokens(folder, other, "other")
    tokenizer.add_tokens(["<draft>"])
    tokenizer.save(str(other / "tokenizer.json"))
    with pytest.raises(ModelError, match="another tokenizer"):
        check_same_tokens(folder, other, "other")
