"""One table and one JSON file a benchmark: figures, each with its target and whether it was met."""

from __future__ import annotations

import json
import operator
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
COMPARISONS = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}


@dataclass
class Figure:
    """One measured number. `target` is text such as `<= 1.25`; without one the figure is for information."""

    name: str
    value: float | None
    unit: str
    target: str = ""
    why: str = ""
    """Why there is no value."""
    met: bool | None = None
    spread: float | None = None
    """Half of the 95 % confidence interval, where there were repeats."""

    def __post_init__(self) -> None:
        if self.target and self.value is not None:
            sign, limit = self.target.split()
            self.met = bool(COMPARISONS[sign](self.value, float(limit)))


def publish(name: str, figures: list[Figure], card: str | None = None) -> None:
    """Print the table and write `loadtest/results/NAME.json`; `card` names the GPU that was measured."""
    table = Table(title=name)
    for column in ("figure", "value", "unit", "target", "met"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for figure in figures:
        value = figure.why if figure.value is None else f"{figure.value:.3f}".rstrip("0").rstrip(".")
        met = {None: "", True: "yes", False: "NO"}[figure.met]
        table.add_row(figure.name, value, figure.unit, figure.target, met)
    Console(width=120).print(table)
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    given = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]  # others have other folders
    command = " ".join(["python", "-m", _main_module(), *given])
    path.write_text(json.dumps(as_report(name, figures, card=card, command=command), indent=2) + "\n")
    print(f"written to {path}")


def conclude(name: str, figures: list[Figure]) -> NoReturn:
    """The end of a benchmark: publish, and exit with 1 where a target was missed."""
    publish(name, figures)
    sys.exit(any(figure.met is False for figure in figures))


def as_report(name: str, figures: list[Figure], *, command: str, card: str | None = None) -> dict[str, Any]:
    """What is written: the figures, and what a reader must know to take them again."""
    return {
        "name": name,
        "commit": _commit(),
        "machine": machine(),
        "card": card,
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "figures": [_without_blanks(figure) for figure in figures],
    }


def _without_blanks(figure: Figure) -> dict[str, Any]:
    fields = asdict(figure)
    if figure.spread is None:
        del fields["spread"]
    return {key: value for key, value in fields.items() if value != ""}


def machine() -> str:
    """This machine in a few words."""
    return f"{os.cpu_count()} cores of {_processor()}"


def _main_module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).stem


def _commit() -> str:
    git = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
