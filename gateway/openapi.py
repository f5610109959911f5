"""GET /openapi.json: the routes that there are, and the bodies that they take, from the classes that read them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from pydantic.json_schema import models_json_schema

from headrace import __version__
from headrace.gateway.chat_request import ChatRequest
from headrace.gateway.completion_request import CompletionRequest
from headrace.gateway.errors import ApiError
from headrace.gateway.guard import ANTHROPIC, is_open
from headrace.gateway.messages_request import CountTokensRequest, MessagesRequest
from headrace.gateway.responses_request import ResponsesRequest
from headrace.gateway.strict import Strict
from headrace.gateway.tokenize_request import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[Strict]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
OBJECT = {"type": "object"}
TEXT = {"type": "string"}
ERRORS = {
    "Error": {"type": "object", "properties": {"error": {
        "type": "object", "properties": {"message": TEXT, "type": TEXT, "param": {}, "code": TEXT}
    }}},
    "AnthropicError": {"type": "object", "properties": {"type": TEXT, "error": {
        "type": "object", "properties": {"type": TEXT, "message": TEXT}
    }}},
}  # fmt: skip


def openapi(app: web.Application) -> dict[str, Any]:
    """The description of an application, in OpenAPI 3.1."""
    models = [(body, "validation") for body in BODIES.values()]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in app.router.routes():
        path = "" if route.resource is None else route.resource.canonical
        if route.method != "HEAD" and path != "/" and not path.startswith("/page/"):
            paths.setdefault(path, {})[route.method.lower()] = _operation(path, route.handler)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], **ERRORS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(path: str, handler: object) -> dict[str, Any]:
    body = BODIES.get(path)
    content: dict[str, Any] = {"application/json": {"schema": OBJECT}}
    operation: dict[str, Any] = {
        "summary": (inspect.getdoc(handler) or "").partition("\n")[0],
        "responses": {"200": {"description": "The answer.", "content": content}},
    }
    if names := re.findall(r"\{(\w+)\}", path):
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in names]
    if is_open(path):
        operation["security"] = []
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation["responses"] |= _errors("AnthropicError" if path.startswith(ANTHROPIC) else "Error")
        if "stream" in body.model_fields:
            content["text/event-stream"] = {"schema": TEXT}
    return operation


def _errors(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    meanings: dict[int, list[str]] = {}
    for kind in _kinds(ApiError):
        meanings.setdefault(kind.status, []).append(" ".join((inspect.getdoc(kind) or "").split()))
    return {str(status): {"description": " ".join(texts), "content": content} for status, texts in meanings.items()}


def _kinds(kind: type[ApiError]) -> Iterator[type[ApiError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _kinds(child)
