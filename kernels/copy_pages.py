"""Copy blocks of memory of one device to other places, in one pass."""

from __future__ import annotations

import torch

from headrace.kernels.launcher import Launcher
from headrace.kernels.optional_triton import tl, triton

WORDS_A_PROGRAM = 2048


def copy_blocks(source: torch.Tensor, blocks: torch.Tensor, target: torch.Tensor, places: torch.Tensor) -> None:
    """target[places[i]] = source[blocks[i]]; both uint8 [rows, bytes], bytes a multiple of 8; int64 indices."""
    if not source.is_cuda:
        target[places] = source[blocks]
        return
    words = source.shape[1] // 8
    _launch_copy(
        (len(blocks), -(-words // WORDS_A_PROGRAM), 1),
        (source.view(torch.int64), blocks, target.view(torch.int64), places),
        (words, WORDS_A_PROGRAM),
        num_warps=8,
    )


@triton.jit
def _copy_kernel(source_ptr, blocks_ptr, target_ptr, places_ptr, WORDS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    block = tl.load(blocks_ptr + tl.program_id(0))
    place = tl.load(places_ptr + tl.program_id(0))
    data = tl.load(source_ptr + block * WORDS + at, mask=at < WORDS)
    tl.store(target_ptr + place * WORDS + at, data, mask=at < WORDS)


_launch_copy = Launcher(_copy_kernel)
