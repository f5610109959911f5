"""What the Gluon kernels for Hopper GPUs call by names that differ between releases of Triton (3.6 to 3.9)."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Start a copy of a descriptor's block to shared memory, which a barrier hears of."""
