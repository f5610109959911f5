"""Looks at a mesh from outside, through Redis alone: who reads this is no member and disturbs nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis.asyncio

from headrace.finished_log import FinishedLog
from headrace.mesh_view import MeshView, Moment, view_mesh
from headrace.node import DEFAULT_REDIS
from headrace.queue import RequestQueue
from headrace.redis_client import Keys, RedisError, connect
from headrace.registry import Member
from headrace.registry_store import RegistryStore
from headrace.settings import Settings, SettingsError
from headrace.wire import Decoder, WireError


class MeshWatch:
    """Each look gives the mesh as it is, with rates since the look before. All methods raise `RedisError`."""

    def __init__(self, client: redis.asyncio.Redis, namespace: str) -> None:
        self.unreadable: list[str] = []
        """Members that another version of Headrace registered."""
        self._client = client
        self._keys = Keys(namespace)
        self._queue = RequestQueue(client, self._keys)
        self._finished = FinishedLog(client, self._keys)
        self._before: Moment | None = None

    async def look(self) -> MeshView:
        """The mesh now."""
        members, unreadable = await read_members(self._client, self._keys)
        self.unreadable = list(unreadable)
        now = Moment.now(members)
        gateways = [member.id for member in now.members if member.tier == "gateway"]
        queued, finished = await self._queue.depth(), await self._finished.read(gateways)
        view = view_mesh(now, self._before, queued=queued, requests=finished)
        self._before = now
        return view


async def read_members(client: redis.asyncio.Redis, keys: Keys) -> tuple[list[Member], dict[str, WireError]]:
    """Who is registered, in order of id, and why others can't be read. Raises `RedisError`."""
    decode: Decoder[Member] = Decoder(Member)
    members, unreadable = [], {}
    for name, value in (await RegistryStore(client, keys).look()).items():
        try:
            if value is not None:
                members.append(decode(value))
        except WireError as error:
            unreadable[name] = error
    return members, unreadable


@asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[MeshWatch]:
    """Raises `SettingsError` where Redis can't be reached, in the block too."""
    url = settings.redis or DEFAULT_REDIS
    client = connect(url)
    try:
        yield MeshWatch(client, settings.namespace)
    except RedisError as error:
        raise SettingsError(
            f"can't reach Redis at {url}: {error}. `headrace up` says at its start where its Redis is: give that with "
            "--redis"
        ) from error
    finally:
        await client.aclose()
