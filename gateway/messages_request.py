"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's fields, as a chat."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from headrace.gateway.chat_request import ChatMessage, ChatRequest, TextPart, chat_job
from headrace.gateway.errors import BadRequest
from headrace.gateway.job import Job
from headrace.gateway.output_format import JsonSchema, ResponseFormat
from headrace.gateway.request_fields import Label, OutputLimit, StopString, parse
from headrace.gateway.strict import Refused, Strict, by_type
from headrace.gateway.tokenizer import Tokenizer
from headrace.gateway.tools import MAX_TOOLS, MadeCall, Name, NamedTool, Tool, ToolChoice

CacheControl = dict[str, Any]
"""No influence: every prompt is cached by itself."""


class TextBlock(Strict):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[Any, Refused("citations are not supported", [])] = None


class ToolUseBlock(Strict):
    """A call of the assistant's, as it was sent to the client."""

    type: Literal["tool_use"]
    id: Label
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None

    def call(self) -> MadeCall:
        """As a chat has it."""
        return MadeCall.of(self.id, self.name, json.dumps(self.input, ensure_ascii=False))


class ToolResultBlock(Strict):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: Label
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    """The model reads `Error:` before the content, for templates have no other place for it."""
    cache_control: CacheControl | None = None

    def message(self) -> ChatMessage:
        """As a chat has it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(block.text for block in content)
        return ChatMessage(
            role="tool", tool_call_id=self.tool_use_id, content=f"Error: {text}" if self.is_error else text
        )


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    by_type("content is text, tool_use or tool_result"),
]
BLOCKS_OF = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock),
    "system": (TextBlock,),
}


class Message(Strict):
    """One turn. An answer's content can be sent back as it is."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], Field(min_length=1)]

    def chat(self, path: str) -> list[ChatMessage]:
        """As a chat has it: a message for each result of a call, then one with all else. Raises `BadRequest`."""
        if isinstance(self.content, str):
            return [ChatMessage(role=self.role, content=self.content)]
        for number, block in enumerate(self.content):
            if not isinstance(block, BLOCKS_OF[self.role]):
                raise BadRequest(
                    f"A message of the role '{self.role}' has no blocks of the type '{block.type}'.",
                    param=f"{path}.content[{number}]",
                )
        results = [block.message() for block in self.content if isinstance(block, ToolResultBlock)]
        texts = [TextPart(type="text", text=block.text) for block in self.content if isinstance(block, TextBlock)]
        calls = [block.call() for block in self.content if isinstance(block, ToolUseBlock)]
        if len(calls) > MAX_TOOLS:
            raise BadRequest(f"A message has at most {MAX_TOOLS} calls of tools.", param=f"{path}.content")
        if not texts and not calls:
            return results
        return [*results, ChatMessage(role=self.role, tool_calls=calls or None, content=texts or None)]


class CustomTool(Strict):
    """A tool of the client's."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    """No influence: where a call must come its input follows the schema to the letter."""
    eager_input_streaming: bool | None = None
    """No influence: input is always told as it comes."""
    cache_control: CacheControl | None = None


class AnthropicToolChoice(Strict):
    """Whether, and what, the model calls."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    """Of the type `tool`."""
    disable_parallel_tool_use: bool | None = None

    def chat(self) -> ToolChoice:
        """As a chat has it. Raises `BadRequest`."""
        if (self.name is not None) != (self.type == "tool"):
            raise BadRequest(
                "A name belongs to the type 'tool', which needs it, and to no other.", param="tool_choice.name"
            )
        if self.name is not None:
            return NamedTool.of(self.name)
        return "required" if self.type == "any" else self.type  # type: ignore[return-value]


class Metadata(Strict):
    """About the request."""

    user_id: Label | None = None
    """A label for the request log."""


class _Form(ResponseFormat):
    SCHEMA: ClassVar = "output_config.format.schema"


class JsonFormat(Strict):
    """A JSON schema that the text follows."""

    type: Literal["json_schema"]
    document: Annotated[dict[str, Any], Field(alias="schema")]

    def chat(self) -> ResponseFormat:
        """As a chat has it."""
        return _Form(type="json_schema", json_schema=JsonSchema.of(self.document))


class OutputConfig(Strict):
    """The form of the answer."""

    format: JsonFormat | None = None
    effort: Annotated[Any, Refused("the effort can't be chosen")] = None


class CountTokensRequest(Strict):
    """What a prompt is made of."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[CustomTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    context_management: Annotated[Any, Refused("contexts are not edited")] = None
    mcp_servers: Annotated[Any, Refused("this server calls no tools itself", [])] = None
    speed: Annotated[Any, Refused("the speed can't be chosen", "standard")] = None
    thinking: Annotated[Any, Refused("thinking can't be asked for", {"type": "disabled"}, {"type": "adaptive"})] = None
    user_profile_id: Annotated[Any, Refused("there are no user profiles")] = None
    workspace_id: Annotated[Any, Refused("there are no workspaces")] = None

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises `BadRequest`."""
        system: str | list[ContentBlock] = self.system if isinstance(self.system, str) else [*(self.system or [])]
        messages = Message(role="system", content=system).chat("system") if system else []
        for number, message in enumerate(self.messages):
            messages += message.chat(f"messages[{number}]")
        if self.messages[-1].role == "assistant":
            raise BadRequest(
                "The beginning of an answer can't be given: the last message is the user's.",
                param=f"messages[{len(self.messages) - 1}]",
            )
        choice, form = self.tool_choice, None if self.output_config is None else self.output_config.format
        return ChatRequest(
            model=self.model,
            messages=messages,
            tools=None if self.tools is None else [Tool.of(t.name, t.description, t.input_schema) for t in self.tools],
            tool_choice=None if choice is None else choice.chat(),
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            response_format=None if form is None else form.chat(),
        )


class MessagesRequest(CountTokensRequest):
    """All fields of Anthropic's endpoint."""

    max_tokens: Annotated[OutputLimit, Field(ge=1)]
    stop_sequences: Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    """No influence: there is one tier."""

    container: Annotated[Any, Refused("there are no containers")] = None
    diagnostics: Annotated[Any, Refused("diagnostics are not supported")] = None
    inference_geo: Annotated[Any, Refused("where this server stands can't be chosen")] = None

    def chat(self) -> ChatRequest:
        fields = {
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "user": self.metadata and self.metadata.user_id,
        }
        return super().chat().model_copy(update=fields)


def read_messages(body: bytes, tokenizer: Tokenizer) -> tuple[str, Job]:
    """Parse, validate, render and tokenize a body: the model asked for, and the job. Raises `BadRequest`."""
    request = parse(body, MessagesRequest)
    return request.model, replace(chat_job(request.chat(), tokenizer), cuts_output=True)


def read_count_tokens(body: bytes, tokenizer: Tokenizer) -> tuple[str | None, dict[str, Any]]:
    """The model asked for, and the answer. Raises `BadRequest`."""
    request = parse(body, CountTokensRequest)
    (prompt,) = chat_job(request.chat(), tokenizer).prompts
    return request.model, {"input_tokens": len(prompt.token_ids)}
