"""Each kernel alone on a GPU: microseconds, TFLOP/s, GB/s; with `--sweep` the tilings of prefill attention, too.

`python -m headrace.loadtest.kernel_bench [--only prefill rope ...] [--sweep] [--head-dims 128 64]` prints a table and
writes loadtest/results/kernels.json (kernels-sweep.json). Without a GPU it runs tiny sizes in Triton's interpreter, to
show that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
import torch.nn.functional as F

from headrace.engine.device_sampler import DeviceSampler
from headrace.engine.sampler import SamplingRow
from headrace.kernels.gated_activation import gated_activation
from headrace.kernels.prefill_attention import Tiling, attend_packed, attend_paged, choose_tiling, plan_tiles
from headrace.kernels.rms_norm import add_rms_norm
from headrace.kernels.rope import RopeTables
from headrace.kernels.rope_cache import rope_cache
from headrace.loadtest.report import Figure, publish
from headrace.messages.request import SamplingParams

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter multiplies bfloat16 wrongly
DRY_RUN = "" if ON_GPU else "-dry-run"
BANDWIDTH = 3.05e12
"""Bytes a second that an H100 reads."""
CALLS, REPLAYS = 10, 5
COMPILERS = 12
KINDS = ["packed", "paged"]


def seconds(function: Callable[[], object]) -> float:
    """The median time of one call: CUDA events around replays of a graph of several."""
    if not ON_GPU:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    times: list[float] = []
    for _ in range(REPLAYS + 1):
        start_event, end_event = (_event() for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        times.append(start_event.elapsed_time(end_event) / 1000 / CALLS)
    return statistics.median(times[1:])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Prompts:
    """Equal requests of one model's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    count: int
    queries: int
    prefix: int = 0

    @property
    def flops(self) -> float:
        """Two products of each query with the keys that it sees."""
        seen = self.queries * self.prefix + self.queries * (self.queries + 1) / 2
        return 4.0 * self.head_dim * self.heads * self.count * seen

    def __str__(self) -> str:
        prefix = f" after {self.prefix}" if self.prefix else ""
        return f"{self.heads}/{self.kv_heads} heads of {self.head_dim}, {self.count} x {self.queries}{prefix}"


def all_prompts(head_dims: Sequence[int]) -> Iterator[Prompts]:
    """The shapes of models with these head sizes: 128 is 8B, 64 is 135M."""
    if not ON_GPU:
        yield from (Prompts(4, 2, 64, 2, 20), Prompts(4, 2, 64, 1, 5, 9))
        return
    for head_dim, heads, kv_heads in ((128, 32, 8), (64, 9, 3), (256, 16, 8), (80, 32, 32), (96, 32, 32)):
        if head_dim in head_dims:
            lengths = ((1, 128), (1, 512), (1, 2048), (1, 8192), (32, 2048), (1, 2048, 6144), (4, 16, 8192))
            yield from (Prompts(heads, kv_heads, head_dim, *numbers) for numbers in lengths)


def packed_call(prompts: Prompts, tiling: Tiling) -> Callable[[], object]:
    """Attention over packed projections."""
    tokens, heads, kv_heads, head_dim = (
        prompts.count * prompts.queries,
        prompts.heads,
        prompts.kv_heads,
        prompts.head_dim,
    )
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=DEVICE, dtype=DTYPE)
    queries = torch.randn(tokens, heads, head_dim, device=DEVICE, dtype=DTYPE)
    table = torch.zeros(prompts.count, 1, dtype=torch.int32, device=DEVICE)
    lengths = [prompts.queries] * prompts.count
    plan = plan_tiles(table, lengths, lengths, heads // kv_heads, tiling)
    return lambda: attend_packed(queries, qkv, plan, head_dim**-0.5, kv_heads)


def paged_call(prompts: Prompts, tiling: Tiling, page_size: int = 16) -> Callable[[], object]:
    """Attention over scattered pages."""
    context = prompts.prefix + prompts.queries
    width = -(-context // page_size)
    shape = (prompts.count * width, 2, prompts.kv_heads, page_size, prompts.head_dim)
    pages = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    table = torch.randperm(prompts.count * width, device=DEVICE).view(prompts.count, width).int()
    queries = torch.randn(prompts.count * prompts.queries, prompts.heads, prompts.head_dim, device=DEVICE, dtype=DTYPE)
    lengths, contexts = [prompts.queries] * prompts.count, [context] * prompts.count
    plan = plan_tiles(table, lengths, contexts, prompts.heads // prompts.kv_heads, tiling)
    return lambda: attend_paged(queries, pages, plan, prompts.head_dim**-0.5)


def attention_call(prompts: Prompts, kind: str, tiling: Tiling) -> Callable[[], object]:
    """`kind` is packed or paged."""
    return packed_call(prompts, tiling) if kind == "packed" else paged_call(prompts, tiling)


def attention_figures(name: str, prompts: Prompts, call: Callable[[], object]) -> Iterator[Figure]:
    """Time and arithmetic rate; a tiling that does not fit the chip is a figure without a value."""
    try:
        duration = seconds(call)
    except Exception as error:
        yield Figure(f"{name}, {prompts}", None, "TFLOP/s", why=f"{type(error).__name__}: {str(error)[:80]}")
        return
    yield Figure(f"{name}, {prompts}", duration * 1e6, "us")
    yield Figure(f"{name}, {prompts}", prompts.flops / duration / 1e12, "TFLOP/s")


def bench_prefill(head_dims: Sequence[int]) -> Iterator[Figure]:
    """The tables' tilings, beside torch's own fused attention where the prompts are whole."""
    for prompts in all_prompts(head_dims):
        for kind in ("paged",) if prompts.prefix else ("packed", "paged"):
            tiling = choose_tiling(
                prompts.head_dim, DTYPE, has_prefix=kind == "paged", tokens=prompts.count * prompts.queries
            )
            yield from attention_figures(f"prefill {kind}", prompts, attention_call(prompts, kind, tiling))
        if ON_GPU and not prompts.prefix:
            for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
                yield from attention_figures(f"torch {backend.lower()}", prompts, torch_call(prompts, backend))


def torch_call(prompts: Prompts, backend: str) -> Callable[[], object]:
    """Torch's attention over dense tensors, for comparison."""
    shapes = [(prompts.count, heads, prompts.queries, prompts.head_dim) for heads in (prompts.heads, prompts.kv_heads)]
    queries = torch.randn(shapes[0], device=DEVICE, dtype=DTYPE)
    keys, values = (torch.randn(shapes[1], device=DEVICE, dtype=DTYPE) for _ in range(2))

    def call() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend[backend]):
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)

    return call


def all_tilings(head_dim: int, kind: str) -> list[Tiling]:
    """What may be worth a try, by the shared memory it takes (227 KiB)."""
    found = []
    sizes = itertools.product(((64, 4), (128, 4), (128, 8)), (32, 64, 128), (2, 3, 4), (False, True))
    for (block_m, num_warps), block_n, num_stages, descriptors in sizes:
        bytes_shared = 2 * head_dim * (block_m + 2 * block_n * num_stages)
        fits = bytes_shared <= 227 * 1024 and block_m * head_dim <= num_warps * 32 * 128
        if fits and not (descriptors and kind == "paged") and not (block_n == 32 and head_dim < 256):
            found.append(Tiling(block_m, block_n, num_warps, num_stages, descriptors))
    return found if ON_GPU else [*found[:1], *found[-1:]]


def compile_tiling(work: tuple[Prompts, str, Tiling]) -> None:
    """Run one tiling once, so that the compiled kernel is in Triton's cache on disk."""
    try:
        attention_call(*work)()
        torch.cuda.synchronize()
    except Exception as error:  # the sweep reports it
        print(f"{work[1:]}: {type(error).__name__}")


def sweep_prefill(head_dims: Sequence[int], kinds: Sequence[str], lengths: Sequence[int]) -> Iterator[Figure]:
    """Every tiling for single prompts, whole and the last part of 8,192; compiled by several processes first."""
    work = [
        (prompts, kind, tiling)
        for prompts in all_prompts(head_dims)
        if not ON_GPU or (prompts.count == 1 and prompts.queries in lengths)
        for kind in kinds
        if not (prompts.prefix and kind == "packed")
        for tiling in all_tilings(prompts.head_dim, kind)
    ]
    if ON_GPU:
        context = multiprocessing.get_context("spawn")
        longest_last = {(kind, prompts.head_dim, tiling): (prompts, kind, tiling) for prompts, kind, tiling in work}
        with ProcessPoolExecutor(min(COMPILERS, os.cpu_count() or 1), mp_context=context) as pool:
            list(pool.map(compile_tiling, longest_last.values()))
    for prompts, kind, tiling in work:
        name = f"{kind} M{tiling.block_m} N{tiling.block_n} w{tiling.num_warps} s{tiling.num_stages}"
        name += " tma" if tiling.descriptors else ""
        yield from attention_figures(name, prompts, attention_call(prompts, kind, tiling))


def memory_figures(name: str, call: Callable[[int], object], num_bytes: int) -> Iterator[Figure]:
    """Time and bandwidth of what moves `num_bytes` of one of the sets of tensors that `call` names.

    Sets are taken in turn: together they are larger than the L2 cache.
    """
    turns = itertools.cycle(range(copies(num_bytes)))
    duration = seconds(lambda: call(next(turns)))
    yield Figure(name, duration * 1e6, "us")
    yield Figure(f"{name}, of {BANDWIDTH / 1e12} TB/s", num_bytes / duration / BANDWIDTH, "")


def copies(num_bytes: int) -> int:
    """How many sets of tensors defeat a cache of 50 MB, up to as many as there are calls."""
    return min(max(-(-(2**27) // max(num_bytes, 1)), 1), CALLS) if ON_GPU else 1


def bench_norms(head_dims: Sequence[int]) -> Iterator[Figure]:
    """The two elementwise kernels of a layer, in 8B's and 135M's sizes."""
    for rows, hidden, inner in ((1, 576, 1536), (1, 4096, 14336), (256, 4096, 14336), (8192, 4096, 14336)):
        if not ON_GPU and rows > 1:
            continue
        weight = torch.ones(hidden, device=DEVICE, dtype=DTYPE)
        norm_bytes, gate_bytes = 4 * rows * hidden * DTYPE.itemsize, 3 * rows * inner * DTYPE.itemsize
        sets = torch.randn(copies(norm_bytes), 2, rows, hidden, device=DEVICE, dtype=DTYPE)

        def norm(turn: int, sets: torch.Tensor = sets, weight: torch.Tensor = weight) -> None:
            add_rms_norm(sets[turn, 0], sets[turn, 1], weight, 1e-5)

        yield from memory_figures(f"add_rms_norm {rows} x {hidden}", norm, norm_bytes)
        gates = torch.randn(copies(gate_bytes), rows, 2 * inner, device=DEVICE, dtype=DTYPE)

        def gate(turn: int, gates: torch.Tensor = gates) -> None:
            gated_activation(gates[turn], "silu")

        yield from memory_figures(f"silu {rows} x {inner}", gate, gate_bytes)


def bench_rope(head_dims: Sequence[int]) -> Iterator[Figure]:
    """Rotation and cache write of one layer, in 8B's and 135M's sizes."""
    for tokens, heads, kv_heads, head_dim in (
        (1, 9, 3, 64),
        (256, 32, 8, 128),
        (2048, 32, 8, 128),
        (65536, 32, 8, 128),
    ):
        if not ON_GPU and tokens > 1:
            continue
        angles = torch.rand(8192, head_dim // 2, device=DEVICE)
        rope = RopeTables(angles.cos(), angles.sin())
        num_bytes = tokens * (2 * heads + 5 * kv_heads) * head_dim * DTYPE.itemsize
        width = (heads + 2 * kv_heads) * head_dim
        sets = torch.randn(copies(num_bytes), tokens, width, device=DEVICE, dtype=DTYPE)
        pages = torch.zeros(-(-tokens // 16), 2, kv_heads, 16, head_dim, device=DEVICE, dtype=DTYPE)
        slots = torch.arange(tokens, device=DEVICE)
        places = (torch.randperm(len(pages), device=DEVICE)[slots // 16], slots % 16)

        def call(
            turn: int,
            sets: torch.Tensor = sets,
            positions: torch.Tensor = slots % 8192,
            rope: RopeTables = rope,
            pages: torch.Tensor = pages,
            places: tuple[torch.Tensor, torch.Tensor] = places,
        ) -> None:
            rope_cache(sets[turn], positions, rope, None, 1e-5, pages, *places, keep_keys=True)

        yield from memory_figures(f"rope_cache {tokens} x {heads}/{kv_heads} x {head_dim}", call, num_bytes)


def bench_sampler(head_dims: Sequence[int]) -> Iterator[Figure]:
    """All rows greedy, drawn, or filtered; peaked logits as a trained model's, and flat ones, the worst case."""
    rows_by_kind: dict[str, tuple[float, dict[str, float]]] = {
        "greedy": (4.0, {"temperature": 0.0}),
        "drawn": (4.0, {}),
        "top-p 0.95": (4.0, {"top_p": 0.95}),
        "top-k 50, top-p 0.9": (4.0, {"top_k": 50, "top_p": 0.9}),
        "penalized, min-p 0.05": (4.0, {"min_p": 0.05, "repetition_penalty": 1.1}),
        "top-p 0.95 of flat logits": (0.5, {"top_p": 0.95}),
    }
    device = torch.device(DEVICE)
    for count, vocab_size in ((1, 49152), (1, 128256), (64, 128256), (256, 128256)) if ON_GPU else ((2, 300),):
        for kind, (scale, fields) in rows_by_kind.items():
            params = [SamplingParams(max_tokens=1, seed=row, **fields) for row in range(count)]  # type: ignore[arg-type]
            states = [SamplingRow.make(p, [1, 2, 3], 1, vocab_size, device) for p in params]
            sampler = DeviceSampler.of(states, vocab_size, device)
            logits = torch.randn(count, vocab_size, device=device) * scale
            positions = torch.arange(count, device=device)

            def call(
                turn: int,
                sampler: DeviceSampler = sampler,
                logits: torch.Tensor = logits,
                positions: torch.Tensor = positions,
            ) -> None:
                sampler.sample(logits, positions)

            yield from memory_figures(f"sample {kind}, {count} x {vocab_size}", call, logits.nbytes)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--sweep", action="store_true", help="time all tilings of prefill attention instead")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of the sweep")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="of the sweep")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    card = torch.cuda.get_device_name() if ON_GPU else None
    if arguments.sweep:
        publish(
            f"kernels-sweep{DRY_RUN}",
            list(sweep_prefill(arguments.head_dims, arguments.kinds, arguments.lengths)),
            card,
        )
        return
    benches = [BENCHES[name] for name in arguments.only]
    publish(f"kernels{DRY_RUN}", [figure for bench in benches for figure in bench(arguments.head_dims)], card)


BENCHES: dict[str, Callable[[Sequence[int]], Iterator[Figure]]] = {
    "prefill": bench_prefill,
    "norms": bench_norms,
    "rope": bench_rope,
    "sampler": bench_sampler,
}

if __name__ == "__main__":
    main()
