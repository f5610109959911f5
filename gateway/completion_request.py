"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field

from headrace.gateway.errors import BadRequest
from headrace.gateway.job import Job, Prompt
from headrace.gateway.request_fields import RequestFields, Token, check_tokens, parse
from headrace.gateway.strict import Refused
from headrace.gateway.tokenizer import Tokenizer
from headrace.messages.request import MAX_PROMPT_TOKENS, MAX_TOP_LOGPROBS

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 512
"""Answers that one request may ask for: prompts times `n`."""

Tokens = Annotated[list[Token], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class CompletionRequest(RequestFields):
    """All fields of OpenAI's endpoint."""

    prompt: str | Texts | Tokens | TokenLists
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: Annotated[Any, Refused("insertion before a suffix is not supported", "")] = None

    @property
    def output_limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self, tokenizer: Tokenizer) -> list[Prompt]:
        """The prompts, tokenized with the tokens that the model expects around a text."""
        found = []
        for prompt in self._each_prompt():
            if isinstance(prompt, str):
                found.append(Prompt(tokenizer.encode(prompt, add_special_tokens=True), prompt))
            else:
                check_tokens(prompt, tokenizer, "prompt")
                found.append(Prompt(prompt, None))
        if any(not prompt.token_ids for prompt in found):
            raise BadRequest("The prompt is empty.", param="prompt")
        return found

    def _each_prompt(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | list[int]], self.prompt)


def read_completion(body: bytes, tokenizer: Tokenizer) -> tuple[str, Job]:
    """Parse, validate and tokenize a body: the model asked for, and the job. Raises `BadRequest`."""
    request = parse(body, CompletionRequest)
    request.check_common(tokenizer)
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise BadRequest(f"'best_of' other than 'n' ({n}) is not supported.", param="best_of")
    prompts = request.prompts(tokenizer)
    if len(prompts) * n > MAX_CHOICES:
        raise BadRequest(f"{len(prompts)} prompts with n={n} ask for more than {MAX_CHOICES} answers.", param="n")
    prompt_logprobs = request.logprobs if request.echo else None
    return request.model, Job(
        kind="completion",
        prompts=prompts,
        n=n,
        sampling=request.sampling(tokenizer, request.logprobs, prompt_logprobs),
        stop=request.stop_strings,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
        echo=bool(request.echo),
        show_logprobs=request.logprobs is not None,
        user=request.user,
    )
