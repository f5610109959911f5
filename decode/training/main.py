"""`headrace train-drafter`: generate, train, evaluate, write. A process a GPU, each with its own text."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from transformers import AutoTokenizer

from headrace.decode.training.conversations import Conversation, ConversationMaker
from headrace.decode.training.head_module import HeadModule, Projection
from headrace.decode.training.peers import Peers, run_together
from headrace.decode.training.train import PASSES, Examples, acceptance_of, batches, train
from headrace.engine.engine import Engine, EngineConfig
from headrace.engine.errors import EngineError
from headrace.engine.fused_decoder import FusedDecoder
from headrace.engine.weights import Checkpoint
from headrace.kernels.round_weights import round_to_4_bits
from headrace.models.locate import ModelFolder, locate_model

HELD_OUT = 0.02
"""Share of the conversations that acceptance is measured on; 16 at least."""
GENERATION_SHARE = 0.33
"""Of the time that is left once the model runs."""
CACHE_BYTES = {"cpu": 2**30, "cuda": 16 * 2**30}
BATCH = {"cpu": 8, "cuda": 768}
"""Conversations that are made together."""
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
"""Of a training step."""
SAVE_SECONDS = 60.0


def run(options: argparse.Namespace) -> None:
    """Train a head and write it, on all GPUs of the machine. Raises `StartError`s that say what to do."""
    folder = locate_model(options.model)
    on_gpus = options.device != "cpu" and torch.cuda.is_available()
    count = options.processes or (torch.cuda.device_count() if on_gpus else 1)
    run_together(count, on_gpus, run_one, options, folder, time.monotonic() + options.minutes * 60)


def run_one(peers: Peers, options: argparse.Namespace, folder: ModelFolder, end: float) -> None:
    """A process's part, until `end` of `time.monotonic`; the first one writes the head."""
    prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else []
    console = Console(quiet=peers.rank > 0)
    with _progress(console) as bars:
        engine = _load(options, folder, bars)
        conversations = _generate(options, peers, engine, folder, prompts, end, bars, console)
        _train(options, peers, engine, folder, conversations, end, bars, console)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, refresh_per_second=2)


def _load(options: argparse.Namespace, folder: ModelFolder, bars: Progress) -> Engine:
    bar = bars.add_task("target", total=1.0, note=folder.name)
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    config = EngineConfig(
        folder.path,
        device=options.device,
        model_impl="fused",
        quantization="none",  # what can be read in one pass by torch, whose gradients end at its states
        max_model_len=2048,
        max_num_seqs=BATCH[device],
        kv_cache_bytes=CACHE_BYTES[device],
    )
    engine = Engine.load(config, lambda what, share: bars.update(bar, completed=share))
    if on_gpu:
        from headrace.engine.graph_decoder import GraphDecoder

        assert isinstance(engine.model, FusedDecoder)
        # Sizes are captured when they occur: the batch stays full, so there are few.
        engine.graph_decoder = GraphDecoder(
            engine.model_config, engine.model.weights, engine.cache, config.max_num_seqs, engine.max_model_len
        )
    return engine


def _generate(
    options: argparse.Namespace,
    peers: Peers,
    engine: Engine,
    folder: ModelFolder,
    prompts: Sequence[str],
    end: float,
    bars: Progress,
    console: Console,
) -> list[Conversation]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder.path)
    seed, limit = options.seed + peers.rank, options.conversations // peers.count
    maker = ConversationMaker(engine, tokenizer, options.answer_tokens, seed, prompts)
    bar = bars.add_task("generating", total=limit, note="")
    until = time.monotonic() + (end - time.monotonic()) * GENERATION_SHARE

    def show(count: int, tokens: int) -> None:
        bars.update(bar, completed=count, note=f"{count} conversations, {tokens / 1e6:.2f}M tokens")

    conversations = list(maker.make(until, limit, show))
    if len(conversations) < 32:
        raise EngineError(f"{len(conversations)} conversations are too few to learn from: give more --minutes")
    console.print(f"{len(conversations)} conversations made, {sum(len(one.token_ids) for one in conversations)} tokens")
    # Short answers end first, so that the first ones are not like the rest.
    random.Random(seed).shuffle(conversations)
    return conversations


def _train(
    options: argparse.Namespace,
    peers: Peers,
    engine: Engine,
    folder: ModelFolder,
    conversations: list[Conversation],
    end: float,
    bars: Progress,
    console: Console,
) -> None:
    assert isinstance(engine.model, FusedDecoder)
    count = max(int(len(conversations) * HELD_OUT), 16)
    held_out, learned = conversations[:count], conversations[count:]
    counted = [answer_counts(part, engine.model_config.vocab_size).to(engine.device) for part in (learned, held_out)]
    counts, held_out_counts = map(peers.total, counted)
    vocabulary = draft_vocabulary(counts, options.vocabulary)
    layers = feature_layers(engine.model_config.num_layers)
    embedding = engine.model.weights.embedding
    torch.manual_seed(options.seed)  # all processes begin with the same head
    head = HeadModule(engine.model_config, len(layers)).to(engine.device)
    with closing(Checkpoint(folder.path, engine.device, torch.float32)) as checkpoint:
        tied = engine.model_config.tied_head or "lm_head.weight" not in checkpoint
        rows = checkpoint.get("model.embed_tokens.weight" if tied else "lm_head.weight")[vocabulary]
        head.start_from(checkpoint)
    rows = round_to_4_bits(rows)
    examples = Examples(engine, layers)
    tokens = BATCH_TOKENS[engine.device.type]
    bar = bars.add_task("training", total=1.0, note="")
    seconds = max(end - time.monotonic() - 15.0, 10.0)
    saved_at = time.monotonic()
    card: dict[str, Any] = {
        "target": folder.name,
        "target_fingerprint": folder.fingerprint,
        "conversations": int(peers.total(torch.tensor(len(learned), device=engine.device))),
        "answer_tokens": int(counts.sum()),
        "prompts": str(options.prompts.name) if options.prompts else "made by the target, from openings of a few words",
        "answer_coverage": round(float(held_out_counts[vocabulary].sum() / held_out_counts.sum()), 4),
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
        "devices": peers.count,
    }

    def show(done: float, loss: float) -> None:
        nonlocal saved_at
        bars.update(bar, completed=done, note=f"loss {loss:.3f}")
        if peers.rank == 0 and time.monotonic() - saved_at > SAVE_SECONDS:
            save(options.output, head, engine, vocabulary, layers, card)
            console.print(f"{done:.0%} of the training, loss {loss:.3f}")
            saved_at = time.monotonic()

    went = train(
        head, examples, peers, learned, embedding, rows, vocabulary, tokens, seconds, options.steps, options.seed, show
    )
    found = torch.zeros(PASSES, 2, dtype=torch.int64, device=engine.device)
    for part in batches(held_out, tokens, random.Random(0)):
        found += acceptance_of(head, examples.batch(part, embedding), rows, vocabulary)
    right, drafted = peers.total(found).T.tolist()
    if peers.rank > 0:
        return
    card |= {
        "steps": went.steps,
        "training_tokens": went.tokens * peers.count,
        "losses": [round(loss, 3) for loss in went.losses[:: max(len(went.losses) // 40, 1)]],
        "held_out_conversations": len(held_out) * peers.count,
        "held_out_acceptance": [round(one / max(all_, 1), 4) for one, all_ in zip(right, drafted, strict=True)],
        "held_out_drafted": drafted,
    }
    save(options.output, head, engine, vocabulary, layers, card)
    shown = ", ".join(f"{value:.3f}" for value in card["held_out_acceptance"])
    console.print(f"wrote {options.output}; held-out acceptance of greedy answers by position: {shown}")


def feature_layers(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high: the layers whose inputs are fused, fewer of a tiny model."""
    return tuple(sorted({min(2, num_layers - 1), num_layers // 2, num_layers - 1}))


def answer_counts(conversations: Sequence[Conversation], vocab_size: int) -> torch.Tensor:
    """How often answers have each token of the target's vocabulary, [vocab_size] int64."""
    tokens = [token for one in conversations for token in one.token_ids[one.answer_start :]]
    return torch.bincount(torch.tensor(tokens), minlength=vocab_size)


def draft_vocabulary(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` most frequent tokens, those first, so that a few of them are a vocabulary, too; int64."""
    return counts.argsort(descending=True, stable=True)[:size]


def save(
    folder: Path,
    head: HeadModule,
    engine: Engine,
    vocabulary: torch.Tensor,
    layers: Sequence[int],
    card: dict[str, Any],
) -> None:
    """Write model.safetensors, config.json and card.json, in the layout of published EAGLE-3 heads.

    Without `lm_head.weight`: the head drafts with the target's own rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {f"{name}.weight" for name, module in head.named_modules() if isinstance(module, Projection)}
    tensors = {
        name: (round_to_4_bits(value) if name in rounded else value).detach().to(torch.bfloat16).cpu().contiguous()
        for name, value in head.state_dict().items()
    }
    own = torch.arange(len(vocabulary))
    tensors["d2t"] = vocabulary.cpu() - own
    tensors["t2d"] = torch.zeros(engine.model_config.vocab_size, dtype=torch.bool)
    tensors["t2d"][vocabulary.cpu()] = True
    unfinished = folder / "model.safetensors.new"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")
    target = engine.model_config
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": target.norm_eps,
        "rope_theta": target.rope.theta,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": len(vocabulary),
        "draft_vocab_by_frequency": True,
        "tie_word_embeddings": True,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers), "use_aux_hidden_state": True},
        "dtype": "bfloat16",
    }
    for name, content in (("config.json", config), ("card.json", card)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
