"""Stop strings: found wherever the pieces end, held back no longer than needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.stop_strings import StopStrings

text = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


def _run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        shown += safe
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def _expected(stops: list[str], whole: str) -> tuple[str, bool]:
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            return whole[: end - max(map(len, complete))], True
    return whole, False


@given(stops, st.lists(text, max_size=8))
def test_the_result_does_not_depend_on_how_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    """Pieces give what the plain definition gives on the whole text."""
    assert _run(stops, pieces) == _expected(stops, "".join(pieces))


@given(stops, st.lists(text, max_size=8))
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(stops: list[str], pieces: list[str]) -> None:
    """What is not yet shown is always a proper prefix of a stop string."""
    matcher = StopStrings(stops)
    seen, shown = "", ""
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        seen, shown = seen + piece, shown + safe
        if stopped:
            return
        held = seen[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_text_passes_untouched() -> None:
    """The usual case holds nothing back."""
    assert StopStrings([]).push("anything") == ("anything", False)
