"""Which tokens of a step's rows grammars allow: found on the host, applied to the logits before anything reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from headrace.grammar import Matcher
from headrace.kernels.mask_logits import mask_logits
from headrace.kernels.upload import upload


class ConstrainedRows(NamedTuple):
    """Rows of one request: one after its newest token, one after each token of its draft."""

    first: int
    matcher: Matcher
    draft: Sequence[int] = ()


def mask_rows(logits: torch.Tensor, constrained: Sequence[ConstrainedRows]) -> None:
    """Make the tokens impossible, in `logits` [R, V], that may not come in these rows.

    On a GPU the masks are found while the device computes the logits.
    """
    rows = np.concatenate([own.first + np.arange(len(own.draft) + 1) for own in constrained])
    masks = np.empty((len(rows), -(-logits.shape[1] // 32)), np.int32)
    start = 0
    for _, matcher, draft in constrained:
        matcher.fill(masks[start : start + len(draft) + 1], draft)
        start += len(draft) + 1
    sent_rows, sent_masks = upload([rows, masks.reshape(-1)], logits.device)
    mask_logits(logits, sent_rows, sent_masks.view(masks.shape))
