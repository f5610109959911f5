"""The receiving side of handoffs: a decode worker's incoming requests.

| state      | on                         | does                                             | next       |
| ---------- | -------------------------- | ------------------------------------------------ | ---------- |
| (none)     | Offer, its pages are this pool's own | own them, too, Grant (`local`: all are held) | RECEIVING |
| (none)     | Offer, pages free          | reserve, choose a transport, Grant               | RECEIVING  |
| (none)     | Offer, pool full           | queue, first come first served                   | WAITING    |
| (none)     | Offer that may not wait, no room | Refuse                                     | (none)     |
| (none)     | Offer in place, short enough | reserve, Grant, have its prompt computed here  | RECEIVING  |
| RECEIVING  | the prompt is computed here | hand over to the decoder, Ack                  | (none)     |
| (none)     | Offer, unusable            | Refuse                                           | (none)     |
| (none)     | Commit or Renew, taken before | Ack again                                     | (none)     |
| (none)     | Commit or Renew, unknown   | Abort `unknown`                                  | (none)     |
| WAITING    | pages come free            | reserve, choose a transport, Grant               | RECEIVING  |
| RECEIVING  | the same Offer again       | Grant again                                      | RECEIVING  |
| RECEIVING  | pages landed               | start the lease again, Credit where it is due    | RECEIVING  |
| RECEIVING  | pages landed, damaged or out of bounds | Abort                                | DRAINING   |
| RECEIVING  | Commit, pages missing      | remember it                                      | COMMITTING |
| RECEIVING  | Commit, all pages here     | hand over to the decoder, Ack                    | (none)     |
| COMMITTING | pages landed, the last     | hand over to the decoder, Ack                    | (none)     |
| RECEIVING  | Renew, nothing was sent    | Grant again                                      | RECEIVING  |
| RECEIVING, COMMITTING | Renew           | Credit: so much is here                          | same       |
| WAITING, RECEIVING | Renew, all that was sent is here | start the lease again              | same       |
| any        | Abort                      | (Released when drained)                          | DRAINING   |
| any        | cancel, lease ended, sender gone, computing failed, `give_up` | Abort to a living sender | DRAINING |
| DRAINING   | no thread writes its pages | free them                                        | (none)     |

The pages themselves land beside this, on threads (`arrivals.py`, `landing.py`), in any order, before the Commit or
after it. Nothing here waits or blocks: every method is called on the event loop and replies through `send`.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence

from headrace.kvtransfer.admission import Admission, grant_of
from headrace.kvtransfer.arrivals import Arrivals
from headrace.kvtransfer.base import PageAllocator, PageStore, Source
from headrace.kvtransfer.draining import Draining
from headrace.kvtransfer.incoming import Incoming, Key, OwnPrompt, ReceivedRequest
from headrace.kvtransfer.landing import Landing
from headrace.kvtransfer.messages import (
    Abort,
    AbortCause,
    Ack,
    Commit,
    Credit,
    Grant,
    Layout,
    Offer,
    Refuse,
    RefuseCause,
    Released,
    Renew,
    ToReceiver,
    TransportName,
)
from headrace.kvtransfer.transports import Choice, TcpOnly
from headrace.wire import Message

LEASE_SECONDS = 10.0


def _at_once(callback: Callable[[], None]) -> None:
    callback()


class Receiver:
    """All handoffs that arrive at one worker."""

    def __init__(
        self,
        layout: Layout,
        stores: Sequence[PageStore],
        pool: PageAllocator,
        total_pages: int,
        send: Callable[[str, Message], None],
        on_received: Callable[[ReceivedRequest], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        choice: Choice | None = None,
        call_soon: Callable[[Callable[[], None]], object] = _at_once,
        refuse: Callable[[str, str], None] = lambda sender, reason: None,
        on_prompt: Callable[[OwnPrompt], None] = lambda prompt: None,
        most_prompt_tokens: int = 0,
    ) -> None:
        """`stores`: the cache of each tensor-parallel rank; `pool` owns the pages of all of them.

        `call_soon` brings what a line's thread has to say to this object's own thread. `refuse(sender, reason)`
        counts what no honest worker sends, and is called on any thread. `on_prompt` is told of prompts to be computed
        here, of which at most `most_prompt_tokens` tokens are not here.
        """
        self.aborts: Counter[str] = Counter()
        self.refusals: Counter[RefuseCause] = Counter()
        """Offers not taken."""
        self.late = 0
        """Other messages that came again, or cross an Abort on its way: they change nothing."""
        self.transports: Counter[str] = Counter()
        """Grants by transport."""
        self.arrivals = Arrivals(layout.dtype, refuse)
        self._layout = layout
        self._stores = stores
        self._pool = pool
        self._send = send
        self._on_received = on_received
        self._clock = clock
        self._choice = choice or TcpOnly()
        self._call_soon = call_soon
        self._refuse = refuse
        self._on_prompt = on_prompt
        self._incoming: dict[Key, Incoming] = {}
        self._draining = Draining(pool, self._drained)
        self._admission = Admission(layout, pool, total_pages, most_prompt_tokens)
        self.room = self._admission.room
        self._newest = self._admission.newest

    @property
    def num_waiting(self) -> int:
        """Offers that wait for free pages."""
        return len(self._admission.waiting)

    @property
    def num_open(self) -> int:
        """Handoffs that have not been committed yet, those that wait among them."""
        return len(self._incoming)

    @property
    def pages_wanted(self) -> int:
        """At most so many the next of those will take."""
        return next((self._admission.pages_needed(incoming.offer) for incoming in self._admission.waiting.values()), 0)

    def handle(self, sender: str, message: ToReceiver) -> None:
        """Apply one message."""
        match message:
            case Offer():
                self._offer(sender, message)
            case Commit():
                self._commit(sender, message)
            case Renew():
                self._renew(sender, message)
            case Abort():
                self._aborted(sender, message)

    def _offer(self, sender: str, offer: Offer) -> None:
        known = self._incoming.get((offer.request_id, offer.attempt))
        if known is not None and (known.sender, known.offer) == (sender, offer):
            if known.grant is not None:
                self._send(sender, known.grant)
            return
        refusal = self._admission.reason_to_refuse(offer, known is not None, self.num_open)
        if refusal is not None:
            cause, message = refusal
            self.refusals[cause] += 1
            if cause in ("invalid", "duplicate"):
                self._refuse(sender, message)
            self._send(sender, Refuse(request_id=offer.request_id, attempt=offer.attempt, cause=cause, message=message))
            return
        older = [key for key in self._incoming if key[0] == offer.request_id]
        for key in older:
            self._abort(self._incoming[key], "cancelled", "a newer attempt began")
        self._newest.remember(offer.request_id, offer.attempt)
        incoming = Incoming(sender, offer, self._clock() + LEASE_SECONDS, self._pool.hashes(offer.token_ids))
        self._incoming[incoming.key] = incoming
        pages = self._choice.pages_here(sender, offer)
        if pages is None:
            self._admission.waiting[incoming.key] = incoming
            self.grant_waiting()
        else:  # nobody need wait for what takes no page, and whose waiting would keep pages from those who do
            self._pool.share(pages)
            incoming.pages = pages
            self._grant(incoming, len(pages), "local", None)

    def stop(self) -> None:
        """Take nothing new, and send away those who wait. What was granted may still end."""
        self.room.stopping = True
        for incoming in list(self._admission.waiting.values()):
            self._take_out(incoming)
            request_id, attempt = incoming.key
            refuse = Refuse(request_id=request_id, attempt=attempt, cause="stopping", message="this worker stops")
            self._send(incoming.sender, refuse)

    def give_up(self) -> None:
        """Time is up for this worker: what has not arrived never will. To be called after `stop`."""
        for incoming in list(self._incoming.values()):
            self._abort(incoming, "receiver_failed", "this worker stops")

    def grant_waiting(self) -> None:
        """Grant waiting offers in order while there is room. To be called whenever pages came free."""
        while (next_up := self._admission.next_to_grant(self.num_open - self.num_waiting)) is not None:
            incoming, held = next_up
            if incoming.offer.in_place:
                self._compute(incoming, held)
            else:
                self._grant(incoming, held, *self._choice.choose(incoming.sender, incoming.offer))

    def _grant(self, incoming: Incoming, held: int, transport: TransportName, source: Source | None) -> None:
        def notify() -> None:  # on a line's thread
            self._call_soon(lambda: self._landed(incoming, landing))

        incoming.grant, arriving = grant_of(incoming, self._layout, self._stores, held, transport, source, notify)
        incoming.landing = landing = arriving.landing
        self.arrivals.expect((incoming.sender, *incoming.key), arriving)
        self.transports[transport] += 1
        self._send(incoming.sender, incoming.grant)

    def _compute(self, incoming: Incoming, num_held: int) -> None:
        """Grant, and have the prompt computed here."""
        offer, page_size = incoming.offer, self._layout.page_size

        def notify() -> None:
            self._call_soon(lambda: self._landed(incoming, landing))

        incoming.landing = landing = Landing(0, 0, self._layout.num_layers, notify)
        incoming.grant = Grant(
            request_id=offer.request_id,
            attempt=offer.attempt,
            held_pages=num_held * page_size // offer.layout.page_size,
            window_bytes=0,
        )
        self._send(incoming.sender, incoming.grant)
        missing = len(offer.token_ids) - num_held * page_size
        self._on_prompt(OwnPrompt(offer, incoming.pages, missing, landing, functools.partial(self._computed, incoming)))

    def _computed(self, incoming: Incoming, commit: Commit | None) -> None:
        if self._incoming.get(incoming.key) is not incoming:
            return
        if commit is None:
            self._abort(incoming, "receiver_failed", "the prompt could not be computed")
        else:
            incoming.commit = commit
            self._complete(incoming)

    def _landed(self, incoming: Incoming, landing: Landing) -> None:
        """Pages of one handoff were written, or could not be."""
        credit = landing.take_credit()
        self._draining.look_at(incoming)
        if self._incoming.get(incoming.key) is not incoming:
            return
        if landing.problem is not None:
            self._abort(incoming, *landing.problem)
            return
        if credit is not None:
            request_id, attempt = incoming.key
            self._send(incoming.sender, Credit(request_id=request_id, attempt=attempt, sequence=credit))
        self._complete(incoming)

    def _commit(self, sender: str, commit: Commit) -> None:
        incoming = self._incoming.get((commit.request_id, commit.attempt))
        if incoming is None:
            self._answer_over(sender, commit.request_id, commit.attempt)
        elif incoming.sender != sender or incoming.landing is None or incoming.offer.in_place:
            self._refuse(sender, "it commits what was not granted to it")
        elif (problem := self._admission.problem_with_tokens(incoming.offer, commit)) is not None:
            self._refuse(sender, problem)
            self._abort(incoming, "sequence", problem)
        elif incoming.commit == commit:
            self.late += 1
        else:
            incoming.commit = commit
            self._complete(incoming)

    def _answer_over(self, sender: str, request_id: str, attempt: int) -> None:
        """Say once more how a handoff ended that `sender` believes to be open."""
        self.late += 1
        if self._newest.was_taken(request_id, attempt, sender):
            self._send(sender, Ack(request_id=request_id, attempt=attempt))
        else:
            self._send(sender, Abort(request_id=request_id, attempt=attempt, cause="unknown"))

    def _complete(self, incoming: Incoming) -> None:
        """Hand a committed request over to the decoder once all its pages are here."""
        commit, landing = incoming.commit, incoming.landing
        if commit is None or landing is None:
            return
        problem = landing.problem or landing.problem_with_end(commit.sequence)
        if problem is not None:
            if landing.problem is None:  # or it has been counted
                self._refuse(incoming.sender, problem[1])
            self._abort(incoming, *problem)
        elif landing.is_complete(commit.sequence):
            landing.close()
            self._take_out(incoming)
            self._newest.remember(commit.request_id, commit.attempt, taken_from=incoming.sender)
            offer = incoming.offer
            token_ids = [*offer.token_ids, *commit.came]
            hashes = self._pool.hashes(token_ids) if commit.came else incoming.hashes
            if commit.token_id is not None:  # or not all is computed
                for page, page_hash in zip(incoming.pages, hashes, strict=False):
                    self._pool.publish(page, page_hash)
            self._send(incoming.sender, Ack(request_id=commit.request_id, attempt=commit.attempt))
            generated = offer.generated + offer.coming
            self._on_received(ReceivedRequest(offer, incoming.pages, commit, token_ids, generated))

    def _take_out(self, incoming: Incoming) -> None:
        self._admission.waiting.pop(incoming.key, None)
        del self._incoming[incoming.key]
        if incoming.landing is not None and not incoming.offer.in_place:
            self.arrivals.forget((incoming.sender, *incoming.key))

    def _renew(self, sender: str, renew: Renew) -> None:
        for request_id, attempt, num_sent in renew.handoffs:
            incoming = self._incoming.get((request_id, attempt))
            if incoming is None:
                self._answer_over(sender, request_id, attempt)
            elif incoming.sender != sender:
                self._refuse(sender, "it renews another worker's handoff")
            else:
                self._renew_one(incoming, num_sent)

    def _renew_one(self, incoming: Incoming, num_sent: int) -> None:
        """Repeat what the sender may have missed, and start the lease again where nothing is on the way here.

        Pages that are on the way have one lease to come: they may be lost.
        """
        landed = incoming.landing.num_landed if incoming.landing is not None else 0
        if num_sent <= landed and incoming.commit is None:
            incoming.lease_ends = self._clock() + LEASE_SECONDS
        if num_sent:
            request_id, attempt = incoming.key
            self._send(incoming.sender, Credit(request_id=request_id, attempt=attempt, sequence=landed))
        elif incoming.grant is not None:
            self._send(incoming.sender, incoming.grant)

    def _aborted(self, sender: str, abort: Abort) -> None:
        key = (abort.request_id, abort.attempt)
        incoming = self._incoming.get(key)
        if incoming is not None and incoming.sender == sender:
            self.aborts[abort.cause] += 1
            self._newest.remember(abort.request_id, abort.attempt - 1)  # it may be offered again, by another
            self._free(incoming, tell_released=True)
            return
        if incoming is not None:
            self._refuse(sender, "it aborts another worker's handoff")
        else:
            self.late += 1
        if not self._draining.tell_at_the_end(sender, key):
            self._send(sender, Released(request_id=abort.request_id, attempt=abort.attempt))

    def cancel(self, request_id: str, attempt: int) -> None:
        """Nobody waits for this request any more, in any attempt up to `attempt`."""
        for key in [key for key in self._incoming if key[0] == request_id and key[1] <= attempt]:
            self._abort(self._incoming[key], "cancelled", "")
        if attempt > self._newest.of(request_id):
            self._newest.remember(request_id, attempt)

    def cancel_gateway(self, gateway: str) -> None:
        """A gateway is gone, and with it all who waited for its requests."""
        for incoming in [i for i in self._incoming.values() if i.offer.gateway == gateway]:
            self._abort(incoming, "cancelled", "the gateway is gone")

    def sender_left(self, sender: str) -> None:
        """A worker is gone: nothing it began will end."""
        for incoming in [i for i in self._incoming.values() if i.sender == sender]:
            self._free(incoming, tell_released=False)
            self.aborts["sender_failed"] += 1
        self._choice.forget(sender)

    def reap(self) -> None:
        """End the handoffs whose lease has run out. To be called on a timer of its own."""
        now = self._clock()
        for incoming in self._incoming.values():
            if incoming.landing is not None and incoming.landing.take_progress():
                incoming.lease_ends = now + LEASE_SECONDS
        for incoming in [i for i in self._incoming.values() if i.lease_ends < now]:
            self._abort(incoming, "lease", f"no progress for {LEASE_SECONDS} s")

    def _abort(self, incoming: Incoming, cause: AbortCause, message: str) -> None:
        self.aborts[cause] += 1
        offer = incoming.offer
        self._send(
            incoming.sender, Abort(request_id=offer.request_id, attempt=offer.attempt, cause=cause, message=message)
        )
        self._free(incoming, tell_released=False)

    def _free(self, incoming: Incoming, tell_released: bool) -> None:
        self._take_out(incoming)
        self._draining.begin(incoming, tell_released)

    def _drained(self, incoming: Incoming, tell_released: bool) -> None:
        if tell_released:
            request_id, attempt = incoming.key
            self._send(incoming.sender, Released(request_id=request_id, attempt=attempt))
        self.grant_waiting()

    def check_integrity(self) -> None:
        """Assert that what waits holds nothing and that what was granted holds its pages."""
        for key, incoming in self._incoming.items():
            if key in self._admission.waiting:
                assert not incoming.pages, f"{key} waits and holds pages"
                assert incoming.landing is None, f"{key} waits and may be written to"
            else:
                needed = self._admission.pages_needed(incoming.offer)
                assert len(incoming.pages) == needed, f"{key} holds the wrong pages"
        self._draining.check_integrity()
