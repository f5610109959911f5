"""The URLs that `--redis` takes.

    redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]             one server; rediss:// with TLS
    unix:///PATH                                          one server on a socket
    redis+sentinel://[...@]HOST[:PORT],HOST.../SERVICE[/DB]  the primary that these sentinels name
    redis+cluster://[...@]HOST[:PORT],HOST...              a Redis Cluster, found through these nodes

`rediss+sentinel` and `rediss+cluster` use TLS. A query sets redis-py's options, such as `?ssl_ca_certs=ca.pem`;
`sentinel_username` and `sentinel_password` are for the sentinels themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis.asyncio.connection import parse_url

from headrace.settings import SettingsError

Form = Literal["server", "sentinel", "cluster"]
DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}
SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


@dataclass(frozen=True, repr=False)
class RedisUrl:
    """One parsed URL. `hosts` are sentinels or nodes of a cluster; a plain server's URL is redis-py's to read."""

    form: Form
    is_encrypted: bool
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """redis-py's, for connections to the servers that hold data."""
    sentinel_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Raises `SettingsError`, which shows the forms that there are."""
        scheme = urlsplit(url).scheme
        if scheme not in SCHEMES:
            raise _error(
                url, f"it must begin with {', '.join(f'{known}://' for known in SCHEMES[:-1])} or {SCHEMES[-1]}://"
            )
        base, _, form = scheme.partition("+")
        try:
            if form:
                return _of_several(url, base, cast(Form, form))
            options = parse_url(url)
        except ValueError as error:
            raise _error(url, str(error)) from None
        if scheme != "unix" and not options.get("host"):
            raise _error(url, "it names no host")
        return cls("server", base == "rediss")


def _of_several(url: str, base: str, form: Form) -> RedisUrl:
    parts = urlsplit(url)
    credentials, at, names = parts.netloc.rpartition("@")
    hosts = tuple(_host(name, DEFAULT_PORTS[form]) for name in names.split(","))
    service, _, database = parts.path.strip("/").partition("/")
    if form == "sentinel" and not service:
        raise _error(
            url, "after the sentinels it names the service that they watch, as in redis+sentinel://h1,h2/mymaster"
        )
    if form == "cluster" and service not in ("", "0"):
        raise _error(url, "a Redis Cluster has database 0 alone")
    query = dict(parse_qsl(parts.query))
    own = {name: query.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in query}
    options = dict(
        parse_url(urlunsplit((base, f"{credentials}{at}localhost", f"/{database or 0}", urlencode(query), "")))
    )
    for name in ("host", "port", "connection_class", *(["db"] if form == "cluster" else [])):
        options.pop(name, None)
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    return RedisUrl(form, base == "rediss", hosts, service if form == "sentinel" else "", options, own | tls)


def _host(name: str, default_port: int) -> tuple[str, int]:
    """`host`, `host:port` or `[v6]:port`. Raises `ValueError`."""
    host, port = urlsplit(f"//{name}").hostname, urlsplit(f"//{name}").port
    if not host:
        raise ValueError(f"{name!r} is no host")
    return host, port or default_port


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    user = credentials.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:***@{hosts}" if at else hosts, query=""))


def _error(url: str, why: str) -> SettingsError:
    return SettingsError(f"--redis {without_password(url)}: {why}")
