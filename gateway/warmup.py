"""Ready means ready: true only once a request went through both tiers, and only while both have a worker."""

from __future__ import annotations

import asyncio
import logging

from headrace.gateway.admission import Admission, Arrival
from headrace.gateway.answer import Answer, running
from headrace.gateway.callers import PRIORITIES, Caller
from headrace.gateway.dispatcher import Dispatcher
from headrace.gateway.errors import ApiError
from headrace.gateway.job import Job, Prompt
from headrace.gateway.terms import Terms
from headrace.gateway.tokenizer import Tokenizer
from headrace.messages.request import SamplingParams

log = logging.getLogger(__name__)

TERMS = Terms(120.0, Caller("headrace", priority=PRIORITIES.stop))
"""Nobody comes before the warm-up: others wait for it."""
RETRY_SECONDS = 1.0


class Readiness:
    """Runs the warm-up request whenever both tiers have become present."""

    def __init__(self, admission: Admission, dispatcher: Dispatcher, tokenizer: Tokenizer) -> None:
        self._admission = admission
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._warm = False
        self._trouble = "the warm-up request is on its way"

    @property
    def reason(self) -> str | None:
        """Why the mesh is not ready; None where it is."""
        if self._admission.stopping:
            return "this server is stopping"
        if (missing := self._admission.missing_tier()) is not None:
            return f"no {missing} worker is running"
        return None if self._warm else self._trouble

    async def run(self) -> None:
        """Keep `reason` true until cancelled."""
        while True:
            await self._admission.until(complete=True)
            try:
                await self._warm_up()
            except ApiError as error:
                self._trouble = f"the warm-up request failed: {error.message}"
                log.warning("%s", self._trouble)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            log.info("ready: a warm-up request went through both tiers")
            self._warm = True
            await self._admission.until(complete=False)
            self._warm = False
            self._trouble = "the warm-up request is on its way"

    async def _warm_up(self) -> None:
        context_length = await self._admission.admit(Arrival(TERMS))
        prompt = Prompt(self._tokenizer.encode("Hello", add_special_tokens=False) or [0], None)
        sampling = SamplingParams(max_tokens=2, min_tokens=2, temperature=0)
        job = Job(kind="completion", prompts=[prompt], n=1, sampling=sampling, stop=())
        answer = Answer(job, TERMS, self._tokenizer.vocabulary, context_length)
        async with running(answer, self._dispatcher):
            await answer.complete()
