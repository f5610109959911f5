"""Whole load tests against a server whose timings are known, and what a user sees of them."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from rich.console import Console

from headrace.cli import main as headrace
from headrace.errors import StartError
from headrace.loadtest.load.arrivals import Lengths, Planned, Workload
from headrace.loadtest.load.cli import build_parser, find_targets, load_of, run_load_test
from headrace.loadtest.load.cli import main as loadtest
from headrace.loadtest.load.crew import Crew, start_crew
from headrace.loadtest.load.figures import Limits, numbers
from headrace.loadtest.load.prompts import Prompts
from headrace.loadtest.load.results import write_results
from headrace.loadtest.load.session import Load, Outcome, Session
from headrace.loadtest.load.target import Target, find_target
from headrace.loadtest.loopback import serving
from headrace.loadtest.paced_server import Pace, paced_server
from headrace.processes import end_process
from tests.browser import PHONE, Browser

TIMEOUT_SECONDS = 20.0
QUIET = Console(quiet=True)


class Told(Console):
    """Says when a run's line is printed."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.first_run = asyncio.Event()

    def print(self, *words: object, **options: object) -> None:  # type: ignore[override]
        self.lines += map(str, words)
        if any(" 1/50" in line for line in self.lines):
            self.first_run.set()


@asynccontextmanager
async def crew_and_server(pace: Pace, processes: int = 1) -> AsyncIterator[tuple[Crew, Target, list[list[int] | str]]]:
    """Generators, what they load, and the prompts that it gets."""
    async with paced_server(pace) as (url, server), start_crew(processes, TIMEOUT_SECONDS) as crew:
        target = await find_target(url, None, None, "auto", {})
        yield crew, target, server.prompts


def plan(count: int, prompt: int = 20, output: int = 8) -> list[Planned]:
    """Requests of a closed loop."""
    return [Planned(None, prompt, output)] * count


async def test_the_client_sees_what_the_server_did() -> None:
    """First token after 60 ms, then one each 20 ms, and what the machine adds; none is lost, lengths are exact."""
    async with crew_and_server(Pace(first=0.06, gap=0.02)) as (crew, target, _):
        run = await crew.run(target, plan(12, 30, 9), Prompts(target, (1,)), concurrency=4)
    assert sorted(result.number for result in run.results) == list(range(12))
    assert {(r.failure, r.prompt_tokens, r.output_tokens, len(r.times)) for r in run.results} == {("", 30, 9, 9)}
    assert all(result.ttft >= 0.058 and result.e2e >= 0.06 + 8 * 0.02 - 0.002 for result in run.results)
    figures = numbers(run, Limits())
    assert 19 <= figures["TPOT p50", "ms"] <= 30
    assert 2 <= figures["at once", "requests"] <= 4
    (done,) = run.generators
    assert done.most_running == 4
    assert done.stamps
    assert done.lags
    assert done.cpu > 0


async def test_an_open_loop_sends_without_waiting_for_answers() -> None:
    """All are on their way before the first has ended, each not before its time."""
    times = [0.0, 0.01, 0.05, 0.1, 0.15]
    async with crew_and_server(Pace(first=1.0), processes=2) as (crew, target, _):
        requests = [Planned(at, 5, 1) for at in times]
        run = await crew.run(target, requests, Prompts(target, (1,)), rate=30.0)
    by_number = sorted(run.results, key=lambda result: result.number)
    assert all(result.sent >= at - 0.002 for result, at in zip(by_number, times, strict=True))
    assert max(result.sent for result in run.results) < min(result.sent + result.ended for result in run.results)
    assert sum(done.most_running for done in run.generators) == 5


async def test_a_run_ends_early_when_enough_is_known() -> None:
    """What runs is cancelled, and the generators serve the next run as if nothing had been."""
    async with crew_and_server(Pace(first=0.02)) as (crew, target, _):
        prompts = Prompts(target, (1,))
        run = await crew.run(target, plan(500), prompts, concurrency=5, is_enough=lambda result: True)
        assert run.was_cut_off
        assert len(run.results) == 1
        assert len((await crew.run(target, plan(6), prompts, concurrency=2)).results) == 6


async def test_refusals_are_counted_by_cause() -> None:
    """And are no answers."""
    async with crew_and_server(Pace(first=0.0, gap=0.001, failing=3)) as (crew, target, _):
        run = await crew.run(target, plan(9), Prompts(target, (1,)), concurrency=1)
    failed = [result.failure for result in run.results if result.failure]
    assert failed == ["status 503: the queue is full"] * 3


async def test_a_server_that_is_gone_and_one_that_is_slow_are_told_apart() -> None:
    """Neither stops the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with paced_server(Pace(first=30)) as (url, _), start_crew(1, 0.2) as crew:
        slow = await find_target(url, None, None, "auto", {})
        gone = Target("gone", f"http://127.0.0.1:{port}", "m", "chat")
        (late,) = (await crew.run(slow, plan(1), Prompts(slow, (1,)), concurrency=1)).results
        (refused,) = (await crew.run(gone, plan(1), Prompts(gone, (1,)), concurrency=1)).results
    assert late.failure == "not over after 0.2 s"
    assert refused.failure.startswith("can't connect")


async def test_prompts_share_what_they_are_told_to_share_and_nothing_else() -> None:
    """Of token ids: a share of each prompt, blocks of a trace with equal hashes, or nothing."""
    async with crew_and_server(Pace(first=0.0, gap=0.0)) as (crew, target, seen):
        await crew.run(target, plan(2, 40, 1), Prompts(target, (1,)), concurrency=1)
        await crew.run(target, plan(2, 40, 1), Prompts(target, (2,), 0.5), concurrency=1)
        hashed = [Planned(None, 600, 1, (7, 8)), Planned(None, 700, 1, (7, 9))]
        await crew.run(target, hashed, Prompts(target, (3,)), concurrency=1)
    assert [len(prompt) for prompt in seen] == [40, 40, 40, 40, 600, 700]
    assert seen[0][0] != seen[1][0]
    assert seen[2][:20] == seen[3][:20]
    assert seen[2][20] != seen[3][20]
    assert seen[4][:512] == seen[5][:512]
    assert seen[4][512:520] != seen[5][512:520]


async def test_a_chat_server_gets_as_many_words_as_make_the_tokens() -> None:
    """It counts 10 tokens more than there are words; no tokenizer is needed to meet a length."""
    async with crew_and_server(Pace(takes_token_ids=False, first=0.0, gap=0.001)) as (crew, target, seen):
        assert (target.endpoint, target.token_ids) == ("chat", None)
        assert (target.tokens_per_word, target.tokens_around) == (1.0, 10.0)
        run = await crew.run(target, plan(2, 64, 3), Prompts(target, (1,)), concurrency=1)
    assert [result.prompt_tokens for result in run.results] == [64, 64]
    assert str(seen[0]).split()[:3] != str(seen[1]).split()[:3]


async def test_the_search_finds_what_the_server_has_places_for(tmp_path: Path) -> None:
    """2 places of 0.1 s each serve 20 a second at best; the repeats must agree with what is told."""
    load = Load(
        Workload(Lengths.parse("5"), Lengths.parse("1"), float("inf")),
        Limits(ttft=0.25),
        rate=16.0,
        seconds=1.0,
        repeats=1,
        warmup=2,
        precision=1.0,
        finds_rate=True,
    )
    async with crew_and_server(Pace(first=0.1, slots=2)) as (crew, target, _):
        session = Session(crew, [target], load, QUIET)
        await session.find_rates()
    (outcome,) = session.outcomes
    assert outcome.highest_rate is not None
    assert 5 <= outcome.highest_rate <= 24
    assert outcome.searched
    report = json.loads(write_results(tmp_path / "found", session.outcomes, load, "headrace loadtest")[0].read_text())
    assert report["targets"][0]["search"][0]["rate"] == 16.0


async def test_two_targets_run_in_turns_and_the_report_renders(tmp_path: Path, browser: Browser) -> None:
    """Light, dark and on a phone; nothing is asked of any host; ratios are there."""
    load = Load(
        Workload(Lengths.parse("16"), Lengths.parse("uniform:4:12")),
        Limits(ttft=0.2, itl=0.1),
        concurrency=3,
        repeats=2,
    )
    async with (
        crew_and_server(Pace(first=0.02, gap=0.005)) as (crew, ours, _),
        paced_server(Pace(0.04, 0.025)) as (url, _),
    ):
        theirs = await find_target(f"<theirs>={url}", None, None, "auto", {})
        session = Session(crew, [ours, theirs], load, QUIET)
        await session.measure()
    data, html = write_results(tmp_path / "both", session.outcomes, load, "headrace loadtest --rate 1")
    figures = {figure["name"]: figure for figure in json.loads(data.read_text())["figures"]}
    assert figures["<theirs> over " + ours.name + ": TPOT mean"]["value"] > 1.5
    assert figures[f"{ours.name}: failed"]["value"] == 0
    assert figures[f"{ours.name}: TTFT p50"]["spread"] >= 0
    for name, size, scheme in (("light", None, "light"), ("dark", None, "dark"), ("phone", PHONE, "light")):
        media = {"prefers_color_scheme": scheme}
        async with browser.page(html.as_uri(), size or (1440, 900), **media) as page:
            await page.shoot(f"loadtest-{name}", whole=True)
            text = await page.text()
            assert "<theirs>" in text
            assert "95 % confidence" in text
            assert await page.run("document.querySelectorAll('figure svg').length") == 5
            assert await page.run("document.documentElement.scrollWidth <= innerWidth")
            assert not page.problems
            assert page.hosts <= {""}


async def test_an_interrupted_test_reports_the_runs_that_were_over(tmp_path: Path) -> None:
    """An hour of load is not lost to a ^C."""
    async with paced_server(Pace(first=0.0, gap=0.01)) as (url, _):
        flags = ["--url", url, "--concurrency", "1", "--repeats", "50", "--requests", "4", "--output", "4"]
        options = build_parser().parse_args([*flags, "--save", str(tmp_path / "cut")])
        console = Told()
        running = asyncio.create_task(run_load_test(options, console, "headrace loadtest"))
        await console.first_run.wait()
        running.cancel()
        assert await running == 0
    assert any("interrupted" in line for line in console.lines)
    assert 1 <= len(json.loads((tmp_path / "cut.json").read_text())["targets"][0]["runs"]) < 50


async def test_two_thousand_streams_at_once() -> None:
    """By one generator process; the server is another process."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.loadtest.paced_server", "--first", "5", "--gap", "1"),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        url = (await server.stdout.readline()).decode().strip()
        async with start_crew(1, 60.0) as crew:
            target = await find_target(url, None, None, "completions", {})
            run = await crew.run(target, plan(2000, 8, 2), Prompts(target, (1,)), concurrency=2000)
    finally:
        await end_process(server, signal.SIGTERM, 10)
    assert {(result.failure, len(result.times)) for result in run.results} == {("", 2)}
    assert run.generators[0].most_running == 2000


def _failing(status: int) -> web.Application:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no such luck"}}, status=status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    return app


@pytest.mark.parametrize(("status", "hint"), [(401, "--api-key"), (404, "give --model"), (500, "give --model")])
async def test_a_server_that_refuses_gets_a_hint(status: int, hint: str) -> None:
    """Before anything is measured."""
    async with serving(_failing(status)) as url:
        with pytest.raises(StartError, match=hint):
            await find_target(url, None, None, "auto", {})
        with pytest.raises(StartError, match="no such luck"):
            await find_target(url, "some-model", None, "auto", {})


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ([], "say how much load"),
        (["--find-rate"], "needs targets"),
        (["--rate", "3", "--concurrency", "2"], "closed loop"),
        (["--rate", "3", "--shared-prefix", "2"], "from 0 to 1"),
        (["--rate", "3", "--in-time", "200"], "from 0 to 100"),
        (["--rate", "3", "--input", "long"], "uniform:LOW:HIGH"),
        (["--trace", "/no/such/file"], "can't read the trace"),
        (["--rate", "3", "--extra-body", "[1]"], "not a JSON object"),
        (["--rate", "3", "--url", "a", "--url", "b", "--url", "c", "--model", "x", "--model", "y"], "once a --url"),
        (["--rate", "3", "--url", "ftp://host"], "give one such as"),
        (["--rate", "3", "--url", "http://127.0.0.1:1"], "can't talk to"),
        (["--rate", "3", "--save", "/no/such/folder/x"], "no folder"),
    ],
)
def test_bad_input_is_told_with_what_to_do(flags: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On one line, with the exit code of a usage error."""
    assert loadtest(flags) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


def test_a_misspelled_flag_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """As with the other commands."""
    with pytest.raises(SystemExit):
        loadtest(["--rat", "3"])
    assert "did you mean --rate?" in capsys.readouterr().err


def test_help_has_three_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """And `headrace --help` lists the command."""
    with pytest.raises(SystemExit):
        headrace(["loadtest", "--help"])
    examples = [line.split()[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("  headrace ")]
    assert len(examples) == 3
    for example in examples:
        load_of(build_parser().parse_args(example))
    with pytest.raises(SystemExit):
        headrace(["--help"])
    assert "loadtest" in capsys.readouterr().out


async def test_two_targets_of_one_name_are_refused() -> None:
    """Their figures could not be told apart."""
    async with paced_server(Pace()) as (url, _):
        options = build_parser().parse_args(["--url", url, "--url", url])
        with pytest.raises(StartError, match="give names"):
            await find_targets(options)


def test_outcomes_without_runs_have_a_report(tmp_path: Path) -> None:
    """A search that found nothing is a result, too."""
    load = Load(Workload(Lengths.parse("5"), Lengths.parse("1")), Limits(ttft=0.1), finds_rate=True)
    outcome = Outcome(Target("slow", "http://slow", "m", "chat"), highest_rate=0.0)
    data, html = write_results(tmp_path / "nothing", [outcome], load, "headrace loadtest --find-rate")
    assert json.loads(data.read_text())["figures"][0]["value"] == 0.0
    assert "highest rate" in html.read_text()
