"""`headrace loadtest`: its flags, and the order of a test."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from headrace.cli import EXIT_USAGE, Parser
from headrace.errors import StartError
from headrace.loadtest.load.arrivals import FORMS, Lengths, Workload
from headrace.loadtest.load.crew import start_crew
from headrace.loadtest.load.figures import Limits
from headrace.loadtest.load.results import print_tables, write_results
from headrace.loadtest.load.session import Load, Session
from headrace.loadtest.load.target import Target, find_target
from headrace.scaling.trace import read_trace

MAX_REPEATS = 100
EXAMPLES = """examples:
  # 4 requests a second at random times, for half a minute, three times
  headrace loadtest --url http://localhost:8000 --rate 4

  # the highest rate at which 90 % of the requests keep both targets
  headrace loadtest --url http://localhost:8000 --find-rate --ttft 200 --itl 20 --input 1024 --output 128

  # two servers in turns, 16 streams at once, with ratios
  headrace loadtest --url ours=http://localhost:8000 --url theirs=http://localhost:9000 --concurrency 16

A trace (Mooncake's JSON lines or Azure's CSV) is played with --trace FILE; --rate stretches it.
NAME.html and NAME.json are written, with all figures, their 95 % intervals, and what making the load cost.
"""


def build_parser() -> Parser:
    """All flags of `headrace loadtest`."""
    parser = Parser(
        prog="headrace loadtest",
        description="Load any OpenAI-compatible servers and report how they do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    server = parser.add_argument_group("servers")
    server.add_argument(
        "--url",
        action="append",
        metavar="[NAME=]URL",
        help="a server, with or without /v1; several run in turns (default: http://127.0.0.1:8000)",
    )
    server.add_argument("--model", action="append", help="once for all or once a --url (default: what the server says)")
    server.add_argument("--api-key", action="append", metavar="KEY", help="the same (default: OPENAI_API_KEY, if set)")
    server.add_argument(
        "--endpoint",
        choices=["auto", "chat", "completions"],
        default="auto",
        help="auto: completions where token ids are taken, so that lengths are exact; else chat",
    )
    server.add_argument(
        "--extra-body", metavar="JSON", default="{}", help="more fields of each request: '{\"top_p\": 0.9}'"
    )
    server.add_argument(
        "--timeout", type=_positive, default=600.0, metavar="SECONDS", help="for one request (default: 600)"
    )

    load = parser.add_argument_group("load (--rate, --concurrency, --trace or --find-rate)")
    load.add_argument(
        "--rate", type=_positive, metavar="R", help="open loop: requests a second; where --find-rate begins"
    )
    load.add_argument(
        "--burstiness",
        type=_positive,
        default=1.0,
        metavar="B",
        help="of the gaps' gamma distribution: 1 Poisson, less is burstier, inf even (default: 1)",
    )
    load.add_argument("--concurrency", type=_count, metavar="N", help="closed loop: so many requests at once")
    load.add_argument("--trace", type=Path, metavar="FILE", help="times, lengths and shared prefixes from a file")
    load.add_argument("--find-rate", action="store_true", help="look for the highest rate within the targets")
    load.add_argument("--input", default="512", metavar="TOKENS", help=f"prompt length: {FORMS} (default: 512)")
    load.add_argument("--output", default="128", metavar="TOKENS", help="answer length, likewise (default: 128)")
    load.add_argument(
        "--shared-prefix",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="0 to 1: part of each prompt that all share (default: 0)",
    )

    targets = parser.add_argument_group("targets of a request, in milliseconds")
    targets.add_argument("--ttft", type=_positive, metavar="MS", help="time to first token")
    targets.add_argument("--itl", type=_positive, metavar="MS", help="each gap between two pieces of text")
    targets.add_argument("--tpot", type=_positive, metavar="MS", help="mean time a token after the first")
    targets.add_argument("--e2e", type=_positive, metavar="MS", help="the whole answer")
    targets.add_argument(
        "--in-time",
        type=_positive,
        default=90.0,
        metavar="PERCENT",
        help="of the requests must keep them (default: 90)",
    )

    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--seconds", type=_positive, default=30.0, metavar="S", help="length of an open-loop run (default: 30)"
    )
    how.add_argument(
        "--requests",
        type=_count,
        metavar="N",
        help="requests of a run, in place of --seconds (closed loop: 10 a stream)",
    )
    how.add_argument(
        "--warmup", type=_count, default=8, metavar="N", help="requests before, which don't count (default: 8)"
    )
    how.add_argument(
        "--repeats",
        type=_count,
        default=3,
        metavar="N",
        help="runs; two or more give confidence intervals (default: 3)",
    )
    how.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="that make the load (default: 1; a warning says when it takes more)",
    )
    how.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of lengths, times and prompts; a server that saw one has its prefixes cached (default: a new one)",
    )
    how.add_argument(
        "--save", type=Path, metavar="NAME", help="where to write NAME.html and NAME.json (default: loadtest-DATE-TIME)"
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def load_of(options: argparse.Namespace) -> Load:
    """What the flags ask for. Raises `StartError` where they contradict each other."""
    seconds = {name: value / 1000 for name in ("ttft", "itl", "tpot", "e2e") if (value := getattr(options, name))}
    limits = Limits(**seconds, share=options.in_time / 100)
    if options.find_rate and not limits.are_set:
        raise StartError("--find-rate needs targets: --ttft, --itl, --tpot or --e2e, in milliseconds")
    if options.concurrency and (options.rate or options.find_rate):
        raise StartError("--concurrency is a closed loop, which has no rate: leave --rate and --find-rate out")
    if not (options.concurrency or options.rate or options.find_rate or options.trace):
        raise StartError("say how much load: --rate R, --concurrency N, --trace FILE or --find-rate")
    for name, value, most in (
        ("--in-time", options.in_time, 100),
        ("--shared-prefix", options.shared_prefix, 1),
        ("--repeats", options.repeats, MAX_REPEATS),
    ):
        if not 0 <= value <= most:
            raise StartError(f"{name} goes from 0 to {most}, and {value:g} does not")
    trace = read_trace(options.trace) if options.trace else ()
    workload = Workload(Lengths.parse(options.input), Lengths.parse(options.output), options.burstiness, trace)
    rate, requests = options.rate, options.requests
    if trace and not rate and not options.concurrency and not options.find_rate:
        rate, requests = workload.trace_rate, requests or len(trace)
        if rate == float("inf"):
            raise StartError(f"all requests of {options.trace} come at once: give --rate or --concurrency")
    return Load(
        workload,
        limits,
        rate=rate,
        concurrency=options.concurrency or 0,
        requests=requests,
        seconds=options.seconds,
        warmup=options.warmup,
        repeats=options.repeats,
        shared_prefix=options.shared_prefix,
        finds_rate=options.find_rate,
        seed=secrets.randbelow(2**31) if options.seed is None else options.seed,
    )


def _one_each(flag: str, values: list[str] | None, count: int) -> list[str | None]:
    """A flag that is given once for all targets or once for each."""
    if values is not None and len(values) not in (1, count):
        raise StartError(f"{flag} is given {len(values)} times and --url {count} times: give it once, or once a --url")
    if values is None:
        return [None] * count
    return [*values] * (count // len(values))


async def find_targets(options: argparse.Namespace) -> list[Target]:
    """All `--url`. Raises `StartError`."""
    try:
        extra: Any = json.loads(options.extra_body)
        if not isinstance(extra, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise StartError(f"--extra-body {options.extra_body!r} is not a JSON object: {error}") from error
    urls = options.url or ["http://127.0.0.1:8000"]
    models = _one_each("--model", options.model, len(urls))
    keys = _one_each("--api-key", options.api_key, len(urls))
    targets: list[Target] = []
    for url, model, key in zip(urls, models, keys, strict=True):
        target = await find_target(url, model, key or os.environ.get("OPENAI_API_KEY"), options.endpoint, extra)
        if target.name in {other.name for other in targets}:
            raise StartError(f"two targets are called {target.name}: give names, --url NAME={url}")
        targets.append(target)
    return targets


async def run_load_test(options: argparse.Namespace, console: Console, command: str) -> int:
    """The whole of it; returns the exit code. Raises `StartError`."""
    load = load_of(options)
    save = options.save or Path(time.strftime("loadtest-%Y%m%d-%H%M%S"))
    if not save.parent.is_dir():
        raise StartError(f"there is no folder {save.parent} for --save")
    targets = await find_targets(options)
    for target in targets:
        kind = "prompts of token ids" if target.token_ids else f"{target.tokens_per_word:.2f} tokens a word"
        console.print(
            f"{target.name}: {target.model} at {target.url}, {target.endpoint}, {kind}",
            *target.notes,
            sep="; ",
            soft_wrap=True,
        )
    async with start_crew(options.processes, options.timeout) as crew:
        session = Session(crew, targets, load, console)
        try:
            await (session.find_rates() if options.find_rate else session.measure())
        except asyncio.CancelledError:  # ^C
            if not any(outcome.runs for outcome in session.outcomes):
                raise
            console.print("interrupted: these are the runs that were over")
    print_tables(console, session.outcomes, load)
    for path in write_results(save, session.outcomes, load, command):
        console.print(f"written to {path}")
    return 0 if any(not result.failure for o in session.outcomes for run in o.runs for result in run.results) else 1


def main(arguments: Sequence[str]) -> int:
    """Run `headrace loadtest ARGUMENTS`; returns the exit code: 1 where nothing was served."""
    options = build_parser().parse_args(arguments)
    shown = [
        "***" if before == "--api-key" else word for before, word in zip(["", *arguments], arguments, strict=False)
    ]
    try:
        return uvloop.run(run_load_test(options, Console(highlight=False), " ".join(["headrace loadtest", *shown])))
    except StartError as error:
        print(f"headrace loadtest: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130
