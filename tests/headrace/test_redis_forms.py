"""The forms of `--redis` against real servers: sentinels that fail over, a cluster, TLS; and URLs that are none."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace.loadtest.redis_servers import RedisServer, redis_server
from headrace.node import ModelIdentity, join_mesh
from headrace.queue import RequestQueue
from headrace.redis_client import Keys, RedisError, connect
from headrace.redis_url import RedisUrl, without_password
from headrace.settings import Settings, SettingsError
from tests.headrace.redis_forms import cluster_of_three, watched_by_sentinels
from tests.headrace.test_queue import entry

MODEL = ModelIdentity("m", "f" * 32, 128)


async def work_together(url: str) -> None:
    """Two members hear of each other, and an entry goes through the queue."""
    space = uuid.uuid4().hex
    a_settings, b_settings = (Settings(redis=url, namespace=space, worker_id=name, lease_seconds=60) for name in "ab")
    async with join_mesh(a_settings, "prefill", MODEL) as a:
        joined, left = asyncio.Event(), asyncio.Event()
        a.registry.on_join.append(lambda _: joined.set())
        a.registry.on_leave.append(lambda _: left.set())
        async with join_mesh(b_settings, "gateway", MODEL) as b, asyncio.timeout(10):
            await joined.wait()
            await b.queue.put(entry("q"))
            (delivery,) = await a.queue.take("w", 1, 1000)
            await a.queue.renew("w", [delivery.entry_id])
            (claimed,) = await b.queue.claim("v", 1, 0)
            assert claimed.attempt == 1
            await a.queue.remove(delivery.entry_id)
            assert await b.queue.depth() == 0
        async with asyncio.timeout(10):
            await left.wait()


async def test_a_mesh_works_on_a_cluster() -> None:
    """All keys of a mesh share a slot, so that commands on several of them are possible."""
    async with cluster_of_three() as url:
        await work_together(url)


async def test_a_mesh_works_behind_sentinels_and_outlives_a_failover() -> None:
    """The primary is killed: the queue goes on at the replica, and no member is lost."""
    async with watched_by_sentinels() as (url, servers):
        await work_together(url)
        space = uuid.uuid4().hex
        a_settings, b_settings = (Settings(redis=url, namespace=space, worker_id=n, lease_seconds=1) for n in "ab")
        async with join_mesh(a_settings, "prefill", MODEL) as a, join_mesh(b_settings, "gateway", MODEL) as b:
            left: list[str] = []
            back = asyncio.Event()
            a.registry.on_outage.append(back.set)
            for node in (a, b):
                node.registry.on_leave.append(lambda member: left.append(member.id))
            await servers[0].kill()
            async with asyncio.timeout(15):
                await back.wait()
                while True:
                    try:
                        await b.queue.put(entry("q"))
                        break
                    except RedisError:
                        await asyncio.sleep(0.05)
                (delivery,) = await a.queue.take("w", 1, 1000) or await a.queue.take("w", 1, 1000)
            assert delivery.entry.request_id == "q"
            assert left == []


@asynccontextmanager
async def tls_in_front_of(server: RedisServer, folder: Path) -> AsyncIterator[str]:
    """The server's URL with TLS, under a certificate of its own."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    listener = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        yield f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}"


async def test_a_mesh_works_over_tls(tmp_path: Path) -> None:
    """The certificate is checked: without its authority there is no connection."""
    async with redis_server() as server, tls_in_front_of(server, tmp_path) as url:
        await work_together(url)
        client = connect(url.partition("?")[0], patient=False)
        with pytest.raises(RedisError, match="certificate"):
            await RequestQueue(client, Keys("x")).depth()
        await client.aclose()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:6379", "must begin with redis://"),
        ("http://localhost", "must begin with redis://"),
        ("redis://", "names no host"),
        ("redis://h:99999999", "[Pp]ort"),
        ("redis+sentinel://a,b", "redis\\+sentinel://h1,h2/mymaster"),
        ("redis+sentinel://a:x/main", "invalid literal|cast"),
        ("redis+sentinel://a,,b/main", "no host"),
        ("redis+cluster://a/3", "database 0 alone"),
        ("redis://user:secret@:1/x", "."),
    ],
)
def test_a_url_of_no_known_form_is_refused(url: str, says: str) -> None:
    """With what is wrong, and without its password."""
    with pytest.raises(SettingsError, match=says) as refused:
        RedisUrl.parse(url)
    assert "secret" not in str(refused.value)


def test_hosts_credentials_and_options_are_read() -> None:
    """Those of the sentinels themselves apart."""
    url = RedisUrl.parse("rediss+sentinel://u:p%40@h1:1,[::1]/main/2?ssl_ca_certs=ca.pem&sentinel_password=s")
    assert (url.form, url.is_encrypted, url.service) == ("sentinel", True, "main")
    assert url.hosts == (("h1", 1), ("::1", 26379))
    assert url.options == {"username": "u", "password": "p@", "db": 2, "ssl_ca_certs": "ca.pem"}
    assert url.sentinel_options == {"password": "s", "ssl_ca_certs": "ca.pem"}
    assert without_password("redis://u:p@h:1/0?password=q") == "redis://u:***@h:1/0"
