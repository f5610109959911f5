"""`make test-compose`: the compose stack on a real Docker engine, scaled, killed and cut apart while it streams.

Needs `docker compose`; `stand_ins.sh` and `override.yaml` stand in for registries. Not among `make test`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sysconfig
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

ROOT = Path(__file__).parents[2]
FILES = ("compose/compose.yaml", "tests/stack/override.yaml")
STREAMS = 6
TOKENS = 64
ENOUGH = 12
"""Tokens that every stream has had when a worker is struck."""
COMMAND_SECONDS = 200.0
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.2
REQUEUES = "headrace_gateway_requeues_total"

pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Stack:
    """A running compose project."""

    environment: dict[str, str]
    url: str
    key: str

    def compose(self, *arguments: str) -> str:
        """`docker compose ARGUMENTS`; its output. Fails the test with what it said where it fails."""
        files = [word for name in FILES for word in ("--file", str(ROOT / name))]
        return run("docker", "compose", *files, *arguments, environment=self.environment)

    def containers(self, service: str) -> list[str]:
        """Ids of a service's running containers."""
        return self.compose("ps", "--quiet", "--status", "running", service).split()


@dataclass
class Stream:
    """One answer as it comes, token by token."""

    prompt: int
    pieces: list[str] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None

    async def read(self, http: aiohttp.ClientSession) -> Stream:
        """Ask, and read to the end."""
        body = {
            "model": "smollm2",
            "prompt": [1000 + 10 * self.prompt + place for place in range(40)],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 0,
        }
        async with http.post("/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    assert "error" not in event, event
                    (choice,) = event["choices"]
                    self.pieces.append(choice["text"])
                    self.tokens += len(choice["logprobs"]["tokens"]) if choice["logprobs"] else 0
                    self.reason = choice["finish_reason"] or self.reason
        return self


def run(*command: str, environment: dict[str, str]) -> str:
    """A command's output; its errors, where it fails, as the test's failure."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack with secrets of its own, brought up from nothing and taken down with its volumes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = tmp_path_factory.mktemp("secrets")
    environment = {
        **os.environ,
        "COMPOSE_FILE": os.pathsep.join(str(ROOT / name) for name in FILES),
        "COMPOSE_PROJECT_NAME": f"headrace-test-{os.getpid()}",
        "COMPOSE_PROFILES": "cpu",
        "HEADRACE_SECRETS": str(folder),
        "HEADRACE_TAG": "test",
        "HEADRACE_PUBLISH": address,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "",
        "TEST_PACKAGES": sysconfig.get_path("platlib"),
    }
    run(str(ROOT / "compose/secrets.sh"), str(folder), environment=environment)
    running = Stack(environment, f"http://{address}", (folder / "api_key").read_text())
    try:
        running.compose("up", "--build", "--detach", "--wait", "--wait-timeout", "180")
        yield running
    finally:
        subprocess.run(["docker", "compose", "logs", "--tail", "12"], env=environment, timeout=30, check=False)
        running.compose("down", "--volumes", "--timeout", "10")
    assert running.compose("ps", "--all", "--quiet") == ""


@pytest.fixture
async def http(stack: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    """A client with the stack's key."""
    headers = {"Authorization": f"Bearer {stack.key}"}
    async with aiohttp.ClientSession(stack.url, headers=headers, timeout=aiohttp.ClientTimeout(120)) as session:
        yield session


async def metric(http: aiohttp.ClientSession, name: str) -> dict[str, float]:
    """A metric's samples, by their labels' text."""
    async with http.get("/metrics") as response:
        text = await response.text()
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(\S*) (\S+)$", text, re.MULTILINE)}


async def until_workers(http: aiohttp.ClientSession, tier: str, count: int) -> None:
    """Wait until the gateway sees so many workers of a tier."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            shown = await metric(http, "headrace_worker_info")
            if sum(f'tier="{tier}"' in labels for labels in shown) == count:
                return
            await asyncio.sleep(LOOK_SECONDS)


async def busiest(http: aiohttp.ClientSession) -> str:
    """The container of the decode worker that runs the most requests."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            running = await metric(http, "headrace_requests_running")
            counts = {labels: value for labels, value in running.items() if 'tier="decode"' in labels}
            labels = max(counts, key=lambda labels: counts[labels])
            if counts[labels]:
                return re.findall(r'worker="decode-(\w+)"', labels)[0]
            await asyncio.sleep(LOOK_SECONDS / 4)


async def undisturbed(http: aiohttp.ClientSession) -> list[str]:
    """What the streams say when nothing happens to them."""
    streams = await asyncio.gather(*[Stream(index).read(http) for index in range(STREAMS)])
    return ["".join(stream.pieces) for stream in streams]


async def struck(http: aiohttp.ClientSession, environment: dict[str, str], *command: str) -> list[str]:
    """What they say when a command strikes the busiest decode worker; each has all its tokens, and ends once."""
    before = await metric(http, REQUEUES)
    streams = [Stream(index) for index in range(STREAMS)]
    reading = [asyncio.create_task(stream.read(http)) for stream in streams]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while min(stream.tokens for stream in streams) < ENOUGH:
            assert not any(task.done() for task in reading), "an answer was over before the worker was struck"
            await asyncio.sleep(LOOK_SECONDS / 4)
    await asyncio.to_thread(run, *command, await busiest(http), environment=environment)
    await asyncio.gather(*reading)
    assert [stream.tokens for stream in streams] == [TOKENS] * STREAMS
    assert {stream.reason for stream in streams} == {"length"}
    assert (await metric(http, REQUEUES))[""] > before[""], "no stream was on the worker that was struck"
    return ["".join(stream.pieces) for stream in streams]


def test_images_hold_no_more_than_they_need(stack: Stack) -> None:
    """As nobody, and the gateway without torch."""
    look = "import os, importlib.util as u; print(os.getuid(), u.find_spec('torch'))"
    said = run(
        "docker",
        "run",
        "--rm",
        "--entrypoint=python",
        "headrace-gateway:test",
        "-c",
        look,
        environment=stack.environment,
    )
    assert said.split() == ["10001", "None"]


def test_containers_can_write_nowhere_and_do_nothing_special(stack: Stack) -> None:
    """Read-only, without capabilities; and no secret stands in an environment."""
    secrets = [path.read_text().strip() for path in Path(stack.environment["HEADRACE_SECRETS"]).iterdir()]
    for service in ("redis", "gateway", "prefill", "decode"):
        (identity,) = stack.containers(service)
        (found,) = json.loads(run("docker", "inspect", identity, environment=stack.environment))
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert found["HostConfig"]["CapDrop"] == ["ALL"]
        assert found["Config"]["User"] not in ("", "root", "0")
        assert not [secret for secret in secrets if secret in json.dumps(found)]


async def test_a_request_needs_the_key(stack: Stack) -> None:
    """The one from the file."""
    async with aiohttp.ClientSession(stack.url) as stranger, stranger.get("/v1/models") as response:
        assert response.status == 401


async def test_a_scaled_stack_loses_no_token_when_decode_workers_are_killed_or_cut_off(
    stack: Stack, http: aiohttp.ClientSession
) -> None:
    """Scale to three, kill one while it streams, take another off the network while it streams."""
    await asyncio.to_thread(stack.compose, "up", "--detach", "--no-recreate", "--wait", "--scale", "decode=3")
    await until_workers(http, "decode", 3)
    expected = await undisturbed(http)
    assert await struck(http, stack.environment, "docker", "kill") == expected
    await until_workers(http, "decode", 2)
    network = f"{stack.environment['COMPOSE_PROJECT_NAME']}_default"
    cut = ("docker", "network", "disconnect", "--force", network)
    assert await struck(http, stack.environment, *cut) == expected
    await until_workers(http, "decode", 1)
    assert await undisturbed(http) == expected
