"""Moves between two workers whose caches are real bytes: requests end up whole at one of them, whatever goes wrong."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.decode import mover as mover_module
from headrace.decode.mover import COMING_TOKENS, Mover
from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Key, Sequence
from headrace.engine.page_pool import PagePool
from headrace.kvtransfer.handoff import Handoff
from headrace.kvtransfer.host import this_host
from headrace.kvtransfer.incoming import ReceivedRequest
from headrace.kvtransfer.messages import Abort, Offer
from headrace.kvtransfer.on_the_way import Outgoing
from headrace.kvtransfer.receiver import Receiver
from headrace.kvtransfer.sender import Sender
from headrace.kvtransfer.transports import Exports
from headrace.mesh import PeerGone
from headrace.messages.request import SamplingParams
from headrace.wire import Message
from tests.kvtransfer.parts import LAYOUT, NUM_LAYERS, PAGE_SIZE, BytesPayload, MemoryStore, frame_of

HERE, THERE = "decode-0", "decode-1"
TOKENS = 60
OFFER = Offer(
    request_id="r",
    attempt=0,
    gateway="gateway-1",
    layout=LAYOUT,
    token_ids=[1],
    generated=0,
    sampling=SamplingParams(max_tokens=TOKENS),
    deadline=1e12,
)


def next_token(token_ids: list[int]) -> int:
    """What the model says: it depends on all that was said before."""
    return (sum(token_ids) * 31 + len(token_ids) * 7) % 251


class _Departures:
    def __init__(self, world: World) -> None:
        self._world = world

    def send(self, handoff: Handoff, outgoing: Outgoing) -> None:
        """The bytes are read now, as a line's thread may."""
        self._world.frames.append(frame_of(handoff, [self._world.store], outgoing))

    def reconnect(self, receiver: str) -> None:
        """See `Departures`."""


class World:
    """A worker that moves its requests, one that takes them, and what is on the way between them."""

    def __init__(self, num_pages: int = 64, pages_there: int = 64, lookahead: int = 0) -> None:
        self.pool, self.pool_there = PagePool(num_pages, PAGE_SIZE), PagePool(pages_there, PAGE_SIZE)
        self.store, self.store_there = MemoryStore(num_pages), MemoryStore(pages_there)
        self.scheduler = DecodeScheduler(self.pool, 8)
        self.steps: deque[list[tuple[Sequence, int]]] = deque()
        """In flight: requests and their length when the step was started."""
        self.lookahead = lookahead
        self.there_is_alive = True
        self.to_there: deque[Message] = deque()
        self.to_here: deque[Message] = deque()
        self.frames: deque[tuple[bytes, bytes]] = deque()
        self.received: dict[Key, ReceivedRequest] = {}
        self.moved: list[Key] = []
        self.sender = Sender(self.send, _Departures(self))
        self.mover = Mover(
            self.scheduler,
            self.pool,
            self.store,
            LAYOUT,
            Exports(this_host(), None, None),
            "auto",
            self.sender,
            self,
            lambda sequence, receiver: self.moved.append(sequence.key),
            lambda: None,
        )
        self.receiver = Receiver(
            LAYOUT,
            [self.store_there],
            self.pool_there,
            pages_there,
            lambda peer, message: self.to_here.append(message),
            self.take,
        )

    def best(self, handoff: Handoff) -> str | None:
        """See `Placement`."""
        return THERE if self.there_is_alive and THERE not in handoff.refused else None

    async def send(self, peer: str, message: Message) -> None:
        """See `Send`."""
        if not self.there_is_alive:
            raise PeerGone(peer)
        self.to_there.append(message)

    def take(self, request: ReceivedRequest) -> None:
        """The other worker's decoder: all that it is given must be what this one computed."""
        tokens = request.token_ids
        for position, token in enumerate(tokens):
            page, offset = request.pages[position // PAGE_SIZE], position % PAGE_SIZE
            for layer in range(NUM_LAYERS):
                assert self.store_there.data[layer][page][offset] == token
        start = len(tokens) - request.generated
        assert start == 1
        for position in range(start, len(tokens)):
            assert tokens[position] == next_token(tokens[:position])
        assert request.commit.token_id == next_token(tokens)
        key = request.offer.request_id, request.offer.attempt
        assert key not in self.received
        self.received[key] = request

    def add(self, name: str) -> Key:
        """A request with one token of prompt and one of output."""
        offer = msgspec.structs.replace(OFFER, request_id=name)
        sequence = Sequence(offer, [1, next_token([1])], self.pool.allocate(1), 10_000)
        self._write(sequence, 0)
        self.scheduler.add(sequence)
        return sequence.key

    def _write(self, sequence: Sequence, position: int) -> None:
        page, offset = sequence.pages[position // PAGE_SIZE], position % PAGE_SIZE
        for layer in range(NUM_LAYERS):
            before = self.store.data[layer][page]
            self.store.data[layer][page] = (
                before[:offset] + bytes([sequence.token_ids[position]]) + before[offset + 1 :]
            )

    def step(self) -> None:
        """One turn of the decode worker's loop."""
        plan = self.scheduler.schedule()
        if plan is not None and self.scheduler.num_running:
            self.steps.append([(s, len(s.token_ids) + s.in_flight) for s in self.scheduler.batch()])
            self.scheduler.started()
        if len(self.steps) > (self.lookahead if self.scheduler.num_running and plan is not None else 0):
            self._collect()
        self.mover.after_step()
        self.receiver.grant_waiting()

    def _collect(self) -> None:
        step = self.steps.popleft()
        self.scheduler.collected()
        for sequence, length in step:
            if length <= len(sequence.token_ids):
                self._write(sequence, length - 1)  # also of one that has left
            if self.scheduler.running(sequence.key) is not sequence:
                continue
            sequence.token_ids.append(next_token(sequence.token_ids))
            if sequence.finish_reason() is not None:
                self.scheduler.remove(sequence.key)

    def deliver_there(self) -> None:
        """The next message and the next frame of pages arrive."""
        if self.frames:
            header, payload = self.frames.popleft()
            self.receiver.arrivals.on_frame(HERE, header, BytesPayload(payload))
        if self.to_there:
            self.receiver.handle(HERE, self.to_there.popleft())

    def deliver_here(self) -> None:
        """The next answer arrives."""
        if self.to_here:
            self.sender.handle(THERE, self.to_here.popleft())

    def cancel(self, key: Key) -> None:
        """The gateway tells both."""
        self.mover.cancel(key)
        self.scheduler.remove(key)
        self.receiver.cancel(*key)
        self.drop(key)

    def drop(self, key: Key) -> None:
        """A request ends at the other worker."""
        if key in self.received:
            self.pool_there.release(self.received.pop(key).pages)

    def there_dies(self) -> None:
        """And the registry says so."""
        self.there_is_alive = False
        self.to_here.clear()
        self.to_there.clear()
        self.frames.clear()
        self.receiver.sender_left(HERE)
        self.to_here.clear()
        self.sender.receiver_left(THERE)


async def settle() -> None:
    """Let tasks run until they wait for messages."""
    for _ in range(20):
        await asyncio.sleep(0)


async def move_all(world: World) -> None:
    """Steps and messages until nothing is left here."""
    world.mover.is_active = True
    for _ in range(10 * TOKENS):
        world.step()
        for _ in range(4):
            await settle()
            world.deliver_there()
            world.deliver_here()
        await settle()
        if not world.scheduler.has_work and not world.mover.num_open:
            return
    raise AssertionError("it does not end")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was refused is offered again at once."""
    monkeypatch.setattr(mover_module, "RETRY_SECONDS", 0.0)


@pytest.mark.parametrize("lookahead", [0, 1], ids=["cpu", "gpu"])
async def test_requests_move_while_they_run_and_stop_for_their_last_pages_only(lookahead: int) -> None:
    """Each makes just the tokens here that its offer said, and none is lost or made twice."""
    world = World(lookahead=lookahead)
    keys = [world.add(name) for name in "abc"]
    for _ in range(9):
        world.step()
    await move_all(world)
    assert sorted(world.received) == keys
    assert sorted(world.moved) == keys
    for request in world.received.values():
        assert request.generated == request.offer.generated + COMING_TOKENS
    assert world.pool.num_in_use == 0


async def test_a_request_that_nobody_takes_ends_here() -> None:
    """There is another worker, but it is full; or there is none."""
    for pages_there in (2, 0):
        world = World(pages_there=max(pages_there, 1))
        world.there_is_alive = pages_there > 0
        world.add("a")
        (sequence,) = world.scheduler.sequences()
        await move_all(world)
        assert sequence.generated == TOKENS
        assert (world.moved, world.received, world.pool.num_in_use) == ([], {}, 0)


async def test_a_request_with_few_tokens_left_is_not_worth_a_move() -> None:
    """It ends before it could have stopped."""
    world = World()
    key = world.add("a")
    while world.scheduler.sequences()[0].tokens_left > COMING_TOKENS:
        world.step()
    await move_all(world)
    assert (key in world.received, world.pool.num_in_use) == (False, 0)


async def test_stopping_gives_the_requests_back_to_the_scheduler() -> None:
    """Time is up: whoever stops the worker decides what becomes of them."""
    world = World()
    key = world.add("a")
    world.mover.is_active = True
    for _ in range(COMING_TOKENS + 2):
        world.step()
        await settle()
        if world.to_there and isinstance(world.to_there[0], Offer):
            world.deliver_there()
            world.deliver_here()
    assert world.scheduler.sequences() == []
    stopping = asyncio.create_task(world.mover.stop())
    await settle()
    world.frames.clear()  # they are late
    while world.to_there:
        world.deliver_there()
        assert not world.received
    while world.to_here:
        world.deliver_here()
    await stopping
    assert [sequence.key for sequence in world.scheduler.sequences()] == [key]
    assert world.mover.num_open == 0
    assert not any(isinstance(message, Abort) for message in world.to_there)
    world.scheduler.remove(key)
    assert (world.pool.num_in_use, world.pool_there.num_in_use) == (0, 0)


class Moving(RuleBasedStateMachine):
    """Any order of steps, messages, cancellations, losses and deaths."""

    @initialize(lookahead=st.sampled_from([0, 1]), pages_there=st.sampled_from([6, 12, 64]))
    def begin(self, lookahead: int, pages_there: int) -> None:
        """Workers with nothing to do."""
        self.loop = asyncio.new_event_loop()
        self.world = World(24, pages_there, lookahead)
        self.count = 0
        self.ended: set[Key] = set()

    @rule()
    def add(self) -> None:
        """A request arrives, if there is a page for it."""
        if self.world.pool.num_free:
            self.world.add(str(self.count))
            self.count += 1

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        """The worker goes on."""

        async def go_on() -> None:
            for _ in range(steps):
                self.world.step()
                await settle()

        self.loop.run_until_complete(go_on())

    @rule()
    def stop(self) -> None:
        """SIGTERM."""
        self.world.mover.is_active = True

    @rule(count=st.integers(1, 12), there=st.booleans())
    def deliver(self, count: int, there: bool) -> None:
        """Messages arrive."""

        async def arrive() -> None:
            for _ in range(count):
                if there:
                    self.world.deliver_there()
                else:
                    self.world.deliver_here()
                await settle()

        self.loop.run_until_complete(arrive())

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client leaves."""
        key = (str(data.draw(st.integers(0, self.count - 1))), 0)
        self.ended.add(key)
        self.world.cancel(key)
        self.loop.run_until_complete(settle())

    @rule()
    def receiver_gives_up(self) -> None:
        """Its lease ends, say."""
        for incoming in list(self.world.receiver._incoming.values()):
            self.world.receiver._abort(incoming, "lease", "")
        self.loop.run_until_complete(settle())

    @rule()
    def other_worker_dies(self) -> None:
        """What it had is queued anew by the gateway."""
        self.world.there_dies()
        for key in list(self.world.received):
            self.world.drop(key)
            self.ended.add(key)
        self.loop.run_until_complete(settle())

    @invariant()
    def no_page_is_lost(self) -> None:
        """And none is freed twice."""
        self.world.pool.check_integrity()
        self.world.pool_there.check_integrity()

    @invariant()
    def nobody_goes_on_for_a_client_that_left(self) -> None:
        """Nor for one that is served elsewhere."""
        assert not self.ended & {sequence.key for sequence in self.world.scheduler.sequences()}
        assert not self.ended & set(self.world.received)

    def teardown(self) -> None:
        """Everything that goes on ends, and nothing is held."""
        if not hasattr(self, "loop"):
            return
        world = self.world
        if world.receiver.num_open:
            world.there_dies()
        self.loop.run_until_complete(move_all(world))
        self.loop.run_until_complete(settle())
        for key in list(world.received):
            world.drop(key)
        while world.to_there or world.frames:
            world.deliver_there()
        self.loop.close()
        assert world.pool.num_in_use == 0
        assert world.receiver.num_open == 0
        assert world.pool_there.num_in_use == 0


TestMoving = Moving.TestCase
TestMoving.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
