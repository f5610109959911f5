"""What the mesh is measured against, in a process of its own: `transformers` and the bare engine.

Reads one JSON command a line from standard input and answers with one JSON line. All in float32.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.engine.decode_batch import DecodeBatch
from headrace.engine.engine import Engine, EngineConfig, PrefillChunk
from headrace.messages.request import SamplingParams
from headrace.models.locate import locate_model


class Yardstick:
    """One method a command; the arguments are the command's other fields."""

    def __init__(self, model: str) -> None:
        folder = locate_model(model).path
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._engine = Engine.load(EngineConfig(folder, dtype="float32", max_num_seqs=64))
        self._engine.warm_up()

    def generate(self, text: str, is_chat: bool, tokens: int) -> dict[str, Any]:
        """`transformers`' own greedy answer: its text after each token, and the margin of its two best logits there."""
        if is_chat:
            messages = [{"role": "user", "content": text}]
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        else:
            encoded = self._tokenizer(text)
        prompt = torch.tensor([encoded["input_ids"]])
        output = self._reference.generate(
            prompt,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        ids = output.sequences[0, prompt.shape[1] :].tolist()
        best = torch.cat(output.logits).topk(2, -1).values
        texts = [self._tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
        return {"texts": texts, "margins": (best[:, 0] - best[:, 1]).tolist(), "prompt_tokens": prompt.shape[1]}

    def reference_decode(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """Tokens a second of one stream of `transformers` after its first token."""
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        first = self._timed(lambda: self._reference.generate(ids, max_new_tokens=1, **options))
        whole = self._timed(lambda: self._reference.generate(ids, max_new_tokens=tokens + 1, **options))
        return {"tokens_per_second": tokens / (whole - first)}

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Seconds from a prompt to its first token in the bare engine."""
        pages = self._engine.pool.allocate(self._engine.pool.pages_for(len(prompt)))
        chunk = PrefillChunk(prompt, 0, len(prompt), pages, SamplingParams(max_tokens=1, temperature=0))
        seconds = self._timed(lambda: self._engine.prefill([chunk]))
        self._engine.pool.release(pages)
        return {"seconds": seconds}

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        """Seconds of each step of the bare engine's batch."""
        batch: DecodeBatch[int] = DecodeBatch(self._engine)
        params = SamplingParams(max_tokens=tokens + 1, temperature=0)
        held = []
        for key, prompt in enumerate(prompts):
            pages = self._engine.pool.allocate(self._engine.pool.pages_for(len(prompt) + tokens + 1))
            output = self._engine.prefill([PrefillChunk(prompt, 0, len(prompt), pages, params)])[0]
            assert output.token is not None
            batch.join(key, [*prompt, output.token.token_id], 1, pages, params)
            held += pages
        steps = [self._timed(batch.step) for _ in range(tokens)]
        self._engine.pool.release(held)
        return {"step_seconds": statistics.mean(steps), "tokens_per_second": len(prompts) * tokens / sum(steps)}

    @staticmethod
    def _timed(run: Any) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


def main() -> None:
    """Serve commands until standard input ends."""
    yardstick = Yardstick("smollm2")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(yardstick, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
