"""What surrounds every handler: request ids, the API key, and OpenAI's or Anthropic's shape for every failure."""

from __future__ import annotations

import logging
import re
import secrets
from contextvars import ContextVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from headrace.gateway.callers import ApiKeys, Caller
from headrace.gateway.errors import (
    ApiError,
    BadRequest,
    BodyTooLarge,
    MethodNotAllowed,
    NotFound,
    Unauthorized,
    anthropic_error_body,
    error_body,
)
from headrace.gateway.sse import encode_json
from headrace.gateway.terms import caller

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/"})
"""What a load balancer asks without a key, and the page, which asks for one."""
PAGE_FILES = "/page/"
ANTHROPIC = "/v1/messages"
"""From here on errors have Anthropic's shape."""
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The X-Request-Id of the request that the current task serves."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def guard(keys: ApiKeys) -> Middleware:
    """The one middleware of the gateway."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request_id.set(given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12))
        try:
            if not is_open(request.path):
                caller.set(_caller(request, keys))
            return await handler(request)
        except ConnectionResetError:  # the client has gone: there is nobody to tell
            raise
        except Exception as error:  # whatever it is, the client gets its API's shape
            failure = _as_api_error(request, error)
            body = anthropic_error_body(failure) if request.path.startswith(ANTHROPIC) else error_body(failure)
            return web.Response(
                status=failure.status, headers=failure.headers, body=encode_json(body), content_type="application/json"
            )

    return guarded


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every response names its request."""
    if (current := request_id.get()) is not None:
        response.headers["X-Request-Id"] = current


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(PAGE_FILES)


def _caller(request: web.Request, keys: ApiKeys) -> Caller:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = request.headers.get("X-Api-Key", "")  # as Anthropic's clients send it
    found = keys.find(key.strip())
    if found is None:
        raise Unauthorized("Incorrect API key provided: send 'Authorization: Bearer KEY'.")
    return found


def _as_api_error(request: web.Request, error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case web.HTTPMethodNotAllowed():
            allowed = sorted(error.allowed_methods)
            return MethodNotAllowed(f"{request.path} takes {', '.join(allowed)}, not {request.method}.", allowed)
        case web.HTTPNotFound():
            known = sorted({resource.canonical for resource in request.app.router.resources()})
            return NotFound(
                f"Unknown request URL: {request.method} {request.path}. This server has {', '.join(known)}.",
                code="unknown_url",
            )
        case web.HTTPRequestEntityTooLarge():
            return BodyTooLarge("The body is over this server's limit (--max-body-bytes).")
        case web.HTTPException():
            return BadRequest(error.text or error.reason)
    log.error("request %s failed inside the gateway", request_id.get(), exc_info=error)
    return ApiError(f"The server had an error of its own; its log has more under {request_id.get()}.")
