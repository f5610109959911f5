"""Orders to a running `headrace up`: a unix socket in the user's runtime folder, named by the mesh's HTTP port.

One line of JSON asks (`Order`), lines of JSON answer (`Reply`) until the last says how it ended. Whoever can open the
socket may give orders: only the user who started the mesh, by the folder's mode. An order is carried out even if who
gave it leaves.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from headrace.errors import StartError
from headrace.tasks import end_task

MAX_LINE_BYTES = 64 * 1024
MAX_ORDERS = 16
"""Under way or waiting for their turn."""
READ_SECONDS = 5.0
"""For an order to arrive once its sender has connected."""


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do; each command checks its own arguments."""

    command: Annotated[str, msgspec.Meta(max_length=64)]
    arguments: Annotated[dict[str, str], msgspec.Meta(max_length=64)] = {}


class Reply(msgspec.Struct, frozen=True):
    """`line`: how far it is, for a person; `done` and `error` (with what to do about it) are the last."""

    kind: Literal["line", "done", "error"]
    text: str = ""


Say = Callable[[str], None]
Handler = Callable[[Mapping[str, str], Say], Awaitable[None]]
"""Carries one command out, given its arguments and where to report to; raises `StartError` where it can't."""


def socket_path(port: int) -> Path:
    """Where the mesh on this HTTP port takes orders. Raises `StartError` where the folder is not the user's own."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime, "headrace") if runtime else Path(tempfile.gettempdir(), f"headrace-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise StartError(f"can't use {folder}: {error.strerror}. Set XDG_RUNTIME_DIR to a folder of yours") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StartError(f"{folder} must belong to you alone: `chmod 700` it, or set XDG_RUNTIME_DIR to another folder")
    return folder / f"{port}.sock"


@asynccontextmanager
async def taking_orders(port: int, handlers: Mapping[str, Handler]) -> AsyncIterator[None]:
    """Carry out orders inside the block, one at a time. Raises `StartError` where another mesh has this port."""
    path = socket_path(port)
    if await _is_served(path):
        raise StartError(f"a mesh of yours runs on port {port} already: stop it, or choose another --port")
    path.unlink(missing_ok=True)  # a mesh that was killed has left it
    turn = asyncio.Lock()
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(tasks) >= MAX_ORDERS:
            writer.close()
            return
        task = asyncio.create_task(_serve(reader, writer, handlers, turn))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_unix_server(connected, path, limit=MAX_LINE_BYTES)
    try:
        yield
    finally:
        server.close()
        for task in list(tasks):
            await end_task(task)
        await server.wait_closed()
        path.unlink(missing_ok=True)


async def _is_served(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True


async def _serve(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: Mapping[str, Handler], turn: asyncio.Lock
) -> None:
    def reply(kind: Literal["line", "done", "error"], text: str = "") -> None:
        if not writer.is_closing():
            writer.write(msgspec.json.encode(Reply(kind, text)) + b"\n")

    try:
        async with asyncio.timeout(READ_SECONDS):
            order = msgspec.json.decode(await reader.readline(), type=Order)
        handler = handlers.get(order.command)
        if handler is None:
            reply("error", f"this mesh knows no order {order.command!r}, only {', '.join(sorted(handlers))}")
            return
        async with turn:
            await handler(order.arguments, lambda line: reply("line", line))
        reply("done")
    except StartError as error:
        reply("error", str(error))
    except (TimeoutError, ValueError, OSError):  # it said nothing, or nothing that can be read
        pass
    finally:
        writer.close()


async def give_order(port: int, command: str, arguments: Mapping[str, str], say: Say) -> None:
    """Have the mesh on this HTTP port carry a command out. Raises `StartError` where it does not."""
    path = socket_path(port)
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE_BYTES)
    except OSError as error:
        others = sorted(other.stem for other in path.parent.glob("*.sock") if other != path)
        known = f"; there are some on {', '.join(others)}" if others else ""
        raise StartError(f"no `headrace up` of yours runs on --port {port}{known}") from error
    try:
        writer.write(msgspec.json.encode(Order(command, dict(arguments))) + b"\n")
        while line := await reader.readline():
            reply = msgspec.json.decode(line, type=Reply)
            if reply.kind == "line":
                say(reply.text)
            elif reply.kind == "error":
                raise StartError(reply.text)
            else:
                return
        raise StartError("the mesh stopped before this was done")
    finally:
        writer.close()
