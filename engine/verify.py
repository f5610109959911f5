"""Which drafted tokens stand: those that the target draws itself.

The usual rule (arXiv:2211.17192) accepts a drafted token with a probability and draws anew where it is refused: the
distribution is the target's, but which tokens come depends on the drafts. Here each position's token is drawn from the
target, with that position's key, as if there were no draft; drafts stand as far as they say the same. So the output is
not only distributed as without drafts, it is the same output, whatever was drafted, in whatever lengths, by whichever
worker: a request that moves goes on with the text that it would have had. A drafter's probabilities are not needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from headrace.engine.sampler import BatchSampler, SampledToken, SamplingRow, describe_logprobs, likeliest


def verify(
    rows: Sequence[SamplingRow],
    generated: Sequence[int],
    drafts: Sequence[Sequence[int]],
    logits: torch.Tensor,
    sampler: BatchSampler | None = None,
) -> list[list[SampledToken]]:
    """The next tokens of each request, one at least and one more than its draft at most.

    `generated` counts each request's output tokens so far. logits [sum of (1 + draft's length), V] float32: those after
    each request's newest token and after each token of its draft. `sampler`: of these rows, if there is one. Each
    position is drawn for the requests whose drafts stood until there, so a draft that is refused costs no draws. Counts
    of penalized rows are brought up to date, in tensors that may be new: samplers of such rows are of no use any more.
    """
    first_rows = [0, *itertools.accumulate(len(draft) + 1 for draft in drafts)]
    if all(row.takes_likeliest for row in rows):
        tokens = likeliest(logits).tolist()
        drawn = [
            _standing(tokens[first:behind], draft)
            for draft, (first, behind) in zip(drafts, itertools.pairwise(first_rows), strict=True)
        ]
    else:
        sampler = sampler or BatchSampler(rows, logits.shape[1], logits.device)
        drawn = _drawn(rows, generated, drafts, logits, first_rows, sampler)
    return [
        _described(row, tokens, logits, first) for row, tokens, first in zip(rows, drawn, first_rows[:-1], strict=True)
    ]


def _standing(token_ids: Sequence[int], draft: Sequence[int]) -> list[int]:
    """The target's tokens up to the first that the draft does not say, or the one behind it."""
    stood = next((at for at, token in enumerate(draft) if token != token_ids[at]), len(draft))
    return [*token_ids[: stood + 1]]


def _drawn(
    rows: Sequence[SamplingRow],
    generated: Sequence[int],
    drafts: Sequence[Sequence[int]],
    logits: torch.Tensor,
    first_rows: Sequence[int],
    whole: BatchSampler,
) -> list[list[int]]:
    drawn: list[list[int]] = [[] for _ in rows]
    standing = list(range(len(rows)))
    while standing:
        at, sampler = len(drawn[standing[0]]), whole
        if len(standing) < len(rows):
            sampler = BatchSampler([rows[r] for r in standing], logits.shape[1], logits.device)
        positions = torch.tensor([generated[r] + at for r in standing], device=logits.device)
        tokens = sampler.sample(logits[[first_rows[r] + at for r in standing]], positions).tolist()
        for request, token in zip(standing, tokens, strict=True):
            drawn[request].append(token)
        standing = [r for r in standing if at < len(drafts[r]) and drafts[r][at] == drawn[r][at]]
    return drawn


def _described(row: SamplingRow, token_ids: list[int], logits: torch.Tensor, first: int) -> list[SampledToken]:
    wanted = row.params.logprobs
    if wanted is None:
        return [SampledToken(token, None) for token in token_ids]
    own = logits[first : first + len(token_ids)]
    found = describe_logprobs(own, torch.tensor(token_ids, device=logits.device), [wanted] * len(token_ids))
    return [SampledToken(token, logprobs) for token, logprobs in zip(token_ids, found, strict=True)]
