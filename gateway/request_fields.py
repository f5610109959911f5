"""The fields that both endpoints share, and how a body that breaks the schema is explained.

Every field is honoured or refused with a 400 that names it; none is ignored. As in OpenAI's API, null means absent.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from headrace.gateway.errors import BadRequest
from headrace.gateway.job import UNLIMITED
from headrace.gateway.output_format import ResponseFormat, StructuredOutputs, read_grammar
from headrace.gateway.stop_strings import MAX_STOP_STRING
from headrace.gateway.strict import Refused, Strict
from headrace.gateway.tokenizer import Tokenizer
from headrace.messages.request import SamplingParams

MAX_N = 128
SMALLEST_TOP_P = 1e-6
"""What `top_p` 0 means: the likeliest token alone."""

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
OutputLimit = Annotated[int, Field(ge=0, le=UNLIMITED - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING)]
Label = Annotated[str, Field(max_length=512)]


def _renamed(name: str) -> Refused:
    return Refused(f"send it as 'structured_outputs': {{'{name}': ...}}, as vLLM has it since 0.12")


class StreamOptions(Strict):
    """How the stream of an answer is written."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: token counts so far come with each chunk, as vLLM has it."""
    include_obfuscation: bool | None = None

    def check(self) -> None:
        """Raise `BadRequest` for what can't be honoured."""
        if self.include_obfuscation:
            raise BadRequest("Obfuscation of streams is not supported.", param="stream_options.include_obfuscation")
        if self.continuous_usage_stats and not self.include_usage:
            raise BadRequest("It needs 'include_usage'.", param="stream_options.continuous_usage_stats")


class RequestFields(Strict):
    """OpenAI's common fields, and the extensions that users of vLLM know (from `top_k` on)."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: OutputLimit | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[Token, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    user: Label | None = None
    """A label for the request log; no influence on the answer."""

    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 keep all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    min_tokens: OutputLimit | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[Any, _renamed("json")] = None
    guided_regex: Annotated[Any, _renamed("regex")] = None
    guided_choice: Annotated[Any, _renamed("choice")] = None
    guided_grammar: Annotated[Any, _renamed("grammar")] = None

    def check_common(self, tokenizer: Tokenizer) -> None:
        """Raise `BadRequest` for what the types alone don't catch."""
        if self.stream_options is not None:
            if not self.stream:
                raise BadRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
            self.stream_options.check()
        for name, tokens in (("logit_bias", self.logit_bias or {}), ("stop_token_ids", self.stop_token_ids or [])):
            check_tokens(tokens, tokenizer, name)
        limit = self.output_limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise BadRequest(
                f"'min_tokens' is {self.min_tokens}, over the limit of {limit} tokens.", param="min_tokens"
            )

    @property
    def output_limit(self) -> int | None:
        """Tokens of output at most; None for as many as fit."""
        return self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, none twice."""
        stop = self.stop or []
        return (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop))

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of the stream has the token counts so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(
        self, tokenizer: Tokenizer, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The parameters for the workers. Defaults are OpenAI's, and the seed is drawn where none is given.

        Raises `BadRequest` where the answer's form can't be followed.
        """
        end = () if self.ignore_eos else tokenizer.eos_token_ids
        return SamplingParams(
            max_tokens=UNLIMITED if self.output_limit is None else self.output_limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, SMALLEST_TOP_P),
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=secrets.randbits(62) if self.seed is None else self.seed % 2**63,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            stop_token_ids=tuple(sorted({*end, *(self.stop_token_ids or [])})),
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=read_grammar(self.response_format, self.structured_outputs, tokenizer.grammars),
        )


Request = TypeVar("Request", bound=Strict)


def parse(body: bytes, schema: type[Request]) -> Request:
    """Read a body. Raises `BadRequest` that names the first field at fault, or says where the JSON breaks."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    related = [detail for detail in details if detail["loc"][:1] == details[0]["loc"][:1]]
    first = max(related, key=lambda detail: _depth(detail["loc"]))
    if first["type"] == "json_invalid":
        raise BadRequest(f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    if not first["loc"]:
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        raise BadRequest(
            f"Unrecognized request argument: '{path}'{_nearest(path, schema)}.", param=path, code="unknown_field"
        )
    if first["type"] == "missing":
        raise BadRequest(f"Missing required argument: '{path}'.", param=path, code="missing_field")
    reasons = dict.fromkeys(
        detail["msg"].removeprefix("Value error, ") for detail in related if _path(detail["loc"]) == path
    )
    raise BadRequest(f"Invalid value for '{path}': {'; or: '.join(reasons)}.", param=path)


def check_tokens(tokens: Sequence[int] | Mapping[int, float], tokenizer: Tokenizer, param: str) -> None:
    """Raise `BadRequest` for the first id that the model has no token for."""
    if tokens and max(tokens) >= tokenizer.vocabulary_size:
        raise BadRequest(
            f"Token {max(tokens)} in '{param}' is outside the model's vocabulary of {tokenizer.vocabulary_size}.",
            param=param,
        )


def _depth(location: tuple[int | str, ...]) -> tuple[int, list[int]]:
    """How far validation came: of a union's branches, the one that failed last is the one that was meant."""
    return len(location), [step for step in location if isinstance(step, int)]


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location, which also names the branches of unions."""
    path = str(location[0])
    for step in location[1:]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in UNION_BRANCHES and not step[0].isupper():  # nor a class
            path += f".{step}"
    return path


UNION_BRANCHES = frozenset({"str", "int", "float", "bool"})


def _nearest(path: str, schema: type[BaseModel]) -> str:
    match = difflib.get_close_matches(path, list(schema.model_fields), n=1)
    return f". Did you mean '{match[0]}'?" if match else ""
