"""Answers of /v1/messages, in Anthropic's form."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from headrace.gateway.answer import Answer
from headrace.gateway.blocks import Block, Blocks, Step
from headrace.gateway.errors import ApiError, anthropic_error_body
from headrace.gateway.sse import named_event

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesShape:
    """A `message`, or the events that it grows by."""

    keep_alive = named_event({"type": "ping"})

    def __init__(self, answer: Answer, model: str) -> None:
        self._answer = answer
        self._model = model
        self._blocks = Blocks(answer)
        self._begun = False

    @property
    def told(self) -> bool:
        return self._blocks.told

    def whole(self) -> dict[str, Any]:
        content = [_content(block) for block in self._blocks.read()]
        return self._message() | {"content": content, **self._stop()}

    def events(self) -> bytes:
        begin = b"" if self._begun else named_event({"type": "message_start", "message": self._message()})
        self._begun = True
        return begin + b"".join(named_event(_event(step)) for step in self._blocks.news())

    def last(self) -> bytes:
        delta = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        return named_event(delta) + named_event({"type": "message_stop"})

    def failed(self, error: ApiError) -> bytes:
        return named_event(anthropic_error_body(error))

    def _message(self) -> dict[str, Any]:
        return {
            "id": f"msg_{self._answer.number}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _stop(self) -> dict[str, Any]:
        reason, found = self._blocks.finish_reason or "stop", self._answer.choices[0].stop_string
        if reason == "stop" and found is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": found}
        return {"stop_reason": STOP_REASONS[reason], "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Prompt tokens that were found computed are no input tokens here."""
        usage = self._answer.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }


def _event(step: Step) -> dict[str, Any]:
    action, block, text = step
    match action:
        case "begin":
            empty = Block(block.index, name=block.name, call_id=block.call_id)
            return {"type": "content_block_start", "index": block.index, "content_block": _content(empty)}
        case "grow":
            delta = {"type": "text_delta", "text": text}
            if block.is_call:
                delta = {"type": "input_json_delta", "partial_json": text}
            return {"type": "content_block_delta", "index": block.index, "delta": delta}
        case "end":
            return {"type": "content_block_stop", "index": block.index}


def _content(block: Block) -> dict[str, Any]:
    if not block.is_call:
        return {"type": "text", "text": block.text}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _arguments(block.text)}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; as far as they came where the answer was cut, as Anthropic's clients read a stream."""
    try:
        arguments = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
