"""The HTTP port of a worker: `/metrics`, `/health` (the process answers) and `/ready` (it takes requests)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector

from headrace.registry import Registry, Tier
from headrace.settings import Settings, SettingsError
from headrace.telemetry.exposition import MemberFigures, render
from headrace.telemetry.otlp_metrics import pushing_metrics
from headrace.telemetry.worker_metrics import WorkerHistograms


class Endpoint:
    """What a worker process shows. It is up before the model is loaded, so that probes tell a slow start from none."""

    def __init__(self) -> None:
        self.address = ""
        """`host:port` for the registry."""
        self.memberships: list[Registry] = []
        """One for each worker in this process, once it has joined."""
        self.metrics = CollectorRegistry()
        self.histograms = WorkerHistograms(self.metrics)
        ProcessCollector(registry=self.metrics)
        self.metrics.register(MemberFigures(lambda: [registry.me for registry in self.memberships]))

    def build(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application()
        app.add_routes(
            [web.get("/metrics", self._metrics), web.get("/health", self._health), web.get("/ready", self._ready)]
        )
        return app

    async def _metrics(self, request: web.Request) -> web.Response:
        body, content_type = render(self.metrics, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        if not self.memberships:
            return _json({"ready": False, "reason": "the model is being loaded"}, 503)
        if any(registry.me.draining for registry in self.memberships):
            return _json({"ready": False, "reason": "this worker is stopping"}, 503)
        return _json({"ready": True})


@asynccontextmanager
async def worker_endpoint(settings: Settings, tier: Tier) -> AsyncIterator[Endpoint]:
    """Serve inside the block, and push metrics where OTLP is asked for.

    Raises `SettingsError` where the port can't be had and `TelemetryError`.
    """
    endpoint = Endpoint()
    runner = web.AppRunner(endpoint.build(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    host, port = settings.metrics_host, settings.metrics_port
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise SettingsError(f"can't listen on --metrics-host {host} --metrics-port {port}: {error}") from error
        reachable = settings.bind if host in ("0.0.0.0", "::") else host
        endpoint.address = f"[{reachable}]" if ":" in reachable else reachable
        endpoint.address += f":{runner.addresses[0][1]}"
        async with pushing_metrics(endpoint.metrics, tier, settings.namespace):
            yield endpoint
    finally:
        await runner.cleanup()


def _json(body: dict[str, object], status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(body), status=status, content_type="application/json")
