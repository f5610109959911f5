"""`make bench`: the main job, measured on this machine with the built-in model. Each ratio is taken in one run."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from headrace.loadtest.client import StreamClient
from headrace.loadtest.local_mesh import LocalMesh, local_mesh
from headrace.loadtest.prompts import sample_prompts, unique_tokens
from headrace.loadtest.report import Figure, conclude
from headrace.loadtest.timed_stream import TimedStream

MODEL = "smollm2"
FLAGS = ("--dtype", "float32", "--max-num-seqs", "64")
NEAR_TIE = 1e-3


class Yardstick:
    """The process of `headrace.loadtest.yardstick`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Run one command there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        """The next line that it writes."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the yardstick process died; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def yardstick() -> AsyncIterator[Yardstick]:
    """Run the yardstick inside the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.loadtest.yardstick"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    try:
        bare = Yardstick(process)
        await bare.answer()
        yield bare
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Numbers:
    """Fresh prompts: none shares a prefix with an earlier one."""

    def __init__(self) -> None:
        self._next = 0

    def prompt(self, length: int) -> list[int]:
        """Token ids nobody has seen."""
        self._next += 1
        return unique_tokens(length, self._next)


async def bench(quick: bool) -> list[Figure]:
    """All figures. The mesh and the yardstick never compute at the same time."""
    numbers = Numbers()
    figures: list[Figure] = []
    async with AsyncExitStack() as stack:
        flags = (*FLAGS, "--prefill", "2") if quick else FLAGS  # a quick run has no time for a second mesh
        bare, mesh = await asyncio.gather(
            stack.enter_async_context(yardstick()), stack.enter_async_context(local_mesh(*flags))
        )
        client = await stack.enter_async_context(StreamClient(mesh.url, MODEL))
        figures += await same_tokens(bare, client, *((4, 8) if quick else (50, 64)))
        figures += await many_streams(client, numbers, *((1, 24) if quick else (3, 64)))
        figures += await latency(bare, client, numbers, *((1, 8) if quick else (9, 32)))
        figures += await bare_engine(bare, numbers, *((1, 8) if quick else (3, 48)))
        figures += await pages_come_back(mesh, client, numbers)
        if quick:
            return figures + await kill_a_prefill_worker(mesh, client, numbers, 6)
    async with local_mesh(*FLAGS, "--prefill", "2") as mesh, StreamClient(mesh.url, MODEL) as client:
        return figures + await kill_a_prefill_worker(mesh, client, numbers, 24)


async def same_tokens(bare: Yardstick, client: StreamClient, count: int, tokens: int) -> list[Figure]:
    """Greedy answers against those of `transformers`, which also says how near a tie each choice was."""
    identical = near_ties = 0
    for prompt in sample_prompts(count):
        expected = await bare("generate", text=prompt.text, is_chat=prompt.is_chat, tokens=tokens)
        answer = await client.ask(prompt, tokens)
        texts: list[str] = expected["texts"]
        if answer == texts[-1]:
            identical += 1
            continue
        # a text that ends inside a character is no prefix of anything yet
        agreed = max(end for end, text in enumerate(texts) if answer.startswith(text.rstrip("\ufffd")))
        near = agreed < len(expected["margins"]) and expected["margins"][agreed] <= NEAR_TIE
        near_ties += near
        if not near:
            print(f"{prompt.name}: {answer!r} is not {texts[-1]!r}", file=sys.stderr)
    return [
        Figure("1 greedy answers right", identical + near_ties, f"of {count}", f"= {count}"),
        Figure("1 of them at a near tie", near_ties, "answers"),
    ]


async def many_streams(client: StreamClient, numbers: Numbers, rounds: int, tokens: int) -> list[Figure]:
    """Total tokens a second of 32 streams against those of one."""
    one_rate, many_rate = [], []
    for _ in range(rounds):
        one_rate.append(await _rate(client, numbers, 1, tokens))
        many_rate.append(await _rate(client, numbers, 32, tokens))
    one, many = statistics.median(one_rate), statistics.median(many_rate)
    return [
        Figure("2 one stream", one, "tokens/s"),
        Figure("2 32 streams", many, "tokens/s"),
        Figure("2 32 streams over one", many / one, "ratio", ">= 5"),
    ]


async def _rate(client: StreamClient, numbers: Numbers, streams: int, tokens: int) -> float:
    started = time.perf_counter()
    answers = await asyncio.gather(*(client.complete(numbers.prompt(16), tokens) for _ in range(streams)))
    assert all(len(answer.token_times) == tokens for answer in answers), "a stream lost tokens"
    return streams * tokens / (time.perf_counter() - started)


async def latency(bare: Yardstick, client: StreamClient, numbers: Numbers, rounds: int, tokens: int) -> list[Figure]:
    """Time to first token and inter-token time through the mesh against the bare engine's.

    Each round measures the bare engine before and after the mesh, since the speed of a shared machine drifts.
    """
    await client.complete(numbers.prompt(512), 4)
    first, step = [], []
    for _ in range(rounds):
        before = await _bare_times(bare, numbers, tokens)
        answer = await client.complete(numbers.prompt(512), tokens)
        after = await _bare_times(bare, numbers, tokens)
        first.append((answer.ttft, (before[0] + after[0]) / 2))
        step.append((answer.itl, (before[1] + after[1]) / 2))
    medians = [statistics.median(column) for column in (*zip(*first, strict=True), *zip(*step, strict=True))]
    return [
        Figure("3 time to first token, mesh", medians[0] * 1000, "ms"),
        Figure("3 prefill of 512, bare engine", medians[1] * 1000, "ms"),
        Figure("3 time to first token over bare", statistics.median(a / b for a, b in first), "ratio", "<= 1.25"),
        Figure("3 inter-token time, mesh", medians[2] * 1000, "ms"),
        Figure("3 decode step, bare engine", medians[3] * 1000, "ms"),
        Figure("3 inter-token time over bare", statistics.median(a / b for a, b in step), "ratio", "<= 1.1"),
    ]


async def _bare_times(bare: Yardstick, numbers: Numbers, tokens: int) -> tuple[float, float]:
    """Seconds of a prefill and of a decode step."""
    prefill = await bare("prefill", prompt=numbers.prompt(512))
    decode = await bare("decode", prompts=[numbers.prompt(512)], tokens=tokens)
    return prefill["seconds"], decode["step_seconds"]


async def bare_engine(bare: Yardstick, numbers: Numbers, rounds: int, tokens: int) -> list[Figure]:
    """The engine's decode against `transformers` generate, both alone, in turns."""
    reference, one, many = [], [], []
    for _ in range(rounds):
        reference.append(
            (await bare("reference_decode", prompt=numbers.prompt(93), tokens=tokens))["tokens_per_second"]
        )
        one.append((await bare("decode", prompts=[numbers.prompt(93)], tokens=tokens))["tokens_per_second"])
        prompts = [numbers.prompt(93) for _ in range(16)]
        many.append((await bare("decode", prompts=prompts, tokens=tokens))["tokens_per_second"])
    base = statistics.median(reference)
    return [
        Figure("4 transformers generate, one stream", base, "tokens/s"),
        Figure("4 engine, one stream over it", statistics.median(one) / base, "ratio", ">= 1"),
        Figure("4 engine, 16 streams over it", statistics.median(many) / base, "ratio", ">= 3"),
    ]


async def pages_come_back(mesh: LocalMesh, client: StreamClient, numbers: Numbers) -> list[Figure]:
    """Finished, cancelled and failed requests at once; then no page may be in use."""
    cancelled = [asyncio.create_task(client.complete(numbers.prompt(100), 500)) for _ in range(8)]
    finished = [asyncio.create_task(client.complete(numbers.prompt(40), 8)) for _ in range(8)]
    failed = [asyncio.create_task(client.complete(numbers.prompt(9000), 8)) for _ in range(2)]
    await asyncio.wait([*finished, *failed])
    for task in cancelled:
        task.cancel()
    await asyncio.wait(cancelled)
    assert all(task.exception() is None for task in finished), "a request that should finish failed"
    assert all(task.exception() is not None for task in failed), "a prompt over the context length was accepted"
    await mesh.until_no_page_is_used(30)
    used = await mesh.metrics("headrace_kv_pages_in_use")
    return [Figure("5 pages in use after a mixed load", sum(used.values()), "pages", "= 0")]


async def kill_a_prefill_worker(mesh: LocalMesh, client: StreamClient, numbers: Numbers, count: int) -> list[Figure]:
    """SIGKILL one of two prefill workers under load; every answer must be what it is undisturbed."""
    prompts = [numbers.prompt(100) for _ in range(count)]
    load = [asyncio.create_task(client.complete(prompt, 16)) for prompt in prompts]
    await mesh.until_pages_are_used("prefill-0")
    mesh.kill("prefill-0")
    answers = await asyncio.gather(*load, return_exceptions=True)
    undisturbed = [(await client.complete(prompt, 16)).text for prompt in prompts[: max(count // 4, 2)]]
    lost = sum(not isinstance(answer, TimedStream) or len(answer.token_times) != 16 for answer in answers)
    wrong = sum(isinstance(a, TimedStream) and a.text != text for a, text in zip(answers, undisturbed, strict=False))
    await mesh.until_no_page_is_used(30)
    return [
        Figure("6 requests lost with a killed prefill worker", lost, f"of {count}", "= 0"),
        Figure("6 answers that differ from an undisturbed run", wrong, f"of {len(undisturbed)}", "= 0"),
    ]


def main() -> None:
    """Run, print, write; exit with 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer prompts and rounds: under a minute")
    figures = asyncio.run(bench(parser.parse_args().quick))
    conclude("main", figures)


if __name__ == "__main__":
    main()
