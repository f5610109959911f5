"""A gateway without HTTP: asks for prompts' tokens, and asks again when a worker fails or leaves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from headrace.loadtest.keyed_model import undisturbed
from headrace.mesh import PeerGone
from headrace.messages.control import Cancel, Flushed
from headrace.messages.request import QueueEntry, SamplingParams
from headrace.messages.stream import (
    Flush,
    Moved,
    PrefillReport,
    RequestFailed,
    ToGateway,
    TokenBatch,
    TokenColumns,
    TokenEvent,
)
from headrace.node import Node
from headrace.queue import DELIVERIES_PER_ATTEMPT
from headrace.registry import Member
from headrace.tasks import run_beside
from headrace.wire import Decoder, Message

SAMPLING = SamplingParams(max_tokens=2, temperature=0)
SILENCE_SECONDS = 15.0
"""After which a request is asked anew: its worker died with the news of it."""
TIMEOUT_SECONDS = 120.0


@dataclass(eq=False)
class _Question:
    """A prompt that waits for its tokens."""

    request_id: str
    token_ids: list[int]
    answer: asyncio.Future[list[int]]
    tokens: dict[int, int] = field(default_factory=dict)
    """By position."""
    asked_at: float = 0.0
    attempt: int = 0
    entry_id: str = ""
    decode_worker: str | None = None


@dataclass
class BareGateway:
    """Every token that arrives is compared, those of requests that are over too."""

    node: Node
    wrong: int = 0
    """Answers with other tokens than the undisturbed ones."""
    retries: Counter[str] = field(default_factory=Counter)
    """By what made them necessary."""

    def __post_init__(self) -> None:
        self._open: dict[str, _Question] = {}
        self._expected: dict[str, list[int]] = {}
        """The undisturbed answers, of all that was asked."""
        self._again: asyncio.Queue[tuple[_Question, int]] = asyncio.Queue()
        """Questions to be asked once more, as this attempt."""
        self._decode: Decoder[ToGateway] = Decoder(ToGateway)
        self.node.registry.on_leave.append(self._member_left)

    async def run(self) -> None:
        """Serve until cancelled."""
        await run_beside(self._mailbox_loop(), [self._ask_again_loop(), self._silence_loop()])

    async def ask(self, request_id: str, token_ids: list[int]) -> list[int]:
        """The output tokens of a prompt. Raises `TimeoutError`, and `CancelledError` where `cancel` came first."""
        question = _Question(request_id, token_ids, asyncio.get_running_loop().create_future())
        self._open[request_id] = question
        self._expected[request_id] = undisturbed(token_ids)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await self._put(question)
                return await question.answer
        finally:
            del self._open[request_id]

    async def _put(self, question: _Question) -> None:
        question.asked_at = time.monotonic()
        question.decode_worker = None
        entry = QueueEntry(
            request_id=question.request_id,
            attempt=question.attempt,
            gateway=self.node.id,
            token_ids=question.token_ids,
            sampling=SAMPLING,
            enqueued_at=time.time(),
            deadline=time.time() + TIMEOUT_SECONDS,
        )
        entry_id = await self.node.queue.put(entry)
        if entry.attempt == question.attempt:  # or it has failed already, and is asked anew
            question.entry_id = entry_id
        if question.answer.done():  # cancelled meanwhile
            await self.node.queue.remove(entry_id)

    async def cancel(self, request_id: str) -> None:
        """The client goes away; `ask` ends with `CancelledError`. Nothing happens where the answer was faster."""
        question = self._open.get(request_id)
        if question is not None and question.answer.cancel():
            if question.entry_id:
                await self.node.queue.remove(question.entry_id)
            self._tell_to_stop(request_id, question.attempt + DELIVERIES_PER_ATTEMPT - 1)

    def _tell_to_stop(self, request_id: str, attempt: int) -> None:
        for member in [*self.node.registry.tier("prefill"), *self.node.registry.tier("decode")]:
            self._post(member.id, Cancel(request_id=request_id, attempt=attempt))

    def _post(self, worker: str, message: Message) -> None:
        try:
            self.node.mesh.post(worker, message)
        except PeerGone:
            pass  # and with it what it held

    async def _mailbox_loop(self) -> None:
        while True:
            inbound, message = await self.node.mesh.receive_as(self._decode)
            match message:
                case Flush():
                    self._post(inbound.sender.id, Flushed())
                case Moved() if question := self._open.get(message.request_id):
                    question.decode_worker = message.decode_worker
                case TokenBatch() | TokenColumns():
                    for event in message.events:
                        self._tokens(event)
                case PrefillReport() if question := self._open.get(message.request_id):
                    question.decode_worker = message.decode_worker
                    if message.decode_worker not in self.node.registry.members:
                        self._retry(question, "decode worker left")
                case RequestFailed() if question := self._open.get(message.request_id):
                    if message.attempt >= question.attempt:
                        self._retry(question, "failed")

    def _tokens(self, event: TokenEvent) -> None:
        expected = self._expected[event.request_id]
        self.wrong += event.token_ids != expected[event.position : event.position + len(event.token_ids)]
        question = self._open.get(event.request_id)
        if question is None:  # answered or cancelled before: whoever works on it is told
            if event.finish_reason is None:
                self._tell_to_stop(event.request_id, event.attempt)
            return
        question.tokens |= enumerate(event.token_ids, event.position)
        if event.finish_reason is not None and not question.answer.done():
            question.answer.set_result([token_id for _, token_id in sorted(question.tokens.items())])

    def _member_left(self, member: Member) -> None:
        for question in self._open.values():
            if question.decode_worker == member.id:
                self._retry(question, "decode worker left")

    def _retry(self, question: _Question, why: str) -> None:
        self.retries[why] += 1
        question.asked_at = time.monotonic()
        question.decode_worker = None
        question.attempt += DELIVERIES_PER_ATTEMPT
        self._again.put_nowait((question, question.attempt))

    async def _ask_again_loop(self) -> None:
        while True:
            question, attempt = await self._again.get()
            if attempt == question.attempt and not question.answer.done():
                if question.entry_id:  # a worker's answer may be here before the queue's
                    await self.node.queue.remove(question.entry_id)
                await self._put(question)

    async def _silence_loop(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for question in self._open.values():
                if time.monotonic() - question.asked_at > SILENCE_SECONDS:
                    self._retry(question, "silence")
