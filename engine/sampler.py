"""Chooses the next token of each request in a batch.

A draw is keyed by (seed, output position) alone, so a request gives the same tokens in whatever row, batch, attempt
or worker it runs. Filters follow vLLM's order: temperature, min-p, top-k, top-p. What is here in torch runs on a CPU
and is the reference of `kernels.sample`, which runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import torch

from headrace.engine.device_sampler import DeviceSampler
from headrace.messages.request import SamplingParams
from headrace.messages.stream import TokenLogprobs

FEW_CANDIDATES = 256
"""Likeliest tokens looked at before the whole vocabulary is sorted."""


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """One request's next token. A struct, since a step makes one a request, in a fifth of a dataclass's time."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(eq=False)
class SamplingRow:
    """One request's parameters and, where a penalty needs it, what it has said so far."""

    params: SamplingParams
    counts: torch.Tensor | None = None
    """[vocabulary] int32: how often each token is in the output."""
    in_prompt: torch.Tensor | None = None
    """[vocabulary] bool."""

    @cached_property
    def record(self) -> np.ndarray:
        """What `DeviceSampler` sends of each row, int64: the bits of four float64, and the seed."""
        params = self.params
        floats = np.array([params.temperature, params.top_k, params.top_p, params.min_p], np.float64)
        return np.append(floats.view(np.int64), params.seed)

    @property
    def is_plain(self) -> bool:
        """Whether what it said so far makes no difference, and no token is told apart from others."""
        return self.counts is None and not self.params.logit_bias and not self.params.min_tokens

    @cached_property
    def takes_likeliest(self) -> bool:
        """Whether its token is the one with the highest logit, whatever came before."""
        params = self.params
        is_open = bool(params.min_tokens and params.stop_token_ids and params.grammar is None)
        return params.temperature == 0 and self.counts is None and not params.logit_bias and not is_open

    @classmethod
    def make(
        cls, params: SamplingParams, token_ids: Sequence[int], generated: int, vocab_size: int, device: torch.device
    ) -> SamplingRow:
        """`token_ids` are prompt and output; the last `generated` are output."""
        if not (params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0):
            return cls(params)
        tokens = torch.tensor(token_ids, device=device)
        prompt_length = len(token_ids) - generated
        counts = torch.bincount(tokens[prompt_length:], minlength=vocab_size).int()
        return cls(params, counts, torch.bincount(tokens[:prompt_length], minlength=vocab_size) > 0)


class BatchSampler:
    """The parameters of a fixed set of rows as tensors. Make a new one whenever the set changes."""

    def __init__(self, rows: Sequence[SamplingRow], vocab_size: int, device: torch.device) -> None:
        params = [row.params for row in rows]
        self._device = device
        self._vocab_size = vocab_size
        self._logprobs = {index: p.logprobs for index, p in enumerate(params) if p.logprobs is not None}
        self._repeatable = not self._logprobs and all(row.is_plain for row in rows)
        self._on_device = DeviceSampler.of(rows, vocab_size, device) if device.type == "cuda" else None
        if self._on_device is not None:
            return
        self._penalized = [i for i, row in enumerate(rows) if row.counts is not None]
        self._biased = [i for i, p in enumerate(params) if p.logit_bias]
        self._held_open = [i for i, p in enumerate(params) if p.min_tokens and p.stop_token_ids and p.grammar is None]
        drawn = [(i, bool(p.top_k or p.top_p < 1 or p.min_p > 0)) for i, p in enumerate(params) if p.temperature > 0]
        self._filtered = [i for i, is_filtered in drawn if is_filtered]
        self._unfiltered = [i for i, is_filtered in drawn if not is_filtered]
        self._temperature = self._column([p.temperature or 1.0 for p in params], torch.float32)
        self._top_p = self._column([p.top_p for p in params], torch.float32)
        self._top_k = self._column([p.top_k or vocab_size for p in params], torch.int64)
        self._min_p = self._column([p.min_p for p in params], torch.float32)
        self._seed = torch.tensor([p.seed for p in params], dtype=torch.int64, device=device)
        self._prepare_penalties([rows[i] for i in self._penalized])
        self._prepare_masks(params)

    @classmethod
    def on_device(cls, logprobs: dict[int, int], sampler: DeviceSampler) -> BatchSampler:
        """Of plain rows on a GPU; `logprobs`: how many of them are wanted, by row."""
        made = cls.__new__(cls)
        made._logprobs, made._repeatable, made._on_device = logprobs, not logprobs, sampler
        return made

    def repeated(self, owners: torch.Tensor) -> BatchSampler | None:
        """For rows of which each has the parameters of row `owners[i]` of this one: [R], on the device, where nothing
        waits for it. None where that can't be: on a CPU, with penalties, changed logits or log probabilities.
        """
        if self._on_device is None or not self._repeatable:
            return None
        repeated = copy(self)
        repeated._on_device = self._on_device.repeated(owners)
        return repeated

    def _column(self, values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device).unsqueeze(1)

    def _prepare_penalties(self, rows: list[SamplingRow]) -> None:
        if not rows:
            return
        self._counts = torch.stack([row.counts for row in rows if row.counts is not None])
        self._in_prompt = torch.stack([row.in_prompt for row in rows if row.in_prompt is not None])
        for index, row in enumerate(rows):  # counted in place from now on
            row.counts = self._counts[index]
        self._presence = self._column([row.params.presence_penalty for row in rows], torch.float32)
        self._frequency = self._column([row.params.frequency_penalty for row in rows], torch.float32)
        self._repetition = self._column([row.params.repetition_penalty for row in rows], torch.float32)

    def _prepare_masks(self, params: list[SamplingParams]) -> None:
        self._bias = torch.zeros(len(self._biased), self._vocab_size, device=self._device)
        for row, index in enumerate(self._biased):
            for token, bias in params[index].logit_bias.items():
                if token < self._vocab_size:
                    self._bias[row, token] = bias
        self._stops = torch.zeros(len(self._held_open), self._vocab_size, dtype=torch.bool, device=self._device)
        for row, index in enumerate(self._held_open):
            self._stops[row, [token for token in params[index].stop_token_ids if token < self._vocab_size]] = True
        self._min_tokens = self._column([params[i].min_tokens for i in self._held_open], torch.int64)

    def sample(self, logits: torch.Tensor, positions: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Next tokens [R] int64 from `logits` [R, V] float32; `positions` [R] are their indices in each output. They
        are written to `out`, if it is given: always the same one.
        """
        if self._on_device is not None:
            return self._on_device.sample(logits, positions, out)
        logits = self._adjusted(logits, positions)
        tokens = likeliest(logits)
        if self._unfiltered or self._filtered:
            uniform = uniforms(self._seed, positions)
            for rows, draw in ((self._unfiltered, self._draw_from_all), (self._filtered, self._draw_filtered)):
                if rows:
                    index = torch.tensor(rows, device=self._device)
                    tokens[index] = draw(index, logits[index] / self._temperature[index], uniform[index].unsqueeze(1))
        if self._penalized:
            self._counts.scatter_add_(1, tokens[self._penalized].unsqueeze(1), torch.ones_like(self._counts[:, :1]))
        return tokens if out is None else out.copy_(tokens)

    def _adjusted(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not (self._penalized or self._biased or self._held_open):
            return logits
        logits = logits.clone()
        if self._penalized:
            part = logits[self._penalized]
            seen = self._in_prompt | (self._counts > 0)
            factor = torch.where(seen, self._repetition, 1.0)
            part = torch.where(part > 0, part / factor, part * factor)
            part -= self._frequency * self._counts + self._presence * (self._counts > 0)
            logits[self._penalized] = part
        if self._biased:
            logits[self._biased] += self._bias
        if self._held_open:
            early = positions[self._held_open].unsqueeze(1) < self._min_tokens
            logits[self._held_open] = logits[self._held_open].masked_fill(self._stops & early, float("-inf"))
        return logits

    def _draw_from_all(self, rows: torch.Tensor, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        cumulative = logits.softmax(-1).double().cumsum(-1)
        return _pick(cumulative, cumulative[:, -1:], uniform)

    def _draw_filtered(self, rows: torch.Tensor, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The filters keep a prefix of the tokens in order of likelihood; most often it is short.

        Like all draws, this one goes through what is kept in vocabulary order.
        """
        for candidates in (FEW_CANDIDATES, self._vocab_size):
            values, order = _likeliest(logits, min(candidates, self._vocab_size))
            whole = logits.logsumexp(-1, keepdim=True)
            likelihood = (values - whole).exp().double()
            kept = torch.arange(values.shape[1], device=self._device) < self._top_k[rows]
            kept &= likelihood >= self._min_p[rows] * likelihood[:, :1]
            cut = (self._top_k[rows] < self._vocab_size) | (self._min_p[rows] > 0)
            mass = torch.where(cut, (likelihood * kept).sum(-1, keepdim=True), 1.0)
            # equal ones may go on beyond the candidates; those that a grammar forbids are never drawn
            is_last = (values == values[:, -1:]) & (values > float("-inf"))
            partial = cut & (kept & is_last).any(-1, keepdim=True)  # so what top-p is a share of does
            before = likelihood.cumsum(-1) - likelihood
            kept &= before < self._top_p[rows] * mass
            kept[:, 0] = True
            if values.shape[1] == self._vocab_size or not (partial | (kept & is_last)).any():
                break
        tokens, by_token = order.sort(-1)
        weights = (likelihood * kept).gather(1, by_token)
        cumulative = weights.cumsum(-1)
        last = torch.where(weights > 0, torch.arange(weights.shape[1], device=self._device), 0).amax(-1)
        choice = torch.minimum(_pick(cumulative, cumulative[:, -1:], uniform), last)
        return tokens.gather(1, choice.unsqueeze(1)).squeeze(1)

    def logprobs(self, tokens: torch.Tensor, logits: torch.Tensor) -> dict[int, TokenLogprobs]:
        """Log probabilities under `logits`, by row, of the rows that asked for them."""
        if not self._logprobs:
            return {}
        rows, counts = list(self._logprobs), list(self._logprobs.values())
        return dict(zip(rows, describe_logprobs(logits[rows], tokens[rows], counts), strict=True))


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The tokens with the highest of logits [R, V] float32, the first of equal ones: int64 [R]."""
    if logits.device.type == "cpu":  # numpy looks at eight numbers at a time
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def describe_logprobs(logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities of `tokens` [R] under `logits` [R, V], each with its `counts[r]` likeliest alternatives, or as
    many as are possible.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    most = min(max(counts, default=0), logits.shape[-1])
    if most == 0:  # a search of the whole vocabulary for nothing takes as long as all else here
        return [
            TokenLogprobs(token_id=token, logprob=logprob, top=[])
            for token, logprob in zip(tokens.tolist(), chosen, strict=True)
        ]
    values, order = logprobs.topk(most, -1)
    return [
        TokenLogprobs(
            token_id=token,
            logprob=logprob,
            top=[(id, top) for id, top in zip(ids[:count], tops[:count], strict=True) if top > float("-inf")],
        )
        for token, logprob, ids, tops, count in zip(
            tokens.tolist(), chosen, order.tolist(), values.tolist(), counts, strict=True
        )
    ]


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Float64 in [0, 1) for each (seed, position), by SplitMix64 (doi:10.1145/2714064.2660195) in wrapping int64."""
    x = _mix(seeds + _GOLDEN)
    x = _mix(x ^ (positions.long() + 1) * _GOLDEN)
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest values and their tokens, in order; equals by token, but which have the lowest is open."""
    values, tokens = logits.topk(count, -1)
    tokens, by_token = tokens.sort(-1)
    values, order = values.gather(1, by_token).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def _pick(cumulative: torch.Tensor, total: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight is over `uniform * total` (inverse CDF). [R]."""
    index = torch.searchsorted(cumulative, uniform * total, right=True).squeeze(1)
    return index.clamp(max=cumulative.shape[1] - 1)
