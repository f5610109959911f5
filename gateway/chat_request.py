"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, ValidationInfo, field_validator

from headrace.gateway.errors import BadRequest
from headrace.gateway.job import Job, Prompt
from headrace.gateway.request_fields import Label, OutputLimit, RequestFields, parse
from headrace.gateway.strict import Refused, Strict
from headrace.gateway.tokenizer import Tokenizer
from headrace.gateway.tools import MAX_TOOLS, MadeCall, ToolChoice, Tools, read_tool_use
from headrace.messages.request import MAX_TOP_LOGPROBS

NO_FUNCTIONS = "tools have taken the place of functions"
TEXT_ONLY = "only text is supported"


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message. A reply of this server can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[MadeCall], Field(max_length=MAX_TOOLS)] | None = None
    """Of the assistant, whose content may be null then."""
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None
    name: str | None = None
    """Given to the chat template; refused where the template ignores it."""
    tool_call_id: Label | None = None
    """Of a `tool` message: whose result it is."""
    refusal: Annotated[Any, Refused("this server makes no refusals")] = None
    audio: Annotated[Any, Refused(TEXT_ONLY)] = None
    function_call: Annotated[Any, Refused(NO_FUNCTIONS)] = None
    annotations: Annotated[Any, Refused("this server makes no annotations", [])] = None

    @field_validator("content")
    @classmethod
    def _needs_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not (info.data.get("role") == "assistant" and info.data.get("tool_calls")):
            raise ValueError("only the assistant's may be null, beside 'tool_calls'")
        return value

    def for_template(self) -> Mapping[str, Any]:
        """As chat templates expect a message; the parts of a content are joined by line breaks, as vLLM does."""
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message if self.name is None else {**message, "name": self.name}


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(RequestFields):
    """All fields of OpenAI's endpoint, and `chat_template_kwargs`."""

    messages: Messages
    max_completion_tokens: Annotated[OutputLimit, Field(ge=1)] | None = None
    max_tokens: Annotated[OutputLimit, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    """A label, like the two below; no influence on the answer."""
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    """`auto` where there are tools."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may call more than once; true where nothing is said."""
    chat_template_kwargs: dict[str, Any] | None = None

    audio: Annotated[Any, Refused(TEXT_ONLY)] = None
    function_call: Annotated[Any, Refused(NO_FUNCTIONS, "none")] = None
    functions: Annotated[Any, Refused(NO_FUNCTIONS, [])] = None
    modalities: Annotated[Any, Refused(TEXT_ONLY, ["text"])] = None
    moderation: Annotated[Any, Refused("moderation is not supported")] = None
    prediction: Annotated[Any, Refused("predicted outputs are not supported")] = None
    prompt_cache_options: Annotated[Any, Refused("prompts are cached by themselves, without options")] = None
    prompt_cache_retention: Annotated[Any, Refused("how long a prompt stays cached can't be chosen")] = None
    reasoning_effort: Annotated[Any, Refused("the effort of reasoning can't be chosen")] = None
    store: Annotated[Any, Refused("answers are not stored", False)] = None
    verbosity: Annotated[Any, Refused("verbosity can't be chosen")] = None
    web_search_options: Annotated[Any, Refused("web search is not supported")] = None

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def read_chat(body: bytes, tokenizer: Tokenizer) -> tuple[str, Job]:
    """Parse, validate, render and tokenize a body: the model asked for, and the job. Raises `BadRequest`."""
    request = parse(body, ChatRequest)
    return request.model, chat_job(request, tokenizer)


def chat_job(request: ChatRequest, tokenizer: Tokenizer) -> Job:
    """Check, render and tokenize a chat, whichever endpoint it came through. Raises `BadRequest`."""
    request.check_common(tokenizer)
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise BadRequest("Give 'max_completion_tokens' or the older 'max_tokens', not both.", param="max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    if tokenizer.template is None:
        raise BadRequest("This model has no chat template: use /v1/completions.", param="messages")
    tool_use = read_tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)
    tools = None if tool_use is None else [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    messages = [message.for_template() for message in request.messages]
    text = tokenizer.template.render(messages, request.chat_template_kwargs or {}, tools)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if not token_ids:
        raise BadRequest("The messages make an empty prompt.", param="messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    sampling = request.sampling(tokenizer, logprobs)
    if tool_use is not None:
        if sampling.grammar is not None:
            raise BadRequest("Give 'tools' or a form of the answer, not both.", param="tools")
        sampling = msgspec.structs.replace(sampling, grammar=tool_use.checked_grammar(tokenizer.grammars))
    return Job(
        kind="chat",
        prompts=[Prompt(token_ids, text)],
        n=request.n or 1,
        sampling=sampling,
        stop=request.stop_strings,
        stream=bool(request.stream),
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
        show_logprobs=bool(request.logprobs),
        user=request.user,
        service_tier="default" if request.service_tier else None,
        tool_use=tool_use,
        source="messages",
    )
