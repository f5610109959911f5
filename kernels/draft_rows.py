"""The rows of a decode step that verifies drafts, and which of them stand, without a word from the host.

A request has one row for its newest token and one for each token of its draft, in order. What is drawn after a row is
the request's next token as long as the drafts of all rows up to that one said the same as what was drawn before them.
Drafts come from the host, or from a head on the device, which the host need not have seen. Behind such a chain of rows
there may be leaves: other tokens for places of the chain. Where the chain ends a leaf may have what was drawn: then it
stands, and what was drawn after it is one token more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.attention_plan import MAX_STEP_ROWS, DraftRows
from headrace.kernels.draft_tree import CHOICES
from headrace.kernels.launch import power_of_two
from headrace.kernels.launcher import Launcher

BLOCK = 128
STEPS_AT_ONCE = 2
"""So many have been started and not collected at most."""


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
    """[B, depth * CHOICES] int64: what a head guesses to come after the newest token, place by place."""

    @classmethod
    def empty(cls, requests: int, depth: int, device: torch.device) -> RequestState:
        """Of no request so far."""
        return cls(
            torch.zeros(requests, dtype=torch.int64, device=device),
            torch.full((requests,), -1, dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.zeros(requests, depth * CHOICES, dtype=torch.int64, device=device),
        )

    @property
    def columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those that a step advances."""
        return self.tokens, self.positions, self.generated


class StepRows:
    """Up to `max_rows` rows. The host fills `layout` [4, rows], the others follow from it and the requests' state."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.layout = torch.full((4, max_rows), -1, dtype=torch.int32, device=device)
        """Owners and first rows as `DraftRows` has them, each row's drafted token (0 in first rows; -1 - i: what was
        guessed at i), and its depth: by how many positions it is behind the first row. All are -1 in rows without a
        request, as at the start: graphs are captured before there are requests.
        """
        pinned = device.type == "cuda"
        self.layouts = [torch.empty(4, max_rows, dtype=torch.int32, pin_memory=pinned) for _ in range(STEPS_AT_ONCE)]
        """On their way there from the host, of steps in turn."""
        self.drafted = DraftRows(self.layout[0], self.layout[1])
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """A request's newest token and its draft."""
        self.positions = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        """-1 in rows without a request."""
        self.generated = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """What was drawn after each row."""
        self.reports = [torch.zeros(max_rows, 2, dtype=torch.int64, pin_memory=pinned) for _ in range(STEPS_AT_ONCE)]
        """Of steps in turn, on the host, see `accept_rows`."""
        self.followers = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """The same, for a head to read."""
        self.last = torch.zeros(max_rows, dtype=torch.int32, device=device)
        """By request: its last row that stands."""


def expand_rows(state: RequestState, rows: StepRows) -> None:
    """Fill tokens, positions and output positions of all rows."""
    size = rows.layout.shape[1]
    _launch_expand(
        (triton.cdiv(size, BLOCK), 1, 1),
        (rows.layout, *state.columns, state.guesses, rows.tokens, rows.positions, rows.generated, size),
        (state.guesses.shape[1], BLOCK),
        num_warps=4,
    )


def accept_rows(sampled: torch.Tensor, rows: StepRows, state: RequestState, report: torch.Tensor) -> None:
    """Bring the requests up to date with what was drawn after each of the first R rows; `sampled` [R] int64.

    Fills `rows.followers`, `rows.last`, and `report` [R, 2] int64 with `sampled` and what each row had drafted; it may
    be pinned memory of the host.
    """
    sizes = (len(sampled), rows.layout.shape[1])
    tensors = (sampled, rows.layout, rows.tokens, *state.columns, rows.followers, report, rows.last)
    _launch_accept((sizes[0], 1, 1), (*tensors, *sizes), (MAX_STEP_ROWS,), num_warps=1)


def move_leaf(pages: torch.Tensor, block_table: torch.Tensor, rows: StepRows, state: RequestState, count: int) -> None:
    """Where one of the first `count` requests goes on from a leaf, bring its K and V to its position's slot, in all
    layers; pages [layers, pages, 2, kv_heads, page_size, head_dim].
    """
    layers, _, both, kv_heads, page_size, head_dim = pages.shape
    _launch_move(
        (count, layers, 1),
        (pages, block_table, rows.layout, rows.last, state.positions, rows.layout.shape[1], block_table.stride(0)),
        (
            pages.stride(0), pages.stride(1), both * kv_heads, power_of_two(both * kv_heads), page_size, head_dim,
            power_of_two(head_dim),
        ),
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def _expand_kernel(
    layout_ptr, tokens_ptr, positions_ptr, generated_ptr, guesses_ptr, row_tokens_ptr, row_positions_ptr,
    row_generated_ptr, size, GUESSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < size
    owner = tl.load(layout_ptr + row, mask=inside, other=-1)
    there = owner >= 0
    depth = tl.load(layout_ptr + 3 * size + row, mask=there, other=0)
    newest = tl.load(tokens_ptr + owner, mask=there & (depth == 0), other=0)
    draft = tl.load(layout_ptr + 2 * size + row, mask=there & (depth > 0), other=0)
    guessed = draft < 0
    guess = tl.load(guesses_ptr + owner * GUESSES - 1 - draft, mask=guessed, other=0)
    draft = tl.where(guessed, guess, draft.to(tl.int64))
    tl.store(row_tokens_ptr + row, newest + draft, mask=inside)
    position = tl.load(positions_ptr + owner, mask=there, other=-1)
    tl.store(row_positions_ptr + row, position + depth, mask=inside)
    generated = tl.load(generated_ptr + owner, mask=there, other=0)
    tl.store(row_generated_ptr + row, generated + depth, mask=inside)


@triton.jit(do_not_specialize=["rows", "size"])
def _accept_kernel(
    sampled_ptr, layout_ptr, row_tokens_ptr, tokens_ptr, positions_ptr, generated_ptr, followers_ptr, report_ptr,
    last_ptr, rows, size, STEP_ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    drawn = tl.load(sampled_ptr + first)
    tl.store(followers_ptr + first, drawn)
    tl.store(report_ptr + 2 * first, drawn)
    tl.store(report_ptr + 2 * first + 1, tl.load(row_tokens_ptr + first))
    owner = tl.load(layout_ptr + first)
    if (owner >= 0) & (tl.load(layout_ptr + size + first) == first):
        offset = tl.arange(0, STEP_ROWS)
        is_draft = (offset > 0) & (first + offset < rows)
        is_draft = is_draft & (tl.load(layout_ptr + size + first + offset, mask=is_draft, other=-1) == first)
        draft = tl.load(row_tokens_ptr + first + offset, mask=is_draft, other=-1)
        depth = tl.load(layout_ptr + 3 * size + first + offset, mask=is_draft, other=0)
        drawn = tl.load(sampled_ptr + first + offset - 1, mask=is_draft, other=-2)
        stands = (offset == 0) | (is_draft & (depth == offset) & (draft == drawn))
        count = tl.min(tl.where(stands, STEP_ROWS, offset), 0)
        drawn = tl.load(sampled_ptr + first + count - 1)
        is_leaf = is_draft & (depth == count) & (depth != offset) & (draft == drawn)
        leaf = tl.min(tl.where(is_leaf, offset, STEP_ROWS), 0)
        last = first + tl.where(leaf < STEP_ROWS, leaf, count - 1)
        count += (leaf < STEP_ROWS).to(tl.int32)
        tl.store(tokens_ptr + owner, tl.load(sampled_ptr + last))
        tl.store(positions_ptr + owner, tl.load(positions_ptr + owner) + count)
        tl.store(generated_ptr + owner, tl.load(generated_ptr + owner) + count)
        tl.store(last_ptr + owner, last)


@triton.jit(do_not_specialize=["size", "table_stride"])
def _move_kernel(
    pages_ptr, table_ptr, layout_ptr, last_ptr, positions_ptr, size, table_stride,
    LAYER: tl.constexpr, PAGE_STRIDE: tl.constexpr, PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    last = tl.load(last_ptr + request)
    position = tl.load(positions_ptr + request) - 1
    offset = last - tl.load(layout_ptr + size + last)
    slot = position - tl.load(layout_ptr + 3 * size + last) + offset
    if (position >= 0) & (slot != position):
        table = table_ptr + request * table_stride
        source = tl.load(table + slot // PAGE).to(tl.int64) * PAGE_STRIDE + slot % PAGE * DIM
        target = tl.load(table + position // PAGE).to(tl.int64) * PAGE_STRIDE + position % PAGE * DIM
        part = tl.arange(0, PARTS_PADDED)[:, None]
        d = tl.arange(0, DIM_PADDED)[None, :]
        cells = pages_ptr + tl.program_id(1).to(tl.int64) * LAYER + part * (PAGE * DIM) + d
        inside = (part < PARTS) & (d < DIM)
        tl.store(cells + target, tl.load(cells + source, mask=inside), mask=inside)


_launch_move = Launcher(_move_kernel)
_launch_expand = Launcher(_expand_kernel)
_launch_accept = Launcher(_accept_kernel)
