"""The body of POST /v1/responses: the fields of OpenAI's Responses API, as a chat. Nothing is stored."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from headrace.gateway.chat_request import ChatMessage, ChatRequest, TextPart, chat_job
from headrace.gateway.job import Job
from headrace.gateway.output_format import JsonSchema, ResponseFormat
from headrace.gateway.request_fields import Label, OutputLimit, parse
from headrace.gateway.strict import Refused, Strict, by_type
from headrace.gateway.tokenizer import Tokenizer
from headrace.gateway.tools import MAX_TOOLS, MadeCall, Name, NamedTool, Tool, ToolChoice

STATELESS = "nothing is stored: send the whole conversation as 'input'"
NO_CALLS = "this server calls no tools itself"
REPEATED = {"instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "temperature", "text"} | {
    "tool_choice", "tools", "top_p", "user"
}  # fmt: skip

Status = Literal["in_progress", "completed", "incomplete"] | None


class Part(Strict):
    """A part of a message's content, or of a call's output."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[Any, Refused("annotations are not supported", [])] = None
    logprobs: Annotated[Any, Refused("log probabilities are no input", [])] = None


Content = str | Annotated[list[Part], Field(min_length=1)]


class InputMessage(Strict):
    """A message. An answer's can be sent back as it is."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Label | None = None
    status: Status = None


class FunctionCall(Strict):
    """A call of the model's, as it was sent to the client."""

    type: Literal["function_call"]
    call_id: Label
    name: Name
    arguments: str
    id: Label | None = None
    status: Status = None


class FunctionCallOutput(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Label
    output: Content
    id: Label | None = None
    status: Status = None


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[FunctionCall, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")],
    by_type("an item is a message, a function_call or a function_call_output", missing="message"),
]


class FunctionTool(Strict):
    """A tool of the client's."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """No influence: where a call must come its arguments follow the schema to the letter."""


class FunctionChoice(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    name: Name


class _Form(ResponseFormat):
    SCHEMA: ClassVar = "text.format.schema"


class TextFormat(Strict):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    document: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """No influence: a schema is always followed to the letter."""

    def chat(self) -> ResponseFormat:
        """As a chat has it."""
        schema = None if self.document is None else JsonSchema.of(self.document)
        return _Form(type=self.type, json_schema=schema)


class TextConfig(Strict):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Refused("verbosity can't be chosen")] = None


class ResponseStreamOptions(Strict):
    """How the stream of an answer is written."""

    include_obfuscation: Annotated[Any, Refused("obfuscation of streams is not supported", False)] = None


class ResponsesRequest(Strict):
    """All fields of OpenAI's endpoint."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: Annotated[OutputLimit, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    """A label, like the four below; no influence on the answer."""
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None

    access_programs: Annotated[Any, Refused("there are no access programs")] = None
    background: Annotated[Any, Refused("nothing is stored, so no answer can be fetched later", False)] = None
    background_options: Annotated[Any, Refused("nothing is computed in the background")] = None
    context_management: Annotated[Any, Refused("contexts are not edited", [])] = None
    conversation: Annotated[Any, Refused(STATELESS)] = None
    image: Annotated[Any, Refused("only text is supported")] = None
    include: Annotated[Any, Refused("nothing more can be told", [], ["reasoning.encrypted_content"])] = None
    max_tool_calls: Annotated[Any, Refused(NO_CALLS)] = None
    moderation: Annotated[Any, Refused("moderation is not supported")] = None
    previous_response_id: Annotated[Any, Refused(STATELESS)] = None
    prompt: Annotated[Any, Refused("there are no stored prompts")] = None
    prompt_cache_options: Annotated[Any, Refused("prompts are cached by themselves, without options")] = None
    prompt_cache_retention: Annotated[Any, Refused("how long a prompt stays cached can't be chosen")] = None
    reasoning: Annotated[Any, Refused("reasoning can't be asked for", {}, {"effort": None, "summary": None})] = None
    store: Annotated[Any, Refused(STATELESS, False)] = None
    top_logprobs: Annotated[Any, Refused("ask /v1/chat/completions for log probabilities", 0)] = None
    truncation: Annotated[Any, Refused("inputs are not cut", "disabled")] = None

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises `BadRequest`."""
        asked = self.tool_choice
        choice: ToolChoice | None = NamedTool.of(asked.name) if isinstance(asked, FunctionChoice) else asked
        return ChatRequest(
            model=self.model,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            user=self.user,
            service_tier=self.service_tier,
            tools=None if self.tools is None else [Tool.of(t.name, t.description, t.parameters) for t in self.tools],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=None if self.text is None or self.text.format is None else self.text.format.chat(),
        )

    def _messages(self) -> list[ChatMessage]:
        """Calls join the assistant's message that they follow."""
        messages = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, ChatMessage(role="user", content=self.input)]
        for item in self.input:
            match item:
                case InputMessage():
                    messages.append(ChatMessage(role=item.role, content=_content(item.content)))
                case FunctionCallOutput():
                    content = _content(item.output)
                    messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=content))
                case FunctionCall():
                    call = MadeCall.of(item.call_id, item.name, item.arguments)
                    before = messages[-1] if messages and messages[-1].role == "assistant" else None
                    calls = [*((before and before.tool_calls) or []), call]
                    if before is None:
                        messages.append(ChatMessage(role="assistant", tool_calls=calls, content=None))
                    else:
                        messages[-1] = before.model_copy(update={"tool_calls": calls})
        return messages

    def repeated(self) -> dict[str, Any]:
        """The fields that an answer repeats, as far as they were given."""
        return self.model_dump(by_alias=True, exclude_none=True, include=REPEATED)


def _content(content: str | list[Part]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def read_responses(body: bytes, tokenizer: Tokenizer) -> tuple[str, Job]:
    """Parse, validate, render and tokenize a body: the model asked for, and the job. Raises `BadRequest`."""
    request = parse(body, ResponsesRequest)
    job = chat_job(request.chat(), tokenizer)
    return request.model, dataclasses.replace(job, source="input", repeated=request.repeated())
