"""A real Chromium without a window, driven over the DevTools protocol (https://chromedevtools.github.io)."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from headrace.processes import end_process
from headrace.tasks import end_task

PATIENCE_SECONDS = 20.0
SHOTS = Path(__file__).parent / "shots"
"""Where screenshots go; ignored by git."""
WIDE = (1440, 900)
PHONE = (390, 844)
KEYS = {"Tab": ("\t", 9), "Enter": ("\r", 13), " ": (" ", 32)}
LISTENING = re.compile(r"DevTools listening on (ws://\S+)")
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page must need no other host
)


class Browser:
    """One process; each page has cookies and storage of its own."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._pages: dict[str, Page] = {}

    async def read(self) -> None:
        """Hand out what the browser says until it closes the connection."""
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                answer = self._answers.pop(data["id"])
                if not answer.done():
                    answer.set_result(data)
            elif (page := self._pages.get(data.get("sessionId", ""))) is not None:
                page.on_event(data["method"], data["params"])

    async def call(
        self, method: str, session: str | None = None, seconds: float = PATIENCE_SECONDS, **parameters: Any
    ) -> Any:
        """One command and its result. Raises `AssertionError` with what the browser did not like."""
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(
            {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        )
        async with asyncio.timeout(seconds):
            data = await self._answers[number]
        assert "error" not in data, f"{method}: {data['error']}"
        return data["result"]

    @asynccontextmanager
    async def page(self, url: str, size: tuple[int, int] = WIDE, **media: str) -> AsyncIterator[Page]:
        """Open a URL. `media` are media features, such as `prefers_color_scheme="dark"`."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = (await self.call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session)
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            width, height = size
            await page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=2 if size == PHONE else 1,
                mobile=size == PHONE,
            )
            features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
            await page.call("Emulation.setEmulatedMedia", features=features)
            await page.call("Page.navigate", url=url)
            async with asyncio.timeout(PATIENCE_SECONDS):
                await page.loaded.wait()
            yield page
        finally:
            del self._pages[session]
            await self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """One tab. `problems` collects errors of the console, of scripts and of loading."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        self.loaded = asyncio.Event()
        self._browser = browser
        self._session = session

    def on_event(self, method: str, parameters: dict[str, Any]) -> None:
        """Remember what a test may ask for."""
        match method:
            case "Page.loadEventFired":
                self.loaded.set()
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                self.problems.append(json.dumps(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(json.dumps(parameters["entry"]))
            case "Network.requestWillBeSent":
                self.hosts.add(parameters["request"]["url"].split("/")[2])

    async def call(self, method: str, **parameters: Any) -> Any:
        """See `Browser.call`."""
        return await self._browser.call(method, self._session, **parameters)

    async def run(self, script: str, seconds: float = PATIENCE_SECONDS) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        result = await self.call(
            "Runtime.evaluate", seconds=seconds, expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, json.dumps(result["exceptionDetails"])[:2000]
        return result["result"].get("value")

    async def until(self, condition: str, seconds: float = PATIENCE_SECONDS / 2) -> None:
        """Wait until a JavaScript expression holds, looking whenever the document changes."""
        script = """new Promise((done) => {
            const end = (found) => { watch.disconnect(); clearTimeout(timer); done(Boolean(found)); };
            const look = () => { const found = (CONDITION); if (found) end(found); };
            const watch = new MutationObserver(look);
            const timer = setTimeout(() => end(null), LIMIT);
            watch.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
            look();
        })"""
        script = script.replace("CONDITION", condition).replace("LIMIT", str(int(seconds * 1000)))
        found = await self.run(script, seconds + PATIENCE_SECONDS)
        assert found, f"never true: {condition}\nproblems: {self.problems}\n{await self.text()}"

    async def text(self, selector: str = "body") -> str:
        """The text that a reader sees in an element."""
        return str(await self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def focused(self) -> str:
        """The id, or the text, of the element that has the focus."""
        return str(await self.run("document.activeElement.id || document.activeElement.innerText"))

    async def type(self, text: str) -> None:
        """As a keyboard would."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, shift: bool = False) -> None:
        """Press and let go of one of `KEYS`."""
        text, code = KEYS[key]
        fields = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text="" if key == "Tab" else text, **fields)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    async def shoot(self, name: str, whole: bool = False) -> Path:
        """Keep a picture of what is seen, or of the whole page."""
        SHOTS.mkdir(exist_ok=True)
        picture = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path = SHOTS / f"{name}.png"
        path.write_bytes(base64.b64decode(picture["data"]))
        return path


@asynccontextmanager
async def chromium(folder: Path) -> AsyncIterator[Browser]:
    """Run a browser inside the block. Skips the test where there is none."""
    command = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if command is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    process = await asyncio.create_subprocess_exec(
        command,
        *FLAGS,
        f"--user-data-dir={folder}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": str(folder)},
        start_new_session=True,
    )
    assert process.stderr is not None
    reading: list[asyncio.Task[Any]] = []
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (found := LISTENING.search((await process.stderr.readline()).decode())):
                assert process.returncode is None, "Chromium did not start"
        reading.append(asyncio.create_task(process.stderr.read()))
        async with aiohttp.ClientSession() as http, http.ws_connect(found[1], max_msg_size=0) as socket:
            browser = Browser(socket)
            reading.append(asyncio.create_task(browser.read()))
            yield browser
            await browser.call("Browser.close")
    finally:
        await end_process(process, signal.SIGTERM, PATIENCE_SECONDS)
        for task in reading:
            await end_task(task)
