"""Who asks: API keys, and what each is entitled to."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from headrace.settings import Settings, SettingsError

MAX_KEYS = 1024
"""The fair queue looks at each caller that waits whenever it releases a request."""
PRIORITIES = range(-10, 11)
NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Caller:
    """Whoever shares one API key. Callers of the same priority share the mesh by weight."""

    name: str
    weight: float = 1.0
    priority: int = 0
    """Nobody waits for a caller of lower priority."""


ANYBODY = Caller("anybody")
"""Where no keys are asked for; everybody is one caller then."""


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    key: Annotated[str, msgspec.Meta(min_length=8, max_length=512)]
    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    priority: Annotated[int, msgspec.Meta(ge=PRIORITIES.start, lt=PRIORITIES.stop)] = 0


class ApiKeys:
    """Finds the caller of a key in a time that says nothing about the keys: they are looked up by keyed hash."""

    def __init__(self, keys: Iterable[tuple[str, Caller]]) -> None:
        self._secret = secrets.token_bytes(32)
        self._callers = {self._digest(key): caller for key, caller in keys}
        self.callers = list(self._callers.values()) or [ANYBODY]

    @classmethod
    def load(cls, settings: Settings) -> ApiKeys:
        """The keys of `--api-key` and `--api-keys-file`. Raises `SettingsError`."""
        keys = [] if settings.api_key is None else [(settings.api_key, Caller("default"))]
        if settings.api_keys_file is not None:
            keys += _read(settings.api_keys_file)
        if len({key for key, _ in keys}) < len(keys) or len({caller.name for _, caller in keys}) < len(keys):
            raise SettingsError(
                "--api-keys-file: two callers have the same key or the same name ('default' is --api-key)"
            )
        if len(keys) > MAX_KEYS:
            raise SettingsError(f"--api-keys-file: {len(keys)} keys are more than the {MAX_KEYS} there may be")
        return cls(keys)

    def find(self, key: str) -> Caller | None:
        """Whose key this is; everybody is `ANYBODY` where there are no keys."""
        return self._callers.get(self._digest(key)) if self._callers else ANYBODY

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, key.encode(errors="surrogateescape"), hashlib.sha256)


def _read(path: Path) -> list[tuple[str, Caller]]:
    try:
        entries = msgspec.convert(tomllib.loads(path.read_text()), dict[str, _Entry])
    except OSError as error:
        raise SettingsError(f"--api-keys-file: can't read {path}: {error.strerror}") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise SettingsError(
            f'--api-keys-file: {path}: {error}. It has a table for each caller: [name], then key = "..." and, where '
            "wanted, weight = 2 and priority = 1"
        ) from error
    for name in entries:
        if NAME.fullmatch(name) is None:
            raise SettingsError(f"--api-keys-file: {name!r} is no name: letters, digits, '.', '_' and '-' are")
    return [(entry.key, Caller(name, entry.weight, entry.priority)) for name, entry in entries.items()]
