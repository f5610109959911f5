"""Prompts for speculative decoding: of answers that copy, of code, and of open talk. The same ones every time."""

from __future__ import annotations

import random
from collections.abc import Callable

PEOPLE = ["Ada", "Bruno", "Chiara", "Deniz", "Edda", "Farid", "Greta", "Hugo", "Ines", "Jonas"]
PLACES = ["Lisbon", "Tromso", "Kyoto", "Oaxaca", "Bergen", "Hobart", "Cusco", "Tartu", "Galway", "Leiden"]
THINGS = ["bridge", "museum", "harbour", "bakery", "library", "lighthouse", "market", "theatre", "garden", "station"]
SENTENCES = [
    "{person} moved to {place} in {year} to look after the old {thing}.",
    "The {thing} of {place} had been closed for {count} years when {person} found the key.",
    "On most evenings {person} wrote down who had passed the {thing} and what they carried.",
    "In {year} the town council of {place} decided to sell the {thing}, but nobody made an offer.",
    "{person} repaired the roof with {count} planks, a borrowed ladder and a great deal of patience.",
    "Visitors who came from {place} always asked {person} why the {thing} was painted green.",
    "By the spring of {year} there were {count} volunteers, and {person} knew all their names.",
    "The newspaper of {place} printed a long article about the {thing} on its last page.",
]
FUNCTIONS = ["total_price", "parse_line", "merge_sorted", "count_words", "find_longest", "clean_rows", "read_config"]
QUESTIONS = [
    "What should I see in {place} on a rainy day?",
    "Explain to a child how a {thing} works.",
    "Write a short story about {person}, who lost a {thing} in {place}.",
    "Give me {count} ideas for a birthday party at the {thing}.",
    "What are good habits for learning a language before a trip to {place}?",
    "Write a polite letter to {person} that turns down an invitation to {place}.",
    "Why do people like to live near a {thing}?",
    "Plan a healthy dinner for {person} and {count} guests.",
]
CODE = """def {name}(items, limit={count}):
    result = []
    for index, item in enumerate(items):
        if item is None or index > limit:
            continue
        if isinstance(item, str):
            item = item.strip().lower()
        result.append((index, item))
    return result


class {person}Store:
    def __init__(self, path):
        self.path = path
        self.items = []

    def add(self, item):
        self.items.append(item)

    def {name}(self):
        return {name}(self.items)
"""
CODE_TASKS = [
    "Add a docstring to every function and method of this Python code and show the whole code:\n\n",
    "Add type hints to this Python code and show the whole code:\n\n",
    "Rename the class in this Python code to Store and show the whole code:\n\n",
    "Write unit tests for this Python code:\n\n",
]


def _filled(template: str, generator: random.Random) -> str:
    return template.format(
        person=generator.choice(PEOPLE),
        place=generator.choice(PLACES),
        thing=generator.choice(THINGS),
        year=generator.randrange(1890, 2020),
        count=generator.randrange(3, 40),
        name=generator.choice(FUNCTIONS),
    )


def _editing(generator: random.Random) -> str:
    text = " ".join(_filled(sentence, generator) for sentence in generator.sample(SENTENCES, 6))
    return f"Correct the spelling of the following text. Repeat the whole text and change nothing else.\n\n{text}"


def _code(generator: random.Random) -> str:
    return generator.choice(CODE_TASKS) + _filled(CODE, generator)


def _open_chat(generator: random.Random) -> str:
    return _filled(generator.choice(QUESTIONS), generator)


KINDS: dict[str, Callable[[random.Random], str]] = {"editing": _editing, "code": _code, "open chat": _open_chat}


def chat_messages(kind: str, count: int) -> list[str]:
    """`count` different messages of a user, each of one of `KINDS`."""
    generator = random.Random(kind)
    messages = dict.fromkeys(KINDS[kind](generator) for _ in range(2 * count))
    return list(messages)[:count]
