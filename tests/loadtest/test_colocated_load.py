"""What the load test of a colocated mesh serves, and what it counts as served in time."""

from __future__ import annotations

from pathlib import Path

from headrace.engine.engine import Engine, EngineConfig
from headrace.gateway.tokenizer import Tokenizer
from headrace.loadtest.colocated_load import QUICK, Stream
from headrace.loadtest.shapes import servable_folder
from headrace.models.locate import locate_model


def test_a_folder_without_weights_can_be_served(tmp_path: Path) -> None:
    """Gateway and worker both take it, and every token has a text of its own."""
    folder = locate_model(str(servable_folder(QUICK.config, tmp_path)))
    tokenizer = Tokenizer.load(folder.path)
    tokenizer.close()
    texts = {tokenizer.vocabulary.bytes_of(token) for token in range(QUICK.config["vocab_size"])}
    assert len(texts) == tokenizer.vocabulary_size == QUICK.config["vocab_size"]
    assert tokenizer.vocabulary.bytes_of(1000) == b"t1000"
    assert Engine.load(EngineConfig(folder.path, device="cpu", random_weights=True)).model_config.vocab_size == 4096


def test_one_late_token_spoils_a_stream() -> None:
    """So do a late first token, a token too few, and a failure."""
    tokens = QUICK.tokens_out
    on_time = [10.1 + 0.01 * number for number in range(tokens)]
    assert Stream(10.0, on_time, tokens).is_good(QUICK)
    late = [*on_time[:5], *(at + 0.015 for at in on_time[5:])]
    assert not Stream(10.0, late, tokens).is_good(QUICK)
    assert not Stream(9.8, on_time, tokens).is_good(QUICK)
    assert not Stream(10.0, on_time, tokens - 1).is_good(QUICK)
    assert not Stream(10.0, [], 0, "status 503").is_good(QUICK)
