"""Bulk bytes between two members, in the clear on loopback and under CURVE."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zmq

from headrace.curve_line import CurveConnection, CurveListener
from headrace.data_line import DataLine, Listener, Payload
from headrace.data_lines import data_listener
from headrace.keys import MeshKey
from headrace.settings import SettingsError
from headrace.tcp_line import MAGIC, MAX_PARTS, PREAMBLE, Hello, TcpConnection, TcpListener
from headrace.wire import encode

SECONDS = 20
KEY = MeshKey.make()


class Ends:
    """A listener that knows `prefill-1@1` alone, and what it heard."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.frames: queue.SimpleQueue[tuple[str, bytes, bytes]] = queue.SimpleQueue()
        self.refused: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.strangers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.read = True
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        listener.start(self.on_frame, self.identify, lambda name, reason: self.refused.put((name, reason)))

    def identify(self, name: str) -> str | None:
        """Who is registered."""
        if name == "prefill-1@1":
            return "prefill-1"
        self.strangers.put(name)
        return None

    def on_frame(self, sender: str, header: memoryview, payload: Payload) -> None:
        """Keep all, read into two pieces of memory."""
        self.may_go_on.wait(SECONDS)
        data = bytearray(payload.size)
        if self.read:
            half = payload.size // 2
            payload.read_into([memoryview(data)[:half], memoryview(data)[half:]])
        self.frames.put((sender, bytes(header), bytes(data)))


@pytest.fixture(params=["tcp", "curve"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A listener of each kind."""
    listener: Listener = TcpListener("127.0.0.1") if request.param == "tcp" else CurveListener("127.0.0.1", KEY)
    yield Ends(listener)
    listener.close()


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    """For the clients' sockets."""
    context: zmq.Context = zmq.Context()
    yield context
    context.destroy(linger=0)


def line_to(ends: Ends, context: zmq.Context, name: str = "prefill-1@1", key: MeshKey = KEY) -> DataLine:
    """A line of the listener's kind."""

    def connect() -> TcpConnection | CurveConnection:
        if isinstance(ends.listener, TcpListener):
            return TcpConnection(ends.listener.address, name)
        return CurveConnection(context, ends.listener.address, name, key)

    return DataLine(connect, "decode-1")


def send(line: DataLine, header: bytes, payload: Sequence[bytes]) -> None:
    """Submit a frame that must not fail."""

    def failed(reason: str) -> None:
        raise AssertionError(reason)

    line.submit(lambda: (header, [memoryview(part) for part in payload]), failed)


def test_frames_arrive_whole(ends: Ends, context: zmq.Context) -> None:
    """Small, empty and large ones, in whatever order."""
    line = line_to(ends, context)
    sent = {b"a": b"", b"b": b"x", b"c": bytes(range(256)) * 20_000}
    for header, payload in sent.items():
        send(line, header, [payload[:1000], payload[1000:]])
    came = [ends.frames.get(timeout=SECONDS) for _ in sent]
    assert {header: payload for _, header, payload in came} == sent
    assert {sender for sender, _, _ in came} == {"prefill-1"}
    line.end()
    line.join()


def test_more_pieces_than_a_system_call_takes_arrive_in_order(ends: Ends, context: zmq.Context) -> None:
    """Of all lengths, empty ones among them."""
    line = line_to(ends, context)
    pieces = [bytes([number % 251]) * (number % 7) for number in range(2 * MAX_PARTS + 5)]
    send(line, b"h", pieces)
    assert ends.frames.get(timeout=SECONDS) == ("prefill-1", b"h", b"".join(pieces))
    line.end()
    line.join()


def test_payloads_that_nobody_reads_are_passed_over(ends: Ends, context: zmq.Context) -> None:
    """The next frame is found behind them."""
    ends.read = False
    line = line_to(ends, context)
    for number in range(8):
        send(line, bytes([number]), [bytes(100_000)])
    assert {ends.frames.get(timeout=SECONDS)[1] for _ in range(8)} == {bytes([number]) for number in range(8)}
    line.end()
    line.join()


def test_a_stranger_is_not_heard(ends: Ends, context: zmq.Context) -> None:
    """Whoever the registry does not know under this id and epoch."""
    line = line_to(ends, context, "prefill-1@2")
    line.submit(lambda: (b"h", ()), lambda reason: None)
    assert ends.strangers.get(timeout=SECONDS) == "prefill-1@2"
    known = line_to(ends, context)
    send(known, b"mine", [])
    assert ends.frames.get(timeout=SECONDS)[1] == b"mine"
    assert ends.frames.empty()
    for each in (line, known):
        each.end()
        each.join()


@pytest.mark.parametrize("ends", ["tcp"], indirect=True)
@pytest.mark.parametrize(
    "preamble",
    [b"GET / HTTP/1.1\r\n\r\n", PREAMBLE.pack(MAGIC, 2**31, 0), PREAMBLE.pack(MAGIC, 1, 2**62)],
    ids=["another protocol", "long header", "long payload"],
)
def test_what_is_no_frame_ends_the_connection(ends: Ends, preamble: bytes) -> None:
    """It is refused, and no memory is taken for it."""
    assert isinstance(ends.listener, TcpListener)
    host, _, port = ends.listener.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        hello = encode(Hello(name="prefill-1@1"))
        connection.sendall(PREAMBLE.pack(MAGIC, len(hello), 0) + hello + preamble)
        assert ends.refused.get(timeout=SECONDS)[0] == "prefill-1@1"


@pytest.mark.parametrize("ends", ["tcp"], indirect=True)
def test_a_broken_line_says_so_and_the_next_frame_connects_again(ends: Ends, context: zmq.Context) -> None:
    """Whoever waits for the frame is told; a line outlives its connections."""
    attempts = iter([False, True])

    def connect() -> TcpConnection:
        if not next(attempts):
            raise ConnectionRefusedError("nobody there")
        return TcpConnection(ends.listener.address, "prefill-1@1")

    line = DataLine(connect, "decode-1", stripes=1)
    failures: queue.SimpleQueue[str] = queue.SimpleQueue()
    line.submit(lambda: (b"lost", ()), failures.put)
    assert "nobody there" in failures.get(timeout=SECONDS)
    send(line, b"here", [])
    assert ends.frames.get(timeout=SECONDS)[1] == b"here"
    line.end()
    line.join()


@pytest.mark.parametrize("ends", ["tcp"], indirect=True)
def test_a_line_ends_although_its_peer_takes_nothing(ends: Ends, context: zmq.Context) -> None:
    """Neither end waits for a `send` that would wait for ever."""
    ends.may_go_on.clear()
    line = line_to(ends, context)
    failures: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in range(64):
        line.submit(lambda: (b"h", [memoryview(bytes(2**20))]), failures.put)
    line.end()
    line.join()
    ends.may_go_on.set()


@pytest.mark.parametrize("ends", ["curve"], indirect=True)
def test_another_key_opens_nothing(ends: Ends, context: zmq.Context) -> None:
    """CURVE turns it away before anything is heard, and members come in meanwhile."""
    line = line_to(ends, context, key=MeshKey.make())
    line.submit(lambda: (b"h", ()), lambda reason: None)
    known = line_to(ends, context)
    send(known, b"mine", [])
    assert ends.frames.get(timeout=SECONDS)[1] == b"mine"
    assert (ends.frames.empty(), ends.strangers.empty()) == (True, True)
    for each in (line, known):
        each.end()
        each.join()


async def test_an_open_address_without_a_key_is_refused() -> None:
    """Pages would travel in the clear."""
    with pytest.raises(SettingsError, match="headrace keys"):
        async with data_listener("10.1.2.3", None):
            pass


async def test_a_key_makes_it_curve(tmp_path: Path) -> None:
    """Also on loopback."""
    KEY.write(tmp_path / "k")
    async with data_listener("127.0.0.1", tmp_path / "k") as listener:
        assert isinstance(listener, CurveListener)
    async with data_listener("127.0.0.1", None) as listener:
        assert isinstance(listener, TcpListener)


def test_a_header_alone_is_sent_on_the_thread_that_submits_it(ends: Ends, context: zmq.Context) -> None:
    """Once a TCP connection is there and idle; by the line's own thread otherwise. It arrives in any case."""
    line = line_to(ends, context)
    makers: list[str] = []

    def make() -> tuple[bytes, Sequence[memoryview]]:
        makers.append(threading.current_thread().name)
        return str(len(makers)).encode(), ()

    for _ in range(12):
        line.submit(make, lambda reason: makers.append(reason), now=True)
        ends.frames.get(timeout=SECONDS)
    here = [name for name in makers if name == threading.current_thread().name]
    assert len(makers) == 12
    assert bool(here) == isinstance(ends.listener, TcpListener)
    line.end()
    line.join()


def test_a_line_that_is_to_reconnect_loses_nothing(ends: Ends, context: zmq.Context) -> None:
    """What was sent before arrives, and what is sent after it, over another connection."""
    line = line_to(ends, context)
    for number in range(40):
        send(line, bytes([number]), [bytes(100_000)])
        if number % 10 == 5:
            line.reconnect()
    assert {ends.frames.get(timeout=SECONDS)[1] for _ in range(40)} == {bytes([number]) for number in range(40)}
    line.end()
    line.join()


@pytest.mark.parametrize("ends", ["tcp"], indirect=True)
def test_a_frame_that_meets_a_broken_connection_takes_a_new_one(ends: Ends, context: zmq.Context) -> None:
    """The receiver closed it meanwhile, say: nobody is told of a failure."""
    line = line_to(ends, context)
    for _ in range(4):
        send(line, b"before", [])
        ends.frames.get(timeout=SECONDS)
    ends.listener.drop("prefill-1")
    failures: list[str] = []
    for number in range(40):  # the first ones may still be taken by the socket, and are lost
        line.submit(lambda number=number: (bytes([number]), [memoryview(bytes(100_000))]), failures.append)
    while ends.frames.get(timeout=SECONDS)[1] != bytes([39]):
        assert not failures
    line.end()
    line.join()


@pytest.mark.parametrize("ends", ["tcp"], indirect=True)
def test_a_frame_that_stops_in_its_middle_ends_its_connection(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads it is told; between frames there may be any silence."""
    monkeypatch.setattr("headrace.tcp_line.FRAME_SECONDS", 0.05)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def on_frame(sender: str, header: memoryview, payload: Payload) -> None:
        try:
            payload.read_into([memoryview(bytearray(payload.size))])
        except ConnectionError as error:
            told.put(str(error))
            raise
        told.put("whole")

    ends.listener._on_frame = on_frame  # type: ignore[attr-defined]
    host, _, port = ends.listener.address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        for header, payload in ((encode(Hello(name="prefill-1@1")), b""), (b"h", b"abc")):
            connection.sendall(PREAMBLE.pack(MAGIC, len(header), len(payload)) + header + payload)
        assert told.get(timeout=SECONDS) == "whole"
        connection.sendall(PREAMBLE.pack(MAGIC, 1, 10) + b"h" + b"half")
        assert "within a frame" in told.get(timeout=SECONDS)
        assert connection.recv(1) == b""
