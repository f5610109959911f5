"""The running batch of a decode worker on a GPU: the next step is on its way before the tokens of this one are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from headrace.engine.arriving import ArrivingTokens
from headrace.engine.base import LayerAnnounced
from headrace.engine.decode_batch import NO_DRAFTS
from headrace.engine.engine import Engine, PrefillChunk, StartedPrefill
from headrace.engine.graph_decoder import GraphDecoder
from headrace.engine.sampler import BatchSampler, SampledToken, SamplingRow
from headrace.kernels.upload import upload
from headrace.messages.request import SamplingParams

K = TypeVar("K", bound=Hashable)


@dataclass
class _Running(Generic[K]):
    """A step on the device and its tokens."""

    keys: list[K]
    tokens: ArrivingTokens


class GraphBatch(Generic[K]):
    """A batch whose steps are collected one step late.

    Rows stay dense. Tokens advance on the device; all else about a row is known to the host, which sends what changed.
    """

    lookahead = 1

    def __init__(self, engine: Engine, decoder: GraphDecoder) -> None:
        capacity = len(decoder.tokens)
        self._engine = engine
        self._decoder = decoder
        self._keys: list[K] = []
        self._row_of: dict[K, int] = {}
        self._sampling: list[SamplingRow] = []
        self._sampler: BatchSampler | None = None
        self._num_pages = np.zeros(capacity, dtype=np.int64)
        self._positions = np.full(capacity, -1, dtype=np.int32)
        self._generated = np.zeros(capacity, dtype=np.int32)
        self._pages = np.zeros(tuple(decoder.block_table.shape), dtype=np.int32)
        self._device_generated = torch.zeros(capacity, dtype=torch.int32, device=engine.device)
        self._new_tokens: dict[int, int] = {}
        """By row: tokens that the device does not know, those of rows that joined."""
        self._moved: dict[int, int] = {}
        """By row: the row whose token, which the device alone knows, belongs there now."""
        self._table_changes: list[tuple[int, int, int]] = []
        """(row, first column, end)."""
        self._members_changed = False
        self._running: deque[_Running[K]] = deque()

    def __len__(self) -> int:
        return len(self._keys)

    def join(
        self, key: K, token_ids: Sequence[int], generated: int, pages: Sequence[int], sampling: SamplingParams
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
        return list(zip(step.keys, step.tokens.wait(), strict=True))

    @torch.inference_mode()
    def start(self, drafts: Mapping[K, Sequence[int]] = NO_DRAFTS) -> None:
        """See `RunningBatch`; returns while the device is at work.

        No drafts: a captured step has one row a request, and the next one starts before the host knows the tokens of
        this one, which the next drafts would follow.
        """
        assert not drafts, "steps on a GPU take no drafts"
        self._send_changes()
        self._sample(self._decoder.step(len(self._keys)))

    @torch.inference_mode()
    def start_with_prompts(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None = None
    ) -> StartedPrefill:
        """Start a step that computes these chunks in the same forward pass, which reads the weights once for both."""
        self._send_changes()
        prompts = self._engine.start_prefill(chunks, on_layer, self._decoder.running(len(self._keys)))
        assert prompts.running_logits is not None
        self._sample(prompts.running_logits)
        return prompts

    def _sample(self, logits: torch.Tensor) -> None:
        """The end of a step: the rows' next tokens, on the device and on their way to the host."""
        assert self.in_flight <= self.lookahead, "collect a step first"
        rows, decoder = len(self._keys), self._decoder
        if self._sampler is None:
            self._sampler = BatchSampler(self._sampling, self._engine.model_config.vocab_size, self._engine.device)
        generated = self._device_generated[:rows]
        sampled = self._sampler.sample(logits, generated)
        logprobs = self._sampler.logprobs(sampled, logits)
        decoder.tokens[:rows] = sampled
        decoder.positions[:rows] += 1
        generated += 1
        self._positions[:rows] += 1
        self._generated[:rows] += 1
        self._running.append(_Running(list(self._keys), ArrivingTokens(sampled, logprobs)))

    def _send_changes(self) -> None:
        decoder, device = self._decoder, self._engine.device
        if self._members_changed:
            numbers = (self._moved.keys(), self._moved.values(), self._new_tokens.keys(), self._new_tokens.values())
            columns = [np.array([*column], np.int64) for column in numbers]
            targets, origins, joined, tokens, positions, generated = upload(
                [*columns, self._positions, self._generated], device
            )
            decoder.tokens[targets] = decoder.tokens[origins]
            decoder.tokens[joined] = tokens
            decoder.positions.copy_(positions)
            self._device_generated.copy_(generated)
            self._moved, self._new_tokens, self._sampler, self._members_changed = {}, {}, None, False
        if self._table_changes:
            width = self._pages.shape[1]
            changed = np.concatenate(
                [np.arange(row * width + first, row * width + end) for row, first, end in self._table_changes]
            )
            cells, pages = upload([changed, self._pages.reshape(-1)[changed]], device)
            decoder.block_table.view(-1)[cells] = pages
            self._table_changes = []
