"""The built-in model's tokenizer, and gateways with scripted workers behind them."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest

from headrace.gateway.chat_template import ChatTemplate
from headrace.gateway.main import serving
from headrace.gateway.tokenizer import Tokenizer
from headrace.models.locate import locate_model
from headrace.node import ModelIdentity, join_mesh
from headrace.redis_server import find_server
from headrace.settings import Settings
from tests.gateway.workers import Workers

MODEL = "test-model"
IDENTITY = ModelIdentity(MODEL, "0" * 16, 512)
_namespaces = itertools.count()
TEMPLATE = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


@pytest.fixture(scope="session")
def tokenizer() -> Iterator[Tokenizer]:
    """The built-in model's."""
    tokenizer = Tokenizer.load(locate_model("smollm2").path)
    yield tokenizer
    tokenizer.close()


@pytest.fixture
def with_tools(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """The built-in model's tokenizer, as if its chat template knew of tools."""
    monkeypatch.setattr(tokenizer, "template", ChatTemplate(TEMPLATE, {}))
    return tokenizer


def start_redis(socket: Path) -> subprocess.Popen[bytes]:
    """Start a server on a unix socket and wait until it listens."""
    command = [find_server(), "--port", "0", "--unixsocket", str(socket), "--dir", str(socket.parent), "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    for _ in range(1000):
        if socket.exists():
            return server
        time.sleep(0.01)
    raise AssertionError("the server did not start")


@dataclass
class Gateway:
    """A gateway that runs, a client for it, and the workers behind it."""

    url: str
    http: aiohttp.ClientSession
    workers: Workers
    settings: Settings
    node: Any

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """POST a JSON body: status and JSON answer."""
        async with self.http.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json()


class OpenGateway(Protocol):
    """Opens a gateway with some settings changed."""

    def __call__(self, *, prefill: bool = True, decode: int = 1, **settings: Any) -> Any:
        """An async context manager that yields a `Gateway`."""


@pytest.fixture
def open_gateway(redis_url: str, tokenizer: Tokenizer) -> OpenGateway:
    """A factory of gateways, each with a mesh of its own."""

    @asynccontextmanager
    async def opener(*, prefill: bool = True, decode: int = 1, **changed: Any) -> AsyncIterator[Gateway]:
        values = {"redis": redis_url, "namespace": f"test-{next(_namespaces)}", "port": 0, "lease_seconds": 5.0}
        settings = Settings(**{**values, **changed})
        async with (
            join_mesh(settings, "gateway", IDENTITY) as node,
            serving(settings, MODEL, tokenizer, node) as url,
            Workers(settings, IDENTITY, tokenizer).running(prefill, decode) as workers,
            aiohttp.ClientSession() as http,
        ):
            await workers.until_seen_by(node, int(prefill) + decode)
            yield Gateway(url, http, workers, settings, node)

    return opener
