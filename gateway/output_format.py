"""What a client says of the form of an answer: OpenAI's `response_format` and vLLM's `structured_outputs`.

Either becomes a grammar, which is compiled here first: what workers could not follow is a 400 at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from headrace.gateway.errors import BadRequest
from headrace.gateway.strict import Strict
from headrace.grammar import GrammarError, Grammars, of_choice, of_grammar, of_json_schema, of_regex
from headrace.messages.request import MAX_GRAMMAR_CHARACTERS

MAX_CHOICES = 1024
ANY_OBJECT = {"type": "object"}

Source = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]
Named = tuple[str, Callable[[], str]]
"""The field that asks for a grammar, and how to make it."""


class JsonSchema(Strict):
    """OpenAI's wrapping of a schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    document: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """No influence: a schema is always followed to the letter."""

    @classmethod
    def of(cls, document: dict[str, Any] | None) -> JsonSchema:
        """For a schema that came without the wrapping."""
        return cls.model_validate({"name": "output", "schema": document})


class ResponseFormat(Strict):
    """OpenAI's field."""

    SCHEMA: ClassVar = "response_format.json_schema.schema"
    """Where the schema stands in the body."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def named(self) -> Named | None:
        """None where any text will do."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            where = self.SCHEMA.removesuffix(".schema")
            raise BadRequest(
                f"'{where}' belongs to the type 'json_schema', which needs it, and to no other.", param=where
            )
        if self.json_schema is None:
            return None if self.type == "text" else ("response_format", lambda: of_json_schema(ANY_OBJECT))
        document = ANY_OBJECT if self.json_schema.document is None else self.json_schema.document
        return self.SCHEMA, lambda: of_json_schema(document)


class StructuredOutputs(Strict):
    """vLLM's field: one of these."""

    document: Annotated[dict[str, Any] | Source | None, Field(alias="json")] = None
    """A JSON schema, or its text."""
    json_object: bool | None = None
    regex: Source | None = None
    """In Rust's syntax; the whole answer matches."""
    choice: Annotated[list[Source], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Source | None = None
    """In Lark's notation, or llama.cpp's (GBNF)."""

    def named(self) -> Named:
        """What is asked for."""
        document, regex, choice, grammar = self.document, self.regex, self.choice, self.grammar
        asked: dict[str, Callable[[], str]] = {}
        if document is not None:
            asked["json"] = lambda: of_json_schema(json.loads(document) if isinstance(document, str) else document)
        if self.json_object:
            asked["json_object"] = lambda: of_json_schema(ANY_OBJECT)
        if regex is not None:
            asked["regex"] = lambda: of_regex(regex)
        if choice is not None:
            asked["choice"] = lambda: of_choice(choice)
        if grammar is not None:
            asked["grammar"] = lambda: of_grammar(grammar)
        if len(asked) != 1:
            raise BadRequest(
                f"'structured_outputs' takes exactly one of json, json_object, regex, choice and grammar, not "
                f"{len(asked)} of them.",
                param="structured_outputs",
            )
        ((name, make),) = asked.items()
        return f"structured_outputs.{name}", make


def read_grammar(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None, grammars: Grammars
) -> str | None:
    """The grammar of the answer, None where there is none. Raises `BadRequest` where it can't be followed."""
    formal = None if response_format is None else response_format.named()
    if structured_outputs is None:
        named = formal
    elif formal is None:
        named = structured_outputs.named()
    else:
        raise BadRequest("Give 'response_format' or 'structured_outputs', not both.", param="structured_outputs")
    if named is None:
        return None
    path, make = named
    try:
        grammar = make()
        grammars.compile(grammar)
    except (GrammarError, ValueError, RecursionError) as error:
        raise BadRequest(f"Invalid value for '{path}': {error or 'it is nested too deep'}.", param=path) from error
    return grammar
