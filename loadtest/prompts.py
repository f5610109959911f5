"""Varied prompts for benchmarks: chat and completion, short and long, several scripts. The same ones every time."""

from __future__ import annotations

import random
from dataclasses import dataclass

TOPICS = {
    "english": "The mill stood where the river bends, and the miller counted sacks while the wheel turned slowly. ",
    "code": "def merge(left, right):\n    out = []\n    while left and right:\n"
    "        out.append((left if left[0] < right[0] else right).pop(0))\n    return out + left + right\n\n",
    "chinese": "水车在河边慢慢地转动，磨坊主人数着麦袋，孩子们在桥上看着流水。",
    "emoji": "Launch day 🚀🎉: the team 👩‍💻👨‍🔧 shipped it, everyone was 😀 and then 🌊 came the traffic! ",
    "numbers": "In 1984 there were 3,141 mills; by 2023 only 271.8 of every 10,000 were left (2.718 %). ",
}


@dataclass(frozen=True)
class SamplePrompt:
    """`text` is a chat's user message or a completion's prompt."""

    name: str
    text: str
    is_chat: bool


def sample_prompts(count: int) -> list[SamplePrompt]:
    """`count` prompts of about 5 to 900 tokens with the built-in model."""
    generator = random.Random(20261124)
    prompts = []
    for index in range(count):
        name, text = list(TOPICS.items())[index % len(TOPICS)]
        length = int(16 * 1.112 ** (index * 50 / count)) if index else 12  # characters; grows to about 2,700
        body = f"{index}. " + text * (length // len(text) + 1)
        body = body[: max(length, 8)] if name != "chinese" else body[: max(length // 3, 6)]
        cut = generator.randrange(4)
        prompts.append(SamplePrompt(f"{name}-{index}", body[: len(body) - cut] or body, is_chat=index % 2 == 0))
    return prompts


def unique_tokens(length: int, number: int) -> list[int]:
    """Token ids that no other `number` shares a prefix with, so that no cache helps."""
    generator = random.Random(number)
    return [generator.randrange(1000, 40000) for _ in range(length)]
