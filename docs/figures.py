"""Brings the measured numbers of the docs up to date: `python docs/figures.py`. A test fails where they are not.

`8.98<!--main: 2 32 streams over one-->` is the figure of that name in `loadtest/results/main.json`, with as many
decimals as stand there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "loadtest" / "results"
QUOTED = re.compile(r"(?P<number>[\d,.]*\d)(?P<note><!--(?P<file>[\w-]+): (?P<name>[^<>]+?)-->)")


def updated(text: str) -> str:
    """The page with the numbers that the files have now. Raises `KeyError` for a figure that is not there."""
    return QUOTED.sub(lambda match: _number(match) + match["note"], text)


def _number(match: re.Match[str]) -> str:
    report = json.loads((RESULTS / f"{match['file']}.json").read_text())
    values = {figure["name"]: figure["value"] for figure in report["figures"]}
    value = values.get(match["name"])
    if value is None:
        raise KeyError(f"{match['file']}.json has no figure {match['name']!r}")
    decimals = len(match["number"].partition(".")[2])
    return f"{value:,.{decimals}f}"


def pages() -> list[Path]:
    """All pages of the docs."""
    return sorted(FOLDER.glob("*.md"))


if __name__ == "__main__":
    for path in pages():
        path.write_text(updated(path.read_text()))
