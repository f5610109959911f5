"""The running batch of a decode worker on a GPU.

The next step is on its way before the tokens of this one are read, but for steps that verify drafts: what they drew is
compared with the drafts on the device, and the host has to know it, too, before it can draft again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from headrace.engine.arriving import ArrivingTokens
from headrace.engine.base import LayerAnnounced
from headrace.engine.decode_batch import NO_DRAFTS
from headrace.engine.engine import Engine, PrefillChunk, StartedPrefill
from headrace.engine.graph_decoder import GraphDecoder
from headrace.engine.sampler import BatchSampler, SampledToken, SamplingRow
from headrace.engine.token_masks import ConstrainedRows, mask_rows
from headrace.grammar import Matcher
from headrace.kernels.draft_rows import accept_rows
from headrace.kernels.upload import upload
from headrace.messages.request import SamplingParams

K = TypeVar("K", bound=Hashable)
MAX_SAMPLERS = 16
"""Kept for numbers of rows that requests had in steps with drafts; few requests often have the same ones."""


@dataclass
class _Running(Generic[K]):
    """A step on the device and its tokens."""

    keys: list[K]
    tokens: ArrivingTokens
    drafts: Mapping[K, Sequence[int]] = field(default_factory=dict)
    penalized: Sequence[SamplingRow] = ()
    """Where requests have penalties and there are drafts: the sampling state after each row."""
    is_known: bool = False
    """Whether the matchers have taken its tokens."""


class GraphBatch(Generic[K]):
    """A batch whose steps are collected one step late.

    Rows stay dense. Tokens advance on the device; all else about a row is known to the host, which sends what changed.
    """

    lookahead = 1

    def __init__(self, engine: Engine, decoder: GraphDecoder) -> None:
        capacity = len(decoder.block_table)
        self._engine = engine
        self._decoder = decoder
        self._keys: list[K] = []
        self._row_of: dict[K, int] = {}
        self._sampling: list[SamplingRow] = []
        self._sampler: BatchSampler | None = None
        self._matchers: dict[K, Matcher] = {}
        self._num_pages = np.zeros(capacity, dtype=np.int64)
        self._positions = np.full(capacity, -1, dtype=np.int32)
        self._generated = np.zeros(capacity, dtype=np.int32)
        self._pages = np.zeros(tuple(decoder.block_table.shape), dtype=np.int32)
        self._layout = torch.zeros(
            decoder.rows.layout.shape, dtype=torch.int32, pin_memory=engine.device.type == "cuda"
        )
        """The rows of a step with drafts, before they are sent."""
        self._drafted_samplers: dict[tuple[int, ...], BatchSampler] = {}
        """By the rows of each request, while the batch has the same members."""
        self._new_tokens: dict[int, int] = {}
        """By row: tokens that the device does not know, those of rows that joined."""
        self._moved: dict[int, int] = {}
        """By row: the row whose token, which the device alone knows, belongs there now."""
        self._table_changes: list[tuple[int, int, int]] = []
        """(row, first column, end)."""
        self._members_changed = False
        self._running: deque[_Running[K]] = deque()
        self.collected_late = False
        """The step that was collected last had ended before that: the device may have waited for the next one."""

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
        assert row < len(self._positions), "the batch is full"
        self._keys.append(key)
        self._row_of[key] = row
        self._sampling.append(self._engine.sampling_row(sampling, token_ids, generated))
        self._positions[row] = len(token_ids) - 1
        self._generated[row] = generated
        self._num_pages[row] = 0
        self._new_tokens[row] = token_ids[-1]
        self.add_pages(key, pages)
        self._members_changed = True
        if matcher is not None:
            self._matchers[key] = matcher
            matcher.start(token_ids[len(token_ids) - generated :])

    def leave(self, key: K) -> None:
        """Remove a request; the last row takes its place."""
        row, last = self._row_of.pop(key), len(self._keys) - 1
        if row != last:
            for column in (self._positions, self._generated, self._num_pages, self._pages):
                column[row] = column[last]
            self._row_of[self._keys[last]] = row
            self._table_changes.append((row, 0, int(self._num_pages[row])))
        self._move_token(last, row)
        self._positions[last] = -1
        self._keys[row], self._sampling[row] = self._keys[last], self._sampling[last]
        self._keys.pop()
        self._sampling.pop()
        self._matchers.pop(key, None)
        self._members_changed = True

    def _move_token(self, source: int, target: int) -> None:
        token, origin = self._new_tokens.pop(source, None), self._moved.pop(source, source)
        self._new_tokens.pop(target, None)
        self._moved.pop(target, None)
        if source == target:
            return
        if token is not None:
            self._new_tokens[target] = token
        else:
            self._moved[target] = origin

    def add_pages(self, key: K, pages: Sequence[int]) -> None:
        """Append pages to a request's block table."""
        row = self._row_of[key]
        first = int(self._num_pages[row])
        self._pages[row, first : first + len(pages)] = pages
        self._num_pages[row] = first + len(pages)
        self._table_changes.append((row, first, first + len(pages)))

    def keep_pages(self, key: K, count: int) -> None:
        """See `RunningBatch`."""
        self._num_pages[self._row_of[key]] = count

    @property
    def in_flight(self) -> int:
        """See `RunningBatch`."""
        return len(self._running)

    def collect(self) -> list[tuple[K, SampledToken]]:
        """See `RunningBatch`; waits for the step to end."""
        step = self._running.popleft()
        self.collected_late = step.tokens.are_here
        tokens = step.tokens.wait()
        found = self._standing(step, tokens) if step.drafts else list(zip(step.keys, tokens, strict=True))
        if self._matchers:
            self._advance(step, found)
        return found

    def _advance(self, step: _Running[K], found: Sequence[tuple[K, SampledToken]]) -> None:
        """Have the matchers take a step's tokens, once."""
        if not step.is_known:
            step.is_known = True
            for key, token in found:
                if (matcher := self._matchers.get(key)) is not None:
                    matcher.advance([token.token_id])

    def _standing(self, step: _Running[K], drawn: list[SampledToken]) -> list[tuple[K, SampledToken]]:
        """What was drawn after each request's newest token and after the drafted tokens that stand."""
        found, first = [], 0
        for request, key in enumerate(step.keys):
            draft, last = step.drafts.get(key, ()), first
            for token in draft:
                if token != drawn[last].token_id:
                    break
                last += 1
            found += [(key, token) for token in drawn[first : last + 1]]
            self._positions[request] += last - first + 1
            self._generated[request] += last - first + 1
            if step.penalized:
                self._sampling[request] = step.penalized[last]
            first += len(draft) + 1
        return found

    @torch.inference_mode()
    def start(self, drafts: Mapping[K, Sequence[int]] = NO_DRAFTS) -> None:
        """See `RunningBatch`; returns while the device is at work. A step with drafts is alone in flight."""
        self._send_changes()
        if drafts:
            assert not self._running, "drafts follow tokens that are known"
            self._start_drafted(drafts)
        else:
            self._sample(self._decoder.step(len(self._keys)))

    @torch.inference_mode()
    def start_with_prompts(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None = None
    ) -> StartedPrefill:
        """Start a step that computes these chunks in the same forward pass, which reads the weights once for both."""
        self._send_changes()
        prompts = self._engine.start_shared(chunks, on_layer, len(self._keys))
        assert prompts.running_logits is not None
        self._sample(prompts.running_logits)
        return prompts

    def _sample(self, logits: torch.Tensor) -> None:
        """The end of a step: the rows' next tokens, on the device and on their way to the host."""
        assert self.in_flight <= self.lookahead, "collect a step first"
        rows, state = len(self._keys), self._decoder.state
        if self._sampler is None:
            self._sampler = self._new_sampler(self._sampling)
        if self._matchers:
            for step in self._running:  # the device has this step's work and goes on meanwhile
                self._advance(step, list(zip(step.keys, step.tokens.wait(), strict=True)))
            mask_rows(logits, [ConstrainedRows(self._row_of[key], own) for key, own in self._matchers.items()])
        generated = state.generated[:rows]
        sampled = self._sampler.sample(logits, generated)
        logprobs = self._sampler.logprobs(sampled, logits)
        state.tokens[:rows] = sampled
        state.positions[:rows] += 1
        generated += 1
        self._positions[:rows] += 1
        self._generated[:rows] += 1
        self._running.append(_Running(list(self._keys), ArrivingTokens(sampled, logprobs)))

    def _start_drafted(self, drafts: Mapping[K, Sequence[int]]) -> None:
        own = [drafts.get(key, ()) for key in self._keys]
        lengths = np.array([len(draft) + 1 for draft in own])
        layout, rows, decoder = self._layout.numpy(), int(lengths.sum()), self._decoder
        layout[:2] = -1
        layout[0, :rows] = np.repeat(np.arange(len(own)), lengths)
        firsts = lengths.cumsum() - lengths
        layout[1, :rows] = np.repeat(firsts, lengths)
        layout[2, :rows] = [token for draft in own for token in (0, *draft)]
        decoder.rows.layout.copy_(self._layout, non_blocking=True)
        penalized = self._penalized_rows(own) if any(row.counts is not None for row in self._sampling) else []
        sampler = self._new_sampler(penalized) if penalized else self._drafted_sampler(lengths)
        logits = decoder.step_drafted(rows)
        if self._matchers:
            at = [(self._row_of[key], matcher) for key, matcher in self._matchers.items()]
            mask_rows(logits, [ConstrainedRows(int(firsts[row]), matcher, own[row]) for row, matcher in at])
        sampled = sampler.sample(logits, decoder.rows.generated[:rows])
        logprobs = sampler.logprobs(sampled, logits)
        accept_rows(sampled, decoder.rows, decoder.state)
        if penalized:  # its counts are not those of the rows that will stand
            self._sampler = None
        self._running.append(_Running(list(self._keys), ArrivingTokens(sampled, logprobs), drafts, penalized))

    def _new_sampler(self, rows: Sequence[SamplingRow]) -> BatchSampler:
        return BatchSampler(rows, self._engine.model_config.vocab_size, self._engine.device)

    def _drafted_sampler(self, lengths: np.ndarray) -> BatchSampler:
        """Of requests without penalties, whose samplers hold nothing that a step changes."""
        repeated = self._drafted_samplers.get(key := tuple(lengths.tolist()))
        if repeated is not None:
            return repeated
        if self._sampler is None:
            self._sampler = self._new_sampler(self._sampling)
        repeated = self._sampler.repeated(self._decoder.rows.layout[0, : lengths.sum()])
        if repeated is None:
            pairs = zip(self._sampling, lengths.tolist(), strict=True)
            repeated = self._new_sampler([row for row, length in pairs for _ in range(length)])
        if len(self._drafted_samplers) == MAX_SAMPLERS:
            self._drafted_samplers.clear()
        self._drafted_samplers[key] = repeated
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
        decoder, device = self._decoder, self._engine.device
        if self._members_changed:
            numbers = (self._moved.keys(), self._moved.values(), self._new_tokens.keys(), self._new_tokens.values())
            columns = [np.array([*column], np.int64) for column in numbers]
            targets, origins, joined, tokens, positions, generated = upload(
                [*columns, self._positions, self._generated], device
            )
            state = decoder.state
            state.tokens[targets] = state.tokens[origins]
            state.tokens[joined] = tokens
            state.positions.copy_(positions)
            state.generated.copy_(generated)
            self._moved, self._new_tokens, self._sampler, self._members_changed = {}, {}, None, False
            self._drafted_samplers.clear()
        if self._table_changes:
            width = self._pages.shape[1]
            changed = np.concatenate(
                [np.arange(row * width + first, row * width + end) for row, first, end in self._table_changes]
            )
            cells, pages = upload([changed, self._pages.reshape(-1)[changed]], device)
            decoder.block_table.view(-1)[cells] = pages
            self._table_changes = []
