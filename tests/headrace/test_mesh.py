"""Membership and messages between real processes' sockets."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest
import zmq

from headrace import mesh as mesh_module
from headrace.keys import MeshKey
from headrace.mesh import OTHERS, Mesh, PeerGone
from headrace.messages.control import Cancel
from headrace.node import ModelIdentity, join_mesh
from headrace.registry import MeshMismatch, Tier
from headrace.settings import Settings, SettingsError
from headrace.tasks import end_task
from headrace.wire import Decoder, encode

MODEL = ModelIdentity("m", "f" * 32, 128)
decode: Decoder[Cancel] = Decoder(Cancel)


def settings(redis_url: str, namespace: str, name: str, key: Path | None = None) -> Settings:
    """One process of a mesh of its own."""
    return Settings(redis=redis_url, namespace=namespace, worker_id=name, mesh_key=key, lease_seconds=0.5)


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "curve"])
async def test_members_find_each_other_and_talk(redis_url: str, tmp_path: Path, secured: bool) -> None:
    """Both ways; whoever left can't be reached."""
    key = tmp_path / "mesh.key" if secured else None
    if key:
        MeshKey.make().write(key)
        assert key.stat().st_mode & 0o077 == 0
    space = uuid.uuid4().hex
    async with join_mesh(settings(redis_url, space, "a", key), "prefill", MODEL) as a:
        async with join_mesh(settings(redis_url, space, "b", key), "decode", MODEL) as b:
            b.mesh.post("a", Cancel(request_id="q", attempt=0))
            assert (await a.mesh.receive()).sender.id == "b"  # whose greeting made it known
            await a.mesh.send("b", Cancel(request_id="r", attempt=1))
            inbound = await b.mesh.receive()
            assert (inbound.sender.id, decode(inbound.header)) == ("a", Cancel(request_id="r", attempt=1))
            b.mesh.post("a", Cancel(request_id="s", attempt=2))
            assert (await a.mesh.receive()).sender.id == "b"
        await a.registry.refresh()
        with pytest.raises(PeerGone):
            a.mesh.post("b", Cancel(request_id="r", attempt=1))


async def test_strangers_are_refused_without_asking_redis_each_time(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All their messages are counted, by name while there is room; members are heard meanwhile."""
    monkeypatch.setattr(mesh_module, "MAX_STRANGERS", 2)
    monkeypatch.setattr(mesh_module, "STRANGER_SECONDS", 60.0)
    space, names = uuid.uuid4().hex, ["decode-9@1", "a@0", "\xff"]
    async with (
        join_mesh(settings(redis_url, space, "a"), "prefill", MODEL) as a,
        join_mesh(settings(redis_url, space, "b"), "decode", MODEL) as b,
    ):
        await a.registry.refresh()
        looks = 0
        refresh = a.registry.refresh

        async def counted() -> None:
            nonlocal looks
            looks += 1
            await refresh()

        monkeypatch.setattr(a.registry, "refresh", counted)
        with zmq.Context() as context:
            for name in names:
                with context.socket(zmq.DEALER) as stranger:
                    stranger.setsockopt(zmq.ROUTING_ID, name.encode("latin-1"))
                    stranger.connect(a.mesh.address)
                    for _ in range(100):
                        stranger.send_multipart([encode(Cancel(request_id="r", attempt=1))])
            for _ in range(2):  # the first may arrive before the strangers', the second is awaited beside them
                await b.mesh.send("a", Cancel(request_id="q", attempt=0))
                assert (await a.mesh.receive()).sender.id == "b"
            receiving = asyncio.create_task(a.mesh.receive())
            for _ in range(500):
                if a.mesh.refused == 300:
                    break
                await asyncio.sleep(0.01)
            await end_task(receiving)
        assert a.mesh.refused == 300
        assert set(a.mesh._refused) <= {*names, "\\xff", OTHERS}
        assert looks <= 3  # one of them when the registry began to listen


@pytest.mark.parametrize("other", [ModelIdentity("n", "e" * 32, 128)])
async def test_the_later_of_two_that_disagree_does_not_start(redis_url: str, other: ModelIdentity) -> None:
    """It says what both serve."""
    space = uuid.uuid4().hex
    tier: Tier = "gateway"
    async with join_mesh(settings(redis_url, space, "a"), tier, MODEL):
        with pytest.raises(MeshMismatch, match=r"b serves n .* a, which was here first, serves m"):
            async with join_mesh(settings(redis_url, space, "b"), "decode", other):
                pass


def test_an_open_address_without_a_key_is_refused() -> None:
    """Pages would travel in the clear."""
    with pytest.raises(SettingsError, match="headrace keys"):
        Mesh("10.1.2.3", None)


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    """And an existing one is never replaced."""
    path = tmp_path / "k"
    path.write_text("nonsense")
    with pytest.raises(SettingsError, match="headrace keys"):
        MeshKey.read(path)
    with pytest.raises(FileExistsError):
        MeshKey.make().write(path)
