"""Trains a draft head: batches, loss, held-out acceptance."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from headrace.decode.training.conversations import Conversation
from headrace.decode.training.head_module import HeadModule
from headrace.decode.training.muon import Muon
from headrace.decode.training.peers import Peers
from headrace.engine.engine import Engine, PrefillChunk
from headrace.messages.request import SamplingParams

PASSES = 5
"""Tokens that a head learns to draft in a row."""
LEARNING_RATE = 3e-3
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


class _CrossEntropy(torch.autograd.Function):
    """Of what states [N, H] draft with the target's probabilities of the vocabulary: their sum, and the guesses [N].

    expected [N, H] are the vocabulary's rows, weighted with the target's probabilities: value and gradient need no more
    of these, so no table of float32 with a column a token is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, expected: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(states, rows)
        drafted = logits.softmax(-1)
        ctx.save_for_backward(drafted @ rows - expected)
        top, guesses = logits.max(-1)
        log_total = top.float() - drafted.amax(-1).float().log()
        ctx.mark_non_differentiable(guesses)
        return log_total.sum() - (states.float() * expected.float()).sum(), guesses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].to(slope.dtype), None, None


def loss_of(head: HeadModule, batch: Batch, rows: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the target's own probabilities of the draft vocabulary, an answer's token; summed over the
    passes, each of which counts where those before it guessed right: elsewhere nobody drafts on.

    rows [draft vocabulary, H]: those of the target's output projection; vocabulary: their tokens.
    """
    length, hidden = batch.features.shape[1], batch.targets.shape[-1]
    kind = torch.bfloat16 if batch.features.is_cuda else torch.float32
    rows = rows.to(kind)
    states = head(batch.features.to(kind), batch.embedded.to(kind), PASSES)
    expected = batch.targets.to(kind)
    of_answer = batch.drafted.flatten().nonzero().squeeze(1)
    answers = expected.reshape(-1, hidden).index_select(0, of_answer)
    expected = expected.new_zeros(expected.shape).view(-1, hidden)
    expected[of_answer] = F.linear(answers, rows).softmax(-1) @ rows
    expected = expected.view(batch.targets.shape)
    total: torch.Tensor = states[0].new_zeros((), dtype=torch.float32)
    standing = batch.drafted[:, :length]
    for step, state in enumerate(states):
        standing = standing & batch.drafted[:, step : step + length]
        at = standing.flatten().nonzero().squeeze(1)
        wanted, tokens = (x[:, step : step + length].flatten(0, 1)[at] for x in (expected, batch.tokens))
        guessing = state.flatten(0, 1).index_select(0, at)
        loss, guesses = _CrossEntropy.apply(guessing, wanted, rows)  # type: ignore[no-untyped-call]
        total = total + loss / len(of_answer)
        standing = torch.zeros_like(standing)
        standing.view(-1)[at] = vocabulary[guesses] == tokens
    return total


@torch.no_grad()
def acceptance_of(head: HeadModule, batch: Batch, rows: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
    """For each pass, tokens that were right, and tokens drafted after nothing but right ones, of greedy answers: int64
    [PASSES, 2].

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
        found.append(torch.stack((right.sum(), standing.sum())))
        standing = right
    return torch.stack(found)


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
    peers: Peers,
    conversations: Sequence[Conversation],
    embedding: torch.Tensor,
    rows: torch.Tensor,
    vocabulary: torch.Tensor,
    batch_tokens: int,
    seconds: float,
    max_steps: float,
    seed: int,
    progress: Callable[[float, float], None],
) -> Trained:
    """Train for `seconds`, or so many steps. `progress` is told the share done and the loss.

    The learning rate follows the share of the time, so a training that is cut to fit still ends low. All processes go
    by the first one's clock, as it was a step ago.
    """
    order, went = random.Random(seed), Trained()
    matrices = Muon([one for one in head.parameters() if one.dim() == 2])
    norms = torch.optim.AdamW(
        [one for one in head.parameters() if one.dim() < 2], LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    started, rounded, loss, clock = time.monotonic(), False, math.nan, torch.zeros(1)
    while True:
        for part in batches(conversations, batch_tokens, order):
            batch = examples.batch(part, embedding)
            done = float(clock)  # only now: the host made a batch while the device computed
            if done >= 1.0:
                return went
            if done >= ROUNDED_FROM and not rounded:
                head.round_weights()
                rounded = True
            value = loss_of(head, batch, rows, vocabulary)
            head.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            went.steps += 1
            clock = peers.share(head.parameters(), max((time.monotonic() - started) / seconds, went.steps / max_steps))
            torch.nn.utils.clip_grad_norm_(head.parameters(), MAX_GRADIENT)
            rate = LEARNING_RATE * min(done / WARM_UP, (1.02 - done) / (1 - WARM_UP), 1.0)
            norms.param_groups[0]["lr"] = rate
            norms.step()
            matrices.step(rate)
            went.tokens += batch.features.shape[0] * batch.features.shape[1]
            if went.steps % 10 == 1:
                loss = float(value.detach())
                went.losses.append(loss)
                progress(done, loss)
