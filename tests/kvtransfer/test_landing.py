"""Every row of the table in `headrace.kvtransfer.landing`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from headrace.kvtransfer.landing import Landing
from headrace.kvtransfer.messages import PagesInPlace


class Notices:
    """A landing of four pages and two layers, of which the first page is here already, and how often it spoke up."""

    def __init__(self) -> None:
        self.count = 0
        self.landing = Landing(4, 1, 2, self.notify)

    def notify(self) -> None:
        """See `Landing`."""
        self.count += 1


def message(
    sequence: int, layer: int = 0, first: int = 1, count: int = 1, credit: bool = True, part: int = 0
) -> PagesInPlace:
    """Some pages."""
    return PagesInPlace(
        request_id="r",
        attempt=0,
        sequence=sequence,
        layer=layer,
        first_page=first,
        blocks=[0] * count,
        credit_wanted=credit,
        part=part,
    )


@pytest.fixture
def notices() -> Notices:
    """A fresh one."""
    return Notices()


def test_messages_land_in_any_order(notices: Notices) -> None:
    """OPEN: complete once all are written, whichever came first."""
    landing = notices.landing
    for sequence, layer, first, count in ((2, 1, 1, 3), (1, 0, 3, 1), (0, 0, 1, 2)):
        part = message(sequence, layer, first, count)
        assert landing.claim(part)
        assert not landing.is_complete(3)
        landing.written(part, None)
    assert landing.is_complete(3)
    assert (landing.problem, landing.idle) == (None, True)


def test_credit_covers_what_was_written_without_a_gap(notices: Notices) -> None:
    """The receiver is notified once until it looks; credit goes to the first number that is missing."""
    landing = notices.landing
    parts = [message(0, first=1, credit=False), message(1, first=2), message(2, first=3)]
    for part in parts:
        landing.claim(part)
    landing.written(parts[1], None)
    assert landing.take_credit() is None
    landing.written(parts[0], None)
    landing.written(parts[2], None)
    assert notices.count == 1
    assert landing.take_credit() == 3
    assert landing.take_credit() is None


def test_no_credit_is_given_unasked(notices: Notices) -> None:
    """Messages that say so get by without."""
    part = message(0, credit=False)
    notices.landing.claim(part)
    notices.landing.written(part, None)
    assert notices.landing.take_credit() is None


@pytest.mark.parametrize("state", ["claimed", "written"])
def test_a_repeated_message_is_dropped(notices: Notices, state: str) -> None:
    """Whether its first copy is still being written or not."""
    part = message(0)
    notices.landing.claim(part)
    if state == "written":
        notices.landing.written(part, None)
    assert not notices.landing.claim(part)
    assert notices.landing.problem is None


@pytest.mark.parametrize(
    ("layer", "first", "count"),
    [(2, 1, 1), (0, 3, 2), (0, 4, 1), (0, 0, 1), (0, 2**31 - 1, 1)],
    ids=["no such layer", "past the end", "no such page", "held", "far out"],
)
def test_what_was_not_granted_breaks_it(notices: Notices, layer: int, first: int, count: int) -> None:
    """OPEN -> BROKEN: nothing more is written, and the receiver is told."""
    assert not notices.landing.claim(message(0, layer, first, count))
    assert notices.landing.problem is not None
    assert not notices.landing.claim(message(1))
    assert notices.count == 1


def test_a_page_lands_once(notices: Notices) -> None:
    """Under another number it would overwrite what is here."""
    notices.landing.claim(message(0, first=1, count=2))
    assert not notices.landing.claim(message(1, first=2, count=2))
    assert notices.landing.problem is not None


def test_damage_breaks_it(notices: Notices) -> None:
    """OPEN -> BROKEN by what the writer found."""
    part = message(0)
    notices.landing.claim(part)
    notices.landing.written(part, ("checksum", "damaged"))
    assert notices.landing.problem == ("checksum", "damaged")
    assert not notices.landing.is_complete(1)


def test_a_closed_landing_is_idle_after_its_last_writer(notices: Notices) -> None:
    """CLOSED: what a thread still writes must not be freed; the last one says so."""
    landing = notices.landing
    parts = [message(0, first=1), message(1, first=2)]
    for part in parts:
        landing.claim(part)
    landing.close()
    assert not landing.claim(message(2, first=3))
    landing.written(parts[0], None)
    assert (landing.idle, notices.count) == (False, 0)
    landing.written(parts[1], None)
    assert (landing.idle, notices.count) == (True, 1)


def test_a_commit_that_can_not_come_true_is_told_from_an_early_one(notices: Notices) -> None:
    """Fewer messages than came, or all of them without all pages."""
    landing = notices.landing
    assert landing.problem_with_end(1) is None
    part = message(0)
    landing.claim(part)
    assert landing.problem_with_end(1) is None
    assert landing.problem_with_end(0) is not None
    landing.written(part, None)
    assert landing.problem_with_end(2) is None
    assert landing.problem_with_end(1) is not None


def test_pages_are_complete_when_all_their_parts_are() -> None:
    """From each rank that holds some of the heads; no part is taken for another, and there are no more."""
    landing = Landing(2, 0, 1, lambda: None, num_parts=2)
    parts = [message(0, first=0, count=2, part=1), message(1, first=0, part=0), message(2, first=1, part=0)]
    for part in parts:
        assert not landing.is_complete(part.sequence)
        assert landing.claim(part)
        landing.written(part, None)
    assert landing.is_complete(3)
    assert not landing.claim(message(3, first=0, part=2))
    assert landing.problem is not None


def test_a_message_whose_line_broke_may_come_again(notices: Notices) -> None:
    """OPEN: half written pages are claimed once more, and count once."""
    landing = notices.landing
    part = message(0, count=3)
    assert landing.claim(part)
    landing.interrupted(part)
    assert (landing.idle, landing.num_landed, landing.problem, notices.count) == (True, 0, None, 0)
    assert landing.claim(part)
    assert not landing.claim(part)
    landing.written(part, None)
    assert landing.num_landed == 1


def test_the_last_thread_that_is_interrupted_ends_a_closed_landing(notices: Notices) -> None:
    """CLOSED: the pages may be freed then."""
    landing = notices.landing
    part = message(0, count=3)
    assert landing.claim(part)
    landing.close()
    landing.interrupted(part)
    assert (landing.idle, notices.count) == (True, 1)


def test_a_message_of_several_layers_takes_the_same_pages_of_each(notices: Notices) -> None:
    """Whole or not at all."""
    landing = notices.landing
    both = msgspec.structs.replace(message(0, first=1, count=6), num_layers=2)
    assert landing.claim(both)
    landing.written(both, None)
    assert landing.is_complete(1)


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 3}, {"layer": 1}, {"blocks": [0] * 5}, {"num_layers": 2**31 - 1}],
    ids=["more layers", "past the last", "uneven", "many"],
)
def test_layers_and_blocks_must_fit(notices: Notices, change: dict[str, Any]) -> None:
    """OPEN -> BROKEN."""
    both = msgspec.structs.replace(message(0, first=1, count=6), **({"num_layers": 2} | change))
    assert not notices.landing.claim(both)
    assert notices.landing.problem is not None
    assert notices.landing.problem[0] == "sequence"
