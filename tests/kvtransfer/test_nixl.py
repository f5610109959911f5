"""Reading pages by NIXL: each row of the table in `headrace.kvtransfer.nixl`, with an agent of our own in its place."""

from __future__ import annotations

import ctypes
import importlib.util
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
import torch

from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.kvtransfer import nixl
from headrace.kvtransfer.arrivals import Arrivals, Arriving, checksum
from headrace.kvtransfer.base import WholePages
from headrace.kvtransfer.host import this_host
from headrace.kvtransfer.landing import Landing
from headrace.kvtransfer.messages import NixlMemory, Offer, PagesInPlace
from headrace.kvtransfer.nixl import READ_SECONDS, NixlEndpoint, NixlSource, nixl_endpoint
from headrace.kvtransfer.transports import Transports, Wanted, exports_of
from headrace.loadtest.kv_pair import PairConfig, pair
from headrace.settings import Settings, SettingsError
from tests.kvtransfer.parts import LAYOUT, BytesPayload, make_offer

SECONDS = 20
CACHE = CacheLayout("float32", num_layers=3, num_kv_heads=1, head_dim=1, page_size=4)
NUM_PAGES = 6
Place = tuple[int, int, int]


@dataclass
class StandIn:
    """See `Agent`: all agents of a test are in this process. Reads take place when they are looked at."""

    name: str
    registered: list[tuple[int, int, int, str]] = field(default_factory=list)
    peers: set[str] = field(default_factory=set)
    transfers: list[int] = field(default_factory=list)
    """Runs of neighbours in each."""
    released: int = 0
    answers: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    """To looks at a read, before it is done; an answer that begins with `!` is an error."""
    is_stuck: threading.Event = field(default_factory=threading.Event)
    """Nothing is done as long as it is set."""
    looks: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    """What was answered."""

    def register_memory(self, regions: list[tuple[int, int, int, str]], kind: str) -> object:
        """See `Agent`."""
        self.registered += regions
        return regions[0]

    def deregister_memory(self, registered: object) -> None:
        """See `Agent`."""
        self.registered.remove(registered)  # type: ignore[arg-type]

    def get_agent_metadata(self) -> bytes:
        """See `Agent`."""
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> str:
        """See `Agent`."""
        if metadata == b"nobody":
            raise RuntimeError("NIXL_ERR_NOT_FOUND")
        self.peers.add(metadata.decode())
        return metadata.decode()

    def remove_remote_agent(self, name: str) -> None:
        """See `Agent`."""
        self.peers.remove(name)

    def get_xfer_descs(self, places: list[Place], kind: str) -> list[Place]:
        """See `Agent`."""
        assert kind == "DRAM"
        return places

    def initialize_xfer(self, operation: str, mine: list[Place], theirs: list[Place], name: str) -> object:
        """See `Agent`."""
        assert operation == "READ"
        assert name in self.peers
        for address, size, _ in mine:
            (start, length, _, _) = self.registered[0]
            assert start <= address <= address + size <= start + length
        self.transfers.append(len(mine))
        return mine, theirs, name

    def transfer(self, handle: object) -> str:
        """See `Agent`."""
        return "PROC"

    def check_xfer_state(self, handle: tuple[list[Place], list[Place], str]) -> str:
        """See `Agent`."""
        mine, theirs, name = handle
        try:
            state = self.answers.get_nowait()
        except queue.Empty:
            state = "DONE" if name in self.peers else "!NIXL_ERR_REMOTE_DISCONNECT"
        if self.is_stuck.is_set():
            state = "PROC"
        if state == "DONE":
            for (here, size, _), (there, other_size, _) in zip(mine, theirs, strict=True):
                assert size == other_size
                ctypes.memmove(here, there, size)
        self.looks.put(state)
        if state.startswith("!"):
            raise RuntimeError(state[1:])
        return state

    def release_xfer_handle(self, handle: object) -> None:
        """See `Agent`."""
        self.released += 1


class World:
    """A sender's cache, and a receiver's with its endpoint."""

    def __init__(self) -> None:
        self.now = 0.0
        self.theirs, self.mine = (KVCache(CACHE, NUM_PAGES, torch.device("cpu")) for _ in range(2))
        self.theirs.pages.normal_()
        self.sender, self.agent = StandIn("sender"), StandIn("receiver")
        self.endpoint_there = NixlEndpoint(self.sender, self.theirs)
        self.endpoint = NixlEndpoint(self.agent, self.mine, lambda: self.now)
        self.source = self.endpoint.open(self.endpoint_there.exports)
        self.ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def copy(self, source: NixlSource | None = None) -> None:
        """Two neighbours and another one, of two layers."""
        blocks = [layer * NUM_PAGES + page for layer in (1, 2) for page in (2, 3, 0)]
        (source or self.source).copy(blocks, range(1, 3), [4, 5, 1], self.ends.put)

    def end(self) -> Exception | None:
        """What the copy ended with."""
        return self.ends.get(timeout=SECONDS)

    def transports(self, wanted: Wanted) -> Transports:
        """The receiver's."""
        return Transports(LAYOUT, self.mine, self.refuse, nixl=self.endpoint, wanted=wanted)

    def refuse(self, sender: str, reason: str) -> None:
        """Nothing is wrong."""
        raise AssertionError(reason)

    def offer(self, machine: str) -> Offer:
        """The sender's, from that machine."""
        exports = exports_of(self.theirs, self.endpoint_there)
        host = msgspec.structs.replace(this_host(), machine=machine)
        return msgspec.structs.replace(make_offer([1]), host=host, shm=exports.shm, nixl=exports.nixl)


@pytest.fixture
def world() -> Iterator[World]:
    """Closed at the end, with nothing registered any more."""
    world = World()
    yield world
    for endpoint, agent in ((world.endpoint, world.agent), (world.endpoint_there, world.sender)):
        endpoint.close()
        assert agent.registered == []
    world.mine.close()
    world.theirs.close()


def test_pages_are_read_to_their_places(world: World) -> None:
    """READING until it is done; neighbours are one descriptor, and nothing else changes."""
    for _ in range(3):
        world.agent.answers.put("PROC")
    world.copy()
    assert world.end() is None
    assert torch.equal(world.mine.pages[1:, [4, 5, 1]], world.theirs.pages[1:, [2, 3, 0]])
    assert not world.mine.pages[0].any()
    assert not world.mine.pages[:, [0, 2, 3]].any()
    assert (world.agent.transfers, world.agent.released) == ([4], 1)


def test_a_read_that_fails_cuts_the_sender_off(world: World) -> None:
    """READING -> over; what is asked of that sender later fails at once, other senders are read."""
    world.agent.answers.put("!NIXL_ERR_REMOTE_DISCONNECT")
    world.copy()
    assert isinstance(world.end(), ConnectionError)
    assert world.source.is_cut_off
    assert world.agent.peers == set()
    world.copy()
    assert isinstance(world.end(), ConnectionError)
    world.copy(world.endpoint.open(world.endpoint_there.exports))
    assert world.end() is None


@pytest.mark.parametrize("why", ["late", "left"])
def test_a_read_that_hangs_is_over_only_when_nothing_writes_any_more(world: World, why: str) -> None:
    """READING -> READING: no other one begins, and its pages are nobody else's before NIXL says so."""
    world.agent.is_stuck.set()
    world.copy()
    assert world.agent.looks.get(timeout=SECONDS) == "PROC"
    if why == "late":
        world.now += READ_SECONDS + 1
    else:
        world.source.close()
    while not world.source.is_cut_off:
        assert world.agent.looks.get(timeout=SECONDS) == "PROC"
    world.copy()
    assert isinstance(world.end(), ConnectionError)
    assert world.ends.empty()
    assert world.agent.peers == {"sender"}
    world.agent.is_stuck.clear()
    assert world.end() is None
    world.copy()
    assert isinstance(world.end(), ConnectionError)
    assert world.agent.peers == set()


def test_an_agent_has_one_source(world: World) -> None:
    """As long as something is read from it; whoever comes back before that is not connected to a second time."""
    exports = world.endpoint_there.exports
    assert world.endpoint.open(exports) is world.source
    with pytest.raises(ValueError, match="other memory"):
        world.endpoint.open(msgspec.structs.replace(exports, address=0))
    world.agent.is_stuck.set()
    world.copy()
    assert world.agent.looks.get(timeout=SECONDS) == "PROC"
    world.source.close()
    while not world.source.is_cut_off:
        assert world.agent.looks.get(timeout=SECONDS) == "PROC"
    assert world.endpoint.open(exports) is world.source
    world.agent.is_stuck.clear()
    assert world.end() is None
    again = world.endpoint.open(exports)
    assert again is not world.source
    world.copy(again)
    assert world.end() is None


def test_closing_waits_for_what_is_being_read() -> None:
    """For a while: the memory is no longer registered, whatever becomes of it."""
    for seconds in (0.0, READ_SECONDS + 1):
        world = World()
        world.agent.is_stuck.set()
        world.copy()
        assert world.agent.looks.get(timeout=SECONDS) == "PROC"
        closing = threading.Thread(target=world.endpoint.close)
        closing.start()
        while not world.endpoint.is_closing:
            assert world.agent.looks.get(timeout=SECONDS) == "PROC"
        world.now += seconds
        if not seconds:
            world.agent.is_stuck.clear()
            assert world.end() is None
        closing.join()
        assert world.agent.registered == []
        assert world.ends.empty()
        world.endpoint_there.close()


def test_what_can_not_be_connected_to_fails(world: World) -> None:
    """Metadata that NIXL does not like, say."""
    world.copy(world.endpoint.open(msgspec.structs.replace(world.endpoint_there.exports, metadata=b"nobody")))
    assert isinstance(world.end(), RuntimeError)


def test_blocks_that_are_not_there_are_refused_at_once(world: World) -> None:
    """And nobody is told later."""
    with pytest.raises(ValueError, match="page 18 of 18"):
        world.source.copy([18], range(1), [0], world.ends.put)
    assert world.ends.empty()


@pytest.mark.parametrize(
    ("wanted", "machine", "expected"),
    [
        ("auto", "another", "nixl"),
        ("auto", this_host().machine, "shm"),
        ("nixl", this_host().machine, "nixl"),
        ("tcp", "another", "tcp"),
        ("tcp", this_host().machine, "tcp"),
    ],
)
def test_nixl_is_for_other_hosts_unless_it_is_asked_for(
    world: World, wanted: Wanted, machine: str, expected: str
) -> None:
    """Where both have it."""
    transports = world.transports(wanted)
    assert transports.choose("prefill-1", world.offer(machine))[0] == expected
    other_pages = msgspec.structs.replace(world.offer("another"), layout=msgspec.structs.replace(LAYOUT, page_size=8))
    assert transports.choose("prefill-1", other_pages)[0] == "tcp"
    assert transports.choose("prefill-1", msgspec.structs.replace(world.offer("another"), nixl=None))[0] == "tcp"
    transports.forget("prefill-1")


def test_what_could_not_be_read_comes_another_way(world: World) -> None:
    """Until the sender has left and come again."""
    transports = world.transports("auto")
    name, source = transports.choose("prefill-1", world.offer("another"))
    assert isinstance(source, NixlSource)
    world.agent.answers.put("!NIXL_ERR_BACKEND")
    world.copy(source)
    assert world.end() is not None
    assert (name, transports.choose("prefill-1", world.offer("another"))) == ("nixl", ("tcp", None))
    transports.forget("prefill-1")
    assert transports.choose("prefill-1", world.offer("another"))[0] == "nixl"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_pages_are_checked_when_they_are_here(world: World, is_damaged: bool) -> None:
    """As those of `tcp` are: the attempt ends, and the sender is told why."""
    told: queue.SimpleQueue[None] = queue.SimpleQueue()
    landing = Landing(1, 0, 3, lambda: told.put(None))
    refused: list[str] = []
    arrivals = Arrivals("float32", lambda sender, reason: refused.append(reason))
    arrivals.expect(("s", "r", 0), Arriving(landing, [WholePages(world.mine, [5])], "nixl", world.source, "auto"))
    sent = checksum([view for layer in range(3) for view in world.theirs.host_views(layer, [2]) or ()])
    if is_damaged:
        world.theirs.pages[1, 2] += 1
    blocks = [layer * NUM_PAGES + 2 for layer in range(3)]
    key = {"request_id": "r", "attempt": 0, "sequence": 0}
    message = PagesInPlace(**key, layer=0, first_page=0, blocks=blocks, num_layers=3, checksum=sent)  # type: ignore[arg-type]
    arrivals.apply("s", message, BytesPayload(b""))
    told.get(timeout=SECONDS)
    if is_damaged:
        assert landing.problem is not None
        assert landing.problem[0] == "checksum"
        assert len(refused) == 1
    else:
        assert landing.is_complete(1)
        assert torch.equal(world.mine.pages[:, 5], world.theirs.pages[:, 2])


async def test_it_is_loaded_where_it_is_of_use_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who asks for it without having it is told what to do."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cache = KVCache(CACHE, NUM_PAGES, torch.device("cpu"))
    for settings in (Settings(), Settings(kv_transport="tcp")):
        async with nixl_endpoint(settings, cache) as endpoint:
            assert endpoint is None
    with pytest.raises(SettingsError, match=r"headrace\[nixl\]"):
        async with nixl_endpoint(Settings(kv_transport="nixl"), cache):
            pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(nixl, "_has_rdma", lambda: True)
    async with nixl_endpoint(Settings(), cache) as endpoint:  # on loopback
        assert endpoint is None
    cache.close()


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs NIXL")
async def test_pages_travel_between_two_processes() -> None:
    """By NIXL itself."""
    config = PairConfig(CacheLayout("bfloat16", 4, 2, 64, 16), 40, "nixl")
    async with pair(config) as both:
        for num_pages in (40, 1, 17):
            both.cache.pages.normal_()
            await both.transfer(num_pages)
            assert await both.arrived_right(range(num_pages))


def test_a_description_of_memory_has_bounds() -> None:
    """It comes from another worker."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(
            {"metadata": b"", "address": 1, "num_blocks": 1, "kind": "DRAM", "gpu": 0}, NixlMemory, strict=True
        )
