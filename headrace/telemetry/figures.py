"""What workers publish in the registry: each figure's name (`/metrics` puts `headrace_` before it) and meaning.

`<cause>` and the like stand for one word of a closed set. `docs/metrics.md` is made from this, and a test compares it
with what workers publish.
"""

from __future__ import annotations

import re
from functools import cache

FIGURES: dict[str, str] = {
    "kv_pages_in_use": "KV pages that requests hold",
    "kv_pages_total": "KV pages that there are",
    "kv_page_tokens": "Tokens of a KV page",
    "requests_waiting": "Prefill: requests taken that wait for pages. Decode: prompts on their way here, or ready",
    "requests_running": "Prefill: prompts held. Decode: requests in the batch",
    "requests_finished_total": "Requests that this worker did its part of",
    "requests_failed_total": "Attempts that this worker gave up",
    "requests_cancelled_total": "Attempts that nobody waited for any more",
    "preemptions_total": "Requests given up because the KV cache was full; they are computed again",
    "prompt_tokens_total": "Prompt tokens computed, those found in the prefix cache not among them",
    "prompts_total": "Prompts computed",
    "prefill_busy_seconds_total": "Time in which prompts were computed",
    "prompt_tokens_waiting": "Prompt tokens that were taken and are not computed yet",
    "prefill_step_tokens": "Tokens of a full prefill step",
    "prefill_tokens_per_second": "Prompt tokens a second of large prefill steps",
    "max_num_seqs": "Requests that the batch has places for",
    "inter_token_seconds": "Time between the ends of two decode steps, a moving mean; 0 where nothing runs",
    "inter_token_alone_seconds": "The same with one request in the batch",
    "inter_token_steps_total": "Decode steps that followed another one at once",
    "inter_token_step_requests_total": "Requests of these steps",
    "inter_token_step_seconds_total": "Time between the ends of these steps and those before",
    "prompts_steered_total": "Prompts taken from the queue and passed on to the prefill worker that holds their prefix",
    "prompts_not_steered_total": "Prompts whose prefix another prefill worker holds that has too much to do",
    "in_place_most_tokens": "Prompt tokens that a decode worker computes itself in a pass, at most",
    "in_place_tokens_waiting": "Prompt tokens that wait for such a pass",
    "in_place_prompts_total": "Prompts computed by a decode worker itself",
    "in_place_prompt_tokens_total": "Tokens of those, less what was found in its prefix cache",
    "in_place_pass_seconds": "What such a pass takes, whatever its tokens; missing where none was measured lately",
    "in_place_token_seconds": "What it takes more for each token",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits_total": "Prompt tokens found there",
    "generation_tokens_total": "Tokens made by decode steps",
    "decode_steps_total": "Decode steps",
    "decode_step_requests_total": "Requests of all decode steps; over the steps, the mean batch size",
    "handoff_recomputed_total": "Prompts computed again after a failure",
    "handoff_moved_here_total": "Requests taken over from another decode worker, running",
    "handoff_bytes_total": "KV sent, in bytes",
    "handoff_pages_total": "KV pages sent, counted once a layer",
    "handoff_repeats_total": "How often KV that was lost on the way was sent again",
    "handoff_gigabytes_per_second": "KV sent over the last ten seconds",
    "handoff_grant_wait_seconds_total": "Time from Offer to Grant",
    "handoff_exposed_seconds_total": "Time from the first token to the acknowledgement",
    "handoff_transport_<name>_total": "Handoffs acknowledged, by transport: local, cuda_ipc, shm, nixl, tcp",
    "handoff_aborts_<cause>_total": "Handoffs given up, by cause",
    "messages_refused_total": "Messages from the mesh that could not be used",
    "speculation_<drafter>_drafted_total": "Draft tokens verified",
    "speculation_<drafter>_accepted_total": "Draft tokens that stood",
    "speculation_<drafter>_mean_accepted_length": "Draft tokens that stood, of a draft",
    "speculation_steps_total": "Decode steps of a worker that may draft",
    "speculation_steps_without_drafts_total": "Those of them that verified no draft",
    "speculation_drafting_seconds_total": "Time spent to draft and to choose lengths",
    "speculation_verification_seconds_total": "Time of the steps that verified drafts",
}
UNKNOWN = "A worker's own figure"
_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_PATTERNS = [(re.compile(re.sub("<.*?>", "[a-z0-9_]+", name)), help) for name, help in FIGURES.items() if "<" in name]


@cache  # a scrape asks for every figure of every worker
def describe(name: str) -> str | None:
    """What a figure means, `UNKNOWN` if nothing says so; None where it is no name at all."""
    if not _NAME.fullmatch(name):
        return None
    if (help := FIGURES.get(name)) is not None:
        return help
    return next((help for pattern, help in _PATTERNS if pattern.fullmatch(name)), UNKNOWN)


def is_counter(name: str) -> bool:
    """Whether a figure only grows."""
    return name.endswith("_total") and name != "kv_pages_total"
