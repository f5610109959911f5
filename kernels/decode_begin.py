"""The first kernel of a decode step: the newest tokens' embeddings become the residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from headrace.kernels.epilogue import SQUARES_SCALE
from headrace.kernels.launch import dependent_launch, power_of_two


def begin_decode(
    tokens: torch.Tensor, embedding: torch.Tensor, scale: float, residual: torch.Tensor, squares: torch.Tensor
) -> None:
    """Look the tokens up, and prepare the sums of squares of a step's norms.

    residual [B, H] = embedding[tokens] * scale; squares int64 [norms, B]: the first row is filled, the others zeroed.
    tokens int64 [B]; embedding [vocabulary, H].
    """
    batch, hidden = residual.shape
    _begin_kernel[(batch,)](
        tokens, embedding, residual, squares, batch, scale, squares.stride(0),
        HIDDEN=hidden, HIDDEN_PADDED=power_of_two(hidden), NORMS=squares.shape[0],
        NORMS_PADDED=power_of_two(squares.shape[0]), SCALE=SQUARES_SCALE, num_warps=4, **dependent_launch(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _begin_kernel(
    tokens_ptr, embedding_ptr, residual_ptr, squares_ptr, batch, scale, squares_stride,
    HIDDEN: tl.constexpr, HIDDEN_PADDED: tl.constexpr, NORMS: tl.constexpr, NORMS_PADDED: tl.constexpr,
    SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    h = tl.arange(0, HIDDEN_PADDED)
    token = tl.load(tokens_ptr + row)
    x = tl.load(embedding_ptr + token * HIDDEN + h, mask=h < HIDDEN, other=0.0)
    stored = (x.to(tl.float32) * scale).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + row.to(tl.int64) * HIDDEN + h, stored, mask=h < HIDDEN)
    value = stored.to(tl.float32)
    norm = tl.arange(0, NORMS_PADDED)
    first = (tl.sum(value * value, 0) * SCALE).to(tl.int64)
    tl.store(squares_ptr + norm * squares_stride + row, tl.where(norm == 0, first, 0), mask=norm < NORMS)
