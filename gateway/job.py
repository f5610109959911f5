"""What a valid request asks for, whichever endpoint it came through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from headrace.gateway.errors import ContextLengthExceeded
from headrace.gateway.tools import ToolUse
from headrace.messages.request import SamplingParams

Kind = Literal["chat", "completion"]


@dataclass(frozen=True)
class Prompt:
    """One prompt. `text` is what `echo` repeats; None where the client sent token ids."""

    token_ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Job:
    """One HTTP request, validated and tokenized."""

    kind: Kind
    prompts: list[Prompt]
    n: int
    """Answers for each prompt; the answers of all prompts are numbered prompt by prompt."""
    sampling: SamplingParams
    """As for the first answer to each prompt: `max_tokens` is still open where it is `UNLIMITED`."""
    stop: tuple[str, ...]
    cuts_output: bool = False
    """`max_tokens` is cut to what the prompt leaves of the context, if it leaves any."""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    show_logprobs: bool = False
    user: str | None = None
    service_tier: str | None = None
    tool_use: ToolUse | None = None
    source: str = "prompt"
    """The body's field that the prompt is from, which an error names."""
    repeated: Mapping[str, Any] | None = None
    """What the answer repeats of its request."""

    @property
    def choices(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.n

    def sampling_of(self, prompt: Prompt, number: int, context_length: int) -> SamplingParams:
        """The parameters of answer `number` to `prompt`: a seed of its own, and an output that fits the context.

        Raises `ContextLengthExceeded` where it does not fit.
        """
        used = len(prompt.token_ids)
        wanted = self.sampling.max_tokens
        if wanted == UNLIMITED or self.cuts_output:
            wanted = min(wanted, max(context_length - used, 1))
        if used + wanted > context_length:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context_length} tokens. However, you requested "
                f"{used + wanted} tokens ({used} in the {self.source}, {wanted} in the completion). Please reduce "
                f"the length of the {self.source} or completion.",
                param=self.source,
            )
        seed = (self.sampling.seed + number) % 2**63
        return msgspec.structs.replace(self.sampling, max_tokens=wanted, seed=seed)


UNLIMITED = 2**31 - 1
"""`max_tokens` of a chat without a limit: what is left of the context."""
