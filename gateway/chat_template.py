"""A model's chat template: messages to prompt text, in Jinja's sandbox, set up as `transformers` sets it up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from headrace.gateway.errors import BadRequest

OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables that the gateway sets and a client can't."""
ROLES = {"developer": "system"}
"""OpenAI's newer name for the system role, which no published template knows."""


class TemplateRefused(ValueError):
    """The model's chat template is not valid Jinja."""


class ChatTemplate:
    """One compiled template; rendering is safe in any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise TemplateRefused(f"the model's chat template can't be read: {error}") from error
        self._special_tokens = dict(special_tokens)
        self.takes_tools = "tools" in variables
        self.options = variables - OURS - set(environment.globals) - set(special_tokens)
        """Variables that a client may set with `chat_template_kwargs`."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt that asks for the next assistant message.

        Raises `BadRequest` where the template refuses the messages, has no such option, or ignores a message's `name`,
        tools or calls of tools.
        """
        if not self.takes_tools and (tools or any("tool_calls" in m or m["role"] == "tool" for m in messages)):
            raise BadRequest("This model's chat template has no place for tools.", param="tools")
        for name in options:
            if name not in self.options:
                known = ", ".join(sorted(self.options)) or "none"
                raise BadRequest(
                    f"This model's chat template has no option {name!r}. Its options: {known}.",
                    param="chat_template_kwargs",
                )
        prompt = self._render(messages, options, tools)
        nameless = [{key: value for key, value in message.items() if key != "name"} for message in messages]
        if nameless != list(messages) and self._render(nameless, options, tools) == prompt:
            raise BadRequest("This model's chat template has no place for a message's `name`.", param="messages")
        return prompt

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        named = [{**message, "role": ROLES.get(message["role"], message["role"])} for message in messages]
        variables = {**self._special_tokens, **options, "messages": named, "add_generation_prompt": True}
        try:
            return self._template.render(**variables, tools=tools, documents=None)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise BadRequest(
                f"This model's chat template refuses the messages: {error or type(error).__name__}", param="messages"
            ) from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training; here it is only passed through."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
