"""Answers of /v1/responses: a response whose output are items, or the events that they grow by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headrace.gateway.answer import Answer
from headrace.gateway.blocks import Block, Blocks, Step
from headrace.gateway.errors import ApiError
from headrace.gateway.sse import KEEP_ALIVE, named_event

UNLESS_GIVEN: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
"""What a response says of its request."""


class ResponsesShape:
    """`response`, streamed or whole."""

    keep_alive = KEEP_ALIVE

    def __init__(self, answer: Answer, model: str) -> None:
        self._answer = answer
        self._model = model
        self._blocks = Blocks(answer)
        self._events = 0

    @property
    def told(self) -> bool:
        return self._blocks.told

    def whole(self) -> dict[str, Any]:
        self._blocks.read()
        return self._ended()

    def events(self) -> bytes:
        return b"".join(self._event(body) for body in self._news())

    def last(self) -> bytes:
        response = self._ended()
        return self._event({"type": f"response.{response['status']}", "response": response})

    def failed(self, error: ApiError) -> bytes:
        response = self._response("failed") | {"error": {"code": error.code, "message": error.message}}
        return self._event({"type": "response.failed", "response": response})

    def _event(self, body: dict[str, Any]) -> bytes:
        self._events += 1
        return named_event(body | {"sequence_number": self._events - 1})

    def _news(self) -> Iterator[dict[str, Any]]:
        if self._events == 0:
            for kind in ("created", "in_progress"):
                yield {"type": f"response.{kind}", "response": self._response("in_progress")}
        for step in self._blocks.news():
            for body in self._call_events(step) if step[1].is_call else self._text_events(step):
                yield body | {"output_index": step[1].index}

    def _text_events(self, step: Step) -> Iterator[dict[str, Any]]:
        action, block, text = step
        at = {"item_id": self._item_id(block), "content_index": 0}
        match action:
            case "begin":
                item = self._item(block, "in_progress") | {"content": []}
                yield {"type": "response.output_item.added", "item": item}
                yield {"type": "response.content_part.added", "part": _part(""), **at}
            case "grow":
                yield {"type": "response.output_text.delta", "delta": text, "logprobs": [], **at}
            case "end":
                yield {"type": "response.output_text.done", "text": block.text, "logprobs": [], **at}
                yield {"type": "response.content_part.done", "part": _part(block.text), **at}
                yield {"type": "response.output_item.done", "item": self._item(block, self._status(block))}

    def _call_events(self, step: Step) -> Iterator[dict[str, Any]]:
        action, block, text = step
        kind, at = "response.function_call_arguments", {"item_id": self._item_id(block)}
        match action:
            case "begin":
                yield {"type": "response.output_item.added", "item": self._item(block, "in_progress")}
            case "grow":
                yield {"type": f"{kind}.delta", "delta": text, **at}
            case "end":
                yield {"type": f"{kind}.done", "name": block.name, "arguments": block.text, **at}
                yield {"type": "response.output_item.done", "item": self._item(block, self._status(block))}

    def _status(self, block: Block) -> str:
        """Of a block that has ended: only the last one can have been cut."""
        cut = self._blocks.finish_reason == "length" and block is self._blocks.all[-1]
        return "incomplete" if cut else "completed"

    def _item_id(self, block: Block) -> str:
        return f"{'fc' if block.is_call else 'msg'}_{self._answer.number}{block.index:02x}"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.is_call:
            return item | {
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": block.text,
            }
        return item | {"type": "message", "role": "assistant", "content": [_part(block.text)]}

    def _ended(self) -> dict[str, Any]:
        """The response once its last token is there."""
        cut = self._blocks.finish_reason == "length"
        usage = self._answer.usage()
        return self._response("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(block, self._status(block)) for block in self._blocks.all],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }

    def _response(self, status: str) -> dict[str, Any]:
        job = self._answer.job
        return {
            "id": f"resp_{self._answer.number}",
            "object": "response",
            "created_at": self._answer.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": [],
            "usage": None,
            "service_tier": job.service_tier,
            **UNLESS_GIVEN,
            **(job.repeated or {}),
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
