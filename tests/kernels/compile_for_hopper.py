"""Compiles the Gluon kernels for compute capability 9.0, without a GPU; run by `test_hopper_kernels.py`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

SHARED_MEMORY = 232448
"""Bytes that a program may have on an H100."""


def descriptor(dtype: str, block: list[int]) -> str:
    """The type of a tensor descriptor."""
    element = {"bf16": gl.bfloat16, "i16": gl.int16}.get(dtype, gl.float8e4nv)
    return f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, element)!r}>"


def compile_for_hopper(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> int:
    """Bytes of shared memory. Arguments that are in neither mapping are None."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    names = list(signature)
    values = {(names.index(name),): constants.get(name) for name in names if signature[name] == "constexpr"}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    source = GluonASTSource(kernel, signature, values, aligned)
    return int(compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared)


def compile_ring(rows: int, gated: bool, split: int, dtype: str) -> int:
    """A projection with all that can surround it."""
    from headrace.kernels import ring_linear
    from headrace.kernels.epilogue import MAX_SHARED_TILES, SQUARES_SCALE

    ring = ring_linear._RINGS[rows]
    block_k = ring.line // (2 if dtype == "bf16" else 1)
    types = {
        "x": descriptor(dtype, [rows, block_k]),
        "out_ptr": "*bf16",
        "partial_ptr": "*fp32",
        "counters_ptr": "*i32",
    }
    types["weight"] = descriptor(dtype, [4, 2, 8, block_k] if gated else [64, block_k])
    types |= {"squares_ptr": "*i64", "squares_out_ptr": "*i64", "bias_ptr": "*bf16", "inverse_k": "fp32", "eps": "fp32"}
    types |= dict.fromkeys(("M", "tiles", "steps"), "i32")
    types |= {} if dtype == "bf16" else {"weight_scale_ptr": "*fp32", "x_scale_ptr": "*fp32"}
    constants = {"N": 4096, "ACTIVATION": "silu" if gated else None, "RESIDUAL": not gated, "SCALE": SQUARES_SCALE}
    constants |= {"STAGES": ring.stages, "SPLIT": split, "ROWS": 64, "PIECE": ring_linear.PIECE}
    constants |= {"MAX_SHARED_TILES": MAX_SHARED_TILES, "num_warps": 4}
    return compile_for_hopper(ring_linear._ring_kernel, types, constants, num_warps=4, launch_pdl=True)


def compile_register(rows: int, gated: bool, k: int) -> int:
    """The same where weights lie in registers."""
    from headrace.kernels import register_linear
    from headrace.kernels.epilogue import SQUARES_SCALE

    pointers = ("x_ptr", "weight_ptr", "out_ptr", "bias_ptr", "keep_ptr")
    types = dict.fromkeys(pointers, "*bf16") | {"squares_ptr": "*i64", "squares_out_ptr": "*i64"}
    types |= dict.fromkeys(("M", "N", "K", "keep_stride"), "i32") | {"inverse_k": "fp32", "eps": "fp32"}
    constants: dict[str, Any] = {"ACTIVATION": "silu" if gated else None, "RESIDUAL": not gated, "SCALE": SQUARES_SCALE}
    constants |= {"ROWS": register_linear.ROWS, "BLOCK_K": register_linear.BLOCK_K, **register_linear.tiling(rows, k)}
    options = {"num_warps": constants["num_warps"], "maxnreg": register_linear.MAX_REGISTERS, "launch_pdl": True}
    return compile_for_hopper(register_linear._register_kernel, types, constants, **options)


def compile_attention(dim: int, group: int) -> int:
    """Heads of one size."""
    from headrace.kernels import hopper_attention as attention

    types = {"q_rows": descriptor("bf16", [attention.HALF_ROWS // group, group, dim]), "out_ptr": "*bf16"}
    types |= {"kv_rows": descriptor("bf16", [attention.BLOCK_N, dim]), "tiles_ptr": "*i32", "starts_ptr": "*i32"}
    types["scale"] = "fp32"
    constants = {"KV_HEADS": 8, "GROUP": group, "num_warps": attention.COMPUTING_WARPS}
    names = ("STAGES", "LOADING_WARPS", "COMPUTING_REGISTERS", "LOADING_REGISTERS")
    constants |= {name: getattr(attention, name) for name in names}
    options = {"num_warps": attention.COMPUTING_WARPS, "maxnreg": attention.REGISTERS}
    return compile_for_hopper(attention._attention_kernel, types, constants, **options)


def compile_decode_attention(cache: str, dim: int, group: int) -> int:
    """Heads of one size; `cache`: the type of what is cached."""
    from headrace.kernels import hopper_decode_attention as attention
    from headrace.kernels.attention_plan import SHARED_BLOCK

    units = descriptor("bf16", [SHARED_BLOCK, dim]) if cache == "bf16" else descriptor("i16", [SHARED_BLOCK, dim // 2])
    types = {"cached": units, "qkv_ptr": "*bf16", "pages_ptr": f"*{cache}", "out_ptr": "*bf16", "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("table_ptr", "positions_ptr", "first_units_ptr", "arrivals_ptr"), "*i32")
    types |= dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32") | dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), "*bf16")
    types |= {"batch": "i32", "table_stride": "i32", "scale": "fp32", "eps": "fp32"}
    constants = {"KV_HEADS": 8, "GROUP": group, "ROTARY": dim, "PAGE": 16, "BATCH": 256, "TILE": 16, "STORED": group}
    constants |= {"MERGED": 4, "STAGES": attention.STAGES, "num_warps": 1}
    return compile_for_hopper(attention._ring_kernel, types, constants, num_warps=1, launch_pdl=True)


def main() -> None:
    """Raises what the compiler says, or `AssertionError` where shared memory does not suffice."""
    cuda = mock.patch.multiple(torch.cuda, is_available=lambda: True, get_device_capability=lambda *_: (9, 0))
    with cuda:  # or modules would define no kernels
        found = [
            compile_ring(16, True, 1, "bf16"),
            compile_ring(16, False, 1, "bf16"),
            compile_ring(64, False, 2, "bf16"),
        ]
        found += [compile_register(4, True, 576), compile_register(32, False, 1536)]
        found += [compile_ring(128, True, 1, "fp8e4nv"), compile_attention(128, 4), compile_attention(64, 1)]
        found += [compile_decode_attention("bf16", 64, 4), compile_decode_attention("fp8e4nv", 128, 4)]
    assert max(found) <= SHARED_MEMORY, found
    print(f"{len(found)} kernels compiled")


if __name__ == "__main__":
    main()
