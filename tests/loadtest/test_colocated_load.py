"""What the load test of a colocated mesh serves."""

from __future__ import annotations

from pathlib import Path

from headrace.engine.engine import Engine, EngineConfig
from headrace.gateway.tokenizer import Tokenizer
from headrace.loadtest.colocated_load import QUICK
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
