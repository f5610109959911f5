"""Makes docs/files.md from the code: `python docs/files.py`. A test fails where the two differ."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("files.md")
ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("gateway", "headrace", "headrace/messages", "headrace/models", "headrace/telemetry", "headrace/scaling"),
    *("prefill", "decode", "decode/training", "colocate", "kvtransfer", "engine", "kernels"),
    *("loadtest", "loadtest/load"),
)
HEAD = """# Every file

<!-- made from the code by docs/files.py: change that, or the first line of a file, not this -->

In what order to read them: [ARCHITECTURE.md](../ARCHITECTURE.md)."""


def page() -> str:
    """All of docs/files.md."""
    return "\n".join([HEAD, *(line for package in PACKAGES for line in _section(ROOT / package))]) + "\n"


def _section(folder: Path) -> Iterator[str]:
    yield f"\n## {folder.relative_to(ROOT)}/\n\n{_summary(folder / '__init__.py')}\n"
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("__"):
            yield f"- `{path.name}`: {_summary(path)}"


def _summary(path: Path) -> str:
    """The first paragraph of its docstring."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{path} says nothing of itself"
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    PAGE.write_text(page())
