"""Which drafted tokens stand: those that the target draws itself.

The usual rule (arXiv:2211.17192) accepts a drafted token with a probability and draws anew where it is refused: the
distribution is the target's, but which tokens come depends on the drafts. Here each position's token is drawn from the
target, with that position's key, as if there were no draft; drafts stand as far as they say the same. So the output is
not only distributed as without drafts, it is the same output, whatever was drafted, in whatever lengths, by whichever
worker: a request that moves goes on with the text that it would have had. A drafter's probabilities are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.engine.sampler import BatchSampler, SampledToken, SamplingRow, describe_logprobs


def accepted_length(draft: Sequence[int], drawn: Sequence[int]) -> int:
    """How many tokens of `draft` stand, given the target's own draws after each of its prefixes, the empty one first.

    `drawn` is one longer than `draft`: the draw after the last token that stands is the next token.
    """
    for index, token in enumerate(draft):
        if drawn[index] != token:
            return index
    return len(draft)


def verify(
    rows: Sequence[SamplingRow], generated: Sequence[int], drafts: Sequence[Sequence[int]], logits: torch.Tensor
) -> list[list[SampledToken]]:
    """The next tokens of each request, one at least and one more than its draft at most.

    `generated` counts each request's output tokens so far. logits [sum of (1 + draft's length), V] float32: those after
    each request's newest token and after each token of its draft. Counts of penalized rows are brought up to date.
    """
    positions = [first + at for first, draft in zip(generated, drafts, strict=True) for at in range(len(draft) + 1)]
    along = [state for row, draft in zip(rows, drafts, strict=True) for state in _along(row, draft)]
    sampler = BatchSampler(along, logits.shape[1], logits.device)
    drawn = sampler.sample(logits, torch.tensor(positions, device=logits.device)).tolist()
    output, first = [], 0
    for row, draft in zip(rows, drafts, strict=True):
        count = accepted_length(draft, drawn[first : first + len(draft) + 1]) + 1
        output.append(_described(row, drawn[first : first + count], logits[first : first + count]))
        first += len(draft) + 1
    return output


def _along(row: SamplingRow, draft: Sequence[int]) -> list[SamplingRow]:
    """A request's sampling state after each prefix of its draft."""
    if row.counts is None:
        return [row] * (len(draft) + 1)
    counts = row.counts.repeat(len(draft) + 1, 1)
    for at, token in enumerate(draft):
        counts[at + 1 :, token] += 1
    return [SamplingRow(row.params, so_far, row.in_prompt) for so_far in counts]


def _described(row: SamplingRow, token_ids: list[int], logits: torch.Tensor) -> list[SampledToken]:
    if row.counts is not None:
        for token in token_ids:
            row.counts[token] += 1
    wanted = row.params.logprobs
    if wanted is None:
        return [SampledToken(token, None) for token in token_ids]
    found = describe_logprobs(logits, torch.tensor(token_ids, device=logits.device), [wanted] * len(token_ids))
    return [SampledToken(token, logprobs) for token, logprobs in zip(token_ids, found, strict=True)]
