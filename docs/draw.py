"""Draws docs/diagrams/*.txt as SVG: `python docs/draw.py`. A test fails where the two differ.

A line is `A -> B: what is said`, `A: what it does`, `x A: what becomes of it`, or `-- what follows`. The columns stand
in the first line, between bars.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "diagrams"
WIDTH, HEAD, ROW, LETTER = 200, 46, 34, 7.0
STYLE = """
text{font:13px ui-sans-serif,system-ui,sans-serif;fill:#1f2933} .s{font-weight:600} .p{fill:#fff}
.b{fill:#e8f1fb;stroke:#2f6fab} .n{fill:#fff8e1;stroke:#c99a2e} .x{fill:#fdecea;stroke:#c0392b}
.l{stroke:#9aa9b8;stroke-dasharray:3 4} .a{stroke:#2f6fab;stroke-width:1.5;marker-end:url(#t)}
@media(prefers-color-scheme:dark){text{fill:#e4e9ef} .p{fill:#161b22}
.b{fill:#1c3247} .n{fill:#3a3118} .x{fill:#4a211d}}
"""


def svg(source: str) -> str:
    """The picture of one text. Raises `ValueError` for a line that is none of the four."""
    head, *lines = [line for line in source.splitlines() if line.strip()]
    columns = [name.strip() for name in head.strip("| ").split("|")]
    middle = {name: WIDTH * (index + 0.5) for index, name in enumerate(columns)}
    width, height = WIDTH * len(columns), HEAD + ROW * (len(lines) + 1)
    parts = [f'<rect class="p" width="{width}" height="{height}"/>']
    for name, x in middle.items():
        parts += [f'<line class="l" x1="{x}" y1="36" x2="{x}" y2="{height - 8}"/>', _box("b", x, 22, name, WIDTH - 24)]
    for row, line in enumerate(lines):
        parts += _line(line, HEAD + ROW * (row + 0.6), middle)
    tip = '<marker id="t" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    tip += '<path d="M0 0L8 4L0 8z" fill="#2f6fab"/></marker>'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return f"{opening}<style>{STYLE}</style><defs>{tip}</defs>\n" + "\n".join(parts) + "\n</svg>\n"


def _line(line: str, y: float, middle: dict[str, float]) -> list[str]:
    if line.startswith("-- "):
        return [f'<text class="s" x="12" y="{y + 4}">{escape(line[3:])}</text>']
    who, colon, words = line.partition(": ")
    first, arrow, second = who.partition(" -> ")
    kind = "x" if first.startswith("x ") else "n"
    first = first.removeprefix("x ")
    if not colon or first not in middle or (arrow and second not in middle):
        raise ValueError(f"not a line of a diagram: {line}")
    if not arrow:
        return [_box(kind, middle[first], y, words, len(words) * LETTER + 16)]
    start, end = middle[first], middle[second]
    left = (start + end) / 2
    return [
        f'<line class="a" x1="{start}" y1="{y + 5}" x2="{end}" y2="{y + 5}"/>',
        f'<text text-anchor="middle" x="{left}" y="{y - 1}">{escape(words)}</text>',
    ]


def _box(kind: str, x: float, y: float, words: str, width: float) -> str:
    rect = f'<rect class="{kind}" x="{x - width / 2:.1f}" y="{y - 12:.1f}" width="{width:.1f}" height="24" rx="5"/>'
    return f'{rect}<text text-anchor="middle" x="{x}" y="{y + 4.5:.1f}">{escape(words)}</text>'


if __name__ == "__main__":
    for path in FOLDER.glob("*.txt"):
        path.with_suffix(".svg").write_text(svg(path.read_text()))
