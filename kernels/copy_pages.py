"""Copy blocks of memory of one device to other places, in one pass."""

from __future__ import annotations

import torch

from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import tl, triton

WORDS_A_PROGRAM = 2048


def copy_blocks(source: torch.Tensor, target: torch.Tensor, moves: torch.Tensor) -> None:
    """target[to] = source[from] for each (from, to) of `moves`, int32 or int64 [N, 2], N > 0.

    Source and target are uint8 [rows, bytes], bytes a multiple of 8.
    """
    if not source.is_cuda:
        target[moves[:, 1].long()] = source[moves[:, 0].long()]
        return
    words = source.shape[1] // 8
    _launch_copy(
        (len(moves), -(-words // WORDS_A_PROGRAM), 1),
        (source.view(torch.int64), target.view(torch.int64), moves),
        (words, WORDS_A_PROGRAM),
        num_warps=8,
    )


@triton.jit
def _copy_kernel(source_ptr, target_ptr, moves_ptr, WORDS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    block = tl.load(moves_ptr + 2 * tl.program_id(0)).to(tl.int64)
    place = tl.load(moves_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    data = tl.load(source_ptr + block * WORDS + at, mask=at < WORDS)
    tl.store(target_ptr + place * WORDS + at, data, mask=at < WORDS)


_launch_copy = Launcher(_copy_kernel)
