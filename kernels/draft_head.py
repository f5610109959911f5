"""What a draft head's step on a GPU does between the kernels that it has in common with a decode step.

A head reads pairs: the embedding of the token after a position beside the target's features there, or beside its own
state of the position before. Its norms' weights have been folded into the projections behind them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.kernels.draft_tree import CHOICES
from headrace.kernels.launch import dependent_launch, power_of_two

PICK_BLOCK = 4096


def begin_guess(
    tokens: torch.Tensor, embedding: torch.Tensor, states: torch.Tensor, eps: float, inputs: torch.Tensor
) -> None:
    """Fill inputs [R, 2 H]: the RMS norms, without weights, of embedding[tokens] and of states [R, H], side by side.

    tokens int64 [R]; embedding [vocabulary, H].
    """
    hidden = states.shape[1]
    _begin_kernel[(len(tokens),)](
        tokens, embedding, states, inputs, eps,
        HIDDEN=hidden, HIDDEN_PADDED=power_of_two(hidden), num_warps=4, **dependent_launch(),
    )  # fmt: skip


def take_last(
    rows: tuple[torch.Tensor, torch.Tensor],
    last: torch.Tensor,
    positions: torch.Tensor,
    requests: tuple[torch.Tensor, torch.Tensor],
    squares: torch.Tensor,
    own_positions: torch.Tensor,
) -> None:
    """Go on with each request's last row that stands.

    `rows`: states [R, H] and attended [R, A], of which row last[b] (int32 [B]) goes to row b of the tensors in
    `requests`. positions int32 [B] of the requests' newest tokens, -1 where there is no request: the head is one
    behind, at own_positions [B]. squares int64 [norms, B] is zeroed.
    """
    (states, attended), (own_states, own_attended) = rows, requests
    hidden, width = states.shape[1], attended.shape[1]
    _take_last_kernel[(len(own_positions),)](
        states, attended, last, positions, own_states, own_attended, squares, own_positions, squares.stride(0),
        HIDDEN=hidden, HIDDEN_PADDED=power_of_two(hidden), WIDTH=width, WIDTH_PADDED=power_of_two(width),
        NORMS=squares.shape[0], num_warps=4, **dependent_launch(),
    )  # fmt: skip


def pick_guess(
    logits: torch.Tensor,
    vocabulary: torch.Tensor,
    positions: torch.Tensor,
    limits: torch.Tensor,
    guesses: torch.Tensor,
    own_positions: torch.Tensor,
    own_tokens: torch.Tensor,
    squares: torch.Tensor,
) -> None:
    """Take the likeliest tokens of each request and go on behind the first of them, unless there is no room.

    logits float32 [B, V] of states at own_positions; vocabulary [V] int64 are their tokens; guesses [B, places *
    CHOICES] get the `CHOICES` likeliest ones, at place own_position - (position - 1): but for the first, of tokens
    that are `PICK_BLOCK` apart only the likelier one. positions as above; limits int32 [B]: positions that a request
    has room for. own_tokens [B] int64 and own_positions are advanced, the latter to -1 where there is no room; squares
    [norms, B] are zeroed.
    """
    _pick_kernel[(len(own_positions),)](
        logits, vocabulary, positions, limits, guesses, own_positions, own_tokens, squares, squares.stride(0),
        VOCABULARY=logits.shape[1], STRIDE=logits.stride(0), GUESSES=guesses.shape[1], CHOICES=CHOICES,
        NORMS=squares.shape[0], BLOCK=min(PICK_BLOCK, power_of_two(logits.shape[1])), num_warps=8, **dependent_launch(),
    )  # fmt: skip


@triton.jit
def _begin_kernel(
    tokens_ptr, embedding_ptr, states_ptr, inputs_ptr, eps,
    HIDDEN: tl.constexpr, HIDDEN_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HIDDEN_PADDED)
    there = h < HIDDEN
    state = tl.load(states_ptr + row * HIDDEN + h, mask=there, other=0.0).to(tl.float32)
    token = tl.load(tokens_ptr + row)
    embedded = tl.load(embedding_ptr + token * HIDDEN + h, mask=there, other=0.0).to(tl.float32)
    at = inputs_ptr + row * (2 * HIDDEN) + h
    embedded *= tl.rsqrt(tl.sum(embedded * embedded, 0) / HIDDEN + eps)
    state *= tl.rsqrt(tl.sum(state * state, 0) / HIDDEN + eps)
    tl.store(at, embedded.to(inputs_ptr.dtype.element_ty), mask=there)
    tl.store(at + HIDDEN, state.to(inputs_ptr.dtype.element_ty), mask=there)


@triton.jit
def _take_last_kernel(
    states_ptr, attended_ptr, last_ptr, positions_ptr, own_states_ptr, own_attended_ptr, squares_ptr, own_positions_ptr,
    squares_stride, HIDDEN: tl.constexpr, HIDDEN_PADDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
    NORMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    request = tl.program_id(0)
    row = tl.load(last_ptr + request).to(tl.int64)
    h = tl.arange(0, HIDDEN_PADDED)
    state = tl.load(states_ptr + row * HIDDEN + h, mask=h < HIDDEN, other=0.0)
    tl.store(own_states_ptr + request.to(tl.int64) * HIDDEN + h, state, mask=h < HIDDEN)
    w = tl.arange(0, WIDTH_PADDED)
    attended = tl.load(attended_ptr + row * WIDTH + w, mask=w < WIDTH, other=0.0)
    tl.store(own_attended_ptr + request.to(tl.int64) * WIDTH + w, attended, mask=w < WIDTH)
    for norm in tl.static_range(NORMS):
        tl.store(squares_ptr + norm * squares_stride + request, 0)
    tl.store(own_positions_ptr + request, tl.maximum(tl.load(positions_ptr + request) - 1, -1))


@triton.jit
def _keys(logits, at):
    """int64 in the order of the logits, and of equal ones the first is the highest; its low half is 2**31 - 1 - at."""
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)


@triton.jit
def _pick_kernel(
    logits_ptr, vocabulary_ptr, positions_ptr, limits_ptr, guesses_ptr, own_positions_ptr, own_tokens_ptr, squares_ptr,
    squares_stride, VOCABULARY: tl.constexpr, STRIDE: tl.constexpr, GUESSES: tl.constexpr, CHOICES: tl.constexpr,
    NORMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    request = tl.program_id(0)
    own_position = tl.load(own_positions_ptr + request)
    position = tl.load(positions_ptr + request)
    limit = tl.load(limits_ptr + request)
    at = tl.arange(0, BLOCK)
    logits_ptr += request.to(tl.int64) * STRIDE
    highest = _keys(tl.load(logits_ptr + at, mask=at < VOCABULARY, other=float("-inf")), at)
    for start in tl.range(BLOCK, VOCABULARY, BLOCK, loop_unroll_factor=4):
        x = tl.load(logits_ptr + start + at, mask=start + at < VOCABULARY, other=float("-inf"))
        highest = tl.maximum(highest, _keys(x, start + at))
    if own_position >= 0:
        place = own_position + 1 - position
        for choice in tl.static_range(CHOICES):
            winner = tl.max(highest, 0)
            token = tl.load(vocabulary_ptr + tl.minimum(0x7FFFFFFF - (winner & 0x7FFFFFFF), VOCABULARY - 1))
            tl.store(guesses_ptr + request * GUESSES + place * CHOICES + choice, token)
            if choice == 0:
                tl.store(own_tokens_ptr + request, token)
            highest = tl.where(highest == winner, -(2**63), highest)
        has_room = own_position + 1 < limit
        tl.store(own_positions_ptr + request, tl.where(has_room, own_position + 1, -1))
    for norm in tl.static_range(NORMS):
        tl.store(squares_ptr + norm * squares_stride + request, 0)
