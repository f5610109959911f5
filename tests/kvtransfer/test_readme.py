"""What the library's own page shows to newcomers runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "kvtransfer" / "README.md"


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Two workers in one process, a real data line, and one prompt."""
    text = README.read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    exec(compile(code, README, "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out.strip()
    assert f"It prints `{printed}`" in text
