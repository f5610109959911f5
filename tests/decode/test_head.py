"""Drafts of the built-in model's head: they are right often enough, and change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headrace.decode.chain import MAX_UNREAD, confidence_depth
from headrace.decode.head import HeadDrafter
from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.step_timing import StepSeconds
from headrace.loadtest.spec_bench import Prompts
from headrace.loadtest.spec_prompts import chat_messages
from headrace.loadtest.spec_side import Side
from headrace.messages.request import SamplingParams
from headrace.models.locate import BUILT_IN_HEAD, locate_model

OUTPUT = 16
pytestmark = pytest.mark.timeout(300)  # float32 takes its time where cores are shared
GREEDY = SamplingParams(max_tokens=OUTPUT, temperature=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """In float32, where the same tokens come whatever the batch."""
    return Engine.load(
        EngineConfig(
            locate_model("smollm2").path,
            device="cpu",
            dtype="float32",
            max_model_len=256,
            max_num_seqs=4,
            kv_cache_bytes=2**27,
            cpu_threads=1,
            draft_head=BUILT_IN_HEAD,
        )
    )


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> Iterator[Prompts]:
    """With costs that make drafts pay."""
    prompts = Prompts(engine)
    costs = {1: 1.0, 16: 1.01}
    prompts.step_seconds, prompts.head_seconds = StepSeconds(costs, costs), {1: 0.001}
    yield prompts
    prompts.forget()


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_are_those_without_drafts(engine: Engine, prompts: Prompts, batch: int) -> None:
    """Greedy answers, in steps of one request and of several; all pages come back."""
    messages = chat_messages("open chat", 2)

    def outputs(drafts: bool) -> tuple[list[list[int]], int, int]:
        speculator = prompts.speculator() if drafts else None
        side = Side(engine, (prompts.request(message, OUTPUT) for message in messages), batch, speculator)
        while side.step():
            pass
        accepted = 0
        if speculator is not None:
            speculator.propose([])  # counts what the last step brought
            accepted = speculator.counters.of["head"].accepted
        return sorted(s.token_ids for s in side.ended), len(side.steps), accepted

    plain, steps, _ = outputs(drafts=False)
    drafted, fewer, accepted = outputs(drafts=True)
    assert drafted == plain
    assert accepted > 0.3 * fewer
    assert fewer < 0.8 * steps
    prompts.forget()
    engine.pool.check_integrity()
    assert engine.pool.num_in_use == 0


def test_what_waits_is_read_later_with_the_same_result(engine: Engine, prompts: Prompts) -> None:
    """A head that pauses for some steps guesses as one that never did."""
    guesses = []
    for depths in ([3] * 4, [0] * 3 + [3]):
        drafter, batch = HeadDrafter(engine), DecodeBatch[tuple[str, int]](engine)
        sequence = prompts.request(chat_messages("open chat", 1)[0], OUTPUT)
        sequence.pages += engine.pool.allocate(2)
        batch.join(sequence.key, sequence.token_ids, 1, sequence.pages, GREEDY)
        for depth in depths:
            batch.start()
            batch.collect()
            found = drafter.draft(batch, depth)
        guesses.append(found[sequence.key].token_ids)
        engine.pool.release(sequence.pages)
    assert guesses[0] == guesses[1]
    assert len(guesses[0]) > 0


def test_no_more_waits_than_may(engine: Engine) -> None:
    """A request that a head was not asked about for long is not drafted for."""
    drafter, batch = HeadDrafter(engine), DecodeBatch[tuple[str, int]](engine)
    pages = engine.pool.allocate(engine.pool.pages_for(MAX_UNREAD + 8))
    (output,) = engine.prefill([PrefillChunk([1, 2, 3], 0, 3, pages, GREEDY)])
    assert output.token is not None
    batch.join(("a", 0), [1, 2, 3, output.token.token_id], 1, pages, GREEDY)
    for _ in range(MAX_UNREAD + 2):
        batch.start()
        batch.collect()
        assert drafter.draft(batch, 0) == {}
        assert sum(len(one.token_ids) for one in drafter._unread.values()) <= MAX_UNREAD
    batch.step()
    assert drafter.draft(batch, 3) == {}
    engine.pool.release(pages)


def test_a_draft_ends_where_the_pages_do(engine: Engine) -> None:
    """It has no place to read a further token into."""
    drafter, batch = HeadDrafter(engine), DecodeBatch[tuple[str, int]](engine)
    size = engine.layout.page_size
    pages = engine.pool.allocate(1)
    prompt = list(range(100, 100 + size - 2))
    (output,) = engine.prefill([PrefillChunk(prompt, 0, len(prompt), pages, GREEDY)])
    assert output.token is not None
    batch.join(("a", 0), [*prompt, output.token.token_id], 1, pages, GREEDY)
    batch.start()
    batch.collect()
    drafter._engine.pool.check_integrity()
    assert len(drafter.draft(batch, 6)["a", 0].token_ids) <= 2
    engine.pool.release(pages)


def test_depths_tell_places_and_confidence_apart() -> None:
    """32 of them, as many as there are estimates."""
    assert confidence_depth(0, 0.0) == 0
    assert confidence_depth(0, 1.0) == 7
    assert confidence_depth(1, 0.13) == 9
    assert confidence_depth(9, 0.999) == 31
