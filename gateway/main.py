"""The gateway process: `headrace gateway`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from headrace.gateway.app import GatewayApp
from headrace.gateway.mesh_client import MeshClient
from headrace.gateway.metrics import GatewayMetrics
from headrace.gateway.tokenizer import Tokenizer
from headrace.models.locate import locate_model
from headrace.node import ModelIdentity, Node, join_mesh, until_stopped
from headrace.settings import Settings, SettingsError
from headrace.tasks import end_task
from headrace.telemetry.otlp_metrics import pushing_metrics

log = logging.getLogger(__name__)

BACKLOG = 4096
"""Connections that wait until they are accepted: what comes meanwhile is dropped by the kernel, or even reset. It may
have a lower limit of its own.
"""
SHUTDOWN_SECONDS = 5.0
"""How long connections may take to end once their answers have."""


async def run(settings: Settings) -> None:
    """Serve until told to stop. Workers may come and go at any time, before and after."""
    folder = await asyncio.to_thread(locate_model, settings.model)
    tokenizer = await asyncio.to_thread(Tokenizer.load, folder.path)
    tokenizer.grammars.load_soon()
    try:
        identity = ModelIdentity(folder.name, folder.fingerprint, tokenizer.context_length)
        name = settings.served_model_name or folder.name
        async with join_mesh(settings, "gateway", identity) as node, serving(settings, name, tokenizer, node) as url:
            log.info("the gateway serves %s on %s/v1", name, url)
            await until_stopped()
            log.info("the gateway stops")
    finally:
        tokenizer.close()


@asynccontextmanager
async def serving(settings: Settings, model: str, tokenizer: Tokenizer, node: Node) -> AsyncIterator[str]:
    """Serve HTTP inside the block; yields the URL. Ends the block where a part of the gateway fails.

    Raises `SettingsError` where the address can't be listened on.
    """
    metrics = GatewayMetrics(node)
    mesh = MeshClient(node, metrics)
    app = GatewayApp(settings, model, tokenizer, mesh, metrics)
    runner = web.AppRunner(app.build(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        url = await _listen(runner, settings)
        async with pushing_metrics(metrics.own, "gateway", settings.namespace), asyncio.TaskGroup() as group:
            receiving = group.create_task(mesh.receive())
            watching = group.create_task(app.live.run())
            warming = group.create_task(app.readiness.run())
            publishing = group.create_task(app.recent.publish(lambda: metrics.stats(mesh.running)))
            try:
                yield url
            finally:
                await end_task(warming)
                await end_task(publishing)
                app.stop()
                await app.live.stop()
                await end_task(watching)
                await runner.cleanup()
                await app.close()
                await mesh.close()
                await end_task(receiving)
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, settings: Settings) -> str:
    """Open the HTTP port; the URL, with the real port where any was asked for."""
    try:
        reuse_port = settings.reuse_port or None
        await web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG, reuse_port=reuse_port).start()
    except OSError as error:
        raise SettingsError(f"can't listen on --host {settings.host} --port {settings.port}: {error}") from error
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
