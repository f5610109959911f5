"""Trains a draft head: batches, loss, held-out acceptance."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F

from headrace.decode.training.conversations import Conversation
from headrace.decode.training.head_module import HeadModule
from headrace.engine.engine import Engine, PrefillChunk
from headrace.messages.request import SamplingParams

PASSES = 5
"""Tokens that a head learns to draft in a row."""
PASS_WEIGHT = 0.85
"""What a further pass's loss counts beside that of the pass before it."""
LEARNING_RATE = 1.5e-3
WARM_UP = 0.03
"""Share of the training in which the learning rate rises."""
ROUNDED_FROM = 0.6
"""After this share of the training, weights are rounded to 4 bits."""
MAX_GRADIENT = 1.0
NO_SAMPLING = SamplingParams(max_tokens=0)


@dataclass(frozen=True)
class Batch:
    """Conversations of similar length, padded, and what the target thinks of them."""

    features: torch.Tensor
    """[B, T, num * H] in the target's type."""
    embedded: torch.Tensor
    """[B, T + PASSES, H]: the embedding of token t + 1 at t."""
    targets: torch.Tensor
    """[B, T + PASSES, H]: at t, the target's final state at t + 1."""
    tokens: torch.Tensor
    """[B, T + PASSES]: at t, token t + 2."""
    drafted: torch.Tensor
    """[B, T + PASSES] bool: whether that token is of the answer."""
    greedy: torch.Tensor
    """[B] bool."""


class Examples:
    """Makes batches of conversations: the target reads them anew each time, so nothing large is kept."""

    def __init__(self, engine: Engine, feature_layers: tuple[int, ...]) -> None:
        self._engine = engine
        self._model = engine.model
        self._model.feature_layers = feature_layers

    @torch.no_grad()
    def batch(self, conversations: Sequence[Conversation], embedding: torch.Tensor) -> Batch:
        """Of these conversations."""
        engine, count = self._engine, len(conversations)
        lengths = [len(one.token_ids) for one in conversations]
        length = max(lengths)
        chunks = []
        for one in conversations:
            pages = engine.pool.allocate(engine.pool.pages_for(len(one.token_ids)))
            chunks.append(PrefillChunk(one.token_ids, 0, len(one.token_ids), pages, NO_SAMPLING))
        hidden = engine.hidden_states(chunks)
        for chunk in chunks:
            engine.pool.release(chunk.pages)
        device = hidden.device
        tokens = torch.zeros(count, length + PASSES + 2, dtype=torch.int64)
        for row, one in enumerate(conversations):
            tokens[row, : lengths[row]] = torch.tensor(one.token_ids)
        tokens = tokens.to(device)
        at = torch.arange(2, length + PASSES + 2)
        starts = torch.tensor([one.answer_start for one in conversations]).unsqueeze(1)
        drafted = (at >= starts) & (at < torch.tensor(lengths).unsqueeze(1))
        targets = hidden.new_zeros(count, length + PASSES + 1, hidden.shape[1])
        features = hidden.new_zeros(count, length, self._model.features.shape[1])
        is_real = (torch.arange(length) < torch.tensor(lengths).unsqueeze(1)).to(device)
        targets[:, :length][is_real] = hidden
        features[is_real] = self._model.features
        return Batch(
            features,
            F.embedding(tokens[:, 1:-1], embedding),
            targets[:, 1:],
            tokens[:, 2:],
            drafted.to(device),
            torch.tensor([one.greedy for one in conversations], device=device),
        )


def batches(
    conversations: Sequence[Conversation], tokens: int, order: random.Random
) -> Iterator[Sequence[Conversation]]:
    """All conversations once, those of similar length together, up to `tokens` with padding a batch."""
    by_length = sorted(conversations, key=lambda one: (len(one.token_ids), order.random()))
    cuts, first = [0], 0
    for index, one in enumerate(by_length):
        if (index + 1 - first) * len(one.token_ids) > tokens and index > first:
            cuts.append(index)
            first = index
    cuts.append(len(by_length))
    spans = list(pairwise(cuts))
    order.shuffle(spans)
    for start, end in spans:
        yield by_length[start:end]


def loss_of(head: HeadModule, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the target's own probabilities of the draft vocabulary, the first passes counting most.

    rows [draft vocabulary, H]: those of the target's output projection.
    """
    length = batch.features.shape[1]
    kind = torch.bfloat16 if batch.features.is_cuda else torch.float32
    states = head(batch.features.to(kind), batch.embedded.to(kind), PASSES)
    total: torch.Tensor = states[0].new_zeros((), dtype=torch.float32)
    weights = 0.0
    for step, state in enumerate(states):
        of_answer = batch.drafted[:, step : step + length]
        with torch.no_grad():
            wanted = F.linear(batch.targets[:, step : step + length][of_answer], rows.to(batch.targets.dtype))
            wanted = wanted.float().softmax(-1)
        drafted = F.linear(state[of_answer], rows.to(kind)).float()
        weight = PASS_WEIGHT**step
        total = total + weight * F.cross_entropy(drafted, wanted)
        weights += weight
    return total / weights


@torch.no_grad()
def acceptance_of(head: HeadModule, batch: Batch, rows: torch.Tensor, vocabulary: torch.Tensor) -> list[list[int]]:
    """For each pass, [tokens that were right, tokens drafted after nothing but right ones], of greedy answers.

    vocabulary [draft vocabulary]: its tokens.
    """
    length = batch.features.shape[1]
    kind = torch.bfloat16 if batch.features.is_cuda else torch.float32
    states = head(batch.features.to(kind), batch.embedded.to(kind), PASSES)
    standing = batch.greedy.unsqueeze(1).expand(-1, length)
    found = []
    for step, state in enumerate(states):
        standing = standing & batch.drafted[:, step : step + length]
        drafted = vocabulary[F.linear(state, rows.to(kind)).argmax(-1)]
        right = standing & (drafted == batch.tokens[:, step : step + length])
        found.append([int(right.sum()), int(standing.sum())])
        standing = right
    return found


@dataclass
class Trained:
    """How a training went."""

    steps: int = 0
    tokens: int = 0
    """Of answers' batches, padding included, each epoch counted."""
    losses: list[float] = field(default_factory=list)
    """Of every tenth step."""


def train(
    head: HeadModule,
    examples: Examples,
    conversations: Sequence[Conversation],
    embedding: torch.Tensor,
    rows: torch.Tensor,
    batch_tokens: int,
    seconds: float,
    max_steps: float,
    seed: int,
    progress: Callable[[float, float], None],
) -> Trained:
    """Train for `seconds`, or so many steps. `progress` is told the share done and the loss.

    The learning rate follows the share of the time, so a training that is cut to fit still ends low.
    """
    order, went = random.Random(seed), Trained()
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    started, rounded, loss = time.monotonic(), False, math.nan
    while True:
        for part in batches(conversations, batch_tokens, order):
            done = max((time.monotonic() - started) / seconds, went.steps / max_steps)
            if done >= 1.0:
                return went
            if done >= ROUNDED_FROM and not rounded:
                head.round_weights()
                rounded = True
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(done / WARM_UP, (1.02 - done) / (1 - WARM_UP), 1.0)
            batch = examples.batch(part, embedding)
            value = loss_of(head, batch, rows)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(head.parameters(), MAX_GRADIENT)
            optimizer.step()
            went.steps += 1
            went.tokens += batch.features.shape[0] * batch.features.shape[1]
            if went.steps % 10 == 1:
                loss = float(value.detach())
                went.losses.append(loss)
                progress(done, loss)
