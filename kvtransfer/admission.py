"""Which offers a receiver takes, which of them may be granted now, and the pages that they get."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.kvtransfer.arrivals import Arriving
from headrace.kvtransfer.base import PageAllocator, PageStore, Source
from headrace.kvtransfer.incoming import Incoming, Key, NewestAttempts
from headrace.kvtransfer.landing import Landing
from headrace.kvtransfer.messages import Commit, Grant, Layout, Offer, RefuseCause, TransportName
from headrace.kvtransfer.reshard import can_recut, plan_landings

MAX_WAITING = 4096
WINDOW_BYTES = 64 * 2**20
WINDOWS_IN_PLACE = 4
"""As much of what is not sent but read in place, and so takes up no buffer here."""


@dataclass
class Room:
    """What a worker can take besides its free pages; the worker keeps it up to date."""

    stopping: bool = False
    """It takes nothing new."""
    reserve_pages: int = 0
    """Free pages that grants leave alone, for running requests to grow into."""
    seats: int = 2**31
    """Requests that would run at once if they came now. More are taken, unless they may not wait."""
    places: int | None = None
    """Handoffs that may be granted and not committed: more could not be run soon. None sets no bound."""


class Admission:
    """Offers that wait are granted in order: who can't be granted yet holds up those behind."""

    def __init__(self, layout: Layout, pool: PageAllocator, total_pages: int, most_prompt_tokens: int) -> None:
        """Of a prompt that is to be computed here at most `most_prompt_tokens` tokens may not be here."""
        self.room = Room()
        self.newest = NewestAttempts()
        self.waiting: OrderedDict[Key, Incoming] = OrderedDict()
        self._layout = layout
        self._pool = pool
        self._total_pages = total_pages
        self._most_prompt_tokens = most_prompt_tokens

    def pages_needed(self, offer: Offer) -> int:
        """Of this worker's size."""
        return -(-(len(offer.token_ids) + offer.coming) // self._layout.page_size)

    def reason_to_refuse(self, offer: Offer, is_open: bool, num_open: int) -> tuple[RefuseCause, str] | None:
        """Why it can't be taken, nor wait. `is_open`: the same attempt is under way; `num_open` handoffs are."""
        if not can_recut(offer.layout, self._layout):
            return "layout", f"offered {offer.layout}, this worker holds {self._layout}"
        if self.pages_needed(offer) > self._total_pages:
            return "too_long", f"{len(offer.token_ids)} tokens don't fit into {self._total_pages} pages"
        if max(offer.token_ids) >= self._layout.vocab_size:
            return "invalid", f"token ids must be below {self._layout.vocab_size}"
        if offer.generated > len(offer.token_ids):
            return "invalid", f"{offer.generated} of {len(offer.token_ids)} tokens can't be generated ones"
        if is_open:
            return "duplicate", "this attempt is already being received"
        if offer.attempt <= (newest := self.newest.of(offer.request_id)):
            return "stale", f"attempt {newest} has been seen"
        if self.room.stopping:
            return "stopping", "this worker is about to stop"
        if len(self.waiting) >= MAX_WAITING:
            return "full", f"{MAX_WAITING} handoffs wait for pages"
        if not offer.may_wait and not self._has_room(offer, num_open):
            return "full", "it would wait here"
        if offer.in_place:
            return self._reason_not_to_compute(offer)
        return None

    def _has_room(self, offer: Offer, num_open: int) -> bool:
        pages_fit = self.pages_needed(offer) + self.room.reserve_pages <= self._pool.num_free
        return pages_fit and not self.waiting and num_open < self.room.seats

    def _reason_not_to_compute(self, offer: Offer) -> tuple[RefuseCause, str] | None:
        if (
            offer.coming
            or offer.may_wait
            or not offer.sampling.max_tokens
            or offer.sampling.prompt_logprobs is not None
        ):
            return "invalid", "such a request is not computed in place"
        held = self._pool.match_prefix(self._reusable(offer, self._pool.hashes(offer.token_ids)))
        self._pool.put_back(held)
        missing = len(offer.token_ids) - len(held) * self._layout.page_size
        if missing > self._most_prompt_tokens:
            return "full", f"{missing} tokens of it are not here"
        return None

    def _reusable(self, offer: Offer, hashes: list[bytes]) -> list[bytes]:
        """Of the pages that may be found here. The last token is computed in any case where the prompt is."""
        return hashes[: (len(offer.token_ids) - 1) // self._layout.page_size] if offer.in_place else hashes

    def problem_with_tokens(self, offer: Offer, commit: Commit) -> str | None:
        """What is wrong with the tokens that a Commit adds."""
        if len(commit.came) != offer.coming:
            return f"committed {len(commit.came)} tokens where {offer.coming} were coming"
        newest = max([commit.token_id or 0, *commit.came])
        if newest >= self._layout.vocab_size:
            return f"committed token {newest}, which must be below {self._layout.vocab_size}"
        return None

    def next_to_grant(self, num_granted: int) -> tuple[Incoming, int] | None:
        """The first that waits, which has its pages now, and how many of them were held; None while there is no room.

        `num_granted` handoffs are granted and not committed.
        """
        if not self.waiting or (self.room.places is not None and num_granted >= self.room.places):
            return None
        key, incoming = next(iter(self.waiting.items()))
        held = self._pool.match_prefix(self._reusable(incoming.offer, incoming.hashes))
        missing = self.pages_needed(incoming.offer) - len(held)
        if missing + self.room.reserve_pages > self._pool.num_free:
            self._pool.put_back(held)
            return None
        del self.waiting[key]
        incoming.pages = held + self._pool.allocate(missing)
        return incoming, len(held)


def grant_of(
    incoming: Incoming,
    layout: Layout,
    stores: Sequence[PageStore],
    held: int,
    transport: TransportName,
    source: Source | None,
    notify: Callable[[], None],
) -> tuple[Grant, Arriving]:
    """What to answer to an Offer whose pages are reserved, the first `held` of them complete, and what the lines are to
    know of it. `notify` is called on their threads when there is something to do (`landing.py`).
    """
    offer = incoming.offer
    num_tokens = len(offer.token_ids) + offer.coming
    plan = plan_landings(offer.layout, layout, stores, num_tokens, incoming.pages, held)
    landing = Landing(plan.num_pages, plan.held_pages, layout.num_layers, notify, len(plan.destinations))
    wire_dtype = offer.wire_dtype if transport == "tcp" else "auto"
    grant = Grant(
        request_id=offer.request_id,
        attempt=offer.attempt,
        held_pages=plan.held_pages,
        window_bytes=WINDOW_BYTES if transport == "tcp" else WINDOWS_IN_PLACE * WINDOW_BYTES,
        transport=transport,
        wire_dtype=wire_dtype,
        parts=plan.parts,
    )
    return grant, Arriving(landing, plan.destinations, transport, source, wire_dtype)
