"""Four layers of an 8B model on the chip, in bfloat16, against the same weights in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace.engine import graph_decoder
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.weights import DecoderWeights, LayerWeights
from headrace.kernels.linear import Linear
from headrace.loadtest.shapes import LLAMA_8B, model_folder
from headrace.messages.request import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPT = [(37 * i) % 1000 for i in range(100)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Random weights; a small vocabulary keeps the CPU's part short. Passes with prompts are graphs of two layers."""
    config = LLAMA_8B | {"num_hidden_layers": 4, "vocab_size": 1024}
    folder: Path = model_folder(config, tmp_path_factory.mktemp("model"))
    engine = Engine.load(
        EngineConfig(
            folder, device="cuda", max_model_len=256, max_num_seqs=128, kv_cache_bytes=2**30, random_weights=True
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_decoder, "PART_LAYERS", 2)
        engine.prepare_decode(lambda what, fraction: None, drafts=True)
        yield engine


@pytest.fixture(scope="module")
def exact(engine: Engine) -> torch.Tensor:
    """Logits after each token of the prompt, in float64."""
    assert isinstance(engine.model, FusedDecoder)

    def wide(x: torch.Tensor | Linear | None) -> torch.Tensor | Linear | None:
        if isinstance(x, Linear):
            return Linear(x.weight.cpu().double())
        return None if x is None else x.cpu().double()

    weights = engine.model.weights
    layers = [LayerWeights(**{name: wide(value) for name, value in vars(layer).items()}) for layer in weights.layers]  # type: ignore[arg-type]
    embedding, norm, head = (wide(x) for x in (weights.embedding, weights.norm, weights.head))
    model = FusedDecoder(engine.model_config, DecoderWeights(embedding, layers, norm, head))  # type: ignore[arg-type]
    layout = CacheLayout("float64", 4, engine.layout.num_kv_heads, engine.layout.head_dim, engine.layout.page_size)
    cache = KVCache(layout, 8, torch.device("cpu"))
    config = EngineConfig(engine.config.model_folder, device="cpu")
    reference = Engine(config, engine.model_config, model, cache, 128)
    chunk = PrefillChunk(PROMPT, 0, len(PROMPT), list(range(7)), SamplingParams(max_tokens=1))
    return model.logits(model.forward(reference._pack([chunk]), cache, None)).double()


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean square error, as a share of the logits' deviation."""
    return float((got.cpu().double() - expected).square().mean().sqrt() / expected.std())


@torch.inference_mode()
def test_prefill_gives_the_exact_logits(engine: Engine, exact: torch.Tensor) -> None:
    """Up to the rounding of bfloat16, in one chunk and in two."""
    for cut in (len(PROMPT), 48):
        pages = engine.pool.allocate(7)
        for start, end in ((0, cut), (cut, len(PROMPT))):
            if end > start:
                chunk = PrefillChunk(PROMPT, start, end - start, pages, SamplingParams(max_tokens=1))
                hidden = engine.model.forward(engine._pack([chunk]), engine.cache, None)
                assert error(engine.model.logits(hidden), exact[start:end]) < 0.03
        engine.pool.release(pages)


@pytest.mark.parametrize("copies", [1, 2, 5])
@torch.inference_mode()
def test_a_captured_pass_of_prompts_gives_the_exact_logits(engine: Engine, exact: torch.Tensor, copies: int) -> None:
    """Of the prompt's end, by as many requests; each is computed in two chunks, of passes of few and of many rows."""
    decoder = engine.graph_decoder
    assert decoder is not None
    tables, sampling = [engine.pool.allocate(7) for _ in range(copies)], SamplingParams(max_tokens=1)
    for start, length in ((0, 16), (16, 84)):
        chunks = [PrefillChunk(PROMPT, start, length, table, sampling) for table in tables]
        assert decoder.can_share(0, chunks)
        logits = decoder.compute_prompts(chunks, range(copies), lambda layers: None)
        assert error(logits, exact[[start + length - 1] * copies]) < 0.03
    for table in tables:
        engine.pool.release(table)


@pytest.mark.parametrize("rows", [1, 3, 30, 64, 100])
@torch.inference_mode()
def test_decode_gives_the_exact_logits(engine: Engine, exact: torch.Tensor, rows: int) -> None:
    """The last token of prefixes of the prompt, one a row, in every kind of batch."""
    decoder = engine.graph_decoder
    assert decoder is not None
    decoder.state.positions.fill_(-1)
    held, ends = [], [len(PROMPT) - 1 - row % 90 for row in range(rows)]
    for row, end in enumerate(ends):
        pages = engine.pool.allocate(7)
        engine.prefill([PrefillChunk(PROMPT[: end + 1], 0, end, pages, SamplingParams(max_tokens=1))])
        decoder.state.tokens[row], decoder.state.positions[row] = PROMPT[end], end
        decoder.block_table[row, :7] = torch.tensor(pages)
        held += pages
    got = decoder.step(rows).clone()
    engine.pool.release(held)
    assert error(got, exact[ends]) < 0.03


@pytest.mark.parametrize("requests", [1, 3, 8, 12])
@torch.inference_mode()
def test_a_step_with_drafts_gives_the_exact_logits(engine: Engine, exact: torch.Tensor, requests: int) -> None:
    """The last tokens of prefixes of the prompt, 16 a request, in steps of 16 to 192 rows."""
    decoder = engine.graph_decoder
    assert decoder is not None
    held, ends = [], []
    decoder.rows.layout.fill_(-1)
    for request in range(requests):
        start = len(PROMPT) - 16 - request * 7 % 80
        pages = engine.pool.allocate(7)
        engine.prefill([PrefillChunk(PROMPT[: start + 1], 0, start, pages, SamplingParams(max_tokens=1))])
        decoder.state.tokens[request], decoder.state.positions[request] = PROMPT[start], start
        decoder.block_table[request, :7] = torch.tensor(pages)
        own = slice(request * 16, request * 16 + 16)
        decoder.rows.layout[0, own], decoder.rows.layout[1, own] = request, request * 16
        decoder.rows.layout[2, own] = torch.tensor([0, *PROMPT[start + 1 : start + 16]])
        decoder.rows.layout[3, own] = torch.arange(16, dtype=torch.int32)
        held += pages
        ends += range(start, start + 16)
    got = decoder.step_drafted(requests * 16).clone()
    engine.pool.release(held)
    assert error(got, exact[ends]) < 0.03


@torch.inference_mode()
def test_prompts_beside_a_step_give_the_exact_logits(engine: Engine, exact: torch.Tensor) -> None:
    """Both those of the prompt's last token and those of the running requests."""
    decoder = engine.graph_decoder
    assert decoder is not None
    decoder.state.positions.fill_(-1)
    sampling, ends = SamplingParams(max_tokens=1, temperature=0), [10, 99, 50]
    held = engine.pool.allocate(28)
    tables = [held[7 * row : 7 * row + 7] for row in range(4)]
    for row, end in enumerate(ends):
        engine.prefill([PrefillChunk(PROMPT[: end + 1], 0, end, tables[row], sampling)])
        decoder.state.tokens[row], decoder.state.positions[row] = PROMPT[end], end
        decoder.block_table[row, :7] = torch.tensor(tables[row])
    for start, length in ((0, 48), (48, 52)):
        chunk = PrefillChunk(PROMPT, start, length, tables[3], sampling)
        started = engine.start_shared([chunk], None, 3)
        assert started.running_logits is not None
        assert error(started.running_logits, exact[ends]) < 0.03
    (output,) = started.outputs()
    engine.pool.release(held)
    assert output.token is not None
    assert exact[-1].max() - exact[-1, output.token.token_id] < 0.1 * exact[-1].std()
