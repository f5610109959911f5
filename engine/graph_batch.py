"""The running batch of a decode worker on a GPU: the next step is on its way before the tokens of this one are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from headrace.engine.engine import Engine
from headrace.engine.graph_decoder import GraphDecoder
from headrace.engine.sampler import BatchSampler, SampledToken, SamplingRow
from headrace.messages.request import SamplingParams
from headrace.messages.stream import TokenLogprobs

K = TypeVar("K", bound=Hashable)

STAGING_BUFFERS = 3
"""One is filled, one may be on its way to the device with a step that runs; the third keeps a slip harmless."""


@dataclass
class _Running(Generic[K]):
    """A step on the device and where its tokens arrive."""

    keys: list[K]
    tokens: torch.Tensor
    logprobs: dict[int, TokenLogprobs]
    done: torch.cuda.Event | None
    """None on a CPU, where tests run this: there a step has ended when it was started."""


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
        self._staging = [_Staging(capacity, engine.device) for _ in range(STAGING_BUFFERS)]
        self._steps = 0
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

    @property
    def in_flight(self) -> int:
        """See `RunningBatch`."""
        return len(self._running)

    def collect(self) -> list[tuple[K, SampledToken]]:
        """See `RunningBatch`; waits for the step to end."""
        step = self._running.popleft()
        if step.done is not None:
            step.done.synchronize()
        return [
            (key, SampledToken(token, step.logprobs.get(row)))
            for row, (key, token) in enumerate(zip(step.keys, step.tokens.tolist(), strict=True))
        ]

    @torch.inference_mode()
    def start(self) -> None:
        """See `RunningBatch`; returns while the device is at work."""
        assert len(self._running) < STAGING_BUFFERS, "collect a step first"
        rows, decoder = len(self._keys), self._decoder
        staging = self._staging[self._steps % STAGING_BUFFERS]
        self._steps += 1
        self._send_changes(staging)
        if self._sampler is None:
            self._sampler = BatchSampler(self._sampling, self._engine.model_config.vocab_size, self._engine.device)
        logits = decoder.step(rows)
        generated = self._device_generated[:rows]
        sampled = self._sampler.sample(logits, generated)
        logprobs = self._sampler.logprobs(sampled, logits)
        decoder.tokens[:rows] = sampled
        decoder.positions[:rows] += 1
        generated += 1
        staging.sampled[:rows].copy_(sampled, non_blocking=True)
        self._positions[:rows] += 1
        self._generated[:rows] += 1
        done = None
        if sampled.is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._running.append(_Running(list(self._keys), staging.sampled[:rows], logprobs, done))

    def _send_changes(self, staging: _Staging) -> None:
        decoder = self._decoder
        if self._members_changed:
            if self._moved:
                targets = staging.send("targets", np.fromiter(self._moved.keys(), np.int64))
                decoder.tokens[targets] = decoder.tokens[
                    staging.send("origins", np.fromiter(self._moved.values(), np.int64))
                ]
            if self._new_tokens:
                targets = staging.send("joined", np.fromiter(self._new_tokens.keys(), np.int64))
                decoder.tokens[targets] = staging.send("tokens", np.fromiter(self._new_tokens.values(), np.int64))
            decoder.positions.copy_(staging.send("positions", self._positions))
            self._device_generated.copy_(staging.send("generated", self._generated))
            self._moved, self._new_tokens, self._sampler, self._members_changed = {}, {}, None, False
        if self._table_changes:
            width = self._pages.shape[1]
            cells = np.concatenate(
                [np.arange(row * width + first, row * width + end) for row, first, end in self._table_changes]
            )
            pages = staging.send("pages", self._pages.reshape(-1)[cells])
            decoder.block_table.view(-1)[staging.send("cells", cells)] = pages
            self._table_changes = []


class _Staging:
    """Pinned host memory that one step's copies to and from the device go through without blocking."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers: dict[str, torch.Tensor] = {}
        self.sampled = torch.zeros(capacity, dtype=torch.int64, pin_memory=self._pinned)

    def send(self, name: str, values: np.ndarray) -> torch.Tensor:
        """A copy on the device; valid for work that is started before this object's next turn."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(values):
            size = 1 << (len(values) - 1).bit_length()
            buffer = torch.empty(size, dtype=torch.from_numpy(values[:1]).dtype, pin_memory=self._pinned)
            self._buffers[name] = buffer
        buffer[: len(values)].numpy()[:] = values
        return buffer[: len(values)].to(self._device, non_blocking=True, copy=True)
