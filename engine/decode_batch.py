"""The running batch of a decode worker: one row a request; a token a row and step, or more where drafts are right."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from headrace.engine.batch import NO_SLOTS, ForwardBatch
from headrace.engine.engine import Engine
from headrace.engine.kv_cache import PagedLayers
from headrace.engine.sampler import BatchSampler, SamplingRow
from headrace.engine.step_tokens import StepTokens
from headrace.engine.synthetic import SyntheticBatch, SyntheticEngine
from headrace.engine.token_masks import ConstrainedRows, mask_rows
from headrace.engine.verify import verify
from headrace.grammar import Matcher
from headrace.kernels.paged_attention import PagedPlan, plan_decode
from headrace.messages.request import SamplingParams

K = TypeVar("K", bound=Hashable)
NO_DRAFTS: Mapping[Any, Sequence[int]] = MappingProxyType({})


class Verified(NamedTuple):
    """A draft that nobody had seen."""

    draft: Sequence[int]
    """See `guess_at`."""
    token_ids: Sequence[int]
    """Its tokens."""
    came: Sequence[int]
    """The step's."""


class RunningBatch(Protocol[K]):
    """What a decode worker needs of its batch."""

    lookahead: int
    """Steps that may be in flight after a new one was started."""
    verified: Mapping[K, Verified]
    """What the step collected last has verified of drafts of a head on the device."""

    @property
    def in_flight(self) -> int:
        """Steps that were started and not collected."""

    def __len__(self) -> int: ...

    def join(
        self,
        key: K,
        token_ids: Sequence[int],
        generated: int,
        pages: Sequence[int],
        sampling: SamplingParams,
        matcher: Matcher | None = None,
    ) -> None:
        """Add a request.

        The K and V of all but the newest of `token_ids` are in `pages`; the last `generated` are output. `matcher` is
        the batch's until the request leaves, and between two steps it knows all tokens that were collected.
        """

    def leave(self, key: K) -> None:
        """Remove a request."""

    def add_pages(self, key: K, pages: Sequence[int]) -> None:
        """Append pages to a request's block table."""

    def keep_pages(self, key: K, count: int) -> None:
        """Shorten a request's block table to `count` pages."""

    def start(self, drafts: Mapping[K, Sequence[int]] = NO_DRAFTS, depth: int = 0) -> None:
        """Start a step of all requests, each of which must have pages for its newest token and its draft, if any.

        Drafts follow tokens that are known: no step may be in flight, and this one must be collected next. That does
        not hold for those of a head on the device (see `kernels.draft_tree`), which guesses for `depth` places of each
        request at the end of the step.
        """

    def collect(self) -> StepTokens[K]:
        """The tokens of the oldest step that was started."""


class Seen(NamedTuple, Generic[K]):
    """What a step has read of a request, and what it said."""

    key: K
    first_row: int
    """Of the features; as many rows count as there are tokens."""
    position: int
    """Of the first of them."""
    token_id: int
    """The one there."""
    token_ids: list[int]
    """Those after each position."""


def new_batch(engine: Engine) -> RunningBatch[Any]:
    """An empty batch of the kind that suits the engine's device."""
    if isinstance(engine, SyntheticEngine):
        return SyntheticBatch(engine)
    if engine.graph_decoder is None:
        return DecodeBatch(engine)
    from headrace.engine.graph_batch import GraphBatch

    return GraphBatch(engine, engine.graph_decoder)


class DecodeBatch(Generic[K]):
    """Rows stay dense: the last one moves into the place of one that leaves.

    Tokens, positions and block tables live on the device and are advanced there. All methods belong on the thread that
    runs the engine.
    """

    lookahead = 0

    def __init__(self, engine: Engine) -> None:
        capacity, width = engine.config.max_num_seqs, engine.pool.pages_for(engine.max_model_len)
        self._engine = engine
        self._keys: list[K] = []
        self._row_of: dict[K, int] = {}
        self._sampling: list[SamplingRow] = []
        self._num_pages: list[int] = []
        self._lengths: list[int] = []
        """Tokens of each request so far; the last one's K and V are written by the next step."""
        self._sampler: BatchSampler | None = None
        self._matchers: dict[K, Matcher] = {}
        self._members: tuple[K, ...] | None = None
        """The keys, until one joins or leaves."""
        self._computed: StepTokens[K] = StepTokens((), [])
        self.in_flight = 0
        self.verified: Mapping[K, Verified] = {}
        self.seen: list[Seen[K]] = []
        """What the last step read, where the engine has a draft head or a draft model."""
        self._rows = np.arange(capacity)
        self._keeps_seen = engine.head is not None or engine.draft is not None
        self._tokens = torch.zeros(capacity, dtype=torch.int64, device=engine.device)
        self._positions = torch.zeros_like(self._tokens)
        self._generated = torch.zeros_like(self._tokens)
        self._block_table = torch.zeros(capacity, width, dtype=torch.int64, device=engine.device)

    def __len__(self) -> int:
        return len(self._keys)

    def join(
        self,
        key: K,
        token_ids: Sequence[int],
        generated: int,
        pages: Sequence[int],
        sampling: SamplingParams,
        matcher: Matcher | None = None,
    ) -> None:
        """See `RunningBatch`."""
        row = len(self._keys)
        assert row < len(self._tokens), "the batch is full"
        self._keys.append(key)
        self._row_of[key] = row
        self._sampling.append(self._engine.sampling_row(sampling, token_ids, generated))
        self._num_pages.append(0)
        self._tokens[row] = token_ids[-1]
        self._lengths.append(len(token_ids))
        self._positions[row] = len(token_ids) - 1
        self._generated[row] = generated
        self.add_pages(key, pages)
        self._sampler = self._members = None
        if matcher is not None:
            self._matchers[key] = matcher
            matcher.start(token_ids[len(token_ids) - generated :])

    def leave(self, key: K) -> None:
        """Remove a request."""
        row, last = self._row_of.pop(key), len(self._keys) - 1
        if row != last:
            for column in (self._tokens, self._positions, self._generated, self._block_table):
                column[row] = column[last]
            self._row_of[self._keys[last]] = row
        lists: list[list[Any]] = [self._keys, self._sampling, self._num_pages, self._lengths]
        for values in lists:
            values[row] = values[last]
            values.pop()
        self._sampler = self._members = None
        self._matchers.pop(key, None)

    def add_pages(self, key: K, pages: Sequence[int]) -> None:
        """Append pages to a request's block table."""
        row = self._row_of[key]
        first = self._num_pages[row]
        self._block_table[row, first : first + len(pages)] = torch.tensor(pages, device=self._engine.device)
        self._num_pages[row] = first + len(pages)

    def keep_pages(self, key: K, count: int) -> None:
        """See `RunningBatch`."""
        self._num_pages[self._row_of[key]] = count

    def step(self) -> StepTokens[K]:
        """One more token for every request."""
        self.start()
        return self.collect()

    def collect(self) -> StepTokens[K]:
        """See `RunningBatch`."""
        self.in_flight = 0
        return self._computed

    @torch.inference_mode()
    def start(self, drafts: Mapping[K, Sequence[int]] = NO_DRAFTS, depth: int = 0) -> None:
        """Compute a step at once: on a CPU there is nothing to run ahead of, and no head guesses in here."""
        self._engine.cpu_share.adjust()
        self.in_flight = 1
        if drafts:
            self._verify([drafts.get(key, ()) for key in self._keys])
        else:
            self._step()

    def _step(self) -> None:
        rows, engine = len(self._keys), self._engine
        page_size = engine.layout.page_size
        if self._sampler is None:
            self._sampler = BatchSampler(self._sampling, engine.model_config.vocab_size, engine.device)
        positions, table = self._positions[:rows], self._block_table[:rows, : max(self._num_pages)]
        if engine.model.follows_tables:
            paged = PagedPlan(table, self._rows[:rows])
            batch = ForwardBatch(self._tokens[:rows], positions, NO_SLOTS, NO_SLOTS, paged, wants_logits=True)
        else:
            batch = ForwardBatch(
                token_ids=self._tokens[:rows],
                positions=positions,
                slot_pages=table.gather(1, (positions // page_size).unsqueeze(1)).squeeze(1),
                slot_offsets=positions % page_size,
                plan=plan_decode(engine.cache.layer(0), table, [1] * rows, self._lengths),
            )
        logits = engine.model.logits(engine.model.forward(batch, engine.cache, None))
        if self._matchers:
            mask_rows(logits, [ConstrainedRows(self._row_of[key], own) for key, own in self._matchers.items()])
        tokens = self._sampler.sample(logits, self._generated[:rows])
        if self._keeps_seen:
            read = (self._keys, range(rows), positions.tolist(), self._tokens[:rows].tolist())
            self.seen = list(map(Seen, *read, [[token] for token in tokens.tolist()]))
        self._tokens[:rows] = tokens
        self._positions[:rows] += 1
        self._lengths = [length + 1 for length in self._lengths]
        self._generated[:rows] += 1
        if self._members is None:
            self._members = tuple(self._keys)
        self._computed = StepTokens(self._members, tokens.tolist(), self._sampler.logprobs(tokens, logits))
        for key, matcher in self._matchers.items():
            matcher.advance([self._computed.token_ids[self._row_of[key]]])

    def pack(
        self,
        keys: Sequence[K],
        starts: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        cache: PagedLayers,
        *,
        wants_logits: bool = False,
    ) -> ForwardBatch:
        """Tokens of some requests, each request's from a position on, within the pages that it has; to be computed with
        this cache, the engine's or a draft model's.
        """
        engine, page_size = self._engine, self._engine.layout.page_size
        rows = [self._row_of[key] for key in keys]
        counts = [len(tokens) for tokens in token_ids]
        width = max(self._num_pages[row] for row in rows)
        of = [owner for owner, count in enumerate(counts) for _ in range(count)]
        at = [start + offset for start, count in zip(starts, counts, strict=True) for offset in range(count)]
        flat = [token for tokens in token_ids for token in tokens]
        if engine.model.follows_tables:  # on a CPU, where each operation of torch's takes as long as a layer's products
            named, positions, tokens = np.array((of, at, flat), np.int64)
            paged = PagedPlan(torch.from_numpy(self._block_table.numpy()[rows, :width]), named)
            return ForwardBatch(
                torch.from_numpy(tokens), torch.from_numpy(positions), NO_SLOTS, NO_SLOTS, paged, wants_logits
            )
        table = self._block_table[rows, :width]
        owners, positions = torch.tensor(of, device=engine.device), torch.tensor(at, device=engine.device)
        contexts = [start + count for start, count in zip(starts, counts, strict=True)]
        return ForwardBatch(
            token_ids=torch.tensor(flat, device=engine.device),
            positions=positions,
            slot_pages=table[owners, positions // page_size],
            slot_offsets=positions % page_size,
            plan=plan_decode(cache.layer(0), table, counts, contexts),
            wants_logits=wants_logits,
        )

    def room(self, key: K) -> int:
        """How many tokens a request's pages hold."""
        return self._num_pages[self._row_of[key]] * self._engine.layout.page_size

    def _verify(self, drafts: list[Sequence[int]]) -> None:
        """Compute what follows each request's newest token and each token of its draft, and keep what stands.

        The K and V of refused tokens stay behind in their slots: the next tokens are written there before any query
        sees them.
        """
        rows, engine = len(self._keys), self._engine
        newest, positions = self._tokens[:rows].tolist(), [length - 1 for length in self._lengths]
        tokens = [[first, *draft] for first, draft in zip(newest, drafts, strict=True)]
        batch = self.pack(self._keys, positions, tokens, engine.cache, wants_logits=True)
        logits = engine.model.logits(engine.model.forward(batch, engine.cache, None))
        firsts = list(itertools.accumulate([len(draft) + 1 for draft in drafts], initial=0))
        if self._matchers:
            at = [(self._row_of[key], matcher) for key, matcher in self._matchers.items()]
            mask_rows(logits, [ConstrainedRows(firsts[row], matcher, drafts[row]) for row, matcher in at])
        found = verify(self._sampling, self._generated[:rows].tolist(), drafts, logits, self._sampler)
        for key, matcher in self._matchers.items():
            matcher.advance([token.token_id for token in found[self._row_of[key]]])
        if any(row.counts is not None for row in self._sampling):
            self._sampler = None
        if self._keeps_seen:
            ids = [[token.token_id for token in own] for own in found]
            self.seen = list(map(Seen, self._keys, firsts, positions, newest, ids))
        taken = [len(tokens) for tokens in found]
        self._advance([tokens[-1].token_id for tokens in found], taken)
        self._lengths = [length + more for length, more in zip(self._lengths, taken, strict=True)]
        pairs = zip(self._keys, found, strict=True)
        self._computed = StepTokens.of((key, token) for key, tokens in pairs for token in tokens)

    def _advance(self, newest: list[int], taken: list[int]) -> None:
        """All requests' newest tokens, and how many more they have."""
        if self._engine.device.type == "cpu":  # torch takes 60 microseconds for a few numbers
            tokens, positions, generated = (one.numpy() for one in (self._tokens, self._positions, self._generated))
            for row, (token, more) in enumerate(zip(newest, taken, strict=True)):
                tokens[row] = token
                positions[row] += more
                generated[row] += more
            return
        rows = len(newest)
        self._tokens[:rows], more_there = torch.tensor((newest, taken), device=self._engine.device)
        self._positions[:rows] += more_there
        self._generated[:rows] += more_there
