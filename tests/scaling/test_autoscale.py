"""The way from what a mesh publishes to workers that come and go, with a real Redis and API servers that are fakes."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from headrace.decode.step_gauge import StepGauge
from headrace.errors import StartError
from headrace.loadtest.loopback import serving
from headrace.redis_client import Keys, connect
from headrace.registry import Member
from headrace.scaling.autoscale import Autoscaler
from headrace.scaling.executors import DockerCompose, Kubernetes, Workers
from headrace.scaling.policy import TIERS, Bounds, Targets
from headrace.scaling.signals import Look, MeshReader, signals_between
from headrace.wire import encode
from tests.members import member


def figures(tier: Any, number: int, draining: bool = False, **stats: float) -> Member:
    """A worker or gateway that publishes these."""
    return member(f"{tier}-{number}", tier, draining=draining, stats=stats)


def prefill(number: int, seconds: float, tokens: float, **stats: float) -> Member:
    """A prefill worker that has computed so many tokens in 100-token prompts."""
    counters = {"prefill_busy_seconds_total": seconds, "prompt_tokens_total": tokens, "prompts_total": tokens / 100}
    return figures("prefill", number, **(counters | stats))


def test_signals_are_what_happened_between_two_looks() -> None:
    """A worker that drains does not count, nor does what one did before it was restarted."""
    before = Look(0.0, [prefill(0, 1.0, 1000), prefill(1, 7.0, 9000)], 0)
    now = Look(
        10.0,
        [
            figures("gateway", 0, prompt_tokens_queued=5000),
            prefill(0, 6.0, 6000, requests_running=2, prompt_tokens_waiting=150),
            prefill(1, 8.0, 10_000),
            figures("decode", 0, kv_pages_in_use=50, kv_pages_total=100, inter_token_seconds=0.02),
            figures("decode", 1, kv_pages_in_use=0, kv_pages_total=100, inter_token_alone_seconds=0.01),
            figures("decode", 2, True, kv_pages_in_use=100, kv_pages_total=100, inter_token_seconds=1.0),
        ],
        5,
    )
    signals = signals_between(before, now)
    assert (signals.prefill_workers, signals.decode_workers) == (2, 2)
    assert signals.prefill_busy == pytest.approx((5 + 1) / 20)
    assert signals.prefill_rate == pytest.approx(6000 / 6)
    assert signals.backlog_tokens == pytest.approx(5000 + 150 + 3 * 100)
    assert signals.pages_in_use == pytest.approx(0.25)
    assert (signals.inter_token, signals.inter_token_alone) == (0.02, 0.01)


def test_a_mesh_of_which_nothing_is_known_gives_no_signals() -> None:
    """And divides nothing by zero."""
    signals = signals_between(Look(0, [], 0), Look(0, [], 3))
    assert (signals.prefill_workers, signals.decode_workers, signals.backlog_tokens) == (0, 0, 0)


def test_gauges_measure_steps() -> None:
    """The gap before a first step, and after a rest, is none."""
    steps = StepGauge()

    def now_and_alone() -> tuple[float, float]:
        return steps.stats()["inter_token_seconds"], steps.stats()["inter_token_alone_seconds"]

    for now, rows in ((0.0, 1), (0.1, 1), (0.2, 1)):
        steps.ended(now, rows)
    assert now_and_alone() == (pytest.approx(0.1), pytest.approx(0.1))
    steps.rest()
    steps.ended(50.0, 4)
    assert now_and_alone() == (0, pytest.approx(0.1))
    steps.ended(50.3, 4)
    assert now_and_alone() == (pytest.approx(0.3), pytest.approx(0.1))
    assert list(steps.stats().values())[2:] == [3, 6, pytest.approx(0.5)]


class Recorder:
    """An executor that only remembers; `broken` makes it fail."""

    def __init__(self, workers: Workers) -> None:
        self.workers = dict(workers)
        self.broken = False

    async def current(self) -> Workers:
        return dict(self.workers)

    async def scale(self, workers: Workers) -> None:
        if self.broken:
            raise StartError("the cluster is full")
        self.workers |= workers


async def test_a_backlog_starts_workers_and_trouble_is_tried_again(
    redis_url: str, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    """The figures come from Redis as workers leave them there."""
    client, now = connect(redis_url), 0.0
    recorder = Recorder({"prefill": 1, "decode": 1})

    async def publish(*members: Member) -> None:
        for each in members:
            await client.set(keys.member(each.id), encode(each))
            await client.sadd(keys.members, each.id)

    reader = MeshReader(client, keys, lambda: now)
    bounds = dict.fromkeys(TIERS, Bounds(1, 6))
    scaler = Autoscaler(reader, recorder, Targets(0.5, 0.05), bounds, dry_run=False)
    try:
        decode = figures("decode", 0, kv_pages_in_use=10, kv_pages_total=100)
        await publish(prefill(0, 0.0, 0), decode)
        await scaler.step()
        now = 5.0
        await publish(prefill(0, 5.0, 5000, prompt_tokens_waiting=1500))
        recorder.broken = True
        await scaler.step()
        assert "the cluster is full" in caplog.text
        recorder.broken = False
        now = 25.0
        await publish(prefill(0, 25.0, 25_000, prompt_tokens_waiting=1500))
        await scaler.step()
        assert recorder.workers == {"prefill": 5, "decode": 1}
    finally:
        await client.aclose()


@asynccontextmanager
async def api_server(replicas: dict[str, int], seen: list[web.Request]) -> AsyncIterator[str]:
    """The scale subresource of some Deployments, as a Kubernetes API server serves it; yields its URL."""

    async def scale(request: web.Request) -> web.Response:
        seen.append(request)
        name = request.match_info["name"]
        if request.headers["Authorization"] != "Bearer secret":
            return web.json_response({"kind": "Status", "message": "Unauthorized"}, status=401)
        if name not in replicas:
            return web.json_response({"kind": "Status", "message": f"{name} not found"}, status=404)
        if request.method == "PATCH":
            assert request.content_type == "application/merge-patch+json"
            replicas[name] = (await request.json())["spec"]["replicas"]
        spec = {"replicas": replicas[name]} if replicas[name] else {}  # zero is left out
        return web.json_response({"kind": "Scale", "apiVersion": "autoscaling/v1", "spec": spec})

    app = web.Application()
    path = "/apis/apps/v1/namespaces/llm/deployments/{name}/scale"
    app.add_routes([web.get(path, scale), web.patch(path, scale)])
    async with serving(app) as url:
        yield url


async def test_kubernetes_is_asked_through_the_scale_subresource(tmp_path: Path) -> None:
    """As the pod's service account, whose token may change at any time."""
    (tmp_path / "namespace").write_text("llm\n")
    (tmp_path / "token").write_text("expired")
    replicas, seen = {"headrace-prefill": 2, "headrace-decode": 0}, list[web.Request]()
    async with api_server(replicas, seen) as url:
        executor = Kubernetes(account=tmp_path, api=url)
        with pytest.raises(StartError, match="401"):
            await executor.current()
        (tmp_path / "token").write_text("secret")
        assert await executor.current() == {"prefill": 2, "decode": 0}
        await executor.scale({"decode": 3})
        assert replicas == {"headrace-prefill": 2, "headrace-decode": 3}
        del replicas["headrace-prefill"]
        with pytest.raises(StartError, match="headrace-prefill not found"):
            await executor.current()
    with pytest.raises(StartError, match="can't be reached"):
        await executor.current()


def test_outside_of_a_cluster_the_kubernetes_executor_says_so(tmp_path: Path) -> None:
    """It needs a service account."""
    with pytest.raises(StartError, match="service account"):
        Kubernetes(account=tmp_path)


async def test_docker_compose_is_told_both_numbers_in_one_command(tmp_path: Path) -> None:
    """A stand-in for docker writes down what it is told and answers as it would."""
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/told\ncase "$*" in\n'
        "*quiet\\ prefill) echo one; echo two;; *quiet\\ decode) echo three;; *=9*) echo no >&2; exit 1; esac\n"
    )
    docker.chmod(stat.S_IRWXU)
    executor = DockerCompose(Path("stack.yml"), [str(docker)])
    assert await executor.current() == {"prefill": 2, "decode": 1}
    await executor.scale({"prefill": 3, "decode": 2})
    told = (tmp_path / "told").read_text().splitlines()[-1]
    expected = "up --detach --no-recreate --no-deps --scale prefill=3 --scale decode=2 prefill decode"
    assert told == f"compose --file stack.yml {expected}"
    with pytest.raises(StartError, match="no"):
        await executor.scale({"decode": 9})
    with pytest.raises(StartError, match="not installed"):
        await DockerCompose(Path("stack.yml"), [str(tmp_path / "nothing")]).current()
