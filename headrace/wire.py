"""How every message is put on the wire: MessagePack with a fixed, versioned schema.

Each boundary between processes has one file of message types under `headrace/messages/` (the handoff's live in
`headrace.kvtransfer.messages`). A message is a frozen, tagged `msgspec.Struct`; a receiver decodes with a closed
union of the types it accepts, so unknown tags, missing or extra fields, wrong types and out-of-range numbers are all
refused before any code sees them. A digest goes before the body, so that a flipped bit never decodes into another valid
message. Nothing that arrives is ever unpickled.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

import msgspec
import xxhash

WIRE_VERSION = 6
DIGEST_BYTES = 8
"""XXH3-64, big endian."""
HEAD_BYTES = 1 + DIGEST_BYTES
MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Largest header accepted, in bytes. Page payloads travel in frames of their own and do not count."""

T = TypeVar("T")

MeshId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""When a process started, in nanoseconds: tells it from others of its id."""
Attempt = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
TraceParent = Annotated[
    str, msgspec.Meta(min_length=55, max_length=55, pattern=r"^00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-9a-f]$")
]
"""W3C Trace Context: version, trace id, id of the span that this belongs under, flags."""


class WireError(ValueError):
    """A message that does not follow the schema; the sender is at fault, never the receiver."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Base of every message that crosses a process boundary."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the structures inside messages."""


def encode(message: Message) -> bytes:
    """Serialise a message: MessagePack, sealed."""
    return seal(msgspec.msgpack.encode(message))


def seal(body: bytes) -> bytes:
    """What goes on the wire for `body`: one version byte, the body's digest, the body."""
    return bytes([WIRE_VERSION]) + xxhash.xxh3_64_digest(body) + body


class Decoder(Generic[T]):
    """Decodes one closed set of message types.

    `Decoder(Offer | Pages)` accepts those two and raises `WireError` for everything else.
    """

    def __init__(self, types: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(types)

    def __call__(self, data: bytes | memoryview) -> T:
        if len(data) > MAX_HEADER_BYTES:
            raise WireError(f"header of {len(data)} bytes is over the limit of {MAX_HEADER_BYTES}")
        if len(data) == 0 or data[0] != WIRE_VERSION:
            raise WireError(f"wire version {data[0] if len(data) else 'missing'}, this process speaks {WIRE_VERSION}")
        body = memoryview(data)[HEAD_BYTES:]
        if xxhash.xxh3_64_digest(body) != data[1:HEAD_BYTES]:
            raise WireError("the header was damaged on the way")
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(str(error)) from error
