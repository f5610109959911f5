"""`headrace doctor`: what this machine has, what is wrong with it, and what to do. Exit code 1 where something is.

It starts nothing, downloads nothing and converts nothing.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headrace.settings import Settings

Verdict = Literal["ok", "warn", "fail"]
CHECK_SECONDS = 60.0
"""A check that takes longer is stuck; importing torch from a slow disk may take half of it."""
MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""
    """What to do; empty where all is well."""


async def run(settings: Settings) -> int:
    """Check everything, print, and tell by the exit code."""
    findings = await examine(settings)
    healthy = all(finding.verdict != "fail" for finding in findings)
    if settings.json_output:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
        return int(not healthy)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = escape(finding.found) + (f"\n[bold]→ {escape(finding.fix)}[/]" if finding.fix else "")
        table.add_row(MARKS[finding.verdict], finding.name, text)
    console = Console(highlight=False)
    console.print(table)
    worst = {finding.verdict for finding in findings}
    console.print(
        "something must be fixed" if not healthy else "good, with a warning" if "warn" in worst else "all good"
    )
    return int(not healthy)


async def examine(settings: Settings) -> list[Finding]:
    """All checks' findings, in a fixed order. A check that breaks is a finding itself."""
    from headrace import doctor_machine, doctor_mesh

    checks: dict[str, Callable[[], Awaitable[list[Finding]]]] = {}
    for name, look in doctor_machine.CHECKS.items():
        checks[name] = functools.partial(asyncio.to_thread, look, settings)
    for name, ask in doctor_mesh.CHECKS.items():
        checks[name] = functools.partial(ask, settings)
    found = await asyncio.gather(*(_safely(name, check) for name, check in checks.items()))
    return [finding for findings in found for finding in findings]


async def _safely(name: str, check: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await check()
    except TimeoutError:
        return [Finding(name, "fail", f"no answer within {CHECK_SECONDS:.0f} s", "try it by hand")]
    except Exception as error:  # one broken check must not hide the others
        return [Finding(name, "fail", f"the check itself failed: {error!r}", "please report this")]
