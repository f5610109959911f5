"""Prompts of exact lengths that share what they are told to share, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from headrace.scaling.trace import HASHED_TOKENS

if TYPE_CHECKING:
    from headrace.loadtest.load.arrivals import Planned
    from headrace.loadtest.load.target import Target

_WORDS = """
about above across after again air all almost along also always among animal another answer any around ask away back
base because been before began behind best better between big bird black blue boat body book both box boy bring
brought build built busy call came car care carry change check city class clear close cold color come common complete
could country course cover cross cut dark day decide deep did differ direct does dog done door down draw drive dry
during each early earth east eat end enough even ever every example eye face fact fall family far farm fast father
feel feet few field figure fill final find fine fire first fish five fly follow food foot force form found four free
friend from front full game gave general get girl give gold good got govern great green ground group grow half hand
hard have head hear heard heat help here high hold home horse hot hour house how hundred idea inch interest island
just keep kind king knew know land language large last late later laugh lead learn leave left less let letter life
light like line list listen little live long look lot love low machine made main make man many map mark may mean
measure men might mile mind minute miss money moon more morning most mother mountain move much music must name near
need never new next night north note nothing notice noun now number numeral object ocean
"""
WORDS = _WORDS.split()
"""Words that most tokenizers have whole."""


class Prompts:
    """Makes request bodies. What `salt` differs in shares no prefix."""

    def __init__(self, target: Target, salt: tuple[int, ...], shared: float = 0.0) -> None:
        self._target = target
        self._salt = salt
        self._shared = shared
        """Share of each prompt that is the same in all of them."""

    def body(self, number: int, planned: Planned) -> bytes:
        """The JSON of request `number`, streamed, with its token counts at the end."""
        target = self._target
        prompt: list[int] | str
        if target.token_ids:
            low, high = target.token_ids
            prompt = (self._draw(number, planned.prompt_tokens, planned.hash_ids, high - low) + low).tolist()
        else:
            count = max(round((planned.prompt_tokens - target.tokens_around) / target.tokens_per_word), 1)
            prompt = " ".join(WORDS[index] for index in self._draw(number, count, planned.hash_ids, len(WORDS)))
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(target.body(prompt, planned.output_tokens) | options)

    def _draw(self, number: int, count: int, hash_ids: tuple[int, ...], below: int) -> np.ndarray:
        """Numbers of tokens or words; those that a trace's `hash_ids` or `shared` make equal come first."""
        if hash_ids:
            known = hash_ids[: count // HASHED_TOKENS]
            blocks = [np.random.default_rng((*self._salt, 1, id)).integers(below, size=HASHED_TOKENS) for id in known]
            blocks.append(self._own(number, count - len(known) * HASHED_TOKENS, below))
            return np.concatenate(blocks)
        shared = int(count * self._shared)
        if not shared:
            return self._own(number, count, below)
        prefix = np.random.default_rng((*self._salt, 2)).integers(below, size=shared)
        return np.concatenate([prefix, self._own(number, count - shared, below)])

    def _own(self, number: int, count: int, below: int) -> np.ndarray:
        return np.random.default_rng((*self._salt, 0, number)).integers(below, size=count)
