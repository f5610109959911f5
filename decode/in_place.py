"""Prompts that a decode worker computes itself: short ones, where that is faster than to wait for their pages.

Between two decode steps at most one pass is run, of as many prompts as it has room for, on the device's own thread. Its
running streams wait meanwhile, which is counted in when a prefill worker chooses (`prefill/in_place.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from concurrent.futures import Executor

from headrace.engine.engine import Engine, PrefillChunk, PrefillOutput
from headrace.engine.prompt_cost import PromptCost
from headrace.kvtransfer.incoming import OwnPrompt

log = logging.getLogger(__name__)

FRESH_SECONDS = 60.0
"""What was measured is published for so long. After that prefill workers go by their own passes and so try again:
an estimate that once was too high would never be corrected otherwise."""


class InPlacePrompts:
    """Those that wait for a pass."""

    def __init__(self, engine: Engine, device_thread: Executor, most_tokens: int) -> None:
        """`most_tokens`: of a pass, and so of what is not cached of a prompt."""
        self._engine = engine
        self._device_thread = device_thread
        self._most_tokens = most_tokens
        self._waiting: deque[OwnPrompt] = deque()
        self._cost = PromptCost()
        self._measured_at: float | None = None
        self._prompts = 0
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, prompt: OwnPrompt) -> None:
        """Have it computed soon."""
        self._waiting.append(prompt)

    async def run_pass(self) -> None:
        """Compute the prompts at the head of the queue, and give each its first token; or say that it failed."""
        budget = self._most_tokens
        prompts: list[OwnPrompt] = []
        while self._waiting and (not prompts or self._waiting[0].missing <= budget):
            prompt = self._waiting.popleft()
            if prompt.begin():  # or nobody wants it any more
                prompts.append(prompt)
                budget -= prompt.missing
        if not prompts:
            return
        started, tokens = time.monotonic(), sum(prompt.missing for prompt in prompts)
        chunks = [self._chunk(prompt) for prompt in prompts]
        outputs: list[PrefillOutput] = []
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(
                self._device_thread, self._engine.prefill, chunks
            )
        except Exception:
            log.exception("a pass of prompts failed, giving them up")
        finally:
            for prompt, output in itertools.zip_longest(prompts, outputs):
                token = output.token if output is not None else None
                prompt.end(*((token.token_id, token.logprobs) if token is not None else (None,)))
        if not outputs:
            return
        self._cost.observe(tokens, time.monotonic() - started)
        self._measured_at = time.monotonic()
        self._prompts += len(prompts)
        self._tokens += tokens

    def figures(self) -> dict[str, float]:
        """For the registry: who takes no prompts, or measured nothing lately, has no such figures."""
        if not self._most_tokens:
            return {}
        figures: dict[str, float] = {
            "in_place_most_tokens": self._most_tokens,
            "in_place_tokens_waiting": sum(prompt.missing for prompt in self._waiting),
            "in_place_prompts_total": self._prompts,
            "in_place_prompt_tokens_total": self._tokens,
        }
        line = self._cost.line()
        if line is not None and self._measured_at is not None and time.monotonic() - self._measured_at < FRESH_SECONDS:
            figures |= {
                "in_place_pass_seconds": round(line.base, 6),
                "in_place_token_seconds": round(line.per_token, 9),
            }
        return figures

    def _chunk(self, prompt: OwnPrompt) -> PrefillChunk:
        offer = prompt.offer
        tokens, wants = offer.token_ids, offer.sampling
        matcher = self._engine.grammars.matcher(wants)
        start = len(tokens) - prompt.missing
        return PrefillChunk(tokens, start, prompt.missing, prompt.pages, wants, offer.generated, matcher)
