"""Kernels of decode steps on a GPU in plain torch, for tests to compare them with."""

from __future__ import annotations

import torch

from headrace.kernels.attention_plan import DraftRows, HeadShape
from headrace.kernels.draft_rows import RequestState, StepRows
from headrace.kernels.draft_tree import CHOICES, standing_row
from headrace.kernels.epilogue import SQUARES_SCALE, Epilogue
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.rope import RopeTables


def fused_decode_attention_reference(
    qkv: torch.Tensor,
    layer_pages: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    rope: RopeTables,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    out: torch.Tensor,
    shape: HeadShape,
    drafted: DraftRows | None = None,
) -> None:
    """`fused_decode_attention` in plain torch, row by row, in float64."""
    heads, kv_heads, page_size = shape.kv_heads * shape.group, shape.kv_heads, layer_pages.shape[3]
    rows = range(len(positions))
    owners, firsts = (rows, rows) if drafted is None else (drafted.owners.tolist(), drafted.firsts.tolist())
    at = positions.tolist()
    for row, (owner_row, first, position) in enumerate(zip(owners, firsts, at, strict=True)):
        if position < 0:
            continue
        queries, key, value = qkv[row].double().view(-1, shape.head_dim).split((heads, kv_heads, kv_heads))
        if norms is not None:
            queries, key = (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.double()
                for x, norm in zip((queries, key), norms, strict=True)
            )
        queries, key = (_rotate(x, rope, position, shape.rotary_dim) for x in (queries, key))
        slot = at[first] + row - first
        page, offset = int(block_table[owner_row, slot // page_size]), slot % page_size
        layer_pages[page, 0, :, offset] = key.to(layer_pages.dtype)
        layer_pages[page, 1, :, offset] = value.to(layer_pages.dtype)
        pages = layer_pages[block_table[owner_row, : slot // page_size + 1].long()].double()
        chain = [other for other in range(first, row) if at[other] == at[first] + other - first < position]
        seen = [*range(at[first]), *(at[first] + other - first for other in chain), slot]
        keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, seen]
        scores = queries.view(kv_heads, shape.group, -1) @ keys.transpose(1, 2) * shape.head_dim**-0.5
        out[row] = (scores.softmax(-1) @ values).flatten()


def _rotate(x: torch.Tensor, rope: RopeTables, position: int, rotary_dim: int) -> torch.Tensor:
    cos, sin = rope.cos[position].double(), rope.sin[position].double()
    first, second, rest = x.split((rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def begin_decode_reference(
    tokens: torch.Tensor, embedding: torch.Tensor, scale: float, residual: torch.Tensor, squares: torch.Tensor
) -> None:
    """`begin_decode` in plain torch."""
    residual.copy_(embedding[tokens] * scale)
    squares.zero_()
    squares[0] = (residual.double().square().sum(1) * SQUARES_SCALE).long()


def decode_linear_reference(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
    """`decode_linear` in plain torch."""
    y = x.double() @ weight.double().T
    if epilogue.weight_scale is not None:
        y *= epilogue.weight_scale
    if epilogue.x_scale is not None:
        y *= epilogue.x_scale.unsqueeze(1)
    if epilogue.squares is not None:
        mean = epilogue.squares.double() / SQUARES_SCALE / x.shape[1]
        y *= torch.rsqrt(mean + epilogue.eps).unsqueeze(1)
    if epilogue.bias is not None:
        y += epilogue.bias
    if epilogue.activation is not None:
        y = gated_activation(y, epilogue.activation)
    out.copy_(y + out if epilogue.residual else y)
    if epilogue.squares_out is not None:
        epilogue.squares_out.add_((out.double().square().sum(1) * SQUARES_SCALE).long())


def begin_guess_reference(
    tokens: torch.Tensor, embedding: torch.Tensor, states: torch.Tensor, eps: float, inputs: torch.Tensor
) -> None:
    """`begin_guess` in plain torch."""
    pairs = torch.stack((embedding[tokens], states), 1).double()
    inputs.copy_((pairs * torch.rsqrt(pairs.square().mean(-1, keepdim=True) + eps)).flatten(1))


def take_last_reference(
    rows: tuple[torch.Tensor, torch.Tensor],
    last: torch.Tensor,
    positions: torch.Tensor,
    requests: tuple[torch.Tensor, torch.Tensor],
    squares: torch.Tensor,
    own_positions: torch.Tensor,
) -> None:
    """`take_last` in plain torch."""
    for source, target in zip(rows, requests, strict=True):
        target.copy_(source[last[: len(target)].long()])
    squares.zero_()
    own_positions.copy_((positions[: len(own_positions)] - 1).clamp(min=-1))


def pick_guess_reference(
    logits: torch.Tensor,
    vocabulary: torch.Tensor,
    positions: torch.Tensor,
    limits: torch.Tensor,
    guesses: torch.Tensor,
    own_positions: torch.Tensor,
    own_tokens: torch.Tensor,
    squares: torch.Tensor,
) -> None:
    """`pick_guess` in plain torch."""
    tokens = vocabulary[logits.sort(stable=True, dim=-1, descending=True).indices[:, :CHOICES]]
    for row, own in enumerate(own_positions.tolist()):
        if own >= 0:
            place = (own + 1 - int(positions[row])) * CHOICES
            guesses[row, place : place + CHOICES] = tokens[row]
            own_tokens[row] = tokens[row, 0]
            own_positions[row] = own + 1 if own + 1 < int(limits[row]) else -1
    squares.zero_()


def expand_rows_reference(state: RequestState, rows: StepRows) -> None:
    """`expand_rows` in plain torch."""
    owners, _, drafts, depths = rows.layout.long()
    guessed = (owners >= 0) & (depths > 0) & (drafts < 0)
    drafts[guessed] = state.guesses[owners[guessed], -1 - drafts[guessed]]
    rows.tokens.copy_(torch.where(depths == 0, state.tokens[owners], drafts).where(owners >= 0, 0))
    rows.positions.copy_((state.positions[owners] + depths).where(owners >= 0, -1))
    rows.generated.copy_((state.generated[owners] + depths).where(owners >= 0, 0))


def accept_rows_reference(sampled: torch.Tensor, rows: StepRows, state: RequestState, report: torch.Tensor) -> None:
    """`accept_rows` in plain torch, request by request."""
    owners, firsts, _, depths = rows.layout[:, : len(sampled)].tolist()
    drafts, drawn = rows.tokens.tolist(), sampled.tolist()
    rows.followers[: len(sampled)] = sampled
    report.copy_(torch.stack((sampled, rows.tokens[: len(sampled)]), 1))
    for owner, first in {(o, f) for o, f in zip(owners, firsts, strict=True) if o >= 0}:
        last = standing_row(first, firsts.count(first), drafts, depths, drawn)
        state.tokens[owner] = drawn[last]
        state.positions[owner] += depths[last] + 1
        state.generated[owner] += depths[last] + 1
        rows.last[owner] = last


def move_leaf_reference(
    pages: torch.Tensor, block_table: torch.Tensor, rows: StepRows, state: RequestState, count: int
) -> None:
    """`move_leaf` in plain torch."""
    size = pages.shape[4]
    for request in range(count):
        last, position = int(rows.last[request]), int(state.positions[request]) - 1
        if position >= 0:
            slot = position - int(rows.layout[3, last]) + last - int(rows.layout[1, last])
            source, target = (int(block_table[request, at // size]) for at in (slot, position))
            pages[:, target, :, :, position % size] = pages[:, source, :, :, slot % size]
