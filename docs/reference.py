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

[Structured output](structured-output.md) and [metrics](metrics.md) have pages of their own.
"""
FLAGS = """## Flags

Each flag has an environment variable: `--max-model-len` is `HEADRACE_MAX_MODEL_LEN`. The flag wins. A variable that
begins with `HEADRACE_` and does not exist stops the start, with the nearest name. {secrets}
name files that hold the value, so that it stands in no environment. {others} are read
elsewhere.
"""
ERRORS = """## Errors of the HTTP API

The body is OpenAI's: `{{"error": {{"message", "type", "param", "code"}}}}`, or Anthropic's at `/v1/messages`
([api.md](api.md)); in a stream that has begun it is an event.
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
    parts += ["| flag | default | of | meaning |", "| --- | --- | --- | --- |", *_flags(), ""]
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
