"""A head is trained for a tiny random model: it makes its own text, learns from it, and what is saved can be loaded."""

from __future__ import annotations

import random
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.decode.training.conversations import Conversation, ConversationMaker
from headrace.decode.training.head_module import HeadModule
from headrace.decode.training.main import answer_counts, draft_vocabulary, feature_layers, save
from headrace.decode.training.peers import Peers, run_together
from headrace.decode.training.train import PASSES, Examples, acceptance_of, batches, train
from headrace.engine.draft_head import TorchHead, load_head
from headrace.engine.engine import Engine
from headrace.engine.errors import EngineError
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.weights import Checkpoint
from headrace.kernels.round_weights import round_to_4_bits
from tests.engine.conftest import load
from tests.engine.test_families import VOCABULARY
from tests.engine.test_families import save as save_model


class Letters:
    """A tokenizer without a chat template."""

    chat_template = None
    bos_token_id = 0
    eos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """A token a character."""
        return [3 + ord(letter) % (VOCABULARY - 3) for letter in text]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Llama with 4 layers of 64."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    save_model(folder, "Llama", {**sizes, "max_position_embeddings": 256})
    return load(folder, "fused", max_model_len=256)


@pytest.fixture(scope="module")
def conversations(engine: Engine) -> list[Conversation]:
    """Some that the model makes."""
    maker = ConversationMaker(engine, Letters(), 12, 0, ["hello there", "what", "why is it so"])
    made = list(maker.make(time.monotonic() + 60, 40, lambda count, tokens: None))
    assert engine.pool.num_in_use == 0
    return made


def test_conversations_have_a_prompt_and_an_answer(conversations: list[Conversation]) -> None:
    """As many as were asked for, greedy ones among them."""
    assert len(conversations) == 40
    for one in conversations:
        assert 3 <= one.answer_start < len(one.token_ids) <= one.answer_start + 12
    assert 0 < sum(one.greedy for one in conversations) < 40


def test_a_model_that_gets_no_prompts_makes_them(engine: Engine) -> None:
    """From openings, which an answer then follows."""
    maker = ConversationMaker(engine, Letters(), 4, 0, [])
    (made,) = maker.make(time.monotonic() + 60, 1, lambda count, tokens: None)
    assert made.answer_start > 2
    assert engine.pool.num_in_use == 0


def test_batches_hold_each_conversation_once(conversations: list[Conversation]) -> None:
    """Padded, within the size."""
    parts = list(batches(conversations, 64, random.Random(0)))
    assert sorted(id(one) for part in parts for one in part) == sorted(map(id, conversations))
    assert all(len(part) * max(len(one.token_ids) for one in part) <= 64 or len(part) == 1 for part in parts)


def test_loss_falls_and_the_head_is_what_was_trained(
    engine: Engine, conversations: list[Conversation], tmp_path: Path
) -> None:
    """Saved in 16 bits, after rounding to 4."""
    assert isinstance(engine.model, FusedDecoder)
    layers = feature_layers(engine.model_config.num_layers)
    counts = answer_counts(conversations, VOCABULARY)
    vocabulary = draft_vocabulary(counts, 64)
    assert counts[vocabulary].sum() > 0.8 * counts.sum()
    assert (counts[vocabulary].diff() <= 0).all()
    head, examples = HeadModule(engine.model_config, len(layers)), Examples(engine, layers)
    with closing(Checkpoint(engine.config.model_folder, engine.device, torch.float32)) as checkpoint:
        head.start_from(checkpoint)
        rows = checkpoint.get("lm_head.weight")[vocabulary]
    embedding = engine.model.weights.embedding
    went = train(
        head, examples, Peers(), conversations, embedding, rows, vocabulary, 256, 60.0, 60, 0, lambda done, loss: None
    )
    assert went.steps == 60
    assert went.losses[-1] < went.losses[0]
    batch = examples.batch(conversations, embedding)
    found = acceptance_of(head, batch, rows, vocabulary)
    assert len(found) == PASSES
    assert found[0][1] > found[1][1]
    save(tmp_path, head, engine, vocabulary, layers, {"steps": 60})
    weights = load_head(tmp_path, engine.config.model_folder, engine.model_config, torch.device("cpu"), torch.float32)
    assert weights.vocabulary.tolist() == vocabulary.tolist()
    assert weights.feature_layers == layers
    assert torch.allclose(weights.fc, round_to_4_bits(head.fc.weight.detach()), rtol=1e-2, atol=1e-3)
    states = TorchHead(engine.model_config, weights, embedding).fuse(batch.features[0])
    assert torch.allclose(states, head.fc(batch.features[0]), rtol=0.1, atol=0.1)


def test_processes_share_gradients_and_the_first_ones_clock(tmp_path: Path) -> None:
    """Two of them, which write what they hear."""
    run_together(2, False, _share, tmp_path)
    found = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    for clock, gradients, total in found:
        assert clock.tolist() == [0.25]
        assert [one.tolist() for one in gradients] == [[[0.5, 0.5], [0.5, 0.5]], [2.5]]
        assert total.tolist() == [3]


def _share(peers: Peers, folder: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    for value, one in zip((peers.rank, 2 + peers.rank), parameters, strict=True):
        one.grad = torch.full_like(one, value)
    clock = peers.share(parameters, 0.25 + peers.rank)
    torch.save(
        (clock, [one.grad for one in parameters], peers.total(torch.tensor([1 + peers.rank]))), folder / f"{peers.rank}"
    )


def test_a_process_that_fails_ends_the_others() -> None:
    """They would wait for it for ever."""
    with pytest.raises(EngineError, match="failed"):
        run_together(2, False, _fail)


def _fail(peers: Peers) -> None:
    if peers.rank == 1:
        raise ValueError("on purpose")
    peers.total(torch.zeros(1))
