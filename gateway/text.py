"""The text of one answer as it grows: detokenized, cut at stop strings, with log probabilities in step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.gateway.detokenizer import Detokenizer
from headrace.gateway.stop_strings import StopStrings
from headrace.gateway.vocabulary import Vocabulary
from headrace.messages.stream import TokenLogprobs


@dataclass(frozen=True)
class ScoredToken:
    """A token's log probabilities and where in the answer's text, in characters, it begins."""

    scores: TokenLogprobs
    offset: int


@dataclass
class Delta:
    """What became known of an answer since the client was last told."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class AnswerText:
    """Takes tokens, gives deltas. What nobody takes grows no further than the answer itself."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], min_tokens: int) -> None:
        self.stopped = False
        """True once a stop string ended the text; further tokens are ignored."""
        self._detokenizer = Detokenizer(vocabulary)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._pushed = 0
        self._decoded = 0
        self._shown = 0
        self._waiting: deque[ScoredToken] = deque()
        self._delta = Delta()

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def push(self, token_id: int, scores: TokenLogprobs | None) -> None:
        """Add one token of the output. Stop strings count from output token `min_tokens` on."""
        if self.stopped:
            return
        self._pushed += 1
        if scores is not None:
            self._waiting.append(ScoredToken(scores, self._decoded))
        text = self._detokenizer.push(token_id)
        self._decoded += len(text)
        if self._pushed > self._min_tokens:
            text, self.stopped = self._stops.push(text)
        self._show(text)

    def finish(self) -> None:
        """Nothing more comes: let out what was held back."""
        if not self.stopped:
            tail = self._detokenizer.flush()
            text, self.stopped = self._stops.push(tail)
            self._show(text if self.stopped else text + self._stops.flush())
        if not self.stopped:  # tokens without text at the very end
            self._delta.tokens.extend(self._waiting)
        self._waiting.clear()

    def take(self) -> Delta:
        """All that is new since the last call."""
        delta, self._delta = self._delta, Delta()
        return delta

    def _show(self, text: str) -> None:
        self._delta.text += text
        self._shown += len(text)
        while self._waiting and self._waiting[0].offset < self._shown:
            self._delta.tokens.append(self._waiting.popleft())
