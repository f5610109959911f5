"""Brings the measured numbers of the docs up to date: `python docs/figures.py`. A test fails where they are not.

`8.98<!--main: 2 32 streams over one-->` is the figure of that name in `loadtest/results/main.json`, with as many
decimals as stand there. Where units tell figures of one name apart, `; tokens/s` follows.
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
    name, _, unit = match["name"].partition("; ")
    values = [f["value"] for f in report["figures"] if f["name"] == name and unit in ("", f.get("unit"))]
    if len(values) != 1 or values[0] is None:
        raise KeyError(f"{match['file']}.json has no figure {match['name']!r}, or several")
    decimals = len(match["number"].partition(".")[2])
    return f"{values[0]:,.{decimals}f}"


def pages() -> list[Path]:
    """All pages of the docs."""
    return sorted(FOLDER.glob("*.md"))


if __name__ == "__main__":
    for path in pages():
        path.write_text(updated(path.read_text()))
