"""Sampling parameters of all rows of a batch on a GPU, where a change writes only the rows that changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headrace.engine.device_sampler import COLUMNS, DeviceSampler
from headrace.engine.sampler import BatchSampler, SamplingRow
from headrace.kernels.sample import LogitChanges, Penalties, SampleRows, SampleWorkspace


class SamplingTable:
    """Penalties and changed logits are not in it: a batch in which a row has some takes a `BatchSampler` of its own."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        rows += rows % 2  # so that each column starts where kernels load fastest
        self.parameters = torch.zeros(len(COLUMNS), rows, dtype=torch.int64, device=device)
        """[5, B]: the bits of what `SampleRows` has of each row. Who changes it is told by `put` and `fields`."""
        self._vocab_size = vocab_size
        self._fields = np.zeros((len(COLUMNS), rows), np.int64)
        self._is_plain = np.zeros(rows, np.bool_)
        self._logprobs = np.full(rows, -1)
        self._samplers: dict[tuple[int, bool, bool], DeviceSampler] = {}
        """By the number of rows, whether some are drawn and whether some have filters."""
        self._workspaces: dict[bool, SampleWorkspace] = {}

    def put(self, row: int, sampling: SamplingRow) -> None:
        """A row's request is another one now."""
        self._fields[:, row] = sampling.record
        self._is_plain[row] = sampling.is_plain
        self._logprobs[row] = -1 if sampling.params.logprobs is None else sampling.params.logprobs

    def fields(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What the device's columns are to have of these rows: int64 [5, len(rows)]."""
        return self._fields[:, rows]

    def sampler(self, rows: int) -> BatchSampler | None:
        """Of the first rows, whose parameters are on the device; None where the table does not say all of one."""
        if not self.parameters.is_cuda or not self._is_plain[:rows].all():
            return None
        scored = np.flatnonzero(self._logprobs[:rows] >= 0).tolist()
        return BatchSampler.on_device({row: int(self._logprobs[row]) for row in scored}, self.device_sampler(rows))

    def device_sampler(self, rows: int) -> DeviceSampler:
        """The same without log probabilities."""
        temperature, top_k, top_p, min_p = self._fields[:4, :rows].view(np.float64)
        drawn = temperature > 0
        filtered = drawn & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        key = rows, bool(drawn.any()), bool(filtered.any())
        if key not in self._samplers:
            self._samplers[key] = self._new_sampler(*key)
        return self._samplers[key]

    def _new_sampler(self, rows: int, any_drawn: bool, any_filtered: bool) -> DeviceSampler:
        device, size = self.parameters.device, self.parameters.shape[1]
        if any_filtered not in self._workspaces:
            space = SampleWorkspace(size, self._vocab_size, device, filtered=any_filtered)
            self._workspaces[any_filtered] = space
        nowhere = torch.full((rows + 1,), -1, dtype=torch.int64, device=device)
        numbers, floats = nowhere[:0], nowhere[:0].double()
        columns = dict(zip(COLUMNS, self.parameters[:, :rows], strict=True))
        sent = SampleRows(
            **{name: column if name == "seed" else column.view(torch.float64) for name, column in columns.items()},
            penalties=Penalties(nowhere[:-1], floats, floats, floats, numbers.int(), numbers.byte()),
            changes=LogitChanges(nowhere + 1, numbers, floats, numbers),
            any_drawn=any_drawn,
            any_filtered=any_filtered,
        )
        return DeviceSampler(sent, self._vocab_size, self._workspaces[any_filtered])
