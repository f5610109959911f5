"""A batch's sampling parameters as tensors for the kernel that samples on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace.kernels.sample import PART, LogitChanges, Penalties, SampleRows, SampleWorkspace, Sampling
from headrace.kernels.upload import upload

if TYPE_CHECKING:
    from headrace.engine.sampler import SamplingRow

FOREVER = 2**62
COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seed")


class DeviceSampler:
    """Samples a number of rows; their parameters on the device may change, but not whether any is drawn or filtered."""

    def __init__(self, rows: SampleRows, vocab_size: int, workspace: SampleWorkspace) -> None:
        self._rows, self._vocab_size, self._workspace = rows, vocab_size, workspace
        self._sampling: Sampling | None = None
        self._places = (0, 0, 0)

    @classmethod
    def _alone(cls, rows: SampleRows, vocab_size: int, part: int) -> DeviceSampler:
        space = (len(rows.seed), vocab_size, rows.seed.device)
        return cls(rows, vocab_size, SampleWorkspace(*space, filtered=rows.any_filtered, part=part))

    @classmethod
    def of(
        cls, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device, *, part: int = PART
    ) -> DeviceSampler:
        """Send the parameters of requests, in one copy that nothing waits for."""
        temperature, top_k, top_p, min_p, seed = np.stack([row.record for row in rows], axis=1)
        penalized = [row for row in rows if row.counts is not None]
        places = np.full(len(rows), -1)
        if penalized:
            places[[row.counts is not None for row in rows]] = np.arange(len(penalized))
        changes = [_changes(row, vocab_size) for row in rows]
        arrays = {
            "temperature": temperature.view(np.float64),
            "top_k": top_k.view(np.float64),
            "top_p": top_p.view(np.float64),
            "min_p": min_p.view(np.float64),
            "seed": seed,
            "place": places,
            "presence": np.array([row.params.presence_penalty for row in penalized], np.float64),
            "frequency": np.array([row.params.frequency_penalty for row in penalized], np.float64),
            "repetition": np.array([row.params.repetition_penalty for row in penalized], np.float64),
            "starts": np.cumsum([0, *map(len, changes)]),
            "tokens": np.array([token for own in changes for token, _, _ in own], np.int64),
            "values": np.array([value for own in changes for _, value, _ in own], np.float64),
            "until": np.array([until for own in changes for _, _, until in own], np.int64),
        }
        columns = dict(zip(arrays, upload(list(arrays.values()), device), strict=True))
        drawn = arrays["temperature"] > 0
        filtered = drawn & ((arrays["top_k"] > 0) | (arrays["top_p"] < 1) | (arrays["min_p"] > 0))
        sent = SampleRows(
            **{name: columns[name] for name in COLUMNS},
            penalties=_penalties(penalized, columns),
            changes=LogitChanges(columns["starts"], columns["tokens"], columns["values"], columns["until"]),
            any_drawn=bool(drawn.any()),
            any_filtered=bool(filtered.any()),
        )
        return cls._alone(sent, vocab_size, part)

    def repeated(self, owners: torch.Tensor) -> DeviceSampler:
        """Of rows of which each has the parameters of row `owners[i]` of this one: [R], on the device.

        For rows without penalties and changed logits, whose state is in no row.
        """
        rows = self._rows
        nowhere = torch.full((len(owners) + 1,), -1, dtype=torch.int64, device=owners.device)
        repeated = replace(
            rows,
            **{name: getattr(rows, name).index_select(0, owners) for name in COLUMNS},
            penalties=rows.penalties._replace(row=nowhere[:-1]),
            changes=rows.changes._replace(starts=nowhere + 1),
        )
        return DeviceSampler._alone(repeated, self._vocab_size, self._workspace.part)

    def sample(self, logits: torch.Tensor, positions: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `BatchSampler.sample`. A next call with tensors at the same places overwrites what this one returns."""
        places = (logits.data_ptr(), positions.data_ptr(), len(logits))
        if self._sampling is None or places != self._places:
            self._sampling, self._places = Sampling(logits, positions, self._rows, self._workspace, out), places
        return self._sampling.run()


def _changes(row: SamplingRow, vocab_size: int) -> list[tuple[int, float, int]]:
    """(token, what is added to its logit, until which output position)."""
    params = row.params
    if not (params.logit_bias or params.min_tokens):
        return []
    changes = [(token, bias, FOREVER) for token, bias in params.logit_bias.items() if token < vocab_size]
    if params.min_tokens and params.grammar is None:  # else the masks see to that
        stops = sorted({token for token in params.stop_token_ids if token < vocab_size})
        changes += [(token, float("-inf"), params.min_tokens) for token in stops]
    return changes


def _penalties(rows: list[SamplingRow], columns: dict[str, torch.Tensor]) -> Penalties:
    like = columns["place"]
    counts = torch.stack([row.counts for row in rows if row.counts is not None]) if rows else like.new_empty(0).int()
    in_prompt = torch.stack([row.in_prompt for row in rows if row.in_prompt is not None]) if rows else counts.bool()
    for index, row in enumerate(rows):  # counted in place from now on
        row.counts = counts[index]
    return Penalties(
        like, columns["presence"], columns["frequency"], columns["repetition"], counts, in_prompt.view(torch.uint8)
    )
