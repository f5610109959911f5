"""What becomes of one prompt: from its entry to the decode worker's acknowledgement."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable

from headrace.engine.engine import Engine
from headrace.grammar import GrammarError, Matcher
from headrace.kvtransfer.handoff import Handoff, HandoffFailed
from headrace.kvtransfer.messages import Layout, Offer, WireDtype
from headrace.kvtransfer.placement import Placement
from headrace.kvtransfer.sender import Sender
from headrace.kvtransfer.transports import Exports
from headrace.messages.request import SamplingParams
from headrace.messages.stream import PrefillReport, RequestFailed
from headrace.prefill.in_place import InPlaceChoice
from headrace.prefill.job import Job, Prompt, RequestRejected
from headrace.prefill.steps import Steps
from headrace.prefill.watch import Watch, watching
from headrace.telemetry.telemetry import Telemetry

log = logging.getLogger(__name__)


class PromptService:
    """Finds pages, has them computed and hands them over, for one prompt a task."""

    def __init__(
        self,
        engine: Engine,
        layout: Layout,
        steps: Steps,
        sender: Sender,
        placement: Placement,
        exports: Exports,
        wire_dtype: WireDtype,
        telemetry: Telemetry,
        on_computed: Callable[[list[bytes]], None],
    ) -> None:
        """`on_computed` hears the hashes of pages that were computed here and can be found from now on."""
        self.recomputed = 0
        """Prompts that were computed before, in another attempt."""
        self._engine = engine
        self._layout = layout
        self._steps = steps
        self._sender = sender
        self._placement = placement
        self._in_place = InPlaceChoice(placement, sender, layout.page_size, steps.meter.cost)
        self._exports = exports
        self._wire_dtype: WireDtype = wire_dtype
        self._telemetry = telemetry
        self._on_computed = on_computed
        self._page_turn = asyncio.Lock()
        self._pages_freed = asyncio.Event()
        engine.pool.on_freed.append(self._pages_freed.set)

    async def serve(self, prompt: Prompt) -> PrefillReport | RequestFailed:
        """Until the prompt is a decode worker's, or nobody's; what the gateway is to hear of it."""
        entry, attempt = prompt.entry, prompt.delivery.attempt
        try:
            with watching(self._telemetry, prompt.delivery) as watch:
                async with asyncio.timeout(max(entry.deadline - time.time(), 0)):
                    return await self._serve(prompt, watch)
        except TimeoutError:
            rejected = RequestRejected(
                "deadline", "the request's deadline passed before its prompt was computed", False
            )
        except RequestRejected as error:
            rejected = error
        log.warning("%s attempt %d: %s: %s", entry.request_id, attempt, rejected.code, rejected)
        return RequestFailed(
            request_id=entry.request_id,
            attempt=attempt,
            code=rejected.code,
            message=str(rejected),
            retryable=rejected.retryable,
        )

    async def _serve(self, prompt: Prompt, watch: Watch) -> PrefillReport:
        taken_at = time.time()
        self._check(prompt)
        matcher = await self._compile_grammar(prompt.entry.sampling)
        if (report := await self._compute_in_place(prompt, taken_at)) is not None:
            return report
        pages, cached_tokens = await self._get_pages(prompt)
        try:
            watch.job = job = self._make_job(prompt, pages, cached_tokens, matcher)
            first_token_at = await self._compute_and_hand_over(job)
        finally:
            self._steps.remove(prompt.key, pages)
        return PrefillReport(
            request_id=prompt.entry.request_id,
            attempt=prompt.delivery.attempt,
            decode_worker=job.handoff.receiver if job.handoff else None,
            queue_ms=max(taken_at - prompt.entry.enqueued_at, 0.0) * 1000,
            prefill_ms=max(first_token_at - taken_at, 0.0) * 1000,
            handoff_ms=max(time.time() - first_token_at, 0.0) * 1000,
            cached_tokens=cached_tokens,
            prompt_logprobs=job.prompt_logprobs if prompt.entry.sampling.prompt_logprobs is not None else None,
        )

    def _check(self, prompt: Prompt) -> None:
        """Raise `RequestRejected` for what no worker, or not this one, can compute."""
        if prompt.delivery.exhausted:
            raise RequestRejected("worker_error", "every worker that tried this request died of it or was lost", False)
        if prompt.entry.deadline <= time.time():
            raise RequestRejected("deadline", "the request's deadline passed before its prompt was begun", False)
        if prompt.delivery.attempt > 0:
            self.recomputed += 1
        limit = self._engine.max_model_len
        if prompt.num_tokens > limit:
            message = f"{prompt.num_tokens} prompt tokens are more than this worker's --max-model-len {limit}"
            raise RequestRejected("invalid_request", message, False)
        vocabulary = self._engine.model_config.vocab_size
        if max(prompt.entry.token_ids) >= vocabulary:
            raise RequestRejected("invalid_request", f"token ids must be below {vocabulary}", False)

    async def _compile_grammar(self, sampling: SamplingParams) -> Matcher | None:
        if sampling.grammar is None:
            return None
        try:
            await asyncio.to_thread(self._engine.grammars.compile, sampling.grammar)
        except GrammarError as error:
            raise RequestRejected("invalid_request", f"the grammar can't be used: {error}", False) from error
        return self._engine.grammars.matcher(sampling)

    async def _compute_in_place(self, prompt: Prompt, taken_at: float) -> PrefillReport | None:
        """Have a decode worker compute the prompt, where that is faster and it does; None where it does not."""
        wants = prompt.entry.sampling
        if prompt.delivery.attempt or not wants.max_tokens or wants.prompt_logprobs is not None:
            return None
        reusable = prompt.reusable
        held = self._engine.pool.num_matching(reusable)
        chosen = self._in_place.choose(reusable, prompt.num_tokens, held, self._steps.backlog())
        if chosen is None:
            return None
        handoff = Handoff(self._offer(prompt, in_place=True), [], self._engine.cache)
        prompt.is_begun = True
        try:
            if not await self._in_place.have_computed(handoff, prompt.page_hashes, *chosen):
                return None
        except HandoffFailed as error:
            raise RequestRejected("worker_error", f"the prompt was not computed in place: {error}", True) from error
        return PrefillReport(
            request_id=prompt.entry.request_id,
            attempt=prompt.delivery.attempt,
            decode_worker=handoff.receiver,
            queue_ms=max(taken_at - prompt.entry.enqueued_at, 0.0) * 1000,
            prefill_ms=max(time.time() - taken_at, 0.0) * 1000,
            handoff_ms=0.0,
            cached_tokens=handoff.held_pages * self._layout.page_size,
            in_place=True,
        )

    async def _get_pages(self, prompt: Prompt) -> tuple[list[int], int]:
        """Pages for the prompt, those found in the prefix cache first, and how many tokens the latter hold."""
        pool = self._engine.pool
        async with self._page_turn:
            while True:
                held = pool.match_prefix(prompt.reusable)
                missing = pool.pages_for(prompt.num_tokens) - len(held)
                if missing <= pool.num_spare:
                    return held + pool.allocate(missing), len(held) * self._layout.page_size
                pool.put_back(held)
                self._pages_freed.clear()
                await self._pages_freed.wait()

    def _make_job(self, prompt: Prompt, pages: list[int], cached_tokens: int, matcher: Matcher | None) -> Job:
        decodes = prompt.entry.sampling.max_tokens > 0
        handoff = Handoff(self._offer(prompt), pages, self._engine.cache) if decodes else None
        computed = asyncio.get_running_loop().create_future()
        job = Job(prompt, pages, cached_tokens, handoff, matcher, computed)
        if cached_tokens:
            for layer in range(self._layout.num_layers):
                job.layer_computed(layer, 0, cached_tokens)
        return job

    def _offer(self, prompt: Prompt, in_place: bool = False) -> Offer:
        entry = prompt.entry
        return Offer(
            request_id=entry.request_id,
            attempt=prompt.delivery.attempt,
            gateway=entry.gateway,
            layout=self._layout,
            token_ids=entry.token_ids,
            generated=entry.generated,
            sampling=entry.sampling,
            deadline=entry.deadline,
            host=self._exports.host,
            cuda_ipc=self._exports.cuda_ipc,
            shm=self._exports.shm,
            nixl=self._exports.nixl,
            wire_dtype=self._wire_dtype,
            traceparent=entry.traceparent,
            may_wait=not in_place,
            in_place=in_place,
        )

    async def _compute_and_hand_over(self, job: Job) -> float:
        """Returns the time at which the first token was known."""
        self._steps.add(job)
        try:
            async with asyncio.TaskGroup() as group:
                if job.handoff is not None:
                    choose = functools.partial(self._placement.choose, page_hashes=job.prompt.page_hashes)
                    group.create_task(self._sender.deliver(job.handoff, choose))
                token = await job.computed
                job.first_token_at = first_token_at = time.time()
                hashes = job.prompt.page_hashes
                if job.handoff is not None and token is not None:
                    job.handoff.finish(token.token_id, token.logprobs)
                elif job.handoff is not None:  # the decode step that has the last token may be yet to come
                    hashes = hashes[: (job.prompt.num_tokens - 1) // self._layout.page_size]
                for page, page_hash in zip(job.pages, hashes, strict=False):
                    self._engine.pool.publish(page, page_hash)
                if computed := hashes[job.cached_tokens // self._layout.page_size :]:
                    self._on_computed(computed)
        except ExceptionGroup as failures:
            error = failures.exceptions[0]
            if isinstance(error, HandoffFailed):
                raise RequestRejected("worker_error", f"the KV could not be handed over: {error}", True) from error
            raise error from None
        return first_token_at
