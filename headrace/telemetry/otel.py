"""Whether OpenTelemetry is asked for, and its exporters. Nothing of the SDK is imported where it is not.

Configured by the standard variables: `OTEL_EXPORTER_OTLP_ENDPOINT` (or that of one signal) turns it on,
`OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` say which requests are traced, `OTEL_SERVICE_NAME`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_*` and `OTEL_METRIC_EXPORT_INTERVAL` what they say.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from headrace import __version__
from headrace.errors import StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

CLOSE_SECONDS = 3.0
"""That a stopping process waits for a collector to take what is left."""


class TelemetryError(StartError):
    """OpenTelemetry is asked for and can't be had; the message says what to do."""


def is_on(signal: Literal["traces", "metrics"], environ: Mapping[str, str] | None = None) -> bool:
    """Whether this signal is to be exported. Raises `TelemetryError` where it should be and can't."""
    environ = os.environ if environ is None else environ
    endpoint = f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"
    if not (environ.get(endpoint) or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        return False
    if (
        environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or environ.get(f"OTEL_{signal.upper()}_EXPORTER") == "none"
    ):
        return False
    protocol = environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL") or environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if protocol not in (None, "", "http/protobuf"):
        raise TelemetryError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r} and this program speaks http/protobuf: set it to that, and "
            "the endpoint to the collector's HTTP port (4318)"
        )
    try:
        import opentelemetry.exporter.otlp.proto.http  # noqa: F401
    except ModuleNotFoundError as error:
        raise TelemetryError(
            f"an OTLP endpoint is set but {error.name} is not installed: `pip install 'headrace[telemetry]'`, or unset "
            "OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from error
    return True


def resource(tier: str, instance: str, namespace: str, environ: Mapping[str, str] | None = None) -> Resource:
    """Who this process is: `service.name` is `headrace-<tier>` where the environment names none."""
    from opentelemetry.sdk.resources import Resource

    environ = os.environ if environ is None else environ
    attributes = {"service.namespace": namespace, "service.instance.id": instance, "service.version": __version__}
    if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = f"headrace-{tier}"
    return Resource.create(attributes)


def tracer_provider(tier: str, instance: str, namespace: str) -> TracerProvider:
    """One that exports in the background, with the sampler that the environment names (all, by default)."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource(tier, instance, namespace), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


async def close(shutdown: Callable[[], object]) -> None:
    """Call an exporter's `shutdown`, which sends what is left and may wait long for a collector that is away."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            shutdown()
        finally:
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:  # the loop did not wait so long
                pass

    threading.Thread(target=run, name="telemetry-close", daemon=True).start()
    try:
        await asyncio.wait_for(done.wait(), CLOSE_SECONDS)
    except TimeoutError:
        pass
