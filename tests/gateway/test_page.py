"""The live page in a real browser, before a gateway with scripted workers. Screenshots go to tests/shots."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from headrace.node import join_mesh
from headrace.queue import Delivery
from tests.browser import PHONE, WIDE, Browser, Page
from tests.gateway.conftest import IDENTITY, Gateway, OpenGateway
from tests.gateway.workers import Workers

AXE = importlib.resources.files("axe_core_python").joinpath("axe.min.js")
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
LOADED = "document.querySelector('#model').textContent === 'test-model'"
STORY = 'A <b>bold</b> mill & <img src=x onerror="throw 1"> a river, 水车 🎉.'
Script = Callable[[Workers, Delivery], Awaitable[None]]


@asynccontextmanager
async def _opened(browser: Browser, gateway: Gateway, **how: Any) -> AsyncIterator[Page]:
    """The page, once it shows the mesh; at the end it must have had nothing to complain of."""
    async with browser.page(f"{gateway.url}/", **how) as page:
        await page.until(LOADED)
        yield page
        assert page.problems == []
        assert page.hosts == {gateway.url.removeprefix("http://")}


def _telling(text: str) -> Script:
    """Answers with `text`, three tokens a step, the second after the client was sent the first."""

    async def script(workers: Workers, delivery: Delivery) -> None:
        await workers.report(delivery)
        ids, begin = workers.ids(text), delivery.entry.generated
        for start in range(begin, len(ids), 3):
            part = ids[start : start + 3]
            await workers.tokens(delivery, start, part, "length" if start + 3 >= len(ids) else None)
            if start == begin:
                await workers.until_taken(delivery)

    return script


async def _begin(workers: Workers, delivery: Delivery) -> None:
    """A report, two tokens, and then nothing."""
    await workers.report(delivery)
    await workers.tokens(delivery, 0, workers.ids()[:2])


async def _moving(workers: Workers, delivery: Delivery) -> None:
    """The first decode worker dies after four tokens, the second one goes on."""
    ids, begin = workers.ids(), delivery.entry.generated
    if delivery.entry.attempt == 0:
        await workers.report(delivery, 0, queue_ms=1, prefill_ms=9, handoff_ms=3)
        await workers.tokens(delivery, 0, ids[:4])
        await workers.until_taken(delivery)
        await workers.leave("d0")
    else:
        await workers.report(delivery, 1, queue_ms=0.1, prefill_ms=0.1, handoff_ms=0.1)
        await workers.tokens(delivery, begin, ids[begin:], "length", decode=1)


async def _say(page: Page, text: str) -> None:
    await page.run("document.querySelector('#question').focus()")
    await page.type(text)
    await page.press("Enter")


async def _said(page: Page, number: int) -> str:
    """The text of message `number`, once its answer has figures of its own."""
    item = f"document.querySelectorAll('#messages li')[{number}]"
    await page.until(f"{item}?.querySelector('.facts').innerText.includes('token')")
    await page.until("document.querySelector('#stop').disabled")
    return str(await page.run(f"{item}.querySelector('.said').innerText"))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("light", {"size": WIDE, "prefers_color_scheme": "light"}),
        ("dark", {"size": WIDE, "prefers_color_scheme": "dark"}),
        ("phone", {"size": PHONE, "prefers_color_scheme": "light"}),
        ("phone-dark", {"size": PHONE, "prefers_color_scheme": "dark"}),
    ],
)
async def test_the_page_is_accessible_and_fits(
    browser: Browser, open_gateway: OpenGateway, name: str, how: dict[str, Any]
) -> None:
    """Axe finds nothing to mend, in names, roles and contrast, with a moved request and a dead worker in sight."""
    async with open_gateway(decode=2) as gateway, _opened(browser, gateway, **how) as page:
        gateway.workers.decode[1].registry.update_stats(
            {"kv_pages_in_use": 700, "kv_pages_total": 1536, "requests_running": 3}
        )
        gateway.workers.script = _moving
        await _say(page, "Tell me a story.")
        await _said(page, 1)
        await page.until("document.querySelector('[data-worker=d0].gone') && document.querySelector('#rows li')")
        for details in ("#figures", "#rows details"):
            await page.run(f"document.querySelector('{details}').open = true")
        await page.shoot(f"page-{name}", whole=True)
        await page.run(AXE.read_text(encoding="utf-8") + ";0")
        found = await page.run(f"axe.run({{runOnly: {json.dumps(TAGS)}}}).then((result) => result.violations)")
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == []
        assert await page.run("document.documentElement.scrollWidth") <= how["size"][0], "it scrolls sideways"


async def test_a_chat_of_several_turns_streams_with_its_figures(browser: Browser, open_gateway: OpenGateway) -> None:
    """Text is text, whatever it looks like; the next turn carries what was said."""
    async with open_gateway() as gateway, _opened(browser, gateway) as page:
        gateway.workers.script = _telling(STORY)
        await _say(page, "Tell me <i>a</i> story.")
        assert await _said(page, 1) == STORY
        assert await page.text("#messages li .said") == "Tell me <i>a</i> story."
        await page.until("document.querySelector('#messages li:last-child .facts').innerText.includes('p0 → d0')")
        facts = await page.text("#messages li:last-child .facts")
        assert all(word in facts for word in ("first token", "tok/s", "tokens", "drafted")), facts
        announced = await page.text("#announcer")
        assert announced == STORY
        await _say(page, "Another one.")
        assert await _said(page, 3) == STORY
        last = gateway.workers.client_deliveries()[-1].entry.token_ids
        first = gateway.workers.client_deliveries()[0].entry.token_ids
        assert len(last) > len(first) + len(gateway.workers.ids(STORY))
        await page.until("document.querySelectorAll('#rows li').length === 2")
        assert await page.run("document.querySelector('#messages img') === null")


async def test_an_answer_can_be_stopped(browser: Browser, open_gateway: OpenGateway) -> None:
    """The workers are told, what was said stays, and the keyboard is back in the question."""
    async with open_gateway() as gateway, _opened(browser, gateway) as page:
        gateway.workers.script = _begin
        await _say(page, "Go on for ever.")
        await page.until("document.querySelector('#messages li:last-child .said').innerText.length > 3")
        await page.press("Tab")
        assert await page.focused() == "stop"
        await page.press(" ")
        await page.until("document.querySelector('#stop').disabled")
        await gateway.workers.until(lambda: bool(gateway.workers.cancels))
        assert await page.focused() == "question"
        assert "stopped" in await page.text("#messages li:last-child")
        await page.until("document.querySelector('#rows .outcome')?.innerText.includes('cancelled')")


async def test_an_error_of_the_server_is_shown_and_the_question_can_be_asked_again(
    browser: Browser, open_gateway: OpenGateway
) -> None:
    """With the server's own words."""

    async def broken(workers: Workers, delivery: Delivery) -> None:
        await workers.fail(delivery, "worker_error", retryable=False)

    async with open_gateway() as gateway, browser.page(f"{gateway.url}/") as page:
        await page.until(LOADED)
        gateway.workers.script = broken
        await _say(page, "Hello?")
        await page.until("document.querySelector('#messages .error')?.innerText.includes('test: worker_error')")
        gateway.workers.script = _telling("Here I am.")
        await _say(page, "Hello?")
        assert await _said(page, 3) == "Here I am."


async def test_workers_that_join_and_die_are_seen_and_told(browser: Browser, open_gateway: OpenGateway) -> None:
    """In the picture, in the table, in the news, and once to screen readers."""
    async with open_gateway(decode=2) as gateway, _opened(browser, gateway) as page:
        await page.until("document.querySelector('[data-worker=d1]')")
        assert await page.run("document.querySelectorAll('#news li').length") == 0
        await gateway.workers.leave("d1")
        await page.until("document.querySelector('[data-worker=d1].gone')?.textContent.includes('died')")
        assert await page.text("#announcer") == "d1 died"
        assert "died" in await page.run("document.querySelector('#figures tbody').textContent")
        newcomer = gateway.settings.model_copy(update={"worker_id": "d2"})
        async with join_mesh(newcomer, "decode", IDENTITY):
            await page.until("document.querySelector('[data-worker=d2].new')?.textContent.includes('joined')")
            assert await page.text("#announcer") == "d2 joined"
            news = await page.run("[...document.querySelectorAll('#news li')].map((item) => item.textContent.slice(8))")
            assert news == ["d2 joined", "d1 died"]


async def test_a_request_that_moved_shows_both_attempts(browser: Browser, open_gateway: OpenGateway) -> None:
    """Two lanes, a cross where the first one ended, and why in the details."""
    async with open_gateway(decode=2) as gateway, _opened(browser, gateway) as page:
        gateway.workers.script = _moving
        await _say(page, "Tell me a story.")
        await _said(page, 1)
        await page.until("document.querySelectorAll('#rows .lane').length === 2")
        kinds = await page.run(
            """[...document.querySelectorAll('#rows .lane')]
                .map((lane) => [...lane.children].map((bar) => bar.className))"""
        )
        assert kinds[0][:3] == ["queue", "prefill", "handoff"]
        assert (kinds[0][-1], kinds[1][-1]) == ("cross", "decode")
        assert "d0 left the mesh" in await page.run("document.querySelector('#rows .why').textContent")
        route = "p0 → d0, then p0 → d1"
        await page.until(f"document.querySelector('#messages li:last-child .facts').innerText.includes('{route}')")


async def test_a_lane_has_the_phases_that_are_known(browser: Browser, open_gateway: OpenGateway) -> None:
    """Time in which nothing came any more is lost, not decoded."""
    until_decode = [("queue", 0, 10), ("prefill", 10, 30), ("handoff", 30, 35)]
    cases: list[tuple[dict[str, Any], list[tuple[str, int, int]]]] = [
        ({"begun": 5, "queue_ms": None}, [("queue", 5, 100)]),
        ({"begun": 5, "queue_ms": None, "failed": 40}, [("lost", 5, 40)]),
        ({"last_token": 60}, [*until_decode, ("decode", 35, 60)]),
        ({"last_token": 60, "failed": 90}, [*until_decode, ("decode", 35, 60), ("lost", 60, 90)]),
        ({"failed": 90}, [*until_decode, ("lost", 35, 90)]),
    ]
    known = {"begun": 0, "queue_ms": 10, "prefill_ms": 20, "handoff_ms": 5, "last_token": None, "failed": None}
    attempts = json.dumps([known | told for told, _ in cases])
    async with open_gateway() as gateway, _opened(browser, gateway) as page:
        found = await page.run(
            f"import('/page/lanes.js').then((lanes) => {attempts}.map((attempt) => lanes.phases(attempt, 100)))"
        )
    assert [[(phase["kind"], phase["from"], phase["to"]) for phase in lane] for lane in found] == [
        expected for _, expected in cases
    ]


async def test_everything_can_be_done_from_the_keyboard(browser: Browser, open_gateway: OpenGateway) -> None:
    """Skip to the chat, ask, open a request's details, pause: each stop has a visible focus."""
    outlined = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
    async with open_gateway() as gateway, _opened(browser, gateway) as page:
        gateway.workers.script = _telling("A river.")
        await page.press("Tab")
        assert await page.focused() == "Skip to chat"
        await page.press("Enter")
        assert await page.focused() == "question"
        await page.type("Hi")
        await page.press("Enter")
        await _said(page, 1)
        await page.until("document.querySelector('#rows summary')")
        visited = []
        for _ in range(20):
            await page.press("Tab")
            visited.append(
                await page.run("document.activeElement.matches('#rows summary') ? 'row' : document.activeElement.id")
            )
            assert visited[-1] == "" or await page.run(outlined), visited
            if visited[-1] == "row":
                await page.press("Enter")
                assert await page.run("document.querySelector('#rows details').open")
            if visited[-1] == "pause":
                await page.press(" ")
                assert await page.run("document.activeElement.getAttribute('aria-pressed')") == "true"
                break
        assert {"send", "row", "pause"} <= set(visited), visited


async def test_a_page_that_is_paused_changes_no_more_until_it_goes_on(
    browser: Browser, open_gateway: OpenGateway
) -> None:
    """What came meanwhile is shown then."""
    async with open_gateway(decode=2) as gateway, _opened(browser, gateway) as page:
        await page.until("document.querySelector('[data-worker=d1]')")
        await page.run("document.querySelector('#pause').click()")
        async with _opened(browser, gateway) as other:
            await gateway.workers.leave("d1")
            await other.until("document.querySelector('[data-worker=d1].gone')")
        assert not await page.run("document.querySelector('.gone')")
        await page.run("document.querySelector('#pause').click()")
        await page.until("document.querySelector('[data-worker=d1].gone')")


async def test_a_handoff_moves_pages_unless_less_motion_is_wanted(browser: Browser, open_gateway: OpenGateway) -> None:
    """Then its path lights up instead."""
    counted = """window.seen = new Set(); new MutationObserver((changes) => { for (const change of changes)
        for (const node of [...change.addedNodes, change.target])
            if (node.classList) node.classList.forEach((name) => seen.add(name)); }).observe(
        document.querySelector('#picture'), {subtree: true, childList: true, attributes: true}); 0"""
    for motion, expected, never in (("no-preference", "page", "lit"), ("reduce", "lit", "mote")):
        async with open_gateway() as gateway, _opened(browser, gateway, prefers_reduced_motion=motion) as page:
            await page.until("document.querySelector('[data-worker=d0]')")
            await page.run(counted)
            gateway.workers.script = _telling("A river.")
            await _say(page, "Hi")
            await _said(page, 1)
            await page.run(f"""new Promise((done) => {{ const look = () =>
                seen.has('{expected}') ? done() : requestAnimationFrame(look); look(); }})""")
            assert not await page.run(f"seen.has('{never}')")


async def test_a_server_with_a_key_is_asked_for_it(browser: Browser, open_gateway: OpenGateway) -> None:
    """A wrong one is refused with the server's words; the right one opens the mesh and the chat."""
    async with open_gateway(api_key="secret") as gateway, browser.page(f"{gateway.url}/") as page:
        await page.until("!document.querySelector('#key').hidden")
        assert await page.focused() == "key-field"
        await page.type("wrong")
        await page.press("Enter")
        await page.until("document.querySelector('#key-note').innerText.includes('Incorrect API key')")
        await page.run("document.querySelector('#key-field').value = ''")
        await page.type("secret")
        await page.press("Enter")
        await page.until(LOADED)
        assert await page.run("document.querySelector('#key').hidden")
        gateway.workers.script = _telling("A river.")
        await _say(page, "Hi")
        assert await _said(page, 1) == "A river."


async def test_the_page_finds_its_gateway_again(browser: Browser, open_gateway: OpenGateway) -> None:
    """It says that the gateway is away, and goes on by itself once it is back on its port."""
    async with AsyncExitStack() as stack:
        async with open_gateway() as gateway:
            page = await stack.enter_async_context(browser.page(f"{gateway.url}/"))
            await page.until(LOADED)
        await page.until("document.querySelector('#link').dataset.state === 'away'")
        async with open_gateway(port=gateway.url.rsplit(":", 1)[1]):
            await page.until("document.querySelector('#link').dataset.state === 'live'")
