"""What carries a decision out: a running `headrace up`, docker compose, or Kubernetes."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import aiohttp

from headrace.control import give_order
from headrace.errors import StartError
from headrace.scaling.policy import TIERS, ScaledTier

COMMAND_SECONDS = 300.0
"""For docker compose to start or stop containers."""
REQUEST_SECONDS = 10.0
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Workers = Mapping[ScaledTier, int]


class Executor(Protocol):
    """Knows how many workers there should be, and can change it."""

    async def current(self) -> Workers:
        """How many workers each tier was last told to have. Raises `StartError` where that can't be found out."""

    async def scale(self, workers: Workers) -> None:
        """Have each tier change to so many. Raises `StartError` where that fails; it may be asked again."""


class LocalProcesses:
    """The `headrace up` on an HTTP port of this machine."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def current(self) -> Workers:
        """See `Executor`."""
        described = await self.describe()
        workers = {tier: int(described[tier]) for tier in TIERS}
        if not all(workers.values()):
            raise StartError("this mesh is one worker that is both tiers (--colocate): there is nothing to scale")
        return workers

    async def describe(self) -> dict[str, str]:
        """What the mesh says of itself: workers by tier, `redis` and `namespace`. Raises `StartError`."""
        lines: list[str] = []
        await give_order(self._port, "describe", {}, lines.append)
        return dict(line.split("=", 1) for line in lines)

    async def scale(self, workers: Workers) -> None:
        """See `Executor`. Returns when those that came serve and those that went have drained."""
        await give_order(self._port, "scale", {tier: str(count) for tier, count in workers.items()}, print)


class DockerCompose:
    """The services `prefill` and `decode` of a compose project."""

    def __init__(self, file: Path, docker: Sequence[str] = ("docker",)) -> None:
        self._command = [*docker, "compose", "--file", str(file)]

    async def current(self) -> Workers:
        """See `Executor`."""
        return {tier: len((await self._run("ps", "--quiet", tier)).split()) for tier in TIERS}

    async def scale(self, workers: Workers) -> None:
        """See `Executor`."""
        scales = [word for tier, count in workers.items() for word in ("--scale", f"{tier}={count}")]
        await self._run("up", "--detach", "--no-recreate", "--no-deps", *scales, *workers)

    async def _run(self, *arguments: str) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
        except FileNotFoundError as error:
            raise StartError(f"{self._command[0]} is not installed here") from error
        try:
            out, errors = await asyncio.wait_for(process.communicate(), COMMAND_SECONDS)
        except BaseException as error:
            if process.returncode is None:
                process.kill()
                await process.wait()
            if isinstance(error, TimeoutError):
                raise StartError(f"docker compose {arguments[0]} took more than {COMMAND_SECONDS:.0f} s") from error
            raise
        if process.returncode != 0:
            raise StartError(f"docker compose {arguments[0]}: {errors.decode(errors='replace').strip()[-500:]}")
        return out.decode()


class Kubernetes:
    """The scale subresource of the Deployments `headrace-prefill` and `headrace-decode`.

    Speaks to the API server as the pod's service account does, which needs `get` and `patch` on `deployments/scale`.
    """

    def __init__(self, namespace: str | None = None, account: Path = SERVICE_ACCOUNT, api: str | None = None) -> None:
        """`namespace` and `api` (its URL) are the pod's own by default."""
        self._account = account
        try:
            self._namespace = namespace or (account / "namespace").read_text().strip()
            host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if api is None and host is None:
                raise StartError("KUBERNETES_SERVICE_HOST is not set: the Kubernetes executor runs inside a cluster")
            address = f"[{host}]" if host and ":" in host else host
            self._api = api or f"https://{address}:{port}"
            authority = account / "ca.crt"
            self._tls = ssl.create_default_context(cafile=str(authority) if authority.is_file() else None)
        except OSError as error:
            raise StartError(f"can't read the service account in {account}: {error}") from error

    async def current(self) -> Workers:
        """See `Executor`."""
        return {tier: await self._replicas("GET", tier) for tier in TIERS}

    async def scale(self, workers: Workers) -> None:
        """See `Executor`."""
        for tier, count in workers.items():
            await self._replicas("PATCH", tier, {"spec": {"replicas": count}})

    async def _replicas(self, method: str, tier: ScaledTier, patch: object = None) -> int:
        path = f"/apis/apps/v1/namespaces/{self._namespace}/deployments/headrace-{tier}/scale"
        try:
            token = (self._account / "token").read_text().strip()  # kubelet renews it
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
            if patch is not None:
                headers["Content-Type"] = "application/merge-patch+json"
            timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
            async with (
                aiohttp.ClientSession(self._api, timeout=timeout, headers=headers) as session,
                session.request(method, path, ssl=self._tls, json=patch) as response,
            ):
                if response.status != 200:
                    raise StartError(f"{method} {path}: {response.status} {(await response.text())[:300]}")
                return int((await response.json())["spec"].get("replicas", 0))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise StartError(f"the Kubernetes API at {self._api} can't be reached: {error!r}") from error
