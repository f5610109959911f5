"""One line a request that a person can read:

chat-7f03b1 p1->d0 ttft 212ms (queue 12 prefill 140 kv 38 first 22) 64 tok 41 tok/s kv=received
"""

from __future__ import annotations

import logging

from headrace.gateway.answer import Answer
from headrace.gateway.callers import ANYBODY

log = logging.getLogger("headrace.gateway.requests")


def log_request(answer: Answer) -> None:
    """Write the line of a request that is over. Where there are several choices, times are the first one's."""
    choice = answer.choices[0]
    tokens = sum(len(each.token_ids) for each in answer.choices)
    words = [f"{answer.job.kind}-{answer.id.partition('-')[2][:6]}"]
    words.append(f"{choice.prefill_worker or '?'}->{choice.decode_worker[0] if choice.decode_worker else '?'}")
    if choice.first_token_at is not None:
        words.append(_first_token(answer))
    words.append(f"{tokens} tok")
    if (rate := _rate(answer)) is not None:
        words.append(f"{rate:.0f} tok/s")
    words.append(f"kv={_kv(answer)}")
    if len(answer.choices) > 1:
        words.append(f"choices={len(answer.choices)}")
    if requeues := sum(each.requeues for each in answer.choices):
        words.append(f"requeues={requeues}")
    if answer.outcome != "ok":
        words.append(answer.outcome)
    if answer.terms.caller != ANYBODY:
        words.append(f"key={answer.terms.caller.name}")
    if answer.job.user is not None:
        words.append(f"user={answer.job.user[:64]!r}")
    log.info(" ".join(words))


def _first_token(answer: Answer) -> str:
    choice = answer.choices[0]
    assert choice.first_token_at is not None, "the caller checked"
    ttft = (choice.first_token_at - choice.created) * 1000
    report = choice.report
    if report is None:
        return f"ttft {ttft:.0f}ms"
    first = max(ttft - report.queue_ms - report.prefill_ms - report.handoff_ms, 0)
    parts = f"queue {report.queue_ms:.0f} prefill {report.prefill_ms:.0f} kv {report.handoff_ms:.0f} first {first:.0f}"
    return f"ttft {ttft:.0f}ms ({parts})"


def _kv(answer: Answer) -> str:
    """Where the prompt's keys and values came from; the dearest way, where there are several choices."""
    if any(choice.attempt > 0 for choice in answer.choices):
        return "recomputed"
    in_place = all(choice.report is not None and choice.report.in_place for choice in answer.choices)
    return "in-place" if in_place else "received"


def _rate(answer: Answer) -> float | None:
    """Tokens a second of the whole answer after its first token."""
    firsts = [choice.first_token_at for choice in answer.choices if choice.first_token_at is not None]
    lasts = [choice.last_token_at for choice in answer.choices if choice.last_token_at is not None]
    later = sum(len(choice.token_ids) for choice in answer.choices) - len(firsts)
    return later / (max(lasts) - min(firsts)) if later > 0 and max(lasts) > min(firsts) else None
