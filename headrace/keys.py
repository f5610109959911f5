"""The key that all processes of a mesh share, for CURVE on their ZeroMQ sockets (RFC 26, CurveZMQ)."""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from headrace.settings import SettingsError


@dataclass(frozen=True, repr=False)
class MeshKey:
    """A CURVE25519 key pair in Z85 text. Whoever has the file is a member; nobody else can send or read a byte."""

    public: bytes
    secret: bytes

    @classmethod
    def make(cls) -> MeshKey:
        """A new random pair."""
        return cls(*zmq.curve_keypair())

    @classmethod
    def read(cls, path: Path) -> MeshKey:
        """Read a file that `write` made. Raises `SettingsError` where there is none or it holds something else."""
        try:
            public, secret = path.read_bytes().split()
            if zmq.curve_public(secret) != public:
                raise ValueError("the two halves don't belong together")
        except (OSError, ValueError, zmq.ZMQError) as error:
            raise SettingsError(
                f"--mesh-key {path} is not a mesh key ({error}): make one with `headrace keys`"
            ) from error
        return cls(public, secret)

    def write(self, path: Path) -> None:
        """Write the pair so that only its owner can read it. Raises `FileExistsError` rather than replace a key."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.public + b"\n" + self.secret + b"\n")

    def callback(self, domain: str, key: bytes) -> bool:
        """ZAP's question whether a client's public key may connect (the name is pyzmq's)."""
        return hmac.compare_digest(z85.encode(key) if len(key) == 32 else key, self.public)


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
