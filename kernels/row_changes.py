"""What happens to a batch's rows between two forward passes: the host's changes, and each row's next token."""

from __future__ import annotations

import numpy as np
import torch

from headrace.kernels.draft_rows import RequestState
from headrace.kernels.launch import power_of_two
from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import tl, triton

STATE_FIELDS = 5
"""Of a row that changed, before its parameters: the row, the row whose state is its own now, or -1 and then its newest
token, that token's position and the number of output tokens."""
BLOCK = 256
BUFFERS = 3
"""A change may be read by the device until the step behind it has been collected, which two others may be ahead of."""


class RowChanges:
    """Brings rows up to date. The device reads what changed from the host's memory: a copy would cost the host more."""

    def __init__(
        self, state: RequestState, parameters: torch.Tensor, block_table: torch.Tensor, limits: torch.Tensor
    ) -> None:
        """`parameters` [P, B] int64, `block_table` [B, W] int32, `limits` [B] int32."""
        self._targets = state, parameters, block_table, limits
        self._buffers = [self._new_buffer(1024) for _ in range(BUFFERS)]

    def _new_buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int64, pin_memory=self._targets[1].is_cuda)

    def send(self, count: int, rows: np.ndarray, cells: np.ndarray, limits: np.ndarray) -> None:
        """All is int64: `rows` [`STATE_FIELDS` + P, N], each row once; `cells` [2, M], places in the flat block table
        and pages; `limits` [2, K], rows and their limits. A row may take over the state of one that is overwritten.
        From row `count` on they are nobody's. Of any `BUFFERS` calls in a row the first must have been carried out.
        """
        changes = np.concatenate((rows.ravel(), cells.ravel(), limits.ravel()))
        buffer = self._buffers.pop(0)
        if len(buffer) < len(changes):
            buffer = self._new_buffer(power_of_two(len(changes)))
        self._buffers.append(buffer)
        buffer.numpy()[: len(changes)] = changes
        run = launch_row_changes if self._targets[1].is_cuda else row_changes_reference
        run(count, buffer[: len(changes)], (rows.shape[1], cells.shape[1], limits.shape[1]), *self._targets)


def row_changes_reference(
    count: int,
    changes: torch.Tensor,
    sizes: tuple[int, int, int],
    state: RequestState,
    parameters: torch.Tensor,
    block_table: torch.Tensor,
    row_limits: torch.Tensor,
) -> None:
    """The same where there is no kernel; `changes` has all that changed, `sizes` are N, M, K."""
    fields = STATE_FIELDS + len(parameters)
    of_rows, of_cells, of_limits = changes.split([fields * sizes[0], 2 * sizes[1], 2 * sizes[2]])
    row, origin, *rest = of_rows.view(fields, -1)
    for column, values in zip(state.columns, rest, strict=False):
        column[row] = torch.where(origin < 0, values, column[origin.clamp(min=0)].long()).to(column.dtype)
    state.positions[count:] = -1
    parameters[:, row] = of_rows.view(fields, -1)[STATE_FIELDS:]
    places, pages = of_cells.view(2, -1)
    block_table.view(-1)[places] = pages.int()
    own, limits = of_limits.view(2, -1)
    row_limits[own] = limits.int()


def launch_row_changes(
    count: int,
    changes: torch.Tensor,
    sizes: tuple[int, int, int],
    state: RequestState,
    parameters: torch.Tensor,
    block_table: torch.Tensor,
    row_limits: torch.Tensor,
) -> None:
    """The same with the kernel; `changes` may be pinned memory of the host."""
    blocks = -(-max(sizes[1:]) // BLOCK)
    _launch_change(
        (1 + blocks, 1, 1),
        (count, changes, *sizes, *state.columns, parameters, block_table, row_limits),
        (*parameters.shape, power_of_two(parameters.shape[1]), STATE_FIELDS, BLOCK),
        num_warps=8,
    )


def advance_rows(sampled: torch.Tensor, state: RequestState, report: torch.Tensor) -> None:
    """The first rows' next tokens, `sampled` [R] int64, are their newest ones now; copied to `report` [R] int64, too,
    which may be pinned memory of the host.
    """
    rows = len(sampled)
    if sampled.is_cuda:
        _launch_advance((-(-rows // BLOCK), 1, 1), (sampled, *state.columns, report, rows), (BLOCK,), num_warps=4)
        return
    state.tokens[:rows] = sampled
    state.positions[:rows] += 1
    state.generated[:rows] += 1
    report.copy_(sampled)


@triton.jit(do_not_specialize=["count", "num_rows", "num_cells", "num_limits"])
def _change_kernel(
    count, changes_ptr, num_rows, num_cells, num_limits, tokens_ptr, positions_ptr, generated_ptr, parameters_ptr,
    table_ptr, limits_ptr, PARAMETERS: tl.constexpr, CAPACITY: tl.constexpr, ROWS: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        at = tl.arange(0, ROWS)
        there = at < num_rows
        own = changes_ptr + at
        row = tl.load(own, mask=there, other=0)
        origin = tl.load(own + num_rows, mask=there, other=-1)
        moved = origin >= 0
        token = tl.load(own + 2 * num_rows, mask=there, other=0)
        token = tl.where(moved, tl.load(tokens_ptr + origin, mask=moved, other=0), token)
        position = tl.load(own + 3 * num_rows, mask=there, other=0).to(tl.int32)
        position = tl.where(moved, tl.load(positions_ptr + origin, mask=moved, other=0), position)
        generated = tl.load(own + 4 * num_rows, mask=there, other=0).to(tl.int32)
        generated = tl.where(moved, tl.load(generated_ptr + origin, mask=moved, other=0), generated)
        tl.debug_barrier()  # all is read before a row is overwritten
        tl.store(tokens_ptr + row, token, mask=there)
        tl.store(positions_ptr + row, position, mask=there)
        tl.store(generated_ptr + row, generated, mask=there)
        tl.store(positions_ptr + at, -1, mask=(at >= count) & (at < CAPACITY))
        for parameter in tl.static_range(PARAMETERS):
            value = tl.load(own + (FIELDS + parameter) * num_rows, mask=there, other=0)
            tl.store(parameters_ptr + parameter * CAPACITY + row, value, mask=there)
    else:
        change = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        cells = changes_ptr + (FIELDS + PARAMETERS) * num_rows + change
        place = tl.load(cells, mask=change < num_cells, other=0)
        page = tl.load(cells + num_cells, mask=change < num_cells, other=0)
        tl.store(table_ptr + place, page.to(tl.int32), mask=change < num_cells)
        limits = cells + 2 * num_cells
        limited = tl.load(limits, mask=change < num_limits, other=0)
        limit = tl.load(limits + num_limits, mask=change < num_limits, other=0)
        tl.store(limits_ptr + limited, limit.to(tl.int32), mask=change < num_limits)


@triton.jit(do_not_specialize=["rows"])
def _advance_kernel(
    sampled_ptr, tokens_ptr, positions_ptr, generated_ptr, report_ptr, rows, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    token = tl.load(sampled_ptr + row, mask=there, other=0)
    tl.store(tokens_ptr + row, token, mask=there)
    tl.store(report_ptr + row, token, mask=there)
    tl.store(positions_ptr + row, tl.load(positions_ptr + row, mask=there, other=0) + 1, mask=there)
    tl.store(generated_ptr + row, tl.load(generated_ptr + row, mask=there, other=0) + 1, mask=there)


_launch_change = Launcher(_change_kernel)
_launch_advance = Launcher(_advance_kernel)
