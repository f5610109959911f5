"""Request traces: when prompts came, how long they and their answers were.

Two layouts are read. Mooncake's (arXiv:2407.00079): one JSON object a line, with `timestamp` in milliseconds,
`input_length`, `output_length` and `hash_ids`, one for each 512 tokens of the prompt. Azure's LLM inference traces
(arXiv:2311.18677): CSV with `TIMESTAMP` as date and time, `ContextTokens` and `GeneratedTokens`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from headrace.settings import SettingsError

HASHED_TOKENS = 512
"""Prompt tokens that one of Mooncake's `hash_ids` stands for."""
MAX_REQUESTS = 2_000_000

Length = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]


@dataclass(frozen=True)
class TraceRequest:
    """One request; `at` is seconds since the first one."""

    at: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Equal prefixes of two requests' ids are equal prompts of `HASHED_TOKENS` each."""


class _MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: Length
    output_length: Length
    hash_ids: list[int] = []


def read_trace(path: Path) -> list[TraceRequest]:
    """In order of time. Raises `SettingsError`, which names the line that can't be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            requests = _read_csv(file) if path.suffix.lower() == ".csv" else _read_json_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"can't read the trace {path}: {error}") from error
    except ValueError as error:
        raise SettingsError(
            f"{path}, {error}. A .csv needs the columns TIMESTAMP, ContextTokens and GeneratedTokens; any other file "
            "one JSON object a line with timestamp (ms), input_length, output_length and, if known, hash_ids"
        ) from error
    if not requests:
        raise SettingsError(f"the trace {path} has no requests")
    requests.sort(key=lambda request: request.at)
    first = requests[0].at
    return [TraceRequest(r.at - first, r.prompt_tokens, r.output_tokens, r.hash_ids) for r in requests]


def _read_json_lines(lines: Iterable[str]) -> list[TraceRequest]:
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    requests = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decode(text)
        except msgspec.MsgspecError as error:
            raise ValueError(f"line {number}: {error}") from error
        requests.append(
            TraceRequest(line.timestamp / 1000, line.input_length, line.output_length, tuple(line.hash_ids))
        )
        _check(number)
    return requests


def _read_csv(lines: Iterable[str]) -> list[TraceRequest]:
    requests = []
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            # 7 digits of a second in some of them, which `fromisoformat` of Python 3.11 cuts to microseconds
            at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: {error!r}") from error
        requests.append(TraceRequest(at, max(prompt, 1), max(output, 1)))
        _check(number)
    return requests


def _check(number: int) -> None:
    if number > MAX_REQUESTS:
        raise ValueError(f"line {number}: {MAX_REQUESTS} requests are the most that a simulation takes")
