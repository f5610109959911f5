"""The sampling kernel against the torch sampler: the same token for each row and step."""

from __future__ import annotations

import torch

from headrace.engine.device_sampler import DeviceSampler
from headrace.engine.sampler import BatchSampler, SamplingRow
from headrace.engine.sampling_table import SamplingTable
from headrace.messages.request import SamplingParams


def some_params(vocab_size: int) -> list[SamplingParams]:
    """Each filter alone and with others; penalties, biases, forbidden stops; greedy rows between."""
    sampled = [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": vocab_size - 1},
        {"top_p": 0.3},
        {"top_p": 0.9, "temperature": 2.0},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"min_p": 0.01, "top_p": 0.8},
        {"top_k": 7, "top_p": 0.7, "min_p": 0.02, "temperature": 1.3},
        {"top_k": 20, "top_p": 0.95, "temperature": 0.7},
        {"repetition_penalty": 1.3, "top_k": 9},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"logit_bias": {3: 5.0, vocab_size - 1: -2.0, 10**6: 9.0}, "top_p": 0.5},
        {"stop_token_ids": (1, 2, 10**6), "min_tokens": 2, "logit_bias": {1: 9.0, 2: 8.0}},
    ]
    greedy = [
        {},
        {"repetition_penalty": 1.7, "frequency_penalty": 1.0},
        {"stop_token_ids": (5,), "min_tokens": 3, "logit_bias": {5: 50.0}},
    ]
    fields = [{"temperature": 1.0, **own} for own in sampled] + [{**own, "temperature": 0.0} for own in greedy]
    return [SamplingParams(max_tokens=64, seed=37 * row + 2**61, **own) for row, own in enumerate(fields)]  # type: ignore[arg-type]


def masked(logits: torch.Tensor, left: int) -> torch.Tensor:
    """Logits [R, V] with so many possible tokens a row."""
    kept = torch.rand(logits.shape).argsort(-1) < left
    return logits.masked_fill(~kept, float("-inf"))


def compare(
    logits: torch.Tensor, params: list[SamplingParams], steps: int, part: int, device: str, strays: int = 0
) -> None:
    """Logits [R, V] on the CPU; all rows for some steps, with what they said counted.

    At most `strays` tokens may differ, where a draw falls between two tokens within the rounding of an exponential.
    """
    vocab_size = logits.shape[1]
    prompt = torch.arange(0, vocab_size, 3).tolist()
    states = [
        [SamplingRow.make(p, [*prompt, 4], 1, vocab_size, torch.device(at)) for p in params] for at in ("cpu", device)
    ]
    torch_sampler = BatchSampler(states[0], vocab_size, torch.device("cpu"))
    kernel_sampler = DeviceSampler.of(states[1], vocab_size, torch.device(device), part=part)
    different = 0
    for step in range(steps):
        logits = logits.roll(17, -1)
        positions = torch.arange(len(params)) % 5 + step
        expected = torch_sampler.sample(logits.float(), positions)
        got = kernel_sampler.sample(logits.to(device), positions.to(device)).cpu()
        different += int((got != expected).sum())
        assert different <= strays, f"step {step}: {got.tolist()} instead of {expected.tolist()}"


def compare_table(vocab_size: int, device: str) -> None:
    """Rows of a table that others take over, batch after batch, and samplers that are made for each batch."""
    rows = [SamplingRow(p) for p in some_params(vocab_size) if p.repetition_penalty == 1 and p.presence_penalty == 0]
    rows = [row for row in rows if row.is_plain]
    table = SamplingTable(len(rows), vocab_size, torch.device(device))
    logits, positions = (torch.randn(len(rows), vocab_size) * 3).to(device), torch.arange(len(rows)).to(device)
    for count in (1, 5, len(rows), 5):
        now = rows[:count]
        for row, sampling in enumerate(now):
            table.put(row, sampling)
        table.parameters[:, :count] = torch.from_numpy(table.fields(range(count))).to(device)
        alone = DeviceSampler.of(now, vocab_size, torch.device(device))
        got = table.device_sampler(count).sample(logits[:count], positions[:count])
        assert got.tolist() == alone.sample(logits[:count], positions[:count]).tolist()
        rows.insert(0, rows.pop())
