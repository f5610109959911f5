"""What gateways are told of a step, and which requests it ends."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec
import pytest

from headrace.decode.output import Output
from headrace.decode.scheduler import DecodeScheduler
from headrace.decode.sequence import Key, Sequence
from headrace.engine.page_pool import PagePool
from headrace.engine.step_tokens import StepTokens
from headrace.messages.request import SamplingParams
from headrace.messages.stream import RequestFailed, ToGateway, TokenBatch, TokenColumns, TokenEvent, TokenLogprobs
from headrace.wire import Decoder, Message, WireError, encode, seal
from tests.kvtransfer.parts import PAGE_SIZE, make_offer

MAX_MODEL_LEN = 50
DECODE: Decoder[ToGateway] = Decoder(ToGateway)


class FailedMatcher:
    """A grammar that can't be followed any more."""

    error = "too many states"


class World:
    """Requests of a batch that has `lookahead` steps in flight, and what gateways hear."""

    def __init__(self, lookahead: int = 1) -> None:
        self.scheduler = DecodeScheduler(PagePool(64, PAGE_SIZE), 8)
        self.output = Output(self.scheduler, self.post, self)
        self.heard: dict[str, list[TokenEvent]] = defaultdict(list)
        self.failed: list[RequestFailed] = []
        self.told: list[Any] = []
        self._lookahead = lookahead
        self._batch: tuple[Key, ...] = ()
        self._in_flight: list[tuple[Key, ...]] = []

    def emit(self, event: object) -> None:
        """See `Telemetry`."""
        self.told.append(event)

    def post(self, gateway: str, message: Message) -> None:
        """What goes over the wire."""
        decoded = DECODE(encode(message))
        if isinstance(decoded, RequestFailed):
            self.failed.append(decoded)
        else:
            assert isinstance(decoded, TokenBatch | TokenColumns)
            self.heard[gateway] += decoded.events

    def add(self, name: str, gateway: str = "gateway-1", prompt: int = 2, **sampling: Any) -> Sequence:
        """A request that joins with the next step."""
        params = SamplingParams(**{"max_tokens": 40, **sampling})
        offer = msgspec.structs.replace(make_offer(range(prompt), name), gateway=gateway, sampling=params)
        sequence = Sequence(offer, [*offer.token_ids], self.scheduler._pool.allocate(1), MAX_MODEL_LEN)
        self.scheduler.add(sequence)
        return sequence

    def step(self, tokens: dict[str, int] | None = None, scores: dict[str, TokenLogprobs] | None = None) -> None:
        """Start a step, then take what the oldest made once there are more than `lookahead`: 9s, or `tokens`."""
        plan = self.scheduler.schedule()
        assert plan is not None
        if plan.leaves or plan.joins:
            self._batch = tuple(sequence.key for sequence in self.scheduler.batch())
        if self._batch:
            self.scheduler.started()
            self._in_flight.append(self._batch)
        if len(self._in_flight) > self._lookahead:
            keys = self._in_flight.pop(0)
            ids = [(tokens or {}).get(name, 9) for name, _ in keys]
            of_rows = {row: scores[name] for row, (name, _) in enumerate(keys) if scores and name in scores}
            self.output.take_step(StepTokens(keys, ids, of_rows))
        self.output.publish()

    def positions(self, gateway: str = "gateway-1") -> dict[str, list[int]]:
        """Of the tokens that a gateway has heard, by request."""
        found = defaultdict(list)
        for event in self.heard[gateway]:
            found[event.request_id] += range(event.position, event.position + len(event.token_ids))
        return dict(found)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_each_gateway_hears_of_its_requests_token_by_token(lookahead: int) -> None:
    """Positions go on while others join, end and are cancelled, and nothing is said of those that are gone."""
    world = World(lookahead)
    first, second = world.add("a"), world.add("b", "gateway-2")
    for _ in range(3 + lookahead):
        world.step()
    third = world.add("c")
    world.step()
    world.output.cancel(first)
    for _ in range(3):
        world.step()
    world.add("d", "gateway-2", max_tokens=2)
    for _ in range(4 + lookahead):
        world.step()
    of_second, of_third = (range(len(sequence.token_ids) - 2) for sequence in (second, third))
    assert world.positions() == {"a": [0, 1, 2, 3], "c": [*of_third]}
    assert world.positions("gateway-2") == {"b": [*of_second], "d": [0, 1]}
    assert (len(of_second), len(of_third)) == (11 + lookahead, 8)
    assert first.token_ids == [0, 1, 9, 9, 9, 9]
    assert [event.finish_reason for event in world.heard["gateway-2"] if event.request_id == "d"] == [None, "length"]


def test_a_request_ends_with_its_stop_token_its_length_or_the_context() -> None:
    """And its pages come free; the others go on."""
    world = World()
    world.add("stop", stop_token_ids=(5,))
    world.add("early", stop_token_ids=(5,), min_tokens=3)
    world.add("short", max_tokens=3)
    world.add("long", prompt=MAX_MODEL_LEN - 4)
    other = world.add("other", stop_token_ids=(6,))
    world.step()
    world.step()
    world.step({"stop": 5, "early": 5, "other": 5})
    for _ in range(4):
        world.step({"early": 9})
    ends = {event.request_id: (event.position, event.finish_reason) for event in world.heard["gateway-1"]}
    assert ends["stop"] == (1, "stop")
    assert ends["short"] == (2, "length")
    assert ends["long"] == (3, "length")
    assert ends["early"][1] is ends["other"][1] is None
    assert other.token_ids[2:] == [9, 5, 9, 9, 9, 9]
    assert [event.code for event in world.told] == ["stop", "length", "length"]
    assert world.scheduler.num_running == 2


def test_log_probabilities_go_with_their_token() -> None:
    """Of the request that asked for them; the newest are kept for who takes the request over."""
    world = World(lookahead=0)
    world.add("a")
    sequence = world.add("b", logprobs=0)
    scores = TokenLogprobs(token_id=9, logprob=-1.0, top=[])
    world.step(scores={"b": scores})
    assert [(event.request_id, event.logprobs) for event in world.heard["gateway-1"]] == [("a", None), ("b", [scores])]
    assert sequence.newest_logprobs == scores


def test_a_grammar_that_failed_is_told_instead_of_the_token() -> None:
    """Its neighbours that end with the same step are told as always."""
    world = World(lookahead=0)
    for name in "abc":
        world.add(name, max_tokens=2)
    broken = world.scheduler.sequences()[1]
    broken.matcher = FailedMatcher()  # type: ignore[assignment]
    world.step()
    world.step()
    assert [failed.request_id for failed in world.failed] == ["b"]
    assert world.positions() == {"a": [0, 1], "b": [0], "c": [0, 1]}
    assert not world.scheduler.num_running


def test_a_request_that_comes_back_goes_on_where_it_was() -> None:
    """A move that failed puts it into the batch again, perhaps in the same row."""
    world = World(lookahead=0)
    sequence = world.add("a")
    world.add("b")
    world.step()
    world.scheduler.take_out(sequence.key)
    world.step()
    world.scheduler.add(sequence)
    world.step()
    world.step()
    assert world.positions() == {"a": [0, 1, 2], "b": [0, 1, 2, 3]}


def test_steps_with_drafts_and_without_take_turns() -> None:
    """A step with drafts may make several tokens of a request."""
    world = World(lookahead=0)
    sequence = world.add("a")
    world.step()
    world.scheduler.schedule()
    world.scheduler.started({sequence.key: [9, 9]})
    world.output.take_step(StepTokens([sequence.key] * 3, [9, 9, 7]))
    world.output.publish()
    world.step()
    assert [(event.position, event.token_ids) for event in world.heard["gateway-1"]] == [
        (0, [9]),
        (1, [9, 9, 7]),
        (4, [9]),
    ]


def test_columns_of_different_lengths_are_refused() -> None:
    """A sender that does not follow the schema is told so before anything is read."""
    message = {"type": "TokenColumns", "requests": [("a", 0)], "positions": [0], "token_ids": [1]}
    assert isinstance(DECODE(seal(msgspec.msgpack.encode(message))), TokenColumns)
    with pytest.raises(WireError, match="different lengths"):
        DECODE(seal(msgspec.msgpack.encode(message | {"positions": [0, 1]})))
