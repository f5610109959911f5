"""Where gateways leave what they finished lately: one Redis key a gateway, which expires when nothing is added."""

from __future__ import annotations

from collections.abc import Sequence

import redis.asyncio

from headrace.messages.finished import FinishedRequest, FinishedRequests
from headrace.redis_client import Keys
from headrace.wire import Decoder, WireError, encode

KEPT_SECONDS = 3600


class FinishedLog:
    """Gateways write, `headrace top` reads. All methods raise `RedisError`."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._decode: Decoder[FinishedRequests] = Decoder(FinishedRequests)

    async def write(self, gateway: str, requests: list[FinishedRequest]) -> None:
        """Replace what this gateway left before."""
        await self._client.set(
            self._keys.finished(gateway), encode(FinishedRequests(requests=requests)), ex=KEPT_SECONDS
        )

    async def read(self, gateways: Sequence[str]) -> list[FinishedRequest]:
        """What these gateways left. What can't be read, because another version wrote it, is left out."""
        if not gateways:
            return []
        values: list[bytes | None] = await self._client.mget([self._keys.finished(id) for id in gateways])  # type: ignore[assignment]
        found: list[FinishedRequest] = []
        for value in values:
            try:
                found += self._decode(value).requests if value is not None else []
            except WireError:
                continue
        return found
