"""The docs say what the code and the result files say, and their links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from headrace.cli import build_parser
from headrace.settings import Settings, flag_name

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("compose/**/*.md")]


def script(name: str) -> Any:
    """One of those that make `docs/`."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_the_code_s() -> None:
    """Run `make docs` where this fails."""
    reference = script("reference")
    assert reference.PAGE.read_text() == reference.page()


def test_every_file_has_its_line() -> None:
    """Run `make docs` where this fails."""
    files = script("files")
    assert files.PAGE.read_text() == files.page()


def test_the_architecture_names_files_that_are_there() -> None:
    """By their names alone or with some of their folders."""
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "ARCHITECTURE.md").read_text()))
    assert len(named) > 50
    folders = [*script("files").PACKAGES, "tests"]
    there = [f"/{folder}/{path.name}" for folder in folders for path in (ROOT / folder).glob("*.py")]
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in there)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_numbers_are_those_of_the_result_files(page: Path) -> None:
    """Run `make docs` after a measurement."""
    assert page.read_text() == script("figures").updated(page.read_text())


def test_a_quoted_number_that_was_not_measured_is_named() -> None:
    """With file and figure."""
    with pytest.raises(KeyError, match=r"main\.json has no figure 'speed'"):
        script("figures").updated("9<!--main: speed-->")


def test_the_tuning_guide_quotes_measurements() -> None:
    """Some in each of its parts, in fact."""
    assert len(script("figures").QUOTED.findall((DOCS / "tuning.md").read_text())) > 15


def test_diagrams_are_drawn_from_their_texts() -> None:
    """Run `make docs` where this fails."""
    draw = script("draw")
    sources = sorted(draw.FOLDER.glob("*.txt"))
    assert sources
    for source in sources:
        assert source.with_suffix(".svg").read_text() == draw.svg(source.read_text())


def test_a_line_that_is_no_line_of_a_diagram_is_named() -> None:
    """Such as one about a column that is not there."""
    with pytest.raises(ValueError, match="c -> b: hello"):
        script("draw").svg("| a | b |\nc -> b: hello")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """Those within the repository."""
    for target in re.findall(r"\]\((?!https?://)([^)\s]*\w[^)\s]*)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            slugs = [
                re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in file.read_text().splitlines()
                if line.startswith("#")
            ]
            assert heading in slugs, target


def test_every_page_is_reached_from_the_readme() -> None:
    """Directly, or from the docs' first page."""
    text = (ROOT / "README.md").read_text() + (DOCS / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"{page.name})" not in text] == []


def test_flags_that_the_pages_name_exist() -> None:
    """Those in running text; what stands in blocks may be another program's."""
    known = {flag_name(field) for field in Settings.model_fields}
    parsers = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    known |= {o for p in parsers for sub in p.choices.values() for a in sub._actions for o in a.option_strings}
    for page in (DOCS / name for name in ("getting-started.md", "how-it-works.md", "operating.md", "tuning.md")):
        words = re.findall(r"`headrace [^`]*`|`--[a-z][^`]*`", page.read_text())
        named = {flag for word in words for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", word)}
        assert named - known == set(), page.name
