"""What the command and its generator processes tell each other, over pipes: a length, then msgpack."""

from __future__ import annotations

import asyncio
import struct

import msgspec

LENGTH = struct.Struct("<I")
PROBE = struct.Struct("<d")
"""When it was sent, by `time.perf_counter`, which all processes of a machine share."""


class Begin(msgspec.Struct, tag=True, frozen=True):
    """A run starts at `origin` (`time.perf_counter`). `head` is the start of each request, up to Content-Length."""

    host: str
    port: int
    tls: bool
    head: bytes
    origin: float
    timeout: float
    concurrency: int
    """Requests at once; 0 where each is sent at its own time."""


class Job(msgspec.Struct, tag=True, frozen=True):
    """One request; `at` is seconds after the origin."""

    number: int
    at: float
    body: bytes


class End(msgspec.Struct, tag=True, frozen=True):
    """There are no more jobs; with `at_once`, what runs is cancelled."""

    at_once: bool = False


class Result(msgspec.Struct, tag=True):
    """One request as its client saw it. `sent` is seconds after the origin, all other times seconds after `sent`."""

    number: int
    sent: float
    late: float
    """Seconds between the time it was to be sent and `sent`."""
    times: list[float] = []
    """When each event with text came."""
    ended: float = 0.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    failure: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.times[0]

    @property
    def e2e(self) -> float:
        """From the request to its last token."""
        return self.times[-1]

    @property
    def gaps(self) -> list[float]:
        """Inter-token times: between one event with text and the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]

    @property
    def tokens(self) -> int:
        """As the server counted; where it does not say, one an event."""
        return len(self.times) if self.output_tokens is None else self.output_tokens

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None where there was no second."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else None


class Tick(msgspec.Struct, tag=True, frozen=True):
    """How far a generator is, some times a second."""

    running: int
    pieces: int
    """Pieces of bodies so far."""


class Done(msgspec.Struct, tag=True, frozen=True):
    """The run is over for this generator; what making the load cost. Seconds."""

    cpu: float
    wall: float
    lags: list[float]
    """How much later than asked the event loop woke."""
    stamps: list[float]
    """Between the arrival of a byte and its time stamp."""
    most_running: int


FromCommand = Begin | Job | End
FromGenerator = Result | Tick | Done


def frame(message: FromCommand | FromGenerator) -> bytes:
    """As it goes into the pipe."""
    data = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next message's bytes; None where the other side is gone."""
    try:
        return await reader.readexactly(LENGTH.unpack(await reader.readexactly(LENGTH.size))[0])
    except asyncio.IncompleteReadError:
        return None
