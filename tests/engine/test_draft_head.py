"""The built-in model's head: what it computes is the same in whatever pieces, and as it was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from headrace.decode.training.head_module import HeadModule
from headrace.engine.device import can_pack
from headrace.engine.draft_head import load_head
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.errors import EngineError
from headrace.engine.model_config import ModelConfig
from headrace.engine.weights import Checkpoint
from headrace.messages.request import SamplingParams
from headrace.models.locate import BUILT_IN_HEAD

pytestmark = pytest.mark.timeout(300)  # the first one compiles

GREEDY = SamplingParams(max_tokens=1, temperature=0)
TEXT = (
    "A headrace is the channel that carries water from the mill pond to the wheel, which turns the stones that grind."
)
KINDS = ["float32", *(["packed"] if can_pack() else [])]


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, built_in_folder: Path) -> Engine:
    """With the built-in head."""
    kind = "float32" if request.param == "float32" else "auto"
    return Engine.load(
        EngineConfig(
            built_in_folder,
            device="cpu",
            dtype=kind,
            max_model_len=256,
            max_num_seqs=4,
            kv_cache_bytes=2**26,
            cpu_threads=1,
            draft_head=BUILT_IN_HEAD,
        )
    )


@pytest.fixture(scope="module")
def tokens(built_in_folder: Path) -> list[int]:
    """Some text."""
    return Tokenizer.from_file(str(built_in_folder / "tokenizer.json")).encode(TEXT).ids


@torch.inference_mode()
def states(engine: Engine, tokens: list[int], pages: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, states) of the whole text, each position with the token after it."""
    assert engine.head is not None
    chunk = PrefillChunk(tokens, 0, len(tokens) - 1, pages, GREEDY)
    engine.hidden_states([chunk])
    features = engine.model.features.clone()
    batch = replace(engine._pack([chunk]), token_ids=torch.tensor(tokens[1:]))
    return features, engine.head.forward(engine.head.fuse(features), batch, engine.cache).clone()


def test_it_computes_what_was_trained(engine: Engine, tokens: list[int]) -> None:
    """The module's first pass, with weights of 4 bits; inputs of packed products have 8."""
    found_features, found = states(engine, tokens, list(range(4)))
    module = HeadModule(engine.model_config, 3)
    saved = Checkpoint(BUILT_IN_HEAD, torch.device("cpu"), torch.float32)
    module.load_state_dict({name: saved.get(name) for name in module.state_dict()})
    module.round_weights()
    embedding = Checkpoint(engine.config.model_folder, torch.device("cpu"), torch.float32).get(
        "model.embed_tokens.weight"
    )
    embedded = embedding[torch.tensor([*tokens[1:], 0])].unsqueeze(0)
    with torch.no_grad():
        (expected,) = module(found_features.unsqueeze(0), embedded, 1)
        normed = module.norm(found.clone())
    likeness = torch.nn.functional.cosine_similarity(normed, expected[0], dim=-1)
    assert likeness.min() > (0.98 if engine.model.follows_tables else 0.9999)


def test_prompts_keys_and_values_are_there_after_prefill(engine: Engine, tokens: list[int]) -> None:
    """In the cache's last layer, whatever the chunks."""
    layer = engine.model_config.num_layers
    assert engine.cache.layout.num_layers == layer + 1
    pages, announced = [5, 2, 9, 7], []
    for start in range(0, len(tokens), 10):
        length = min(10, len(tokens) - start)
        chunk = PrefillChunk(tokens, start, length, pages, GREEDY)
        (output,) = engine.prefill([chunk], lambda index, _: announced.append(index))
    assert output.token is not None
    assert announced == list(range(layer + 1)) * -(-len(tokens) // 10)
    states(engine, [*tokens, output.token.token_id], [10, 11, 12, 13])
    full = len(tokens) // engine.layout.page_size
    for chunked, at_once in zip(pages[:full], (10, 11, 12, 13), strict=False):
        ours, theirs = engine.cache.layer(layer)[chunked].float(), engine.cache.layer(layer)[at_once].float()
        assert torch.allclose(ours, theirs, atol=2e-2 * theirs.abs().max().item())


def test_a_head_of_another_model_is_refused(built_in_folder: Path, tmp_path: Path) -> None:
    """The error says what does not fit."""
    config = replace(ModelConfig.from_folder(built_in_folder), hidden_size=512)
    with pytest.raises(EngineError, match="not for this model"):
        load_head(BUILT_IN_HEAD, built_in_folder, config, torch.device("cpu"), torch.float32)
    with pytest.raises(EngineError, match=r"no config\.json"):
        load_head(tmp_path, built_in_folder, config, torch.device("cpu"), torch.float32)
