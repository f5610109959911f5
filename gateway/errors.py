"""Every way in which a request can fail, as the client sees it.

    ApiError                    500  server_error
    ├── BadRequest              400  invalid_request_error
    │   └── ContextLengthExceeded    (code context_length_exceeded)
    ├── Unauthorized            401  invalid_request_error (code invalid_api_key)
    ├── NotFound                404  invalid_request_error
    │   └── ModelNotFound            (code model_not_found)
    ├── MethodNotAllowed        405  invalid_request_error
    ├── BodyTooSlow             408  invalid_request_error
    ├── BodyTooLarge            413  invalid_request_error
    ├── Conflict                409  invalid_request_error (retryable)
    ├── KeyReused               422  invalid_request_error
    ├── QueueFull               429  rate_limit_error      (retryable, Retry-After)
    ├── WorkerFailed            500  server_error          (retryable)
    ├── Unavailable             503  server_error          (retryable, Retry-After)
    └── DeadlineExceeded        504  timeout_error         (retryable)

"Retryable" says that the same request may succeed later.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from headrace.messages.stream import RequestFailed

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 3600.0


class ApiError(Exception):
    """A failure with an HTTP status and a body in OpenAI's shape."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    retry_after_seconds: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the response."""
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}


class BadRequest(ApiError):
    """The request can't be served as it stands; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class ContextLengthExceeded(BadRequest):
    """Prompt and output together are longer than the model's context."""

    default_code = "context_length_exceeded"


class Unauthorized(ApiError):
    """No API key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ApiError):
    """No such path."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFound(NotFound):
    """A model that this server does not serve."""

    default_code = "model_not_found"


class MethodNotAllowed(ApiError):
    """The path exists and does not take this method."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"

    def __init__(self, message: str, allowed: list[str]) -> None:
        super().__init__(message)
        self.allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": ", ".join(self.allowed)}


class BodyTooSlow(ApiError):
    """The body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    default_code = "body_too_slow"


class BodyTooLarge(ApiError):
    """The body is over `--max-body-bytes`."""

    status = 413
    type = "invalid_request_error"
    default_code = "body_too_large"


class Conflict(ApiError):
    """A stream with the same `Idempotency-Key` is running."""

    status = 409
    type = "invalid_request_error"
    default_code = "idempotency_conflict"
    retryable = True


class KeyReused(ApiError):
    """The `Idempotency-Key` came with another request before."""

    status = 422
    type = "invalid_request_error"
    default_code = "idempotency_key_reused"


class QueueFull(ApiError):
    """As much waits as may, or more than can be started in time."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"
    retryable = True

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        """`retry_after`: seconds until the same request would be admitted, if nobody else came."""
        super().__init__(message)
        self.retry_after = min(max(retry_after, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    @property
    def headers(self) -> dict[str, str]:
        """`retry-after-ms` is what OpenAI's clients look for first."""
        return {
            "Retry-After": str(math.ceil(self.retry_after)),
            "Retry-After-Ms": str(math.ceil(self.retry_after * 1000)),
        }


class WorkerFailed(ApiError):
    """Workers failed this request more often than it may be tried again, or in a way that trying again won't help."""

    default_code = "worker_error"
    retryable = True


class Unavailable(ApiError):
    """Nobody can take the request now: no workers, no Redis, or this server is stopping."""

    status = 503
    default_code = "unavailable"
    retryable = True
    retry_after_seconds = 2


class DeadlineExceeded(ApiError):
    """The answer was not complete within `X-Request-Timeout` or `--request-timeout`."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"
    retryable = True


def error_body(error: ApiError) -> dict[str, object]:
    """The JSON body (or SSE event) that tells a client of `error`."""
    return {
        "error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code},
    }


ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""By status, where it is not `invalid_request_error` or `api_error`."""


def anthropic_error_body(error: ApiError) -> dict[str, Any]:
    """The same in Anthropic's form, which has no place for the field's name but the message."""
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    named = error.param is None or error.param in error.message
    message = error.message if named else f"{error.param}: {error.message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def worker_error(failure: RequestFailed) -> ApiError:
    """What the client is told of a worker's failure that no retry mends."""
    match failure.code:
        case "invalid_request":
            return BadRequest(failure.message)
        case "deadline":
            return DeadlineExceeded(failure.message)
        case "overloaded" | "preempted" | "worker_stopping":
            return Unavailable(failure.message, code=failure.code)
        case "worker_error":
            return WorkerFailed(failure.message)
