"""Membership and messages between real processes' sockets."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from headrace.keys import MeshKey
from headrace.mesh import Mesh, PeerGone
from headrace.messages.control import Cancel
from headrace.node import ModelIdentity, join_mesh
from headrace.registry import MeshMismatch, Tier
from headrace.settings import Settings, SettingsError
from headrace.wire import Decoder

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
