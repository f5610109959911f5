"""A draft head's steps on a GPU, behind a step with drafts of a `GraphDecoder` and as captured as it is.

First it reads what the step has settled: all rows' features with the tokens that were drawn after them, of which those
that do not stand are overwritten before anything sees them. From each request's last row that stands it guesses a
token, reads that, too, guesses the next, and so on; less likely ones are kept beside. All stays on the device; guesses
lie in the requests' state, where the next step finds them.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch

from headrace.engine.draft_head import MAX_HEAD_DEPTH, HeadWeights
from headrace.engine.graph_decoder import GraphDecoder, StepInputs
from headrace.engine.model_config import ModelConfig
from headrace.engine.sampler import BatchSampler, SamplingRow
from headrace.engine.weights import Progress
from headrace.kernels.attention_plan import plan_decode_attention
from headrace.kernels.decode_attention import fused_decode_attention
from headrace.kernels.decode_linear import decode_linear
from headrace.kernels.draft_head import begin_guess, pick_guess, take_last
from headrace.kernels.draft_rows import STEPS_AT_ONCE, accept_rows, move_leaf
from headrace.kernels.epilogue import Epilogue
from headrace.messages.request import SamplingParams

SIZES = (1, 2, 4, 8, 16, 32)
"""Captured numbers of requests. With more, the host takes longer for drafts than they save, see docs/log.md."""
PLAIN = Epilogue()


class GraphHead:
    """Guesses for all requests of a running batch at once."""

    def __init__(
        self, config: ModelConfig, weights: HeadWeights, embedding: torch.Tensor, decoder: GraphDecoder
    ) -> None:
        """`weights` are folded; `embedding` [vocabulary, H] is the target's; `decoder` keeps features of its layers."""
        device, dtype, hidden = embedding.device, embedding.dtype, config.hidden_size
        self._config = config
        self._weights = weights
        self._embedding = embedding
        self._decoder = decoder
        requests = len(decoder.block_table)
        self.sizes = sorted({*(size for size in SIZES if size < requests), min(requests, SIZES[-1])})
        most, rows = self.sizes[-1], len(decoder.features)
        qkv_size, width = len(weights.qkv), config.num_heads * config.head_dim
        self._states = torch.zeros(rows, hidden, dtype=dtype, device=device)
        self._inputs = torch.zeros(rows, 2 * hidden, dtype=dtype, device=device)
        self._qkv = torch.zeros(rows, qkv_size, dtype=dtype, device=device)
        self._attended = torch.zeros(rows, width, dtype=dtype, device=device)
        self._tokens = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.full((most,), -1, dtype=torch.int32, device=device)
        self._own_states = torch.zeros(most, hidden, dtype=dtype, device=device)
        self._own_attended = torch.zeros(most, width, dtype=dtype, device=device)
        self._squares = torch.zeros(2, most, dtype=torch.int64, device=device)
        self._activated = torch.zeros(most, weights.down.shape[1], dtype=dtype, device=device)
        self._logits = torch.zeros(most, len(weights.rows), dtype=torch.float32, device=device)
        self._samplers: dict[int, BatchSampler] = {}
        """Of so many greedy rows of a step."""

    @property
    def max_requests(self) -> int:
        """It guesses for no more at once."""
        return self.sizes[-1]

    def capture_all(self, progress: Progress) -> None:
        """Compile the kernels and capture all sizes."""
        rows = self._decoder.sizes("drafted")
        for done, size in enumerate(reversed(rows)):
            for report, is_greedy in itertools.product(range(STEPS_AT_ONCE), (False, True)):
                key = ("read", size, report, is_greedy)
                self._decoder.graphs.capture(key, partial(self._read, size, report, is_greedy))
            progress("capturing the draft head", (done + 1) / (len(rows) + len(self.sizes)))
        for done, size in enumerate(reversed(self.sizes)):
            for depth in range(1, MAX_HEAD_DEPTH + 1):
                self._decoder.graphs.capture(("guess", size, depth), partial(self._guess, size, depth))
            progress("capturing the draft head", (len(rows) + done + 1) / (len(rows) + len(self.sizes)))

    def read(self, rows: int, report: int, *, is_greedy: bool = False) -> None:
        """Start after a step of `rows` rows, to bring the requests up to date (`accept_rows`, with `sampled` and one of
        `reports` of the decoder's `StepRows`), and to read what it has settled. `is_greedy`: first take the likeliest
        tokens as `sampled`.
        """
        size = next(size for size in self._decoder.sizes("drafted") if size >= rows)
        work = partial(self._read, size, report, is_greedy)
        self._decoder.graphs.run(("read", size, report, is_greedy), work)

    def guess(self, requests: int, depth: int) -> None:
        """Start after that: `move_leaf`, and guess for `depth` places of each of the first `requests`."""
        assert 0 < depth <= MAX_HEAD_DEPTH, "a draft has one token or more"
        size = next(size for size in self.sizes if size >= requests)
        self._decoder.graphs.run(("guess", size, depth), partial(self._guess, size, depth))

    def _read(self, size: int, report: int, is_greedy: bool) -> None:
        """All rows of the step, up to attention, which the step has planned: K and V go to the cache."""
        decoder, step = self._decoder, self._decoder.inputs(size, "drafted")
        rows = decoder.rows
        if is_greedy:
            if size not in self._samplers:
                greedy = [SamplingRow(SamplingParams(max_tokens=1, temperature=0))] * size
                self._samplers[size] = BatchSampler(greedy, self._config.vocab_size, self._embedding.device)
            self._samplers[size].sample(decoder.logits[:size], rows.generated[:size], rows.sampled[:size])
        accept_rows(rows.sampled[:size], rows, decoder.state, rows.reports[report][:size])
        states = self._states[:size]
        self._project_rows(decoder.features[:size], self._weights.fc, states)
        begin_guess(decoder.rows.followers[:size], self._embedding, states, self._config.norm_eps, self._inputs[:size])
        self._project_rows(self._inputs[:size], self._weights.qkv, self._qkv[:size])
        self._attend(step, self._qkv[:size], self._attended[:size])

    def _guess(self, size: int, depth: int) -> None:
        decoder = self._decoder
        move_leaf(decoder.cache.pages, decoder.block_table, decoder.rows, decoder.state, size)
        take_last(
            (self._states, self._attended),
            decoder.rows.last,
            decoder.state.positions,
            (self._own_states[:size], self._own_attended[:size]),
            self._squares[:, :size],
            self._positions[:size],
        )
        self._finish(size)
        for _ in range(depth - 1):
            self._guess_next(size)

    def _guess_next(self, size: int) -> None:
        decoder, states, inputs = self._decoder, self._own_states[:size], self._inputs[:size]
        tokens, positions = self._tokens[:size], self._positions[:size]
        step = StepInputs(size, tokens, positions, None, decoder.block_table, decoder.attention_workspace)
        plan_decode_attention(positions, step.workspace)
        begin_guess(tokens, self._embedding, states, self._config.norm_eps, inputs)
        self._project(inputs, self._weights.qkv, self._qkv[:size])
        self._attend(step, self._qkv[:size], self._own_attended[:size])
        self._finish(size)

    def _finish(self, size: int) -> None:
        """From attention to the likeliest tokens."""
        weights, states, eps = self._weights, self._own_states[:size], self._config.norm_eps
        activated, logits, (first, second) = self._activated[:size], self._logits[:size], self._squares[:, :size]
        self._project(self._own_attended[:size], weights.output, states, Epilogue(residual=True, squares_out=first))
        activation = self._config.activation
        self._project(states, weights.gate_up, activated, Epilogue(squares=first, eps=eps, activation=activation))
        self._project(activated, weights.down, states, Epilogue(residual=True, squares_out=second))
        self._project(states, weights.rows, logits, Epilogue(squares=second, eps=eps))
        state = self._decoder.state
        pick_guess(
            logits,
            weights.vocabulary,
            state.positions,
            self._decoder.limits,
            state.guesses,
            self._positions[:size],
            self._tokens[:size],
            self._squares[:, :size],
        )

    def _project(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, epilogue: Epilogue = PLAIN) -> None:
        decode_linear(x, weight, out, epilogue, self._decoder.linear_workspace)

    def _project_rows(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        if len(x) <= self._decoder.max_narrow:
            self._project(x, weight, out)
        else:
            torch.mm(x, weight.T, out=out)

    def _attend(self, step: StepInputs, qkv: torch.Tensor, attended: torch.Tensor) -> None:
        decoder = self._decoder
        fused_decode_attention(
            qkv,
            decoder.cache.layer(self._config.num_layers),
            step.block_table,
            step.positions,
            decoder.rope,
            None,
            self._config.norm_eps,
            attended,
            decoder.heads,
            step.workspace,
            step.drafted,
        )
