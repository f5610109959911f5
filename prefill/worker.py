"""The prefill worker: takes entries from the queue, gives each a task, and hears what the mesh says."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable

from headrace.engine.engine import Engine
from headrace.farewell import Farewell
from headrace.kvtransfer.departures import LineDepartures, Lines
from headrace.kvtransfer.messages import Layout, ToSender, WireDtype
from headrace.kvtransfer.nixl import NixlEndpoint
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.sender import RENEW_SECONDS, Sender
from headrace.kvtransfer.transports import exports_of
from headrace.mesh import PeerGone
from headrace.messages.control import MAX_HELD_PAGES, Cancel, Flushed, GivenBack, Holds, PassedOn
from headrace.node import Node
from headrace.prefill.intake import Intake
from headrace.prefill.job import Prompt
from headrace.prefill.scheduler import Key
from headrace.prefill.service import PromptService
from headrace.prefill.steering import Steering
from headrace.prefill.steps import Steps
from headrace.prefill.turns import Turns
from headrace.queue import Delivery
from headrace.redis_client import RedisError
from headrace.registry import Member
from headrace.tasks import end_task
from headrace.wire import Decoder, Message

log = logging.getLogger(__name__)

Inbound = ToSender | Cancel | Flushed | GivenBack | Holds | PassedOn
STOP_TAKING_SECONDS = 2.0
HOLDS_SECONDS = 0.1
"""Between two `Holds`: what is computed meanwhile goes with the next one."""
MAX_PASSED = 1024
"""Entries passed on and not looked at; what is beyond comes when others claim it."""


class PrefillWorker:
    """Everything between the queue and the first token: `service.py` for one prompt, `steps.py` for the device."""

    def __init__(
        self,
        node: Node,
        engine: Engine,
        layout: Layout,
        turns: Turns,
        max_jobs: int,
        lease_seconds: float,
        lines: Lines,
        wire_dtype: WireDtype,
        beside: str | None = None,
        nixl: NixlEndpoint | None = None,
    ) -> None:
        """`beside` is the decode worker of the same process, if there is one."""
        self._node = node
        self._pool = engine.pool
        self._page_size = layout.page_size
        self._lease_seconds = lease_seconds
        self._intake = Intake(node.queue, node.registry, lease_seconds)
        self._steering = Steering(node.registry, layout.page_size)
        self._steps = Steps(engine, layout.page_size, turns)
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
        departures = LineDepartures([engine.cache], layout.dtype, lines, call_soon)
        self._sender = Sender(node.mesh.send, departures, engine.cache.staging_blocks)
        self._service = PromptService(
            engine,
            layout,
            self._steps,
            self._sender,
            Placement(node.registry, beside),
            exports_of(engine.cache, nixl),
            wire_dtype,
            node.telemetry,
            on_computed=self._tell_what_is_held,
        )
        self._room = asyncio.Semaphore(max_jobs)
        self._room_for_passed = asyncio.Semaphore(max_jobs)
        """What others pass on has places of its own: the loop that takes from the queue holds one while it waits."""
        self._passed: asyncio.Queue[Delivery] = asyncio.Queue(MAX_PASSED)
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._prompts: dict[Key, Prompt] = {}
        """What each of them serves."""
        self._untold: list[bytes] = []
        """Pages computed that the tier has not been told of."""
        self._next_holds: asyncio.TimerHandle | None = None
        self._stopping = False
        self._farewell = Farewell(node)
        self._decode: Decoder[Inbound] = Decoder(Inbound)
        node.registry.on_leave.append(self._member_left)

    async def run(self, stopped: Awaitable[None], drain_timeout: float) -> None:
        """Serve until `stopped` is done, then give back what has not begun, and finish the rest.

        What is left after `drain_timeout` seconds is given back, too.
        """
        self._publish_stats()
        async with asyncio.TaskGroup() as group:
            taking = group.create_task(self._take_loop(group))
            loops = [self._mailbox_loop(), self._steps.run(), self._keep_alive_loop(), self._passed_loop(group)]
            running = [group.create_task(loop) for loop in loops]
            await stopped
            self._stopping = True
            self._node.registry.drain()
            await self._give_back_waiting()
            await asyncio.wait([taking], timeout=STOP_TAKING_SECONDS)
            await end_task(taking)
            await self._give_back_waiting()  # what came meanwhile
            if self._tasks:
                await asyncio.wait(list(self._tasks.values()), timeout=drain_timeout)
            await self._give_entries_back(list(self._tasks), is_untouched=False)
            if self._next_holds is not None:
                self._next_holds.cancel()
            await self._farewell.say()
            await asyncio.gather(*[end_task(task) for task in running])

    async def _give_back_waiting(self) -> None:
        waiting = [key for key, prompt in self._prompts.items() if not prompt.is_begun]
        await self._give_entries_back(waiting, is_untouched=True)

    async def _give_entries_back(self, keys: list[Key], is_untouched: bool) -> None:
        if not keys:
            return
        tasks = {self._tasks[key]: self._prompts[key].delivery for key in keys}
        await asyncio.gather(*[end_task(task) for task in tasks])
        await self._to_others([delivery for task, delivery in tasks.items() if task.cancelled()], is_untouched)

    async def _to_others(self, deliveries: list[Delivery], is_untouched: bool) -> None:
        await self._intake.give_back(deliveries, is_untouched)
        self._tell_tier(GivenBack())
        log.info("gave %d entries back to the queue", len(deliveries))

    def _tell_tier(self, message: Message) -> None:
        for worker in self._node.registry.tier("prefill"):
            self._post(worker.id, message)

    async def _take_loop(self, group: asyncio.TaskGroup) -> None:
        """Pull entries, only as many as there is room for."""
        while not self._stopping:
            await self._room.acquire()
            delivery = await self._intake.next()
            prompt = Prompt(delivery, self._page_size) if delivery is not None else None
            if prompt is None or await self._passes_on(prompt):
                self._room.release()
            else:
                self._begin(group, prompt, self._room)

    async def _passed_loop(self, group: asyncio.TaskGroup) -> None:
        """Serve what others of the tier have passed on; what there is no room for goes to whoever claims it."""
        while True:
            delivery = await self._passed.get()
            if self._stopping or self._room_for_passed.locked():
                await self._to_others([delivery], is_untouched=True)
            elif await self._intake.accept(delivery):
                await self._room_for_passed.acquire()
                self._begin(group, Prompt(delivery, self._page_size), self._room_for_passed)

    async def _passes_on(self, prompt: Prompt) -> bool:
        """Pass a prompt on to a worker that had better compute it, if there is one. Nothing is passed on twice."""
        delivery = prompt.delivery
        if not delivery.is_new or not self._node.registry.tier("prefill"):
            return False
        reusable = prompt.reusable
        held = self._pool.num_matching(reusable)
        worker = self._steering.better(reusable, prompt.num_tokens, held, self._steps.num_waiting_tokens)
        if worker is None or not await self._intake.pass_on(delivery, worker):
            return False
        self._post(worker.id, PassedOn(entry_id=delivery.entry_id, entry=prompt.entry, attempt=delivery.attempt))
        self._steering.passed_on(worker, reusable, prompt.num_tokens)
        return True

    def _tell_what_is_held(self, page_hashes: list[bytes]) -> None:
        """Have the tier know of pages: at once, or `HOLDS_SECONDS` after it was told last."""
        self._untold = (self._untold + page_hashes)[-MAX_HELD_PAGES:]
        if self._next_holds is None:
            self._tell_untold()

    def _tell_untold(self) -> None:
        self._next_holds = None
        if self._untold:
            self._tell_tier(Holds(waiting=self._steps.num_waiting_tokens, page_hashes=self._untold))
            self._untold = []
            self._next_holds = asyncio.get_running_loop().call_later(HOLDS_SECONDS, self._tell_untold)

    def _begin(self, group: asyncio.TaskGroup, prompt: Prompt, room: asyncio.Semaphore) -> None:
        task = group.create_task(self._serve(prompt), name=f"serve {prompt.key}")
        self._tasks[prompt.key] = task
        self._prompts[prompt.key] = prompt
        task.add_done_callback(functools.partial(self._served, prompt, room))

    def _served(self, prompt: Prompt, room: asyncio.Semaphore, _: asyncio.Task[None]) -> None:
        self._intake.let_go(prompt.delivery)
        del self._tasks[prompt.key], self._prompts[prompt.key]
        room.release()
        self._publish_stats()

    async def _serve(self, prompt: Prompt) -> None:
        gateway = prompt.entry.gateway
        if await self._is_waited_for(gateway):
            self._post(gateway, await self._service.serve(prompt))
        await self._intake.acknowledge(prompt.delivery)

    async def _is_waited_for(self, gateway: str) -> bool:
        if gateway not in self._node.registry.members:
            try:
                await self._node.registry.refresh()
            except RedisError:
                return True
        return gateway in self._node.registry.members

    def _post(self, gateway: str, message: Message) -> None:
        try:
            self._node.mesh.post(gateway, message)
        except PeerGone as error:
            log.warning("nobody to tell: %s", error)

    def pages_of(self, request_id: str, attempt: int) -> list[int] | None:
        """See `Beside`."""
        return self._sender.pages_of(request_id, attempt)

    async def _mailbox_loop(self) -> None:
        while True:
            inbound, message = await self._node.mesh.receive_as(self._decode)
            match message, inbound.sender.tier:
                case Cancel(), "gateway":
                    self._cancel(message)
                case Flushed(), "gateway":
                    self._farewell.answered(inbound.sender.id)
                case ((Cancel() | Flushed()), _):
                    self._node.mesh.refuse(inbound.sender, "only a gateway may cancel, and say what it has taken")
                case GivenBack(), "prefill":
                    self._intake.hurry()
                case Holds(), "prefill":
                    self._steering.heard(inbound.sender, message.page_hashes, message.waiting)
                case PassedOn(), "prefill":
                    self._take_passed(message)
                case ((GivenBack() | Holds() | PassedOn()), _):
                    self._node.mesh.refuse(inbound.sender, "only prefill workers share the queue")
                case _:
                    self._sender.handle(inbound.sender.id, message)

    def _take_passed(self, message: PassedOn) -> None:
        try:
            self._passed.put_nowait(Delivery(message.entry_id, message.entry, message.attempt))
        except asyncio.QueueFull:
            log.warning("%s was passed on to this worker, which has no room left", message.entry.request_id)

    def _cancel(self, message: Cancel) -> None:
        self._intake.cancel(message.request_id, message.attempt)
        for (request_id, attempt), task in self._tasks.items():
            if request_id == message.request_id and attempt <= message.attempt:
                task.cancel()

    async def _keep_alive_loop(self) -> None:
        """Renew what is held: the queue's entries (or others would claim them) and the handoffs' leases."""
        next_renewal = 0.0
        while True:
            await asyncio.sleep(self._lease_seconds / 4)
            await self._intake.renew()
            if time.monotonic() >= next_renewal:
                next_renewal = time.monotonic() + RENEW_SECONDS
                await self._sender.renew()
            self._publish_stats()

    def _member_left(self, member: Member) -> None:
        if member.tier == "decode":
            self._sender.receiver_left(member.id)
        elif member.tier == "gateway":
            self._farewell.answered(member.id)
            for job in self._steps.jobs:
                if job.prompt.entry.gateway == member.id:
                    self._tasks[job.key].cancel()

    def _publish_stats(self) -> None:
        self._node.registry.update_stats(
            {
                "kv_pages_in_use": self._pool.num_in_use,
                "kv_pages_total": self._pool.num_pages,
                "requests_waiting": len(self._tasks) - self._steps.num_jobs,
                "requests_running": self._steps.num_jobs,
                "prompt_tokens_waiting": self._steps.num_waiting_tokens,
                "handoff_recomputed_total": self._service.recomputed,
                "messages_refused_total": self._node.mesh.refused,
            }
            | self._steps.meter.figures()
            | self._steering.figures()
            | self._sender.stats.figures()
            | self._node.telemetry.stats()
        )
