"""Who may import whom: the rules that keep the gateway free of torch and every part readable on its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"gateway", "kernels", "engine", "kvtransfer", "prefill", "decode", "colocate", "loadtest"}
BASE = "headrace"
"""The package's own modules, `messages`, `models`, `scaling` and `telemetry` among them."""

MAY_IMPORT = {
    BASE: set(),
    "gateway": {BASE},
    "kernels": set(),
    "kvtransfer": {BASE},
    "engine": {BASE, "kernels"},
    "prefill": FOLDERS - {"gateway", "decode", "colocate", "loadtest"} | {BASE},
    "decode": FOLDERS - {"gateway", "prefill", "colocate", "loadtest"} | {BASE},
    "colocate": FOLDERS - {"gateway", "loadtest"} | {BASE},
    "loadtest": {BASE, "engine", "kernels", "kvtransfer", "prefill", "decode"},
}
HEAVY = {"torch", "transformers", "triton"}
FREE_OF_HEAVY = {BASE, "gateway", "kvtransfer"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}


def sources(part: str) -> list[Path]:
    """The Python files of one part."""
    if part != BASE:
        return sorted((ROOT / part).rglob("*.py"))
    own = [ROOT / BASE, *(ROOT / BASE / name for name in ("messages", "models", "scaling", "telemetry"))]
    return sorted(path for folder in own for path in folder.glob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """All modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of ours that a module belongs to."""
    first, second, *_ = [*module.split("."), ""]
    assert first not in FOLDERS, f"{module}: import it as headrace.{module}"
    if first != BASE:
        return None
    return second if second in FOLDERS else BASE


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_the_parts_below_it(part: str) -> None:
    """Each part can be read knowing only those that it is built on."""
    allowed = MAY_IMPORT[part] | {part}
    wrong = [
        f"{p.relative_to(ROOT)}: {m}" for p in sources(part) for m in imports(p) if part_of(m) not in {None, *allowed}
    ]
    assert not wrong


@pytest.mark.parametrize("part", sorted(FREE_OF_HEAVY))
def test_light_parts_need_no_torch(part: str) -> None:
    """A gateway starts where only the base requirements are installed."""
    wrong = [f"{p.relative_to(ROOT)}: {m}" for p in sources(part) for m in imports(p) if m.split(".")[0] in HEAVY]
    assert not wrong


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_nothing_unpickles_or_evaluates(part: str) -> None:
    """No part can be made to run what arrives from outside."""
    for path in sources(part):
        assert not {module.split(".")[0] for module in imports(path)} & FORBIDDEN_MODULES, path
        tree = ast.walk(ast.parse(path.read_text()))
        calls = {node.func.id for node in tree if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not calls & FORBIDDEN_CALLS, path


def test_every_part_has_sources() -> None:
    """The tests above look at something."""
    assert [part for part in MAY_IMPORT if part != "loadtest" and not sources(part)] == []
