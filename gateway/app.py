"""The HTTP application: OpenAI's endpoints, Anthropic's, vLLM's, and the ones that operators ask."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiohttp import web

from headrace import __version__
from headrace.gateway.admission import Admission, Arrival
from headrace.gateway.answer import Answer, running
from headrace.gateway.callers import ApiKeys
from headrace.gateway.chat_request import read_chat
from headrace.gateway.chat_shape import ChatShape
from headrace.gateway.completion_request import read_completion
from headrace.gateway.completion_shape import CompletionShape
from headrace.gateway.dispatcher import Dispatcher
from headrace.gateway.errors import ApiError, BodyTooSlow, DeadlineExceeded, ModelNotFound, Unavailable
from headrace.gateway.guard import add_request_id, guard
from headrace.gateway.idempotency import Idempotency
from headrace.gateway.job import Job
from headrace.gateway.live import LiveFeed
from headrace.gateway.mesh_client import MeshClient
from headrace.gateway.messages_request import read_count_tokens, read_messages
from headrace.gateway.messages_shape import MessagesShape
from headrace.gateway.metrics import GatewayMetrics
from headrace.gateway.openapi import openapi
from headrace.gateway.page_files import page_file
from headrace.gateway.recent_requests import RecentRequests
from headrace.gateway.request_log import log_request
from headrace.gateway.respond import respond_streaming, whole_body
from headrace.gateway.responses_request import read_responses
from headrace.gateway.responses_shape import ResponsesShape
from headrace.gateway.shape import Shape
from headrace.gateway.sse import encode_json
from headrace.gateway.terms import Terms, read_terms
from headrace.gateway.tokenize_request import read_detokenize, read_tokenize
from headrace.gateway.tokenizer import Tokenizer
from headrace.gateway.tracing import current, tracing
from headrace.gateway.warmup import Readiness
from headrace.settings import Settings

BODY_SECONDS = 60.0
"""How long a client may take to send its body."""

T = TypeVar("T")
Reader = Callable[[bytes, Tokenizer], tuple[str, Job]]
Helper = Callable[[bytes, Tokenizer], tuple[str | None, dict[str, Any]]]
"""Makes the whole answer of an endpoint that needs no worker."""
WAITING = {"gateway": "requests_queued", "prefill": "requests_waiting", "decode": "requests_waiting"}
"""The gauge behind each tier's part of `/load`."""


class GatewayApp:
    """Handlers, and what they share."""

    def __init__(
        self, settings: Settings, model: str, tokenizer: Tokenizer, mesh: MeshClient, metrics: GatewayMetrics
    ) -> None:
        self._keys = ApiKeys.load(settings)
        self._dispatcher = Dispatcher(mesh)
        self._idempotency = Idempotency(mesh.node)
        self.admission = Admission(self._dispatcher, settings, self._keys.callers)
        self.readiness = Readiness(self.admission, self._dispatcher, tokenizer)
        self.recent = RecentRequests(mesh.node)
        self._settings = settings
        self._registry = mesh.node.registry
        self._model = model
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._tracer = mesh.node.telemetry.tracer
        self._started = int(time.time())
        self.live = LiveFeed(mesh.node, self.readiness, model)
        self._description = b""
        """What /openapi.json says, once it was asked for."""

    def build(self) -> web.Application:
        """The aiohttp application."""
        middlewares = [guard(self._keys)]
        if self._tracer is not None:
            middlewares.append(tracing(self._tracer))
        app = web.Application(client_max_size=self._settings.max_body_bytes, middlewares=middlewares)
        app.on_response_prepare.append(add_request_id)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
                web.post("/v1/responses", self.responses),
                web.post("/v1/messages", self.messages),
                web.post("/v1/messages/count_tokens", self.count_tokens),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{model:.+}", self.model),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.get("/ready", self.ready),
                web.get("/load", self.load),
                web.get("/metrics", self.metrics),
                web.get("/version", self.version),
                web.get("/openapi.json", self.openapi),
                web.get("/", page_file),
                web.get("/page/{name}", page_file),
                web.get("/live", self.live.watch, allow_head=False),
            ]
        )
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions: OpenAI's chats."""
        return await self._answer(request, read_chat, ChatShape)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions: OpenAI's texts that go on."""
        return await self._answer(request, read_completion, CompletionShape)

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/responses: OpenAI's Responses, none of which is stored."""
        return await self._answer(request, read_responses, ResponsesShape)

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/messages: Anthropic's messages."""
        return await self._answer(request, read_messages, MessagesShape)

    async def count_tokens(self, request: web.Request) -> web.Response:
        """POST /v1/messages/count_tokens: how long a message's prompt is."""
        return _json(await self._help(request, read_count_tokens))

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize: the tokens of a text or a chat, as vLLM tells them."""
        length = self.admission.context_length() or self._tokenizer.context_length
        return _json(await self._help(request, read_tokenize) | {"max_model_len": length})

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize: the text of tokens, as vLLM tells it."""
        return _json(await self._help(request, read_detokenize))

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models: the one that is served."""
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{model}: whether it is served."""
        self._check_model(request.match_info["model"])
        return _json(self._model_card())

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: this process alone."""
        return _json({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: whether an answer can be had, and of which model. Needs no key."""
        reason = self.readiness.reason
        if reason is not None:
            return _json({"ready": False, "reason": reason}, status=503)
        return _json({"ready": True, "model": self._model_card()["id"]})

    async def load(self, request: web.Request) -> web.Response:
        """GET /load: answers under way here, and what each tier has to do, as its members published it lately."""
        members = [self._registry.me, *self._registry.members.values()]
        tiers = {}
        for tier, waiting in WAITING.items():
            stats = [member.stats for member in members if member.tier == tier]
            tiers[tier] = {
                "members": len(stats),
                "requests_waiting": int(sum(each.get(waiting, 0) for each in stats)),
                "requests_running": int(sum(each.get("requests_running", 0) for each in stats)),
            }
        return _json({"server_load": self._dispatcher.under_way, "tiers": tiers})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: this process and all workers, or with `?scope=process` this process alone."""
        whole_mesh = request.query.get("scope") != "process"
        body, content_type = self._metrics.render(request.headers.get("Accept", ""), whole_mesh)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def version(self, request: web.Request) -> web.Response:
        """GET /version: Headrace's."""
        return _json({"version": __version__})

    async def openapi(self, request: web.Request) -> web.Response:
        """GET /openapi.json: this description."""
        if not self._description:
            self._description = await self._tokenizer.in_thread(lambda: encode_json(openapi(request.app)))
        return web.Response(body=self._description, content_type="application/json")

    def stop(self) -> None:
        """Take no new requests and end those that run."""
        self.admission.stopping = True
        self._dispatcher.fail_all(Unavailable("This server is stopping.", code="stopping"))

    async def close(self) -> None:
        """End what goes on without a client."""
        await self._idempotency.close()

    async def _answer(
        self, request: web.Request, read: Reader, shape_of: Callable[[Answer, str], Shape]
    ) -> web.StreamResponse:
        try:
            terms = read_terms(request, self._settings.request_timeout)
            job, body = await self._read(request, read, terms)
        except ApiError as error:
            self._metrics.requests.labels(request.path, error.code).inc()
            raise
        fingerprint = hashlib.sha256(request.path.encode() + body).digest()
        if job.stream:
            async with (
                self._idempotency.alone(terms, fingerprint),
                self._answering(request.path, job, terms) as answer,
            ):
                return await respond_streaming(request, answer, shape_of(answer, self._model))

        async def compute() -> bytes:
            async with self._answering(request.path, job, terms) as answer:
                return await whole_body(answer, shape_of(answer, self._model))

        whole = await self._idempotency.once(terms, fingerprint, compute)
        return web.Response(body=whole, content_type="application/json")

    async def _help(self, request: web.Request, read: Helper) -> dict[str, Any]:
        """Answer without a worker, and count it."""
        outcome = "cancelled"
        try:
            terms = read_terms(request, self._settings.request_timeout)
            try:
                async with asyncio.timeout(terms.timeout):
                    answer = await self._parse(await _body(request), read)
            except TimeoutError:
                raise DeadlineExceeded("The answer was not complete in time.") from None
            outcome = "ok"
            return answer
        except ApiError as error:
            outcome = error.code
            raise
        finally:
            self._metrics.requests.labels(request.path, outcome).inc()

    async def _parse(self, body: bytes, read: Callable[[bytes, Tokenizer], tuple[str | None, T]]) -> T:
        model, found = await self._tokenizer.in_thread(lambda: read(body, self._tokenizer))
        if model is not None:
            self._check_model(model)
        return found

    async def _read(self, request: web.Request, read: Reader, terms: Terms) -> tuple[Job, bytes]:
        body = await _body(request)
        if terms.idempotency_key is None:  # spares the tokenizer what would be refused whatever it is
            self.admission.check(Arrival(terms))
        return await self._parse(body, read), body

    @asynccontextmanager
    async def _answering(self, path: str, job: Job, terms: Terms) -> AsyncIterator[Answer]:
        """Admit a request and have its answer made inside the block; count it, and log it at its end."""
        tokens = job.n * sum(len(prompt.token_ids) for prompt in job.prompts)
        try:
            context_length = await self.admission.admit(Arrival(terms, job.choices, tokens))
            answer = Answer(job, terms, self._tokenizer.vocabulary, context_length)
        except ApiError as error:
            self._metrics.requests.labels(path, error.code).inc()
            raise
        if (trace := current.get()) is not None:
            trace.follow(answer, self._model)
        self._metrics.prompt_tokens.inc(sum(len(prompt.token_ids) for prompt in job.prompts))
        self.live.begin(answer)
        try:
            async with running(answer, self._dispatcher):
                yield answer
        except ApiError as error:
            answer.outcome = error.code
            raise
        finally:
            self._metrics.requests.labels(path, answer.outcome).inc()
            self._ended(answer)
            log_request(answer)
            self.live.end(answer)

    def _ended(self, answer: Answer) -> None:
        first, trace = answer.choices[0], current.get()
        self._metrics.observe_end(answer.job.kind, first.created, first.traceparent)
        self.recent.add(answer, "" if trace is None else trace.trace_id)
        if trace is not None:
            trace.answered(answer)

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise ModelNotFound(f"The model '{model}' does not exist; this server has '{self._model}'.", param="model")

    def _model_card(self) -> dict[str, object]:
        return {"id": self._model, "object": "model", "created": self._started, "owned_by": "headrace"}


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise BodyTooSlow(f"The body did not arrive within {BODY_SECONDS:.0f} seconds.") from None


def _json(body: dict[str, object], status: int = 200) -> web.Response:
    return web.Response(body=encode_json(body), status=status, content_type="application/json")
