"""What a request's headers ask for: priority, a deadline, and not to be computed twice."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass

from aiohttp import web

from headrace.gateway.callers import ANYBODY, PRIORITIES, Caller
from headrace.gateway.errors import BadRequest

caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
"""Whose key the request carried that the current task serves."""
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True)
class Terms:
    """How a request is to be served."""

    timeout: float
    """Seconds until nobody waits for the answer any more."""
    caller: Caller = ANYBODY
    priority: int = 0
    """Among the caller's own requests; higher is sooner."""
    idempotency_key: str | None = None


def read_terms(request: web.Request, longest: float) -> Terms:
    """The terms of a request, whose time-out is cut to `longest`. Raises `BadRequest` that names the header."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and IDEMPOTENCY_KEY.fullmatch(key) is None:
        raise BadRequest("1 to 255 visible ASCII characters are an idempotency key.", param="Idempotency-Key")
    priority = _number(request, "X-Priority", 0)
    if priority not in PRIORITIES:
        span = f"{PRIORITIES.start} to {PRIORITIES.stop - 1}"
        raise BadRequest(f"A priority is a whole number from {span}; higher is sooner.", param="X-Priority")
    timeout = _number(request, "X-Request-Timeout", longest)
    if not timeout > 0:
        raise BadRequest("A time-out is a number of seconds above 0.", param="X-Request-Timeout")
    return Terms(min(timeout, longest), caller.get(), int(priority), key)


def _number(request: web.Request, header: str, default: float) -> float:
    try:
        return float(request.headers.get(header, default))
    except ValueError:
        return float("nan")
