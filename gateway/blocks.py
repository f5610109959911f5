"""One answer as a row of blocks, texts and calls of tools, that begin, grow and end one after the other.

What the newer APIs have in common: Anthropic's content blocks and the output items of OpenAI's Responses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from headrace.gateway.answer import Answer
from headrace.gateway.tools import CallReader, read_part


@dataclass
class Block:
    """A text, or a call where it has a `name`."""

    index: int
    text: str = ""
    """Of a call its arguments, in JSON."""
    name: str = ""
    """Of the tool."""
    call_id: str = ""

    @property
    def is_call(self) -> bool:
        """Whether this is the call of a tool."""
        return bool(self.name)


Step = tuple[Literal["begin", "grow", "end"], Block, str]
"""What happens to a block; the string is what it grows by."""


class Blocks:
    """Reads the first choice of an answer."""

    def __init__(self, answer: Answer) -> None:
        use = answer.job.tool_use
        self.all: list[Block] = []
        """Those that have begun."""
        self.finish_reason: str | None = None
        """OpenAI's, once the answer is complete."""
        self._choice = answer.choices[0]
        self._reader = None if use is None else CallReader(use.most_calls)
        self._open: Block | None = None

    @property
    def told(self) -> bool:
        """Whether all of the answer has been read."""
        return self.finish_reason is not None

    def read(self) -> list[Block]:
        """All that have begun, with what is new."""
        for _ in self.news():
            pass
        return self.all

    def news(self) -> Iterator[Step]:
        """What happened since the last call; to be read to its end."""
        choice = self._choice
        ended = choice.finish_reason if choice.state == "finished" else None
        read, self.finish_reason = read_part(self._reader, choice.take().text, ended)
        for piece in read.pieces:
            if isinstance(piece, str):
                yield from self._grow_text(piece)
            else:
                yield from self._grow_call(piece)
        if self.finish_reason is not None:
            yield from self._end()

    def _grow_text(self, text: str) -> Iterator[Step]:
        if self._open is None or self._open.is_call:
            yield from self._begin(Block(len(self.all)))
        yield self._grow(text)

    def _grow_call(self, delta: dict[str, Any]) -> Iterator[Step]:
        if "id" in delta:
            yield from self._begin(Block(len(self.all), name=delta["function"]["name"], call_id=delta["id"]))
        if arguments := delta["function"]["arguments"]:
            yield self._grow(arguments)

    def _begin(self, block: Block) -> Iterator[Step]:
        yield from self._end()
        self.all.append(block)
        self._open = block
        yield "begin", block, ""

    def _grow(self, text: str) -> Step:
        assert self._open is not None, "it has begun"
        self._open.text += text
        return "grow", self._open, text

    def _end(self) -> Iterator[Step]:
        if self._open is not None:
            yield "end", self._open, ""
            self._open = None
