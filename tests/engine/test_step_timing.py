"""What steps are timed at the start of a decode worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.engine import step_timing
from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.step_timing import ROWS, time_steps
from tests.engine.test_families import FUSED, save


@pytest.mark.parametrize(("max_num_seqs", "max_model_len", "expected"), [(8, 128, ROWS), (1, 16, ROWS[:-1])])
def test_all_rows_that_the_settings_allow_are_timed(
    max_num_seqs: int,
    max_model_len: int,
    expected: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the pages come back."""
    monkeypatch.setattr(step_timing, "BUDGET_SECONDS", 0.0)
    save(tmp_path, *FUSED["llama"])
    config = EngineConfig(tmp_path, device="cpu", max_model_len=max_model_len, max_num_seqs=max_num_seqs, cpu_threads=1)
    engine = Engine.load(config)
    seconds = time_steps(engine)
    assert seconds.plain is seconds.drafted
    assert tuple(seconds.plain) == expected
    assert all(taken > 0 for taken in seconds.plain.values())
    assert engine.pool.num_in_use == 0
