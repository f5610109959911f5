"""The next token of each row on the device: no sort of the vocabulary, no wait for the device, fit for a CUDA graph.

Three kernels. `_scan` reads the logits once, in parts of the vocabulary: each part's maximum and sum of weights and, of
rows with filters, how many tokens and how much weight lie above some levels. `_collect` copies the tokens above the
lowest level that the filters can need, most often some dozens of them, in vocabulary order. `_finish` finds the
filters' thresholds among these by a search over the bits of their weights, and draws by inverse CDF in vocabulary
order. A row that needs no draw ends with the maxima, a row without filters with the part that the draw falls into.

A token's weight is exp((logit - highest logit) / temperature). Filters keep a prefix of the tokens in order of
likelihood, equal ones in vocabulary order: temperature, min-p, top-k, top-p, each a share of what those before it keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from headrace.kernels.launch import power_of_two
from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import tl, triton

PART = 4096
"""Tokens of one program of the scan. Sums depend on it, so it must not depend on the batch."""
LEVELS = 16
"""Steps of one natural logarithm below the likeliest token's; tokens below them all are sought in the whole row."""
CANDIDATES = 16384
"""At most so many tokens are copied; more are sought in the whole row."""
SEARCH_BLOCK = 2048


@dataclass(frozen=True)
class SampleRows:
    """The parameters of R rows, on the device."""

    temperature: torch.Tensor
    """[R] float64; 0 takes the likeliest token, the first one of equals."""
    top_k: torch.Tensor
    """[R] float64, whole numbers; 0 keeps all."""
    top_p: torch.Tensor
    """[R] float64; 1 keeps all."""
    min_p: torch.Tensor
    """[R] float64; 0 keeps all."""
    seed: torch.Tensor
    """[R] int64."""
    penalties: Penalties
    changes: LogitChanges
    any_drawn: bool
    any_filtered: bool


class Penalties(NamedTuple):
    """Of the P rows that have some; all tensors but `row` are empty where no row has."""

    row: torch.Tensor
    """[R] int64: where in the following tensors; -1: nowhere."""
    presence: torch.Tensor
    """[P] float64, like the other two."""
    frequency: torch.Tensor
    repetition: torch.Tensor
    counts: torch.Tensor
    """[P, V] int32: how often each token is in the output; sampled tokens are counted here."""
    in_prompt: torch.Tensor
    """[P, V] uint8: 1 for tokens of the prompt."""


class LogitChanges(NamedTuple):
    """What is added to single logits, row after row: biases, and minus infinity for tokens that are forbidden."""

    starts: torch.Tensor
    """[R + 1] int64."""
    tokens: torch.Tensor
    """[N] int64, each below V."""
    values: torch.Tensor
    """[N] float64."""
    until: torch.Tensor
    """[N] int64: holds at output positions below this."""


class SampleWorkspace:
    """Intermediate results of up to `max_rows` rows; `filtered` rows need 4 bytes a token of the vocabulary each."""

    def __init__(
        self, max_rows: int, vocab_size: int, device: torch.device, *, filtered: bool, part: int = PART
    ) -> None:
        self.part = part
        self.num_parts = -(-vocab_size // part)
        shape = (max_rows, self.num_parts)
        self.highest = torch.empty(shape, dtype=torch.float32, device=device)
        self.best = torch.empty(shape, dtype=torch.int32, device=device)
        self.sums = torch.empty(shape, dtype=torch.float64, device=device)
        rows = max_rows if filtered else 0
        self.counts_above = torch.empty(rows, self.num_parts, LEVELS, dtype=torch.int32, device=device)
        self.sums_above = torch.empty(rows, self.num_parts, LEVELS, dtype=torch.float32, device=device)
        self.num_candidates = torch.empty(rows, dtype=torch.int32, device=device)
        self.weights = torch.empty(rows, vocab_size, dtype=torch.float32, device=device)
        self.tokens = torch.empty(rows, min(CANDIDATES, vocab_size), dtype=torch.int32, device=device)


class Sampling:
    """One way to sample, from logits [R, V] and at `positions` [R], the tokens' indices in each output: prepared once,
    then run as often as both have been filled anew. The reference is `engine.sampler.BatchSampler`, in torch.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        rows: SampleRows,
        workspace: SampleWorkspace,
        out: torch.Tensor | None = None,
    ) -> None:
        count, vocab_size = logits.shape
        self.out = torch.empty(count, dtype=torch.int64, device=logits.device) if out is None else out
        """[R] int64: the next tokens. Each run fills it."""
        space, parts = workspace, workspace.num_parts
        arguments = (
            logits, positions, rows.temperature, rows.top_k, rows.top_p, rows.min_p, *rows.penalties, *rows.changes,
            space.highest, space.best, space.sums, space.counts_above, space.sums_above,
            space.num_candidates, space.weights, space.tokens,
        )  # fmt: skip
        constants = (
            logits.stride(0), vocab_size, space.part, parts, power_of_two(parts), LEVELS, min(CANDIDATES, vocab_size),
            rows.any_drawn,
        )  # fmt: skip
        by_part, by_row = (count, parts, 1), (count, 1, 1)
        self._launches = [_launch_scan.repeated(by_part, arguments, constants, num_warps=8)]
        if rows.any_filtered:
            self._launches.append(_launch_collect.repeated(by_part, arguments, constants, num_warps=8))
        finish = ((*arguments, rows.seed, self.out), (*constants, SEARCH_BLOCK))
        self._launches.append(_launch_finish.repeated(by_row, *finish, num_warps=16))

    def run(self) -> torch.Tensor:
        """Sample; returns `out`."""
        for launch in self._launches:
            launch()
        return self.out


@triton.jit
def _changed_logits(
    logits_ptr, row, token, position, penalty_row_ptr, presence_ptr, frequency_ptr, repetition_ptr,
    counts_ptr, in_prompt_ptr, starts_ptr, change_tokens_ptr, change_values_ptr, until_ptr,
    STRIDE: tl.constexpr, VOCAB: tl.constexpr,
):  # fmt: skip
    """Logits of tokens of one row after penalties, biases and bans, float32; minus infinity past the vocabulary."""
    there = token < VOCAB
    x = tl.load(logits_ptr + row.to(tl.int64) * STRIDE + token, mask=there, other=float("-inf")).to(tl.float32)
    place = tl.load(penalty_row_ptr + row)
    if place >= 0:
        count = tl.load(counts_ptr + place * VOCAB + token, mask=there, other=0)
        prompted = tl.load(in_prompt_ptr + place * VOCAB + token, mask=there, other=0)
        repetition = tl.load(repetition_ptr + place).to(tl.float32)
        factor = tl.where((prompted != 0) | (count > 0), repetition, 1.0)
        x = tl.where(x > 0, x / factor, x * factor)
        frequency = tl.load(frequency_ptr + place).to(tl.float32)
        presence = tl.load(presence_ptr + place).to(tl.float32)
        x -= frequency * count.to(tl.float32) + tl.where(count > 0, presence, 0.0)
    for change in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        applies = position < tl.load(until_ptr + change)
        value = tl.where(applies, tl.load(change_values_ptr + change), 0.0).to(tl.float32)
        x = tl.where(token == tl.load(change_tokens_ptr + change), x + value, x)
    return x


@triton.jit
def _filters(top_k_ptr, top_p_ptr, min_p_ptr, temperature, row):
    """The filters of a row, and whether it has any."""
    top_k = tl.load(top_k_ptr + row).to(tl.int64)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    is_filtered = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    return top_k, top_p, min_p, is_filtered


@triton.jit
def _scan_kernel(
    logits_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    penalty_row_ptr, presence_ptr, frequency_ptr, repetition_ptr, counts_ptr, in_prompt_ptr,
    starts_ptr, change_tokens_ptr, change_values_ptr, until_ptr,
    highest_ptr, best_ptr, sums_ptr, counts_above_ptr, sums_above_ptr, num_candidates_ptr, weights_ptr, tokens_ptr,
    STRIDE: tl.constexpr, VOCAB: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
    LEVELS: tl.constexpr, CAPACITY: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """One part of one row: its maximum and, where the row is drawn, the sum of its weights beside that maximum's."""
    row = tl.program_id(0)
    cell = row * PARTS + tl.program_id(1)
    token = tl.program_id(1) * PART + tl.arange(0, PART)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    # all loads below are of what the kernel ahead has made
    x = _changed_logits(
        logits_ptr, row, token, tl.load(positions_ptr + row), penalty_row_ptr, presence_ptr,
        frequency_ptr, repetition_ptr, counts_ptr, in_prompt_ptr, starts_ptr, change_tokens_ptr, change_values_ptr,
        until_ptr, STRIDE, VOCAB,
    )  # fmt: skip
    highest = tl.max(x, 0)
    tl.store(highest_ptr + cell, highest)
    tl.store(best_ptr + cell, tl.min(tl.where(x == highest, token, VOCAB - 1), 0))
    if DRAWN:
        if temperature > 0:
            y = x / temperature
            top = highest / temperature
            weight = tl.exp(y - tl.where(top > float("-inf"), top, 0.0))
            tl.store(sums_ptr + cell, tl.sum(weight.to(tl.float64), 0))
            _, _, _, is_filtered = _filters(top_k_ptr, top_p_ptr, min_p_ptr, temperature, row)
            if is_filtered:
                for level in range(LEVELS):
                    above = y >= tl.floor(top) - level
                    tl.store(counts_above_ptr + cell * LEVELS + level, tl.sum(above.to(tl.int32), 0))
                    tl.store(sums_above_ptr + cell * LEVELS + level, tl.sum(tl.where(above, weight, 0.0), 0))


@triton.jit
def _parts_of_row(highest_ptr, sums_ptr, row, temperature, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr):
    """Each part's maximum over the temperature, the row's, and each part's sum of weights beside the row's maximum."""
    part = tl.arange(0, PARTS_PADDED)
    tops = tl.load(highest_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf")) / temperature
    top = tl.max(tops, 0)
    sums = tl.load(sums_ptr + row * PARTS + part, mask=part < PARTS, other=0.0)
    return tops, top, tl.where(tops > float("-inf"), sums * tl.exp(tops - top).to(tl.float64), 0.0)


@triton.jit
def _collect_kernel(
    logits_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    penalty_row_ptr, presence_ptr, frequency_ptr, repetition_ptr, counts_ptr, in_prompt_ptr,
    starts_ptr, change_tokens_ptr, change_values_ptr, until_ptr,
    highest_ptr, best_ptr, sums_ptr, counts_above_ptr, sums_above_ptr, num_candidates_ptr, weights_ptr, tokens_ptr,
    STRIDE: tl.constexpr, VOCAB: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
    LEVELS: tl.constexpr, CAPACITY: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """One part of one filtered row: its tokens above the level that suffices, behind those of the parts before it."""
    row = tl.program_id(0)
    own_part = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k, top_p, min_p, is_filtered = _filters(top_k_ptr, top_p_ptr, min_p_ptr, temperature, row)
    # all loads below are of what the kernels ahead have made
    if is_filtered:
        tops, top, part_sums = _parts_of_row(highest_ptr, sums_ptr, row, temperature, PARTS, PARTS_PADDED)
        part = tl.arange(0, PARTS_PADDED)
        level = tl.arange(0, LEVELS)
        # a part counts its levels from its own maximum down
        own_level = tl.floor(tops)[:, None] - tl.floor(top) + level[None, :]
        counted = (own_level >= 0) & (part < PARTS)[:, None]
        own_level = tl.where(counted, own_level, 0.0).to(tl.int32)
        cells = (row * PARTS + part)[:, None] * LEVELS + own_level
        counts = tl.load(counts_above_ptr + cells, mask=counted, other=0)
        sums = tl.load(sums_above_ptr + cells, mask=counted, other=0.0) * tl.exp(tops - top)[:, None]
        count = tl.sum(counts, 0)
        share = tl.sum(tl.where(counted, sums.to(tl.float64), 0.0), 0) / tl.sum(part_sums, 0)
        # a little more than needed, since these numbers are rounded; what is not asked for is never enough
        needed_count = tl.where(top_k > 0, top_k, 2**31)
        needed_depth = tl.where(min_p > 0, top + tl.log(tl.maximum(min_p, 1e-30)) - 1e-3, float("-inf"))
        needed_share = tl.where((top_k > 0) | (min_p > 0), 2.0, top_p + 1e-5)
        enough = (count >= needed_count) | (tl.floor(top) - level < needed_depth) | (share >= needed_share)
        first = tl.min(tl.where(enough, level, LEVELS), 0)
        num_candidates = tl.sum(tl.where(level == first, count, 0), 0)
        fits = (first < LEVELS) & (num_candidates <= CAPACITY)
        token = own_part * PART + tl.arange(0, PART)
        y = _changed_logits(
            logits_ptr, row, token, tl.load(positions_ptr + row), penalty_row_ptr, presence_ptr,
            frequency_ptr, repetition_ptr, counts_ptr, in_prompt_ptr, starts_ptr, change_tokens_ptr,
            change_values_ptr, until_ptr, STRIDE, VOCAB,
        ) / temperature  # fmt: skip
        weight = tl.exp(y - top)
        row_weights = weights_ptr + row.to(tl.int64) * VOCAB
        if fits:
            earlier = (part < own_part)[:, None] & (level == first)[None, :]
            offset = tl.sum(tl.sum(tl.where(earlier, counts, 0), 1), 0)
            above = (y >= tl.floor(top) - first) & (token < VOCAB)
            place = offset + tl.cumsum(above.to(tl.int32), 0) - 1
            above = above & (place < CAPACITY)
            tl.store(row_weights + place, weight, mask=above)
            tl.store(tokens_ptr + row.to(tl.int64) * CAPACITY + place, token, mask=above)
        else:
            tl.store(row_weights + token, weight, mask=token < VOCAB)
        tl.store(num_candidates_ptr + row, tl.where(fits, num_candidates, -1))


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(seed, position):
    """Float64 in [0, 1): `engine.sampler.uniforms`."""
    x = _mix(seed + -0x61C8864680B583EB)
    x = _mix(x ^ ((position.to(tl.int64) + 1) * -0x61C8864680B583EB))
    return ((x >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _search(weights, count, target, BY_SUM: tl.constexpr, BLOCK: tl.constexpr):
    """The highest bits of a weight such that those of no less are `target` in number, or in sum.

    Weights are in [0, 1], so their bits are in order and below 2^30: ten octal digits, all eight values at once.
    """
    low = count * 0
    digit = tl.arange(0, 8)
    for step in range(10):
        shift = 27 - 3 * step
        pivot = low + (digit << shift)
        reached = tl.zeros((8,), tl.float64)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            weight = tl.load(weights + at, mask=at < count, other=-1.0)
            above = weight.to(tl.int32, bitcast=True)[None, :] >= pivot[:, None]
            if BY_SUM:
                reached += tl.sum(tl.where(above, weight[None, :].to(tl.float64), 0.0), 1)
            else:
                reached += tl.sum(above.to(tl.int32), 1).to(tl.float64)
        found = tl.max(tl.where(reached >= target, digit, 0), 0)
        low += found << shift
    return low


@triton.jit
def _amounts(weights, count, bits, BLOCK: tl.constexpr):
    """How many weights are above `bits`, how much, and how many are equal."""
    number = count * 0
    equal = count * 0
    total = tl.zeros((1,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weight = tl.load(weights + at, mask=at < count, other=-1.0)
        own = weight.to(tl.int32, bitcast=True)
        number += tl.sum((own > bits).to(tl.int32), 0)
        equal += tl.sum(((own == bits) & (at < count)).to(tl.int32), 0)
        total += tl.sum(tl.where(own > bits, weight.to(tl.float64), 0.0), 0)
    return number, tl.sum(total, 0), equal


@triton.jit
def _kept(weights, start, count, bits, equals, rank, BLOCK: tl.constexpr):
    """A block's weights, 0 where a token is not kept: those above `bits`, and the first `equals` that equal it."""
    at = start + tl.arange(0, BLOCK)
    weight = tl.load(weights + at, mask=at < count, other=-1.0)
    own = weight.to(tl.int32, bitcast=True)
    equal = (own == bits) & (at < count)
    ranks = rank + tl.cumsum(equal.to(tl.int32), 0)
    kept = (own > bits) | (equal & (ranks <= equals))
    return at, tl.where(kept, weight.to(tl.float64), 0.0), rank + tl.sum(equal.to(tl.int32), 0)


@triton.jit
def _draw_filtered(weights, count, top_k, top_p, min_p, whole, uniform, BLOCK: tl.constexpr):
    """The index of the drawn weight among `count`, of which `whole` is the sum with all those left out."""
    bits = count * 0
    equals = count
    if (top_k > 0) & (top_k < count):
        bits = _search(weights, count, top_k.to(tl.float64), False, BLOCK)
        number, total, equal = _amounts(weights, count, bits, BLOCK)
        equals = top_k.to(tl.int32) - number
    min_bits = min_p.to(tl.int32, bitcast=True)
    if min_bits > bits:
        bits = min_bits
        equals = count
    if top_p < 1:
        kept_sum = whole
        if (top_k > 0) | (min_p > 0):
            number, total, equal = _amounts(weights, count, bits, BLOCK)
            kept_sum = total + tl.minimum(equals, equal).to(tl.float64) * bits.to(tl.float32, bitcast=True)
        target = top_p * kept_sum
        p_bits = _search(weights, count, target, True, BLOCK)
        number, total, equal = _amounts(weights, count, tl.maximum(p_bits, bits), BLOCK)
        least = tl.maximum(p_bits, bits).to(tl.float32, bitcast=True).to(tl.float64)
        needed = tl.ceil(tl.minimum((target - total) / tl.maximum(least, 1e-300), 1e9)).to(tl.int32)
        equals = tl.maximum(tl.minimum(needed, tl.where(p_bits > bits, count, equals)), 1)
        bits = tl.maximum(p_bits, bits)
    kept_sum = tl.zeros((1,), tl.float64)
    rank = count * 0
    for start in range(0, count, BLOCK):
        at, kept, rank = _kept(weights, start, count, bits, equals, rank, BLOCK)
        kept_sum += tl.sum(kept, 0)
    goal = uniform * tl.sum(kept_sum, 0)
    before = goal * 0
    found = count
    last = count * 0
    rank = count * 0
    for start in range(0, count, BLOCK):
        at, kept, rank = _kept(weights, start, count, bits, equals, rank, BLOCK)
        cumulative = before + tl.cumsum(kept, 0)
        found = tl.minimum(found, tl.min(tl.where((cumulative > goal) & (kept > 0), at, count), 0))
        last = tl.maximum(last, tl.max(tl.where(kept > 0, at, 0), 0))
        before = tl.max(cumulative, 0)
    return tl.where(found < count, found, last)


@triton.jit
def _finish_kernel(
    logits_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    penalty_row_ptr, presence_ptr, frequency_ptr, repetition_ptr, counts_ptr, in_prompt_ptr,
    starts_ptr, change_tokens_ptr, change_values_ptr, until_ptr,
    highest_ptr, best_ptr, sums_ptr, counts_above_ptr, sums_above_ptr, num_candidates_ptr, weights_ptr, tokens_ptr,
    seed_ptr, out_ptr,
    STRIDE: tl.constexpr, VOCAB: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
    LEVELS: tl.constexpr, CAPACITY: tl.constexpr, DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's token."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS_PADDED)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    # all loads below are of what the kernels ahead have made
    highest = tl.load(highest_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    best = tl.load(best_ptr + row * PARTS + part, mask=part < PARTS, other=VOCAB - 1)
    chosen = tl.min(tl.where(highest == tl.max(highest, 0), best, VOCAB - 1), 0)
    if DRAWN:
        top_k, top_p, min_p, is_filtered = _filters(top_k_ptr, top_p_ptr, min_p_ptr, temperature, row)
        position = tl.load(positions_ptr + row)
        uniform = _uniform(tl.load(seed_ptr + row), position)
        if (temperature > 0) & (is_filtered == 0):
            _, top, part_sums = _parts_of_row(highest_ptr, sums_ptr, row, temperature, PARTS, PARTS_PADDED)
            goal = uniform * tl.sum(part_sums, 0)
            reached = tl.cumsum(part_sums, 0)
            last_part = tl.max(tl.where(part_sums > 0, part, 0), 0)
            drawn_part = tl.minimum(tl.sum((reached <= goal).to(tl.int32), 0), last_part)
            goal -= tl.sum(tl.where(part < drawn_part, part_sums, 0.0), 0)
            token = drawn_part * PART + tl.arange(0, PART)
            x = _changed_logits(
                logits_ptr, row, token, position, penalty_row_ptr, presence_ptr, frequency_ptr,
                repetition_ptr, counts_ptr, in_prompt_ptr, starts_ptr, change_tokens_ptr, change_values_ptr, until_ptr,
                STRIDE, VOCAB,
            )  # fmt: skip
            weight = tl.exp(x / temperature - top).to(tl.float64)
            over = (tl.cumsum(weight, 0) > goal) & (weight > 0)
            first = tl.min(tl.where(over, token, VOCAB), 0)
            last = tl.max(tl.where(weight > 0, token, 0), 0)
            chosen = tl.where(first < VOCAB, first, last)
        if is_filtered:
            _, _, part_sums = _parts_of_row(highest_ptr, sums_ptr, row, temperature, PARTS, PARTS_PADDED)
            num_candidates = tl.load(num_candidates_ptr + row)
            is_copied = num_candidates >= 0
            count = tl.where(is_copied, num_candidates, VOCAB)
            row_weights = weights_ptr + row.to(tl.int64) * VOCAB
            index = _draw_filtered(row_weights, count, top_k, top_p, min_p, tl.sum(part_sums, 0), uniform, BLOCK)
            token_at = tokens_ptr + row.to(tl.int64) * CAPACITY + tl.where(is_copied, index, 0)
            chosen = tl.where(is_copied, tl.load(token_at), index)
    chosen = tl.maximum(tl.minimum(chosen, VOCAB - 1), 0)
    tl.store(out_ptr + row, chosen.to(tl.int64))
    place = tl.load(penalty_row_ptr + row)
    if place >= 0:
        at = counts_ptr + place * VOCAB + chosen
        tl.store(at, tl.load(at) + 1)


_launch_scan = Launcher(_scan_kernel)
_launch_collect = Launcher(_collect_kernel)
_launch_finish = Launcher(_finish_kernel)
