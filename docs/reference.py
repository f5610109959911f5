"""Makes docs/reference.md from the code: `python docs/reference.py`. A test fails where the two differ."""

from __future__ import annotations

import argparse
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

from headrace.cli import EXIT_USAGE, build_parser
from headrace.gateway.errors import ApiError
from headrace.messages.stream import FailureCode
from headrace.settings import NOT_SETTINGS, SECRETS, Settings, commands_of, env_name, flag_name

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference: commands, flags and errors

<!-- made from the code by docs/reference.py: change that, or the code, not this -->

[Metrics](metrics.md) have a page of their own.
"""
FLAGS = """## Flags

Each flag has an environment variable: `--max-model-len` is `HEADRACE_MAX_MODEL_LEN`. The flag wins. A variable that
begins with `HEADRACE_` and does not exist stops the start, with the nearest name. {secrets}
name files that hold the value, so that it stands in no environment. {others} are read
elsewhere.
"""
FORMS = """## Structured output

Both endpoints take one of these; anything that can't be followed is a 400 that says what.

| field | form of the answer |
| --- | --- |
| `response_format` `{"type": "json_object"}` | a JSON object |
| `response_format` `{"type": "json_schema", "json_schema": {"name", "schema"}}` | JSON of this schema; `strict` makes no difference, a schema is always followed to the letter |
| `structured_outputs` `{"json": SCHEMA}` | the same; the schema may be a string |
| `structured_outputs` `{"json_object": true}` | a JSON object |
| `structured_outputs` `{"regex": PATTERN}` | the whole answer matches; Rust's syntax: no look-around, no back references |
| `structured_outputs` `{"choice": [TEXT, ...]}` | one of these texts |
| `structured_outputs` `{"grammar": TEXT}` | a text of this grammar, in Lark's notation or llama.cpp's (GBNF) |

- Of JSON Schema, llguidance follows [most](https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md), but not `not`, `if`, `contains`, `uniqueItems`, `propertyNames`,
  `dependentRequired`, `dependentSchemas`, `unevaluatedProperties`, and `oneOf` only of what excludes each other. `$ref` is followed within the schema;
  nothing is fetched. Properties come in the schema's order.
- Whitespace in JSON is at most 20 characters at a time, and none before or after it, so that a weak model does not write blanks for ever.
- The answer ends (`stop`) where the text is whole and the model ends it, or where nothing may follow. `max_tokens` and stop strings cut it as any other.
- The grammar comes before everything: `min_tokens` yields where it is at its end, penalties, biases and filters choose among what it allows. As vLLM's,
  log probabilities are those among the allowed tokens, so there may be fewer alternatives than were asked for.
"""
ERRORS = """## Errors of the HTTP API

The body is OpenAI's: `{{"error": {{"message", "type", "param", "code"}}}}`; in a stream that has begun it is an event.
"Again" says that the same request may succeed later; where a header is named it says when.

| status | code | type | again | when |
| --- | --- | --- | --- | --- |"""
WORKERS = """## Failures inside the mesh

A worker that gives a request up says why: {codes}.
What another attempt may mend, the gateway queues again with the tokens that it has, five times at most; the client sees
a pause. The rest ends as one of the errors above.

## Exit codes

| code | meaning |
| --- | --- |
| 0 | stopped as asked (SIGTERM, SIGINT), or the check found nothing |
| 1 | it failed while it ran; `status`: a tier is missing; `doctor`: something must be fixed |
| {usage} | it can't serve as it was started (flags, model, Redis, version): its last line says what to do |
| 130 | interrupted before it served |
"""


def page() -> str:
    """All of docs/reference.md."""
    secrets = " and ".join(f"`{env_name(f'{name}_file')}`" for name in SECRETS)
    others = ", ".join(f"`{name}`" for name in sorted(NOT_SETTINGS))
    codes = ", ".join(f"`{code}`" for code in typing.get_args(FailureCode))
    parts = [HEAD, "## Commands\n", *_commands(), "", FLAGS.format(secrets=secrets, others=others)]
    parts += ["| flag | default | of | meaning |", "| --- | --- | --- | --- |", *_flags(), "", FORMS]
    parts += [ERRORS.format(), *_errors(ApiError), "", WORKERS.format(codes=codes, usage=EXIT_USAGE)]
    return "\n".join(parts)


def _commands() -> Iterator[str]:
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    yield from ("| command | what it does |", "| --- | --- |")
    for action in commands._choices_actions:
        yield f"| `headrace {action.dest}` | {_cell(action.help or '')} |"


def _flags() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or field.default is False else f"`{field.default}`"
        commands = ", ".join(commands_of(name))
        yield f"| `{flag_name(name)}` | {default} | {commands} | {_cell(field.description or '')} |"


def _errors(kind: type[ApiError]) -> Iterator[str]:
    again = "no"
    if kind.retryable:
        has_header = kind.headers is not ApiError.headers or kind.retry_after_seconds is not None
        again = "yes, `Retry-After`" if has_header else "yes"
    meaning = _cell(inspect.getdoc(kind) or "") if kind is not ApiError else "A fault of the server's own."
    yield f"| {kind.status} | `{kind.default_code}` | `{kind.type}` | {again} | {meaning} |"
    for child in sorted(kind.__subclasses__(), key=lambda child: child.status):
        yield from _errors(child)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
