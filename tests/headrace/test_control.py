"""Orders to a running mesh, and a fleet whose workers are replaced: with processes that only wait."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest

from headrace.control import Say, give_order, socket_path, taking_orders
from headrace.errors import StartError
from headrace.fleet import Fleet, orders
from headrace.scaling.executors import LocalProcesses
from headrace.settings import Settings
from headrace.supervisor import Supervisor
from headrace.tasks import end_task

PORT = 9
SERVES = """
import os, sys
if len(sys.argv) > 3 and os.path.exists("broken"):
    print("no such model")
    sys.exit(2)
os.write(int(os.environ["HEADRACE_READY_FD"]), b"1")
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime folder of the test's own, which is also where processes are started."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def echo(arguments: Mapping[str, str], say: Say) -> None:
    """Say what there is, or refuse."""
    if "fail" in arguments:
        raise StartError("it can't: try another")
    say(f"got {dict(arguments)}")
    say("and more")


async def test_an_order_is_carried_out_and_told_of_line_by_line() -> None:
    """What a handler refuses, its sender learns; an unknown one is answered with those that there are."""
    heard: list[str] = []
    async with taking_orders(PORT, {"echo": echo}):
        await give_order(PORT, "echo", {"a": "1"}, heard.append)
        with pytest.raises(StartError, match="try another"):
            await give_order(PORT, "echo", {"fail": ""}, heard.append)
        with pytest.raises(StartError, match="only echo"):
            await give_order(PORT, "eco", {}, heard.append)
    assert heard == ["got {'a': '1'}", "and more"]
    assert not socket_path(PORT).exists()


async def test_without_a_mesh_the_error_names_those_that_run() -> None:
    """The user may have forgotten --port."""
    async with taking_orders(PORT, {"echo": echo}):
        with pytest.raises(StartError, match=f"there are some on {PORT}"):
            await give_order(PORT + 1, "echo", {}, print)


async def test_a_dead_meshs_socket_is_replaced_and_a_living_ones_is_not(runtime: Path) -> None:
    """One mesh a port."""
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), socket_path(PORT))
    server.close()
    async with taking_orders(PORT, {"echo": echo}):
        with pytest.raises(StartError, match="already"):
            async with taking_orders(PORT, {"echo": echo}):
                raise AssertionError("two meshes on one port")
        await give_order(PORT, "echo", {}, lambda line: None)


@pytest.mark.parametrize("sent", [b"", b"\n", b"rubbish\n", b'{"command": 1}\n', b"x" * 100_000 + b"\n"])
async def test_what_is_no_order_is_dropped(sent: bytes) -> None:
    """And the next one is served."""
    async with taking_orders(PORT, {"echo": echo}):
        reader, writer = await asyncio.open_unix_connection(socket_path(PORT))
        writer.write(sent)
        writer.write_eof()
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass
        writer.close()
        await give_order(PORT, "echo", {}, lambda line: None)


def test_a_folder_that_others_can_write_is_refused(runtime: Path) -> None:
    """Whoever can open the socket may give orders."""
    (runtime / "headrace").mkdir(mode=0o755)
    (runtime / "headrace").chmod(0o755)
    with pytest.raises(StartError, match="chmod 700"):
        socket_path(PORT)


@asynccontextmanager
async def fleet(folder: Path, log: list[str]) -> AsyncIterator[tuple[Fleet, Supervisor]]:
    """A gateway, a prefill worker and two decode workers that serve nothing."""
    (folder / "serve").write_text(f"#!{sys.executable}\n{SERVES}")
    (folder / "serve").chmod(0o700)
    with mock.patch.object(sys, "executable", str(folder / "serve")):
        made = Fleet(Settings(decode=2, drain_timeout=5), folder)
        supervisor = Supervisor(made.children, lambda child, line: log.append(f"{child.name}: {line}"))
        running = asyncio.create_task(supervisor.run())
        try:
            await asyncio.gather(*[child.is_ready.wait() for child in made.children])
            yield made, supervisor
        finally:
            await end_task(running)
            await supervisor.stop()
            assert all(child.process and child.process.returncode is not None for child in made.children)


async def test_workers_are_replaced_one_by_one_and_never_fewer(tmp_path: Path) -> None:
    """Each successor serves before its predecessor is told to leave; the gateway stays."""
    log: list[str] = []
    async with fleet(tmp_path, log) as (made, supervisor):
        before = {child.process.pid for child in made.children if child.process}
        said: list[str] = []
        (tmp_path / "cpu-share").write_bytes(b"\1" * 3 + bytes(253))  # as of workers that are killed at work
        await orders(made, supervisor)["restart"]({}, said.append)
        after = {child.process.pid for child in made.children if child.process}
        assert len(before & after) == 1
        names = [child.name for child in made.children]
        assert names == ["gateway", "prefill-1", "decode-2", "decode-0"]
        starts = [n for n, line in enumerate(log) if "started" in line][4:]
        ends = [n for n, line in enumerate(log) if "as it was told to" in line]
        assert len(ends) == 3
        assert all(start < end for start, end in zip(starts, ends, strict=True))
        assert len({child.environment["HEADRACE_CPU_SHARE"] for child in made.workers}) == 3
        assert not any((tmp_path / "cpu-share").read_bytes())
        assert said[-1] == "decode-1: gone, decode-0 serves"


async def test_a_successor_that_cannot_start_leaves_all_as_it_was(tmp_path: Path) -> None:
    """The order fails with what it said; the mesh goes on."""
    async with fleet(tmp_path, []) as (made, supervisor):
        (tmp_path / "broken").touch()
        names = [child.name for child in made.children]
        with pytest.raises(StartError, match="prefill-1: no such model"):
            await orders(made, supervisor)["restart"]({}, lambda line: None)
        assert [child.name for child in made.children] == names
        assert all(child.process and child.process.returncode is None for child in made.children)


async def test_a_worker_that_dies_is_started_again_and_one_that_was_told_to_leave_is_not(tmp_path: Path) -> None:
    """By whatever it died."""
    log: list[str] = []
    with mock.patch("headrace.supervisor.RESTART_DELAY_SECONDS", 0.0):
        async with fleet(tmp_path, log) as (made, supervisor):
            prefill, decode = made.workers[:2]
            await supervisor.remove(decode)
            assert decode not in made.children
            assert prefill.process
            prefill.process.send_signal(signal.SIGKILL)
            prefill.is_ready.clear()
            async with asyncio.timeout(10):
                await prefill.is_ready.wait()
    assert sum(f"{prefill.name}: started" in line for line in log) == 2
    assert sum(f"{decode.name}: started" in line for line in log) == 1


async def test_a_mesh_is_scaled_to_the_numbers_named(tmp_path: Path) -> None:
    """Other tiers stay as they are, and the newest go first."""
    async with fleet(tmp_path, []) as (made, supervisor), taking_orders(PORT, orders(made, supervisor)):
        local = LocalProcesses(PORT)
        assert await local.current() == {"prefill": 1, "decode": 2}
        await local.scale({"prefill": 3})
        assert await local.current() == {"prefill": 3, "decode": 2}
        await local.scale({"prefill": 2, "decode": 4})
        await local.scale({"decode": 1})
        assert [child.name for child in made.workers] == ["prefill-0", "decode-0", "prefill-1"]
        assert (await local.describe())["namespace"] == "headrace"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [({"decode": "0"}, "from 1 to"), ({"decode": "two"}, "from 1 to"), ({"gateway": "2"}, "no tier")],
)
async def test_what_cannot_be_scaled_to_is_refused(tmp_path: Path, wanted: dict[str, str], says: str) -> None:
    """Before anything is started or stopped."""
    async with fleet(tmp_path, []) as (made, supervisor):
        before = list(made.children)
        with pytest.raises(StartError, match=says):
            await orders(made, supervisor)["scale"]({"prefill": "2", **wanted}, lambda line: None)
        assert made.children == before


async def test_workers_that_cannot_start_leave_none_behind(tmp_path: Path) -> None:
    """Scaling up fails as a whole."""
    async with fleet(tmp_path, []) as (made, supervisor):
        (tmp_path / "broken").touch()
        before = list(made.children)
        with pytest.raises(StartError, match="no such model"):
            await orders(made, supervisor)["scale"]({"prefill": "3"}, lambda line: None)
        assert made.children == before
