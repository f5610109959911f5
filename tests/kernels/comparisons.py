"""Each decode kernel against its torch reference; shared by the interpreter's tests and those on a GPU."""

from __future__ import annotations

import torch

from headrace.kernels.attention_plan import (
    AttentionWorkspace,
    DraftRows,
    HeadShape,
    plan_decode_attention,
)
from headrace.kernels.decode_attention import fused_decode_attention
from headrace.kernels.decode_begin import begin_decode
from headrace.kernels.decode_linear import decode_linear
from headrace.kernels.draft_head import (
    begin_guess,
    pick_guess,
    take_last,
)
from headrace.kernels.draft_rows import (
    RequestState,
    StepRows,
    accept_rows,
    expand_rows,
    move_leaf,
)
from headrace.kernels.draft_tree import CHOICES, chain, depths_of, guess_at
from headrace.kernels.epilogue import SQUARES_SCALE, Epilogue, Workspace
from headrace.kernels.fp8_linear import quantize_rows
from headrace.kernels.mask_logits import launch_mask_logits, mask_logits_reference
from headrace.kernels.rope import RopeTables
from headrace.kernels.row_changes import STATE_FIELDS, launch_row_changes, row_changes_reference
from tests.kernels.references import (
    accept_rows_reference,
    begin_decode_reference,
    begin_guess_reference,
    decode_linear_reference,
    expand_rows_reference,
    fused_decode_attention_reference,
    move_leaf_reference,
    pick_guess_reference,
    take_last_reference,
)


def compare_decode_linear(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    activation: str | None,
    surrounded: bool,
    fp8: bool = False,
) -> None:
    """Shape is (rows, out, in). `surrounded`: norm and bias before, residual sum and squares after, NaNs behind x."""
    rows, out_size, in_size = shape
    x = torch.full((rows + (128 if surrounded else 0), in_size), torch.nan, device=device, dtype=dtype)[:rows]
    x.normal_()
    weight = torch.randn(out_size * (2 if activation else 1), in_size, device=device, dtype=dtype) / in_size**0.5
    weight, scale = quantize_rows(weight) if fp8 else (weight, None)
    x, x_scale = quantize_rows(x) if fp8 and rows > 1 and device != "cpu" else (x, None)
    got = torch.randn(rows, out_size, device=device, dtype=dtype)
    expected = got.clone()
    workspace = Workspace(torch.device(device))
    squares = (x.double().square().sum(1) * SQUARES_SCALE).long()
    sums = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2)]
    bias = None if activation else torch.randn(out_size, device=device, dtype=dtype)
    kept = torch.zeros(rows, 2, in_size, device=device, dtype=dtype)
    epilogues = [
        Epilogue(
            squares if surrounded else None,
            1e-5,
            weight_scale=scale,
            x_scale=x_scale,
            bias=bias if surrounded else None,
            activation=activation,  # type: ignore[arg-type]
            residual=surrounded,
            squares_out=total if surrounded else None,
            keep=kept[:, 1] if surrounded and x_scale is None else None,
        )
        for total in sums
    ]
    for _ in range(2):  # the second run finds what the first left in the workspace
        decode_linear(x, weight, got, epilogues[0], workspace)
        decode_linear_reference(x, weight, expected, epilogues[1])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sums[0].double(), sums[1].double(), rtol=1e-2, atol=rows * SQUARES_SCALE)
        expected.copy_(got)
    assert epilogues[0].keep is None or torch.equal(kept[:, 1], x)
    assert not kept[:, 0].any()
    assert not workspace.arrivals.any()


def compare_quantize_rows(device: str, dtype: torch.dtype, rows: int, size: int) -> None:
    """8 bits and scales, one row all zeros."""
    x = torch.randn(rows, size, device=device, dtype=dtype)
    x[0] = 0
    got, scale = quantize_rows(x)
    expected, expected_scale = quantize_rows(x.cpu())
    torch.testing.assert_close(scale.cpu(), expected_scale)
    difference = (got.cpu().float() - expected.float()).abs()
    next_number = (expected.float().abs() / 8).clamp(min=2**-9)  # the smallest numbers of all are 2**-9 apart
    assert (difference <= next_number).all()  # a division may be rounded the other way


def compare_decode_attention(
    device: str,
    dtype: torch.dtype,
    positions: list[int],
    shape: HeadShape,
    page_size: int,
    normed: bool = False,
    cache_dtype: torch.dtype | None = None,
    drafts: list[int] | None = None,
    leaves: int = 0,
    as_many: bool = False,
) -> None:
    """A new token of each request at each of `positions` (-1: none) against the reference, outputs and cache.

    `as_many`: the way of steps of many rows.
    `drafts`: how many drafted tokens each has, and with them rows behind its own; one empty row comes last. Behind
    those that have some are `leaves` rows for places among them.
    """
    requests, width = len(positions), (max(positions) + 64) // page_size + 5
    pages = torch.randn(requests * width + 1, 2, shape.kv_heads, page_size, shape.head_dim, device=device, dtype=dtype)
    pages = pages.to(cache_dtype or dtype)
    table = (torch.randperm(requests * width, device=device) + 1).view(requests, width).int()
    longest = max(positions) + 1 + max(drafts or [0])
    angles = torch.arange(longest, device=device).unsqueeze(1) * 0.9 ** torch.arange(
        shape.rotary_dim // 2, device=device
    )
    rope = RopeTables(angles.cos(), angles.sin())
    norms = (torch.rand(2, shape.head_dim, device=device, dtype=dtype) + 0.5).unbind() if normed else None
    drafted = None
    if drafts is not None:
        rows = [
            (row, position + at)
            for row, position in enumerate(positions)
            for at in (
                *range(drafts[row] + 1),
                *(leaf % drafts[row] + 1 for leaf in range(leaves if drafts[row] else 0)),
            )
        ]
        firsts = [index - at for row in range(requests) for at, index in enumerate(_indices(rows, row))]
        columns = ([row for row, _ in rows] + [-1], [*firsts, -1])
        drafted = DraftRows(*(torch.tensor(column, dtype=torch.int32, device=device) for column in columns))
        positions = [position for _, position in rows] + [-1]
    batch = len(positions)
    qkv = torch.randn(batch, (shape.group + 2) * shape.kv_heads * shape.head_dim, device=device, dtype=dtype)
    got = torch.zeros(batch, shape.kv_heads * shape.group * shape.head_dim, device=device, dtype=dtype)
    expected, expected_pages = got.clone(), pages.clone()
    at = torch.tensor(positions, dtype=torch.int32, device=device)
    workspace = AttentionWorkspace(shape, batch, dtype, torch.device(device), drafted=drafted is not None)
    if as_many:
        workspace.few = workspace.many
    for _ in range(2):  # the second run finds what the first left in the workspace
        plan_decode_attention(at, workspace, drafted)
        qkv = qkv.clone()  # a kernel ahead that is not the plan's, as projections are
        fused_decode_attention(qkv, pages, table, at, rope, norms, 1e-6, got, shape, workspace, drafted)
    fused_decode_attention_reference(qkv, expected_pages, table, at, rope, norms, 1e-6, expected, shape, drafted)
    tolerance = 0.13 if cache_dtype is not None else 1e-5 if dtype == torch.float32 else 2e-2  # 0.13: 3 bits' last one
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    if cache_dtype is None or device != "cpu":  # Triton's interpreter rounds to float8 carelessly
        torch.testing.assert_close(pages.float(), expected_pages.float(), rtol=tolerance, atol=tolerance)
    assert not workspace.arrivals.any()


def _indices(rows: list[tuple[int, int]], request: int) -> list[int]:
    return [index for index, (row, _) in enumerate(rows) if row == request]


def compare_begin_decode(device: str, dtype: torch.dtype, batch: int, hidden: int) -> None:
    """Embeddings, their squares, and zeros for the norms to come."""
    tokens = torch.randint(50, (batch,), device=device)
    embedding = torch.randn(50, hidden, device=device, dtype=dtype)
    got, expected = (torch.zeros(batch, hidden, device=device, dtype=dtype) for _ in range(2))
    squares = [torch.ones(5, batch, dtype=torch.int64, device=device) for _ in range(2)]
    begin_decode(tokens, embedding, 2.0, got, squares[0])
    begin_decode_reference(tokens, embedding, 2.0, expected, squares[1])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(squares[0].double(), squares[1].double(), rtol=1e-5, atol=0)


def compare_row_changes(device: str, moved: int, num_cells: int) -> None:
    """So many of some rows take over each other's state, as many get a new one; cells of the block table change."""
    requests, parameters, width = 12, 3, 90
    order = torch.randperm(requests - 1)
    rows = torch.randint(50, (STATE_FIELDS + parameters, 2 * moved))
    rows[0], rows[1] = order[: 2 * moved], -1
    rows[1, :moved] = rows[0, :moved].roll(1)
    cells = torch.stack((torch.randperm(requests * width)[:num_cells], torch.randint(999, (num_cells,))))
    limits = torch.stack((order[:moved], torch.randint(999, (moved,))))
    changes = torch.cat((rows.flatten(), cells.flatten(), limits.flatten()))
    state = [torch.randint(99, (requests,)), *torch.randint(99, (2, requests)).int(), torch.zeros(requests, 1).long()]
    others = [
        torch.randint(99, (parameters, requests)),
        torch.zeros(requests, width).int(),
        torch.zeros(requests).int(),
    ]
    found = []
    for on, change in ((device, launch_row_changes), ("cpu", row_changes_reference)):
        own, after = RequestState(*(column.clone().to(on) for column in state)), [x.clone().to(on) for x in others]
        change(requests - 1, changes.to(on), (2 * moved, num_cells, moved), own, *after)
        found.append([column.tolist() for column in (*own.columns, *after)])
    assert found[0] == found[1]


def compare_draft_rows(device: str, lengths: list[int], max_rows: int, size: int) -> None:
    """Rows of drafts of these lengths, in the order of a shuffled block table; drafts stand to random depths.

    Some are a head's, which the requests' state holds.
    """
    requests, generator = len(lengths), torch.Generator().manual_seed(sum(lengths))

    def random_state(high: int) -> torch.Tensor:
        return torch.randint(high, (requests + 2,), generator=generator)

    tokens, positions, generated = random_state(3), random_state(900).int(), random_state(80).int()
    states, stepped = [], []
    guesses = torch.randint(2, (requests + 2, 4 * CHOICES), generator=generator)
    owners = torch.randperm(requests + 2, generator=generator)[:requests].tolist()
    layout = torch.full((4, max_rows), -1, dtype=torch.int32)
    at = 0
    for owner, length in zip(owners, lengths, strict=True):
        layout[0, at : at + length + 1], layout[1, at : at + length + 1] = owner, at
        layout[2, at : at + length + 1] = torch.randint(2, (length + 1,), generator=generator)
        layout[3, at : at + length + 1] = torch.arange(length + 1)
        if owner % 2 and length > 1:
            tree = [*chain(min(length - 1, 4)), *[guess_at(place, choice) for place in range(4) for choice in (1, 2)]]
            draft = torch.tensor(tree[:length])
            layout[2, at + 1 : at + len(draft) + 1] = draft
            layout[3, at + 1 : at + len(draft) + 1] = torch.tensor(depths_of(tree[:length]))
        at += length + 1
    sampled = torch.randint(2, (size,), generator=generator)
    table = torch.randperm((requests + 2) * 60).view(-1, 60).int()
    pages = torch.randn(2, table.numel(), 2, 3, 16, 8)
    for on, expand, accept, move in (
        (device, expand_rows, accept_rows, move_leaf),
        ("cpu", expand_rows_reference, accept_rows_reference, move_leaf_reference),
    ):
        state = RequestState(*(column.clone().to(on) for column in (tokens, positions, generated, guesses)))
        rows = StepRows(max_rows, torch.device(on))
        rows.layout.copy_(layout)
        expand(state, rows)
        stepped.append([column.tolist() for column in (rows.tokens, rows.positions, rows.generated)])
        report = torch.zeros(size, 2, dtype=torch.int64, pin_memory=on == "cuda")
        accept(sampled.to(on), rows, state, report)
        after_move = pages.clone().to(on)
        move(after_move, table.to(on), rows, state, requests + 2)
        # the report comes last: it may be the host's memory, and copies of what is before it wait for the device
        after = (*state.columns, rows.followers[:size], rows.last[: requests + 2], after_move, report)
        states.append([column.tolist() for column in after])
    assert stepped[0] == stepped[1]
    assert states[0] == states[1]
    assert states[0][1] != positions.tolist()


def compare_mask_logits(device: str, masked: list[int], rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    """These of all rows, at random; the first of them loses all its tokens, the last one none."""
    logits = torch.randn(rows, vocabulary).to(dtype)
    masks = torch.randint(-(2**31), 2**31, (len(masked), -(-vocabulary // 32))).int()
    masks[0], masks[-1] = 0, -1
    got = logits.to(device)
    launch_mask_logits(got, torch.tensor(masked, device=device), masks.to(device))
    mask_logits_reference(logits, torch.tensor(masked), masks)
    assert torch.equal(got.cpu(), logits)


def compare_guesses(device: str, dtype: torch.dtype, requests: int, vocabulary: int, hidden: int) -> None:
    """The kernels of a draft head: what it reads, which rows it goes on from, and what it takes for likely."""
    torch.manual_seed(requests)
    rows, width = 3 * requests, 2 * hidden
    embedding, states = torch.randn(50, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
    tokens, attended = torch.randint(50, (rows,)), torch.randn(rows, width).to(dtype)
    last, positions = torch.randint(rows, (requests,)).int(), torch.randint(3, 90, (requests,)).int()
    positions[0] = -1 if requests > 1 else 5
    limits, logits = positions + torch.randint(3, (requests,)).int(), torch.randn(requests, vocabulary)
    logits[:, vocabulary // 2] = logits[:, vocabulary // 3] = 9.0  # the first of two equals
    found = []
    for on, begin, take, pick in (
        (device, begin_guess, take_last, pick_guess),
        ("cpu", begin_guess_reference, take_last_reference, pick_guess_reference),
    ):

        def there(tensor: torch.Tensor, on: str = on) -> torch.Tensor:
            return tensor.clone().to(on)

        inputs = torch.empty(rows, 2 * hidden, dtype=dtype, device=on)
        begin(there(tokens), there(embedding), there(states), 1e-5, inputs)
        own = (
            torch.zeros(requests, hidden, dtype=dtype, device=on),
            torch.zeros(requests, width, dtype=dtype, device=on),
        )
        squares = torch.ones(2, requests, dtype=torch.int64, device=on)
        own_positions = torch.zeros(requests, dtype=torch.int32, device=on)
        take((there(states), there(attended)), there(last), there(positions), own, squares, own_positions)
        zeroed = squares.clone()
        guesses, own_tokens = (
            torch.zeros(requests, 4 * CHOICES, dtype=torch.int64, device=on),
            there(tokens[:requests]),
        )
        squares += 1
        for _ in range(2):
            pick(
                there(logits), there(torch.arange(vocabulary) + 7), there(positions), there(limits), guesses,
                own_positions, own_tokens, squares,
            )  # fmt: skip
        found.append([x.cpu() for x in (inputs, *own, zeroed, squares, own_positions, guesses, own_tokens)])
    for mine, theirs in zip(*found, strict=True):
        tolerance = 2e-2 if mine.is_floating_point() and dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    assert int(found[0][6][-1, 0]) == vocabulary // 3 + 7
