"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from headrace.gateway.errors import BadRequest
from headrace.gateway.job import Job, Prompt
from headrace.gateway.request_fields import Label, OutputLimit, Refused, RequestFields, parse, refuse
from headrace.gateway.strict import Strict
from headrace.gateway.tokenizer import Tokenizer
from headrace.messages.request import MAX_TOP_LOGPROBS

NO_TOOLS = "tool calls are not supported"
TEXT_ONLY = "only text is supported"


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message. A reply of this server can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    """Given to the chat template; refused where the template ignores it."""
    refusal: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None
    annotations: Any = None

    REFUSED: ClassVar[Refused] = {
        "refusal": ((), "this server makes no refusals"),
        "audio": ((), TEXT_ONLY),
        "tool_calls": (([],), NO_TOOLS),
        "function_call": ((), NO_TOOLS),
        "annotations": (([],), "this server makes no annotations"),
    }

    @field_validator("role", mode="before")
    @classmethod
    def _no_tool_messages(cls, value: Any) -> Any:
        if value in ("tool", "function"):
            raise ValueError(NO_TOOLS)
        return value

    @field_validator(*REFUSED)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> None:
        refuse(cls.REFUSED, value, info)

    def for_template(self) -> Mapping[str, Any]:
        """As chat templates expect a message; the parts of a content are joined by line breaks, as vLLM does."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(RequestFields):
    """All fields of OpenAI's endpoint, and `chat_template_kwargs`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[OutputLimit, Field(ge=1)] | None = None
    max_tokens: Annotated[OutputLimit, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    """A label, like the two below; no influence on the answer."""
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    """No influence: there are no tools to call."""
    chat_template_kwargs: dict[str, Any] | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    REFUSED: ClassVar[Refused] = {
        "audio": ((), TEXT_ONLY),
        "function_call": (("none",), NO_TOOLS),
        "functions": (([],), NO_TOOLS),
        "modalities": ((["text"],), TEXT_ONLY),
        "moderation": ((), "moderation is not supported"),
        "prediction": ((), "predicted outputs are not supported"),
        "prompt_cache_options": ((), "prompts are cached by themselves, without options"),
        "prompt_cache_retention": ((), "how long a prompt stays cached can't be chosen"),
        "reasoning_effort": ((), "the effort of reasoning can't be chosen"),
        "store": ((False,), "answers are not stored"),
        "tool_choice": (("none",), NO_TOOLS),
        "tools": (([],), NO_TOOLS),
        "verbosity": ((), "verbosity can't be chosen"),
        "web_search_options": ((), "web search is not supported"),
    }

    @field_validator(*REFUSED)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> None:
        refuse(cls.REFUSED, value, info)

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def read_chat(body: bytes, tokenizer: Tokenizer) -> tuple[str, Job]:
    """Parse, validate, render and tokenize a body: the model asked for, and the job. Raises `BadRequest`."""
    request = parse(body, ChatRequest)
    request.check_common(tokenizer)
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise BadRequest("Give 'max_completion_tokens' or the older 'max_tokens', not both.", param="max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    if tokenizer.template is None:
        raise BadRequest("This model has no chat template: use /v1/completions.", param="messages")
    text = tokenizer.template.render([m.for_template() for m in request.messages], request.chat_template_kwargs or {})
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if not token_ids:
        raise BadRequest("The messages make an empty prompt.", param="messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return request.model, Job(
        kind="chat",
        prompts=[Prompt(token_ids, text)],
        n=request.n or 1,
        sampling=request.sampling(tokenizer, logprobs),
        stop=request.stop_strings,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        show_logprobs=bool(request.logprobs),
        user=request.user,
        service_tier="default" if request.service_tier else None,
    )
