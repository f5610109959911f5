"""A model, its cache and its pages on one device: what workers and benchmarks use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace.engine.arriving import ArrivingTokens
from headrace.engine.base import LayerAnnounced, Model, Ready
from headrace.engine.batch import ForwardBatch
from headrace.engine.cpu_share import CpuShare
from headrace.engine.device import choose_device, choose_dtype
from headrace.engine.draft_head import DraftHead, TorchHead
from headrace.engine.draft_model import DraftCache, DraftModel, draft_layout, layers_taken
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.kv_cache import CacheLayout, KVCache
from headrace.engine.loading import load_draft_head, load_draft_model, load_model, num_pages
from headrace.engine.model_config import ModelConfig
from headrace.engine.page_pool import PagePool
from headrace.engine.prompt_rows import lay_out
from headrace.engine.sampler import BatchSampler, SampledToken, SamplingRow, describe_logprobs
from headrace.engine.token_masks import ConstrainedRows, mask_rows
from headrace.engine.weights import Progress
from headrace.grammar import Grammars, Matcher
from headrace.kernels.paged_attention import PagedPlan
from headrace.kernels.prefill_attention import FEW_TOKENS, plan_prefill
from headrace.kernels.upload import upload
from headrace.messages.request import SamplingParams
from headrace.messages.stream import TokenLogprobs

if TYPE_CHECKING:
    from headrace.engine.graph_decoder import GraphDecoder
    from headrace.engine.graph_head import GraphHead

LOGPROB_ROWS = 256
"""Rows of prompt logits held at once."""


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model; the fields are the flags of the same meaning."""

    model_folder: Path
    device: str = "auto"
    dtype: str = "auto"
    model_impl: str = "auto"
    page_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 256
    cpu_threads: int | None = None
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    random_weights: bool = False
    draft_head: Path | None = None
    """Folder of a draft head; the cache has a layer more for its keys and values."""
    draft_model: Path | None = None
    """Folder of a draft model, in place of a head; the cache has some layers more for its keys and values."""


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens `start` to `start + length` of a sequence whose earlier tokens are in `pages` already."""

    token_ids: Sequence[int]
    """The whole sequence: the prompt, and `generated` tokens of earlier output."""
    start: int
    length: int
    pages: Sequence[int]
    sampling: SamplingParams
    generated: int = 0
    matcher: Matcher | None = None
    """For who wants to know whether the output could follow its grammar; it starts here."""

    @property
    def is_last(self) -> bool:
        """Whether the sequence is complete after this chunk."""
        return self.start + self.length == len(self.token_ids)


@dataclass(frozen=True)
class PrefillOutput:
    """What one chunk gave.

    `token` follows a complete sequence (but where `max_tokens` is 0); `prompt_logprobs` are those of the prompt tokens
    `start + 1` to `start + length`, where asked for.
    """

    token: SampledToken | None
    prompt_logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class StartedPrefill:
    """A forward pass that may still run on the device."""

    outputs: Callable[[], list[PrefillOutput]]
    """Waits for its end, on the thread that started it."""
    running_logits: torch.Tensor | None = None
    """float32 [R, vocabulary], of the running requests whose step was computed with the chunks."""
    ended: Ready | None = None
    """The pass; None where it has ended, or nobody waits for more than the outputs."""


class Engine:
    """`prefill` belongs on one thread, and so do decode steps: on a CPU on the same one.

    The pool may be used on another one.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: Model,
        cache: KVCache,
        max_model_len: int,
        head: DraftHead | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.model = model
        self.head = head
        self.draft = draft
        self.cache = cache
        self.layout = cache.layout
        if head is not None:
            head.attach(cache)
        self.pool = PagePool(cache.num_pages, cache.layout.page_size)
        self.max_model_len = max_model_len
        self.device = cache.pages.device
        self.grammars = Grammars(config.model_folder, model_config.vocab_size)
        self.cpu_share = CpuShare(config.cpu_threads, self._use_threads)
        self.graph_decoder: GraphDecoder | None = None
        """Set by `prepare_decode` where the model and the device have one."""
        self.graph_head: GraphHead | None = None
        """The same of the draft head."""

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> Engine:
        """Read the weights and take memory for the cache. Raises `EngineError`."""
        progress = progress or (lambda what, fraction: None)
        device = choose_device(config.device)
        model_config = ModelConfig.from_folder(config.model_folder)
        dtype = choose_dtype(config.dtype, device, model_config.dtype)
        limit = model_config.max_position_embeddings
        max_model_len = min(config.max_model_len or limit, limit)
        with torch.inference_mode():
            model = load_model(config, model_config, device, dtype, max_model_len, progress)
            head = None
            if config.draft_head is not None:
                head = load_draft_head(config, config.draft_head, model_config, model, max_model_len)
                model.feature_layers = head.feature_layers
        cache_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else model.cache_dtype or dtype
        layout = CacheLayout(
            str(cache_dtype).removeprefix("torch."),
            model_config.num_layers + (head is not None),
            model_config.num_kv_heads,
            model_config.head_dim,
            config.page_size,
        )
        drafts = None
        if config.draft_model is not None:
            draft_config = ModelConfig.from_folder(config.draft_model)
            drafts = draft_layout(draft_config, layout)
            layout = replace(layout, num_layers=layout.num_layers + layers_taken(drafts, layout))
            with torch.inference_mode():
                draft_model = load_draft_model(config, draft_config, model, dtype, max_model_len, progress)
        # outside of inference mode, in which tensors are made that the handoff could not write to
        cache = KVCache(layout, num_pages(config, layout, device, max_model_len), device)
        draft = None
        if drafts is not None:
            vocabulary = min(model_config.vocab_size, draft_config.vocab_size)
            draft = DraftModel(draft_config, draft_model, DraftCache(drafts, cache), vocabulary)
        return cls(config, model_config, model, cache, max_model_len, head, draft)

    def _use_threads(self, threads: int) -> None:
        self.model.use_threads(threads)
        if self.head is not None:
            self.head.use_threads(threads)
        if self.draft is not None:
            self.draft.model.use_threads(threads)

    def warm_up(self) -> None:
        """Run some tokens through the model, so that the first requests find everything in place.

        On a GPU: few and many tokens, without and with a prefix, greedy and sampled, for each of which kernels are
        compiled.
        """
        greedy = SamplingParams(max_tokens=1, temperature=0)
        sampled = SamplingParams(max_tokens=1, top_k=2)
        on_gpu = self.device.type == "cuda"
        for length in (1, FEW_TOKENS) if on_gpu and self.max_model_len > FEW_TOKENS else (1,):
            pages = self.pool.allocate(self.pool.pages_for(length + 1))
            self.prefill([PrefillChunk([0] * length, 0, length, pages, greedy)])
            if on_gpu:
                self.prefill([PrefillChunk([0] * (length + 1), 1, length, pages, sampled)])
            self.pool.release(pages)
        self.cpu_share.rest()

    @torch.inference_mode()
    def prepare_decode(self, progress: Progress, *, drafts: bool = False) -> None:
        """Compile and capture what decode steps need, so that no request waits for it; `drafts`: those with drafts,
        too.
        """
        if isinstance(self.model, FusedDecoder) and self.model.norms_are_folded:
            self.graph_decoder = self._new_graph_decoder(self.model, self.config.max_num_seqs, drafts)
            self.graph_decoder.capture_all(progress)
            if drafts and isinstance(self.head, TorchHead):
                from headrace.engine.graph_head import GraphHead

                embedding = self.model.weights.embedding
                self.graph_head = GraphHead(self.model_config, self.head.weights, embedding, self.graph_decoder)
                self.graph_head.capture_all(progress)

    @torch.inference_mode()
    def prepare_prompts(self, progress: Progress) -> None:
        """Compile and capture what short prompts need, where there are no decode steps."""
        if isinstance(self.model, FusedDecoder) and self.model.norms_are_folded:
            self.graph_decoder = self._new_graph_decoder(self.model, 1, drafts=False)
            self.graph_decoder.capture_all(progress, ["prompts"])

    def _new_graph_decoder(self, model: FusedDecoder, max_batch: int, drafts: bool) -> GraphDecoder:
        from headrace.engine.graph_decoder import GraphDecoder

        return GraphDecoder(
            self.model_config,
            model.weights,
            self.cache,
            max_batch,
            self.max_model_len,
            drafts=drafts,
            feature_layers=model.feature_layers,
        )

    def prefill(self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None = None) -> list[PrefillOutput]:
        """Compute all chunks in one forward pass. `on_layer(l, ready)`: layer l of every chunk is in the cache."""
        return self.start_prefill(chunks, on_layer).outputs()

    @torch.inference_mode()
    def start_prefill(self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None = None) -> StartedPrefill:
        """The same without a wait for the device."""

        def layer_done(layer: int) -> None:
            self.cpu_share.adjust()
            if on_layer is not None:
                on_layer(layer, self._recorded_event())

        wants_all = _wants_logprobs(chunks)
        if self.graph_decoder is not None and not wants_all and self.graph_decoder.can_share(0, chunks):
            return self._start_captured(self.graph_decoder, chunks, on_layer)
        self.cpu_share.adjust()
        ends = list(itertools.accumulate(chunk.length for chunk in chunks))
        last = _rows_with_tokens(chunks)
        of_last = np.array([ends[row] - 1 for row in last], np.int64)
        batch = self._pack(chunks, wanted=None if wants_all else of_last)
        hidden = self.model.forward(batch, self.cache, layer_done)
        first = None
        if last:
            at_ends = hidden.index_select(0, upload([of_last], self.device)[0]) if wants_all else hidden
            first = self._sample_first([chunks[row] for row in last], self.model.logits(at_ends))
        if self.head is not None:
            self._prefill_head(self.head, chunks, last, first, batch, self.model.features)
            layer_done(self.model_config.num_layers)
        if self.draft is not None:
            self.draft.forward(self._pack(chunks, self.draft))
            for layer in range(self.model_config.num_layers, self.layout.num_layers):
                layer_done(layer)

        def outputs() -> list[PrefillOutput]:
            tokens = dict(zip(last, first.wait_for_all(), strict=True)) if first is not None else {}
            return [
                PrefillOutput(
                    tokens.get(row), self._prompt_logprobs(chunk, hidden[ends[row] - chunk.length : ends[row]])
                )
                for row, chunk in enumerate(chunks)
            ]

        return StartedPrefill(outputs, ended=self._recorded_event())

    def _start_captured(
        self, decoder: GraphDecoder, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None
    ) -> StartedPrefill:
        """The same for few tokens, whose kernels take a host longer to start one by one than the device to run."""
        last = _rows_with_tokens(chunks)
        logits = decoder.compute_prompts(chunks, last, self._announcing(on_layer))
        first = self._sample_first([chunks[row] for row in last], logits) if last else None
        if self.head is not None:
            batch = self._pack(chunks)
            self._prefill_head(self.head, chunks, last, first, batch, decoder.features[: len(batch.token_ids)])
            if on_layer is not None:
                on_layer(self.model_config.num_layers, self._recorded_event())
        return StartedPrefill(partial(_tokens_of, chunks, last, first), ended=self._recorded_event())

    @torch.inference_mode()
    def start_shared(
        self, chunks: Sequence[PrefillChunk], on_layer: LayerAnnounced | None, running: int
    ) -> StartedPrefill:
        """The same and a decode step of the graph decoder's first `running` requests: in one captured forward pass,
        but where chunks are too many or want more than their K and V and first tokens.
        """
        decoder = self.graph_decoder
        assert decoder is not None
        if self.head is not None or _wants_logprobs(chunks) or not decoder.can_share(running, chunks):
            started = self.start_prefill(chunks, on_layer)
            return replace(started, running_logits=decoder.step(running)) if running else started
        last = _rows_with_tokens(chunks)
        logits, running_logits = decoder.step_shared(running, chunks, last, self._announcing(on_layer))
        first = self._sample_first([chunks[row] for row in last], logits) if last else None
        return StartedPrefill(partial(_tokens_of, chunks, last, first), running_logits)

    def _announcing(self, on_layer: LayerAnnounced | None) -> Callable[[int], None]:
        """See `Started` of the graph decoder: tells of layers some at a time."""
        announced = 0

        def started(layers: int) -> None:
            nonlocal announced
            if on_layer is not None:
                ready = self._recorded_event()
                for layer in range(announced, layers):
                    on_layer(layer, ready)
            announced = layers

        return started

    def _prefill_head(
        self,
        head: DraftHead,
        chunks: Sequence[PrefillChunk],
        sampling: Sequence[int],
        first: ArrivingTokens | None,
        batch: ForwardBatch,
        features: torch.Tensor,
    ) -> None:
        """Compute the head's K and V of what the model has just read. Each position needs the token after it: of a
        complete prompt the one that was sampled; `sampling`: which chunks have one.
        """
        following: list[int] = []
        ends = []
        for row, chunk in enumerate(chunks):
            following += chunk.token_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
            following += [0] * chunk.is_last
            if row in sampling:
                ends.append(len(following) - 1)
        token_ids, last_rows = upload([np.array(following, np.int64), np.array(ends, np.int64)], self.device)
        if first is not None:
            token_ids[last_rows] = first.sampled
        states = head.fuse(features)
        head.write(states, replace(batch, token_ids=token_ids), self.cache)

    def hidden_states(self, chunks: Sequence[PrefillChunk]) -> torch.Tensor:
        """The final, normalised hidden states [T, H] of all chunks' tokens, of which the model's `features` are, too.

        Their K and V are written to the chunks' pages.
        """
        return self.model.forward(self._pack(chunks), self.cache, None)

    def _recorded_event(self) -> Ready | None:
        if self.device.type != "cuda":
            return None
        # One that a thread waits for asleep: several of them that spin would take cores from the one that launches.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _pack(
        self, chunks: Sequence[PrefillChunk], draft: DraftModel | None = None, wanted: np.ndarray | None = None
    ) -> ForwardBatch:
        """The chunks' tokens, for the model or for a draft model; `wanted`: see `ForwardBatch`."""
        laid_out = lay_out(chunks, self.layout.page_size)
        table = laid_out.table
        packed = (laid_out.token_ids, laid_out.positions, laid_out.slot_pages, laid_out.slot_offsets, table.reshape(-1))
        token_ids, at_positions, pages, offsets, flat_table, *rows = upload(
            [*packed, *([] if wanted is None else [wanted])], self.device
        )
        wanted_rows = rows[0] if rows else None
        lengths = [chunk.length for chunk in chunks]
        contexts = [chunk.start + chunk.length for chunk in chunks]
        if self.model.follows_tables:
            paged = PagedPlan(flat_table.view(table.shape), np.repeat(np.arange(len(chunks)), lengths))
            return ForwardBatch(token_ids, at_positions, pages, offsets, paged, wanted=wanted_rows)
        layer, heads = self.cache.layer(0), self.model_config.num_heads
        if draft is not None:
            layer, heads = draft.cache.layer(0), draft.config.num_heads
        plan = plan_prefill(layer, flat_table.view(table.shape), lengths, contexts, heads)
        return ForwardBatch(token_ids, at_positions, pages, offsets, plan, wanted=wanted_rows)

    def _sample_first(self, chunks: Sequence[PrefillChunk], logits: torch.Tensor) -> ArrivingTokens:
        rows = [self.sampling_row(chunk.sampling, chunk.token_ids, chunk.generated) for chunk in chunks]
        sampler = BatchSampler(rows, self.model_config.vocab_size, self.device)
        matchers = [chunk.matcher or self.grammars.matcher(chunk.sampling) for chunk in chunks]
        constrained = [ConstrainedRows(row, own) for row, own in enumerate(matchers) if own is not None]
        for row, matcher, _ in constrained:
            matcher.start(chunks[row].token_ids[len(chunks[row].token_ids) - chunks[row].generated :])
        if constrained:
            mask_rows(logits, constrained)
        (positions,) = upload([np.array([chunk.generated for chunk in chunks], np.int32)], self.device)
        sampled = sampler.sample(logits, positions)
        return ArrivingTokens(sampled, sampler.logprobs(sampled, logits))

    def sampling_row(self, params: SamplingParams, token_ids: Sequence[int], generated: int) -> SamplingRow:
        """One request's sampling state on this device."""
        return SamplingRow.make(params, token_ids, generated, self.model_config.vocab_size, self.device)

    @torch.inference_mode()
    def _prompt_logprobs(self, chunk: PrefillChunk, hidden: torch.Tensor) -> list[TokenLogprobs]:
        count = chunk.sampling.prompt_logprobs
        if count is None:
            return []
        prompt_length = len(chunk.token_ids) - chunk.generated
        targets = chunk.token_ids[chunk.start + 1 : min(chunk.start + chunk.length + 1, prompt_length)]
        found: list[TokenLogprobs] = []
        for first in range(0, len(targets), LOGPROB_ROWS):
            part = torch.tensor(targets[first : first + LOGPROB_ROWS], device=self.device)
            logits = self.model.logits(hidden[first : first + len(part)])
            found += describe_logprobs(logits, part, [count] * len(part))
        return found


def _tokens_of(
    chunks: Sequence[PrefillChunk], last: Sequence[int], first: ArrivingTokens | None
) -> list[PrefillOutput]:
    tokens = dict(zip(last, first.wait_for_all(), strict=True)) if first is not None else {}
    return [PrefillOutput(tokens.get(row), []) for row in range(len(chunks))]


def _wants_logprobs(chunks: Sequence[PrefillChunk]) -> bool:
    return any(chunk.sampling.prompt_logprobs is not None for chunk in chunks)


def _rows_with_tokens(chunks: Sequence[PrefillChunk]) -> list[int]:
    """The chunks that a token is drawn after."""
    return [row for row, chunk in enumerate(chunks) if chunk.is_last and chunk.sampling.max_tokens > 0]
