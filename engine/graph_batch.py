"""The running batch of a decode worker on a GPU.

The next step is on its way before the tokens of this one are read. What was drawn is compared with drafts on the
device, which advances the requests, so that holds for drafts of a head on the device, too: step after step verifies
what the one before it has guessed, and the host hears of it later. Drafts of the host's follow tokens that it knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
import torch

from headrace.engine.arriving import ArrivingTokens
from headrace.engine.base import LayerAnnounced
from headrace.engine.decode_batch import NO_DRAFTS, Verified
from headrace.engine.engine import Engine, PrefillChunk, StartedPrefill
from headrace.engine.graph_decoder import GraphDecoder
from headrace.engine.sampler import BatchSampler, SamplingRow
from headrace.engine.sampling_table import SamplingTable
from headrace.engine.step_tokens import StepTokens
from headrace.engine.token_masks import ConstrainedRows, mask_rows
from headrace.grammar import Matcher
from headrace.kernels.draft_rows import STEPS_AT_ONCE, accept_rows, move_leaf
from headrace.kernels.draft_tree import depths_of, place_of, standing_row
from headrace.kernels.row_changes import STATE_FIELDS, RowChanges, advance_rows
from headrace.kernels.upload import upload
from headrace.messages.request import SamplingParams
from headrace.messages.stream import TokenLogprobs

K = TypeVar("K", bound=Hashable)
MAX_SAMPLERS = 16
"""Kept for numbers of rows that requests had in steps with drafts; few requests often have the same ones."""


@dataclass(frozen=True)
class _Layout:
    """The rows of a step with drafts."""

    drafts: Sequence[Sequence[int]]
    """Of each request."""

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each request."""
        return [len(draft) + 1 for draft in self.drafts]

    @cached_property
    def depths(self) -> list[int]:
        """Of each row."""
        return [depth for draft in self.drafts for depth in (0, *depths_of(draft))]

    @cached_property
    def firsts(self) -> list[int]:
        """Each request's first row."""
        return [*accumulate(self.lengths[:-1], initial=0)]

    @cached_property
    def is_known(self) -> bool:
        """Whether there are drafts of the host's."""
        return any(draft and draft[0] >= 0 for draft in self.drafts)

    @cached_property
    def has_leaves(self) -> bool:
        """Whether a draft is more than a chain."""
        return any(draft and depths_of(draft)[-1] != len(draft) for draft in self.drafts)

    def fill(self, layout: np.ndarray) -> None:
        """As `StepRows` has it, [4, rows]."""
        rows = len(self.depths)
        layout.fill(-1)
        layout[0, :rows] = np.repeat(np.arange(len(self.lengths)), self.lengths)
        layout[1, :rows] = np.repeat(self.firsts, self.lengths)
        layout[2, :rows] = [token for draft in self.drafts for token in (0, *draft)]
        layout[3, :rows] = self.depths


@dataclass
class _Running(Generic[K]):
    """A step on the device and its tokens."""

    keys: Sequence[K]
    tokens: ArrivingTokens
    layout: _Layout | None = None
    """Of a step with drafts."""
    penalized: Sequence[SamplingRow] = ()
    """Where requests have penalties and there are drafts that the host knew: the sampling state after each row."""
    found: StepTokens[K] | None = None
    """Its tokens, once they have been waited for."""
    verified: dict[K, Verified] = field(default_factory=dict)
    """See `RunningBatch`; known then."""


class GraphBatch(Generic[K]):
    """A batch whose steps are collected one step late.

    Rows stay dense. Tokens advance on the device; all else about a row is known to the host, which sends what changed.
    """

    lookahead = 1

    def __init__(self, engine: Engine, decoder: GraphDecoder) -> None:
        self._engine = engine
        self._decoder = decoder
        self._keys: list[K] = []
        self._members: tuple[K, ...] = ()
        """The same, as they were when a step was started last."""
        self._row_of: dict[K, int] = {}
        self._sampling: list[SamplingRow] = []
        vocab_size = engine.model_config.vocab_size
        self._samplers = SamplingTable(len(decoder.block_table), vocab_size, engine.device)
        parameters = self._samplers.parameters
        self._changes = RowChanges(decoder.state, parameters, decoder.block_table, decoder.limits)
        self._sampler: BatchSampler | None = None
        self._matchers: dict[K, Matcher] = {}
        self._tables: list[list[int]] = []
        """Pages of each row."""
        self._drafted_samplers: dict[tuple[int, ...], BatchSampler] = {}
        """By the rows of each request, while the batch has the same members."""
        self._joined: dict[int, tuple[int, int, int]] = {}
        """By row: newest token, its position and the number of output tokens of a request that joined."""
        self._moved: dict[int, int] = {}
        """By row: the row whose state, which the device alone knows, belongs there now."""
        self._table_changes: list[tuple[int, int]] = []
        """(row, first page)."""
        self._members_changed = False
        self._running: deque[_Running[K]] = deque()
        self.collected_late = False
        """The step that was collected last had ended before that: the device may have waited for the next one."""
        self._layout = _Layout(())
        """Of the last step with drafts, which the device still has."""
        on_device = engine.device.type == "cuda"
        self._done = [torch.cuda.Event() if on_device else None for _ in range(STEPS_AT_ONCE)]  # type: ignore[no-untyped-call]
        """Of steps with drafts in turn: their reports are there."""
        self._turn = 0
        self._greedy_samplers: dict[int, BatchSampler] = {}
        """Of so many rows that take the likeliest token and nothing else, whoever they belong to."""
        self._guessed: dict[K, int] = {}
        """How many tokens of these requests the head has guessed behind the newest step."""
        self.verified: Mapping[K, Verified] = {}

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
        """See `RunningBatch.join`."""
        row = len(self._keys)
        assert row < len(self._decoder.block_table), "the batch is full"
        self._keys.append(key)
        self._row_of[key] = row
        self._sampling.append(self._engine.sampling_row(sampling, token_ids, generated))
        self._tables.append([])
        self._joined[row] = token_ids[-1], len(token_ids) - 1, generated
        self.add_pages(key, pages)
        self._members_changed = True
        if matcher is not None:
            self._matchers[key] = matcher
            matcher.start(token_ids[len(token_ids) - generated :])

    def leave(self, key: K) -> None:
        """Remove a request; the last row takes its place."""
        row, last = self._row_of.pop(key), len(self._keys) - 1
        if row != last:
            self._tables[row] = self._tables[last]
            self._row_of[self._keys[last]] = row
            self._table_changes.append((row, 0))
        self._move(last, row)
        self._guessed.pop(key, None)
        self._keys[row], self._sampling[row] = self._keys[last], self._sampling[last]
        self._keys.pop()
        self._sampling.pop()
        self._tables.pop()
        self._matchers.pop(key, None)
        self._members_changed = True

    def _move(self, source: int, target: int) -> None:
        joined, origin = self._joined.pop(source, None), self._moved.pop(source, source)
        self._joined.pop(target, None)
        self._moved.pop(target, None)
        if source == target:
            return
        if joined is not None:
            self._joined[target] = joined
        else:
            self._moved[target] = origin

    def add_pages(self, key: K, pages: Sequence[int]) -> None:
        """Append pages to a request's block table."""
        row = self._row_of[key]
        self._table_changes.append((row, len(self._tables[row])))
        self._tables[row] += pages

    def keep_pages(self, key: K, count: int) -> None:
        """See `RunningBatch`."""
        row = self._row_of[key]
        del self._tables[row][count:]
        self._table_changes.append((row, count))

    @property
    def in_flight(self) -> int:
        """See `RunningBatch`."""
        return len(self._running)

    def collect(self) -> StepTokens[K]:
        """See `RunningBatch`; waits for the step to end."""
        step = self._running.popleft()
        self.collected_late = step.tokens.are_here
        found = self._found(step)
        self.verified = step.verified
        return found

    def _found(self, step: _Running[K]) -> StepTokens[K]:
        """The tokens of a step, which is waited for; the first time the matchers take them."""
        if step.found is None:
            tokens = step.tokens.wait()
            if step.layout is not None:
                step.found = self._standing(step, step.layout, tokens)
            else:
                step.found = StepTokens(step.keys, tokens, step.tokens.logprobs)
            for key, token in step.found if self._matchers else ():
                if (matcher := self._matchers.get(key)) is not None:
                    matcher.advance([token.token_id])
        return step.found

    def _standing(self, step: _Running[K], layout: _Layout, drawn: list[int]) -> StepTokens[K]:
        """What was drawn after each request's newest token and after the drafted tokens that stand."""
        drafted, depths, scores = step.tokens.drafted, layout.depths, step.tokens.logprobs
        keys, tokens, of_rows = list[K](), list[int](), dict[int, TokenLogprobs]()
        for request, (key, draft, first) in enumerate(zip(step.keys, layout.drafts, layout.firsts, strict=True)):
            last = standing_row(first, len(draft) + 1, drafted, depths, drawn)
            came = [*drawn[first : first + depths[last]], drawn[last]]
            for index, row in enumerate((*range(first, first + depths[last]), last) if scores else (), len(tokens)):
                if row in scores:
                    of_rows[index] = scores[row]
            tokens += came
            keys += [key] * len(came)
            if draft and draft[0] < 0:
                step.verified[key] = Verified(draft, drafted[first + 1 : first + len(draft) + 1], came)
            if step.penalized:
                self._sampling[request] = step.penalized[last]
        return StepTokens(keys, tokens, of_rows)

    @torch.inference_mode()
    def start(self, drafts: Mapping[K, Sequence[int]] = NO_DRAFTS, depth: int = 0) -> None:
        """See `RunningBatch`; returns while the device is at work."""
        self._send_changes()
        if drafts or depth:
            self._start_drafted(
                [self._known_draft(row, drafts.get(key, ())) for row, key in enumerate(self._keys)], depth
            )
        else:
            self._sample(self._decoder.step(len(self._keys)))
        self._guessed = dict.fromkeys(self._keys, depth) if depth else {}

    def _known_draft(self, row: int, draft: Sequence[int]) -> Sequence[int]:
        """What there is of a draft: a head has guessed nothing where a request has just joined or prompts rode along,
        and the host needs to know what penalties count and grammars follow.
        """
        if not draft or draft[0] >= 0:
            return draft
        key = self._keys[row]
        if self._sampling[row].counts is not None or key in self._matchers:
            return ()
        places = self._guessed.get(key, 0)
        return [token for token in draft if place_of(token) < places]

    @torch.inference_mode()
    def start_with_prompts(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None = None
    ) -> StartedPrefill:
        """Start a step that computes these chunks in the same forward pass, which reads the weights once for both."""
        self._send_changes()
        prompts = self._engine.start_shared(chunks, on_layer, len(self._keys))
        assert prompts.running_logits is not None
        self._sample(prompts.running_logits)
        self._guessed = {}
        return prompts

    def _sample(self, logits: torch.Tensor) -> None:
        """The end of a step: the rows' next tokens, on the device and on their way to the host."""
        assert self.in_flight <= self.lookahead, "collect a step first"
        rows, state = len(self._keys), self._decoder.state
        if self._sampler is None:
            self._sampler = self._samplers.sampler(rows) or self._new_sampler(self._sampling)
        if self._matchers:
            self._mask(logits, range(rows), [()] * rows)
        sampled = self._sampler.sample(logits, state.generated[:rows])
        logprobs = self._sampler.logprobs(sampled, logits)
        report = torch.empty(rows, dtype=torch.int64, pin_memory=sampled.is_cuda)
        advance_rows(sampled, state, report)
        self._running.append(_Running(self._members, ArrivingTokens(report, logprobs, is_copied=True)))

    def _mask(self, logits: torch.Tensor, firsts: Sequence[int], own: Sequence[Sequence[int]]) -> None:
        """Have grammars forbid tokens; `firsts`: each request's first row, `own`: its draft."""
        for step in self._running:  # the device has this step's work and goes on meanwhile
            self._found(step)
        at = [(self._row_of[key], matcher) for key, matcher in self._matchers.items()]
        mask_rows(logits, [ConstrainedRows(firsts[row], matcher, own[row]) for row, matcher in at])

    def _start_drafted(self, own: Sequence[Sequence[int]], depth: int) -> None:
        """`own`: each request's draft; a head then guesses for `depth` places."""
        decoder, head = self._decoder, self._engine.graph_head
        self._turn = turn = (self._turn + 1) % STEPS_AT_ONCE
        if own != self._layout.drafts:
            self._layout = _Layout(own)
            self._layout.fill(decoder.rows.layouts[turn].numpy())
            decoder.rows.layout.copy_(decoder.rows.layouts[turn], non_blocking=True)
        layout = self._layout
        assert not (layout.is_known and self._running), "the host's drafts follow tokens that it knows"
        rows = len(layout.depths)
        logits, report = decoder.step_drafted(rows), decoder.rows.reports[turn][:rows]
        penalized, logprobs = list[SamplingRow](), dict[int, TokenLogprobs]()
        if depth and head is not None and not self._matchers and self._are_greedy():
            head.read(rows, turn, is_greedy=True)
        else:
            if any(row.counts is not None for row in self._sampling):
                penalized = self._penalized_rows(own)
            sampler = self._new_sampler(penalized) if penalized else self._drafted_sampler(layout.lengths)
            if self._matchers:
                self._mask(logits, layout.firsts, own)
            sampled = sampler.sample(logits, decoder.rows.generated[:rows], decoder.rows.sampled[:rows])
            logprobs = sampler.logprobs(sampled, logits)
            if depth and head is not None:
                head.read(rows, turn)
            else:
                accept_rows(sampled, decoder.rows, decoder.state, report)
            if penalized:  # its counts are not those of the rows that will stand
                self._sampler = None
        arriving = ArrivingTokens(report, logprobs, is_copied=True, done=self._done[turn])
        self._running.append(_Running(self._members, arriving, layout, penalized if layout.is_known else ()))
        if depth and head is not None:
            head.guess(len(self._keys), depth)
        elif layout.has_leaves:
            pages = self._engine.cache.pages
            move_leaf(pages, decoder.block_table, decoder.rows, decoder.state, len(self._keys))

    def _new_sampler(self, rows: Sequence[SamplingRow]) -> BatchSampler:
        return BatchSampler(rows, self._engine.model_config.vocab_size, self._engine.device)

    def _are_greedy(self) -> bool:
        """Whether all take the likeliest token and nobody asks for log probabilities."""
        return all(row.takes_likeliest and row.params.logprobs is None for row in self._sampling)

    def _drafted_sampler(self, lengths: Sequence[int]) -> BatchSampler:
        """Of requests without penalties, whose samplers hold nothing that a step changes."""
        rows = sum(lengths)
        is_greedy = self._are_greedy()
        repeated = self._greedy_samplers.get(rows) if is_greedy else self._drafted_samplers.get(tuple(lengths))
        if repeated is not None:
            return repeated
        if self._sampler is None:
            self._sampler = self._samplers.sampler(len(self._keys)) or self._new_sampler(self._sampling)
        repeated = self._sampler.repeated(self._decoder.rows.layout[0, :rows])
        if repeated is None:
            pairs = zip(self._sampling, lengths, strict=True)
            repeated = self._new_sampler([row for row, length in pairs for _ in range(length)])
        if is_greedy:
            self._greedy_samplers[rows] = repeated
            return repeated
        if len(self._drafted_samplers) == MAX_SAMPLERS:
            self._drafted_samplers.clear()
        self._drafted_samplers[tuple(lengths)] = repeated
        return repeated

    def _penalized_rows(self, drafts: Sequence[Sequence[int]]) -> list[SamplingRow]:
        """Each row's sampling state: its request's, and the drafted tokens up to there have been said."""
        rows = []
        for draft, row in zip(drafts, self._sampling, strict=True):
            rows.append(row)
            for token in draft:
                counts = None
                if row.counts is not None:
                    counts = row.counts.clone()
                    counts[token] += 1
                row = SamplingRow(row.params, counts, row.in_prompt)
                rows.append(row)
        return rows

    def _send_changes(self) -> None:
        """Tell the device which rows and pages are others than in the last step."""
        if not (self._members_changed or self._table_changes):
            return
        decoder, moved = self._decoder, self._moved
        if moved and self._engine.graph_head is not None:
            columns = np.array([[*moved.keys()], [*moved.values()]], np.int64)
            targets, origins = upload([*columns], self._engine.device)
            decoder.state.guesses[targets] = decoder.state.guesses[origins]
        self._changes.send(len(self._keys), self._changed_rows(), *self._changed_pages())

    def _changed_rows(self) -> np.ndarray:
        """See `RowChanges.send`."""
        fields = [(row, -1, *of_row) for row, of_row in self._joined.items()]
        fields += [(row, origin, 0, 0, 0) for row, origin in self._moved.items()]
        for row, *_ in fields:
            self._samplers.put(row, self._sampling[row])
        if self._members_changed:
            self._members = tuple(self._keys)
            self._moved, self._joined, self._sampler, self._members_changed = {}, {}, None, False
            self._drafted_samplers.clear()
        state = np.array(fields, np.int64).reshape(-1, STATE_FIELDS).T
        return np.concatenate((state, self._samplers.fields(state[0])))

    def _changed_pages(self) -> tuple[np.ndarray, np.ndarray]:
        """See `RowChanges.send`: cells of the block table, and how many tokens rows have pages for."""
        width, page_size = self._decoder.block_table.shape[1], self._engine.layout.page_size
        at, new = list[int](), list[int]()
        limits = dict[int, int]()
        for row, first in self._table_changes:
            if row < len(self._tables):  # or its request has left
                table = self._tables[row]
                at += range(row * width + first, row * width + len(table))
                new += table[first:]
                limits[row] = min(len(table) * page_size, self._engine.max_model_len)
        self._table_changes = []
        return np.array([at, new], np.int64), np.array([[*limits.keys()], [*limits.values()]], np.int64)
