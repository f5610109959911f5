"""The rows of a decode step that verifies drafts, and which of them stand, without a word from the host.

A request has one row for its newest token and one for each token of its draft, in order. What is drawn after a row is
the request's next token as long as the drafts of all rows up to that one said the same as what was drawn before them.
Drafts come from the host, or from a head on the device, which the host need not have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.decode_attention import MAX_STEP_ROWS, DraftRows
from headrace.kernels.launcher import Launcher

BLOCK = 128
GUESSED = -1
"""In a layout, stands for a drafted token that a head has guessed, which the device alone knows."""


@dataclass(frozen=True)
class RequestState:
    """What the device knows of each request of a batch, by its row of the block table."""

    tokens: torch.Tensor
    """[B] int64: the newest one, whose K and V are not in the cache yet."""
    positions: torch.Tensor
    """[B] int32: that token's."""
    generated: torch.Tensor
    """[B] int32: output tokens so far."""
    guesses: torch.Tensor
    """[B, depth] int64: what a head guesses to come after the newest token."""

    @classmethod
    def empty(cls, requests: int, depth: int, device: torch.device) -> RequestState:
        """Of no request so far."""
        return cls(
            torch.zeros(requests, dtype=torch.int64, device=device),
            torch.full((requests,), -1, dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.zeros(requests, depth, dtype=torch.int64, device=device),
        )

    @property
    def columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those that a step advances."""
        return self.tokens, self.positions, self.generated


class StepRows:
    """Up to `max_rows` rows. The host fills `layout` [3, rows], the others follow from it and the requests' state."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.layout = torch.full((3, max_rows), -1, dtype=torch.int32, device=device)
        """Owners and first rows as `DraftRows` has them, and each row's drafted token (0 in first rows; `GUESSED`
        becomes what was guessed); all are -1 in rows without a request, as at the start: graphs are captured before
        there are requests.
        """
        self.drafted = DraftRows(self.layout[0], self.layout[1])
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.positions = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        """-1 in rows without a request."""
        self.generated = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.followers = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """What was drawn after each row."""
        self.last = torch.zeros(max_rows, dtype=torch.int32, device=device)
        """By request: its last row that stands."""


def expand_rows(state: RequestState, rows: StepRows) -> None:
    """Fill drafted tokens, tokens, positions and output positions of all rows."""
    size = rows.layout.shape[1]
    _launch_expand(
        (triton.cdiv(size, BLOCK), 1, 1),
        (rows.layout, *state.columns, state.guesses, rows.tokens, rows.positions, rows.generated, size),
        (state.guesses.shape[1], BLOCK),
        num_warps=4,
    )


def expand_rows_reference(state: RequestState, rows: StepRows) -> None:
    """The same in plain torch."""
    owners, firsts, drafts = rows.layout.long()
    offsets = torch.arange(len(owners), device=owners.device) - firsts
    guessed = (owners >= 0) & (offsets > 0) & (drafts == GUESSED)
    drafts[guessed] = state.guesses[owners[guessed], offsets[guessed] - 1]
    rows.layout[2] = drafts
    rows.tokens.copy_(torch.where(offsets == 0, state.tokens[owners], drafts).where(owners >= 0, 0))
    rows.positions.copy_((state.positions[owners] + offsets).where(owners >= 0, -1))
    rows.generated.copy_((state.generated[owners] + offsets).where(owners >= 0, 0))


def accept_rows(sampled: torch.Tensor, rows: StepRows, state: RequestState) -> None:
    """Bring the requests up to date with what was drawn after each of the first R rows; `sampled` [R] int64.

    Fills `rows.followers` and `rows.last`, too.
    """
    sizes = (len(sampled), rows.layout.shape[1])
    tensors = (sampled, rows.layout, *state.columns, rows.followers, rows.last)
    _launch_accept((sizes[0], 1, 1), (*tensors, *sizes), (MAX_STEP_ROWS,), num_warps=1)


def accept_rows_reference(sampled: torch.Tensor, rows: StepRows, state: RequestState) -> None:
    """The same in plain torch, request by request."""
    owners, firsts, drafts = rows.layout[:, : len(sampled)].tolist()
    drawn = sampled.tolist()
    rows.followers[: len(sampled)] = sampled
    for owner, first in {(o, f) for o, f in zip(owners, firsts, strict=True) if o >= 0}:
        last = first
        while last + 1 < len(drawn) and firsts[last + 1] == first and drafts[last + 1] == drawn[last]:
            last += 1
        state.tokens[owner] = drawn[last]
        state.positions[owner] += last - first + 1
        state.generated[owner] += last - first + 1
        rows.last[owner] = last


@triton.jit(do_not_specialize=["size"])
def _expand_kernel(
    layout_ptr, tokens_ptr, positions_ptr, generated_ptr, guesses_ptr, row_tokens_ptr, row_positions_ptr,
    row_generated_ptr, size, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < size
    owner = tl.load(layout_ptr + row, mask=inside, other=-1)
    offset = row - tl.load(layout_ptr + size + row, mask=inside, other=0)
    there = owner >= 0
    newest = tl.load(tokens_ptr + owner, mask=there & (offset == 0), other=0)
    draft = tl.load(layout_ptr + 2 * size + row, mask=there & (offset > 0), other=0)
    guessed = draft == -1
    guess = tl.load(guesses_ptr + owner * DEPTH + offset - 1, mask=guessed, other=0)
    tl.store(layout_ptr + 2 * size + row, guess.to(tl.int32), mask=guessed)
    draft = tl.where(guessed, guess, draft.to(tl.int64))
    tl.store(row_tokens_ptr + row, newest + draft, mask=inside)
    position = tl.load(positions_ptr + owner, mask=there, other=-1)
    tl.store(row_positions_ptr + row, position + tl.where(there, offset, 0), mask=inside)
    generated = tl.load(generated_ptr + owner, mask=there, other=0)
    tl.store(row_generated_ptr + row, generated + tl.where(there, offset, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "size"])
def _accept_kernel(
    sampled_ptr, layout_ptr, tokens_ptr, positions_ptr, generated_ptr, followers_ptr, last_ptr, rows, size,
    STEP_ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    tl.store(followers_ptr + first, tl.load(sampled_ptr + first))
    owner = tl.load(layout_ptr + first)
    if (owner >= 0) & (tl.load(layout_ptr + size + first) == first):
        offset = tl.arange(0, STEP_ROWS)
        is_draft = (offset > 0) & (first + offset < rows)
        is_own = tl.load(layout_ptr + size + first + offset, mask=is_draft, other=-1) == first
        draft = tl.load(layout_ptr + 2 * size + first + offset, mask=is_draft, other=-1)
        drawn = tl.load(sampled_ptr + first + offset - 1, mask=is_draft, other=-2)
        stands = (offset == 0) | (is_own & (draft == drawn))
        count = tl.min(tl.where(stands, STEP_ROWS, offset), 0)
        tl.store(tokens_ptr + owner, tl.load(sampled_ptr + first + count - 1))
        tl.store(positions_ptr + owner, tl.load(positions_ptr + owner) + count)
        tl.store(generated_ptr + owner, tl.load(generated_ptr + owner) + count)
        tl.store(last_ptr + owner, first + count - 1)


_launch_expand = Launcher(_expand_kernel)
_launch_accept = Launcher(_accept_kernel)
