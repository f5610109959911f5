"""`headrace status` and `headrace top` look at a mesh through Redis, without being a member."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import AbstractAsyncContextManager

import pytest
from rich.console import Console

from headrace import top
from headrace.mesh_tables import mesh_tables
from headrace.mesh_watch import watching
from headrace.messages.finished import FinishedRequest
from headrace.node import ModelIdentity, Node, join_mesh
from headrace.registry import Tier
from headrace.settings import Settings, SettingsError
from headrace.status import run

IDENTITY = ModelIdentity("tiny", "0" * 16, 64)


@pytest.fixture
def settings(redis_url: str, request: pytest.FixtureRequest) -> Settings:
    """Of a mesh of the test's own."""
    return Settings(redis=redis_url, namespace=request.node.name, json_output=True)


async def test_the_figures_of_a_whole_mesh_are_told(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """With what gateways finished lately; the exit code says that it can answer."""
    async with (
        _join(settings, "gateway") as gateway,
        _join(settings, "prefill") as prefill,
        _join(settings, "decode"),
    ):
        prefill.registry.update_stats({"kv_pages_in_use": 3, "kv_pages_total": 4})
        await prefill.registry._renew()
        done = FinishedRequest(id="chatcmpl-123456", kind="chat", outcome="ok", started_at=1.0, output_tokens=7)
        await gateway.finished.write(gateway.id, [done])
        assert await run(settings) == 0
        view = json.loads(capsys.readouterr().out)
        assert await run(settings.model_copy(update={"json_output": False})) == 0
    assert [member["tier"] for member in view["members"]] == ["gateway", "prefill", "decode"]
    assert view["members"][1]["fill"] == 0.75
    assert (view["queued"], view["requests"][0]["output_tokens"]) == (0, 7)
    text = capsys.readouterr().out
    assert "3/4" in text
    assert "chat-123456" in text


async def test_a_missing_tier_is_named(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is for scripts."""
    async with _join(settings, "gateway"):
        assert await run(settings) == 1
    assert json.loads(capsys.readouterr().out)["missing_tiers"] == ["prefill", "decode"]


async def test_redis_that_is_away_is_said_with_what_to_do() -> None:
    """Instead of a traceback."""
    with pytest.raises(SettingsError, match="--redis"):
        await run(Settings(redis="redis://127.0.0.1:1/0"))


async def test_top_shows_who_is_there(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is stopped."""
    screen, shown = io.StringIO(), asyncio.Event()

    class Watched(io.TextIOBase):
        def write(self, text: str) -> int:
            screen.write(text)
            if "Ctrl-C ends" in text:
                shown.set()
            return len(text)

    monkeypatch.setattr(top, "Console", lambda **_: Console(file=Watched(), width=160, height=40, force_terminal=True))
    monkeypatch.setattr(top, "until_stopped", shown.wait)
    async with _join(settings, "decode"), asyncio.timeout(10):
        assert await top.run(settings) == 0
    assert "decode-0" in screen.getvalue()


async def test_names_are_text_and_no_markup(settings: Settings) -> None:
    """Whoever can name a model can't draw on the operator's terminal."""
    async with join_mesh(settings, "decode", ModelIdentity("[red]x", "0" * 16, 64)), watching(settings) as watch:
        console = Console(file=io.StringIO(), width=120)
        console.print(mesh_tables(await watch.look(), 120))
    assert "[red]x" in console.file.getvalue()  # type: ignore[attr-defined]


def _join(settings: Settings, tier: Tier) -> AbstractAsyncContextManager[Node]:
    return join_mesh(settings.model_copy(update={"worker_id": f"{tier}-0"}), tier, IDENTITY)
