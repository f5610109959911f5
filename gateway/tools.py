"""Tools that a model may call: what a client says of them, how an answer is bound to them, and how its calls are read.

Calls are written as Hermes and Qwen write them, which the model's chat template must teach it:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from headrace.gateway.errors import BadRequest
from headrace.gateway.strict import Strict
from headrace.grammar import WHITESPACE, GrammarError, Grammars

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\S)')
TAIL = re.compile(r"[\s}]*(?:<[/a-z_]*)?\Z")
"""What may belong to the end of a call, and not to its arguments."""
MAX_HEAD = 512
"""Characters after `OPEN` within which a call's arguments begin."""

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]


class Function(Strict):
    """What a tool does."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None
    """No influence: where a call must come its arguments follow the schema to the letter."""


class Tool(Strict):
    """One tool."""

    type: Literal["function"]
    function: Function

    @classmethod
    def of(cls, name: str, description: str | None, parameters: dict[str, Any] | None) -> Tool:
        """For another API's tool."""
        return cls(type="function", function=Function(name=name, description=description, parameters=parameters))


class FunctionName(Strict):
    """Names a tool."""

    name: Name


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName

    @classmethod
    def of(cls, name: str) -> NamedTool:
        """For another API's choice."""
        return cls(type="function", function=FunctionName(name=name))


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class MadeFunction(Strict):
    """What was called, and with what."""

    name: Name
    arguments: str


class MadeCall(Strict):
    """A call in a message of the assistant's, as it was sent to the client."""

    id: str
    type: Literal["function"]
    function: MadeFunction

    @classmethod
    def of(cls, id: str, name: str, arguments: str) -> MadeCall:
        """For another API's call."""
        return cls(id=id, type="function", function=MadeFunction(name=name, arguments=arguments))

    def for_template(self) -> dict[str, Any]:
        """With arguments as an object, which templates write as JSON again."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """What an answer may call."""

    tools: Sequence[Tool]
    is_required: bool
    """Or as the model likes."""
    most_calls: int | None
    """None: any number."""

    def checked_grammar(self, grammars: Grammars) -> str | None:
        """Of an answer that is calls and nothing else, in Lark's notation; None where it may be anything.

        Raises `BadRequest` where the tools' parameters can't be followed.
        """
        if not self.is_required:
            return None
        more = "" if self.most_calls == 1 else ' ("\\n" call)*'
        names = [f"call_{number}" for number in range(len(self.tools))]
        rules = [f"{name}: %json {json.dumps(_schema(tool))}" for name, tool in zip(names, self.tools, strict=True)]
        call = f'call: "{OPEN}\\n" ({" | ".join(names)}) "\\n{CLOSE}"'
        grammar = "\n".join([f"start: call{more}", call, *rules])
        try:
            grammars.compile(grammar)
        except GrammarError as error:
            raise BadRequest(f"Invalid value for 'tools': {error}.", param="tools") from error
        return grammar


def _schema(tool: Tool) -> dict[str, Any]:
    arguments = {"type": "object"} if tool.function.parameters is None else tool.function.parameters
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_pattern": WHITESPACE},
    }


def read_tool_use(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """None where nothing may be called. Raises `BadRequest` for a choice that the tools don't have."""
    if not tools or choice == "none":
        if choice not in (None, "none"):
            raise BadRequest("'tool_choice' needs 'tools'.", param="tool_choice")
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise BadRequest("Two tools have the same name.", param="tools")
    most = 1 if parallel is False else None
    if not isinstance(choice, NamedTool):
        return ToolUse(tools, choice == "required", most)
    named = [tool for tool in tools if tool.function.name == choice.function.name]
    if not named:
        raise BadRequest(
            f"'tool_choice' names '{choice.function.name}', which is none of the tools: {', '.join(names)}.",
            param="tool_choice",
        )
    return ToolUse(named, True, 1)


@dataclass
class Read:
    """What became known of an answer: text outside of calls, and OpenAI's deltas of calls, in the order of the text."""

    pieces: list[str | dict[str, Any]] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The text."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The deltas of calls."""
        return [piece for piece in self.pieces if not isinstance(piece, str)]


class CallReader:
    """Takes an answer's text as it grows, cut anywhere; arguments are told as they come.

    What looks like a call and is none stays text.

    | state  | on                          | tells                   | next   |
    | ------ | --------------------------- | ----------------------- | ------ |
    | text   | `OPEN`                      | text before it          | opened |
    | opened | a head with the name        | the call                | called |
    | opened | `CLOSE`, or too much else   | all of it, as text      | text   |
    | called | more text                   | arguments               | called |
    | called | `CLOSE`                     | the arguments' end      | text, or over after the last call allowed |
    """

    def __init__(self, most_calls: int | None) -> None:
        self._most = most_calls
        self._state: Literal["text", "opened", "called", "over"] = "text"
        self._held = ""
        """What was not told yet."""
        self.num_calls = 0

    def push(self, text: str, ended: bool) -> Read:
        """What is new; `ended`: nothing comes after this."""
        self._held += text
        read = Read()
        while self._advance(read):
            pass
        if ended:
            self._end(read)
        return read

    def _advance(self, read: Read) -> bool:
        """One step; False where more text is needed."""
        match self._state:
            case "text":
                return self._read_text(read)
            case "opened":
                return self._read_head(read)
            case "called":
                return self._read_arguments(read)
            case "over":
                self._held = ""
                return False

    def _read_text(self, read: Read) -> bool:
        before, mark, after = self._held.partition(OPEN)
        if mark:
            self._say(read, before.rstrip())
            self._state, self._held = "opened", after
            return True
        partial = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        told = len(self._held[: len(self._held) - partial].rstrip())
        self._say(read, self._held[:told])
        self._held = self._held[told:]
        return False

    def _read_head(self, read: Read) -> bool:
        if (head := HEAD.match(self._held)) is not None:
            function = {"name": head[1], "arguments": ""}
            call_id = f"call_{secrets.token_hex(12)}"
            read.pieces.append({"index": self.num_calls, "id": call_id, "type": "function", "function": function})
            self.num_calls += 1
            self._state, self._held = "called", self._held[head.end() :]
            return True
        if CLOSE not in self._held and len(self._held) <= MAX_HEAD:
            return False
        self._state = "text"
        before, mark, after = self._held.partition(CLOSE)
        self._say(read, OPEN + before + mark)
        self._held = after
        return True

    def _read_arguments(self, read: Read) -> bool:
        before, mark, after = self._held.partition(CLOSE)
        if mark:
            self._tell(read, before.rstrip().removesuffix("}").rstrip())
            self._state, self._held = "over" if self.num_calls == self._most else "text", after
            return True
        told = TAIL.sub("", self._held)
        self._tell(read, told)
        self._held = self._held[len(told) :]
        return False

    def _end(self, read: Read) -> None:
        if self._state == "opened":
            self._say(read, OPEN + self._held)
        elif self._state == "called":
            self._tell(read, self._held.rstrip().removesuffix("}").rstrip())
        elif self._held.strip() or not self.num_calls:
            self._say(read, self._held)
        self._held = ""

    def _say(self, read: Read, text: str) -> None:
        """Blanks around calls are no content."""
        if text and (not self.num_calls or text.strip()):
            read.pieces.append(text)

    def _tell(self, read: Read, arguments: str) -> None:
        if arguments:
            read.pieces.append({"index": self.num_calls - 1, "function": {"arguments": arguments}})


def read_part(reader: CallReader | None, text: str, finish_reason: str | None) -> tuple[Read, str | None]:
    """What an answer's new text is, all of it text without a reader; and why it ended, if it has."""
    if reader is None:
        return Read([text] if text else []), finish_reason
    read = reader.push(text, ended=finish_reason is not None)
    return read, "tool_calls" if finish_reason == "stop" and reader.num_calls else finish_reason


def joined(deltas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole calls, of all their deltas."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if "id" in delta:
            calls.append({key: value for key, value in delta.items() if key != "index"})
        else:
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    return calls
