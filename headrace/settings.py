"""The one settings object of every process.

Each field is a flag (`max_model_len` -> `--max-model-len`) and an environment variable (`HEADRACE_MAX_MODEL_LEN`); the
flag wins. `commands` says which sub-commands take it. Unknown flags and variables are errors that name the nearest.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.errors import StartError

ENV_PREFIX = "HEADRACE_"
NOT_SETTINGS = {"HEADRACE_CACHE", "HEADRACE_SUPERVISED", "HEADRACE_READY_FD", "HEADRACE_CPU_SHARE"}
"""Variables with our prefix that are read elsewhere."""
SECRETS = ("api_key", "redis")
"""Fields that may also come from a file, which `HEADRACE_API_KEY_FILE` and `HEADRACE_REDIS_FILE` name."""

GATEWAY = ("up", "gateway")
WORKER = ("up", "prefill", "decode", "colocate")
ALL = (*WORKER, "gateway")
WATCH = ("status", "top", "doctor")


class SettingsError(StartError):
    """A flag or an environment variable that can't be used; the message says which and what to do."""


def _field(default: Any, help: str, commands: tuple[str, ...], **limits: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"commands": list(commands)}, **limits)


class Settings(BaseModel):
    """What a process was told. Frozen: a process never changes its own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = _field(
        "smollm2", "built-in `smollm2`, a Hugging Face folder, a .gguf file or a hub id", (*ALL, "doctor")
    )
    served_model_name: str | None = _field(
        None, "name that clients use for the model (default: the model's own)", GATEWAY
    )
    redis: str | None = _field(
        None,
        "URL: redis[s]://, unix://, redis[s]+sentinel://HOST,HOST/SERVICE or redis[s]+cluster://HOST,HOST; "
        "`up` starts a private server if none",
        (*ALL, *WATCH),
    )
    namespace: str = _field(
        "headrace", "prefix of all Redis keys: one mesh a namespace", (*ALL, *WATCH), pattern=r"^[\w.-]+$"
    )
    lease_seconds: float = _field(1.5, "silence after which a process counts as dead", ALL, ge=0.5, le=60)
    bind: str = _field("127.0.0.1", "address that other machines of the mesh reach this process at", (*ALL, "doctor"))
    advertise: str | None = _field(
        None, "address that other machines reach this process at, where that is not --bind (NAT)", ALL
    )
    mesh_key: Path | None = _field(
        None, "file made by `headrace keys`; required where --bind is not loopback", (*ALL, "doctor")
    )
    log_level: Literal["debug", "info", "warning", "error"] = _field(
        "info", "least severe messages shown", (*ALL, *WATCH)
    )

    host: str = _field("127.0.0.1", "HTTP address", (*GATEWAY, "doctor"))
    port: int = _field(8000, "HTTP port", (*GATEWAY, "doctor", "restart"), ge=0, le=65535)
    reuse_port: bool = _field(False, "share the port with other gateways of this machine that do", ("gateway",))
    api_key: str | None = _field(None, "key that every request but /health and /ready must carry", GATEWAY)
    max_body_bytes: int = _field(16 * 2**20, "largest HTTP body", GATEWAY, ge=1024)
    api_keys_file: Path | None = _field(
        None, "TOML file with a table for each caller: [name], key, weight (share) and priority", GATEWAY
    )
    max_queued_requests: int = _field(4096, "waiting requests after which new ones get a 429", GATEWAY, ge=1)
    max_queued_tokens: int = _field(2**21, "the same in tokens of their prompts", GATEWAY, ge=1)
    max_ttft: float = _field(
        60.0,
        "seconds before the first token that a request may wait for others; a 429 if it would be more",
        GATEWAY,
        gt=0,
    )
    request_timeout: float = _field(600.0, "seconds after which a request is given up", GATEWAY, gt=0)

    metrics_host: str = _field(
        "127.0.0.1", "HTTP address of a worker's /metrics, /health and /ready", ("prefill", "decode", "colocate")
    )
    metrics_port: int = _field(
        0, "its port; 0 takes a free one, which `status` tells", ("prefill", "decode", "colocate"), ge=0, le=65535
    )
    worker_id: str | None = _field(
        None, "name of this worker (default: tier and a random suffix)", ("prefill", "decode", "colocate")
    )
    device: Literal["auto", "cpu", "cuda"] = _field("auto", "where the model runs", WORKER)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field("auto", "type of weights and activations", WORKER)
    quantization: Literal["auto", "none", "fp8"] = _field(
        "auto",
        "`fp8`: 8-bit weights of a GPU's fused path; `auto`: on a CPU with --dtype auto, weights of 4 bits stay packed",
        WORKER,
    )
    kv_cache_dtype: Literal["auto", "fp8"] = _field("auto", "type of the KV cache; `auto` is --dtype", WORKER)
    load_format: Literal["auto", "dummy", "synthetic"] = _field(
        "auto",
        "`dummy` makes random weights, to measure speed; `synthetic` loads none and sleeps for --step-costs, to test a "
        "mesh at scale",
        WORKER,
    )
    step_costs: Path | None = _field(None, "JSON file of measured step costs that `synthetic` sleeps for", WORKER)
    model_impl: Literal["auto", "fused", "transformers"] = _field("auto", "which path runs the model", WORKER)
    max_model_len: int | None = _field(
        None, "longest prompt + output in tokens (default: the model's own)", WORKER, ge=16
    )
    block_size: int = _field(16, "tokens in a KV page", WORKER, ge=1, le=256)
    kv_cache_memory_bytes: int | None = _field(None, "size of the KV cache (default: by device)", WORKER, ge=1)
    gpu_memory_utilization: float = _field(0.9, "share of a GPU's memory that a worker may use", WORKER, gt=0, le=1)
    kv_transport: Literal["auto", "nixl", "tcp"] = _field(
        "auto",
        "how KV pages come here: `auto` by what sender and receiver share (NIXL between hosts with RDMA that both have "
        "it), or always by NIXL where both have it, which encrypts nothing, or always over the mesh's own lines",
        WORKER,
    )
    kv_wire_dtype: Literal["auto", "fp8"] = _field(
        "auto",
        "how KV pages travel over a network: as they are stored, or in half the bytes",
        WORKER,
    )
    max_num_seqs: int = _field(256, "requests that a decode worker runs at once", WORKER, ge=1, le=4096)
    speculation: Literal["auto", "off"] = _field(
        "auto", "draft tokens and verify several at once, as long as that is faster; the same for both tiers", WORKER
    )
    draft_head: Path | None = _field(
        None, "folder of an EAGLE-3 draft head for the model (default: the built-in model's own)", WORKER
    )
    draft_model: str | None = _field(
        None,
        "a smaller model with the same tokenizer that drafts in place of a head, named as --model; the same for both "
        "tiers, on a CPU",
        WORKER,
    )
    max_num_batched_tokens: int | None = _field(
        None,
        "prompt tokens that a prefill step computes (default: 2048 on a GPU, 512 on a CPU, 96 with packed weights)",
        WORKER,
        ge=16,
    )
    max_num_prefills: int = _field(8, "prompts that a prefill worker holds at once", WORKER, ge=1, le=256)
    cpu_threads: int | None = _field(
        None, "threads of one worker on a CPU (default: its part of the cores)", WORKER, ge=1
    )
    drain_timeout: float = _field(30.0, "seconds that a stopping worker may take to finish what it holds", WORKER, ge=0)

    itl_target: float | None = _field(
        None,
        "milliseconds between two tokens beside which prompts are computed (default: 14.8 on a GPU, 200 on a CPU)",
        ("up", "colocate"),
        gt=0,
    )
    colocate: bool = _field(False, "start one worker that is both tiers, in place of --prefill and --decode", ("up",))

    json_output: bool = _field(False, "print one JSON object instead of text", ("status", "doctor"))

    gateways: int = _field(1, "gateways to start, which share the port", ("up",), ge=1, le=64)
    prefill: int = _field(1, "prefill workers to start", ("up",), ge=1, le=64)
    decode: int = _field(1, "decode workers to start", ("up",), ge=1, le=64)

    @classmethod
    def load(cls, flags: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
        """Merge flags over environment variables over defaults.

        Raises `SettingsError` for a value that does not fit and for a `HEADRACE_*` variable that does not exist.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(ENV_PREFIX) or variable in NOT_SETTINGS:
                continue
            name = variable.removeprefix(ENV_PREFIX).lower()
            if (secret := name.removesuffix("_file")) != name and secret in SECRETS:
                name, text = secret, _read_secret(variable, text)
            if name not in cls.model_fields:
                known = [env_name(field) for field in cls.model_fields]
                raise SettingsError(f"unknown environment variable {variable}{nearest(variable, known)}")
            values[name] = text
        values.update({name: value for name, value in flags.items() if value is not None})
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(detail, flags) for detail in error.errors())) from None

    def as_environment(self) -> dict[str, str]:
        """The variables that give another process these settings."""
        return {env_name(name): str(value) for name, value in self if value is not None}


def env_name(field: str) -> str:
    """The environment variable of a field."""
    return ENV_PREFIX + field.upper()


def flag_name(field: str) -> str:
    """The flag of a field."""
    if field == "json_output":  # a field named `json` would hide a method of pydantic's
        return "--json"
    return "--" + field.replace("_", "-")


def nearest(word: str, known: list[str]) -> str:
    """A hint such as `; did you mean --port?`, or nothing where no known word is close."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def commands_of(field: str) -> list[str]:
    """The sub-commands that take a field."""
    extra = Settings.model_fields[field].json_schema_extra
    assert isinstance(extra, dict), field
    commands = extra["commands"]
    assert isinstance(commands, list)
    return [str(command) for command in commands]


def _read_secret(variable: str, path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{variable}: can't read {path} ({error})") from error


def _explain(detail: Any, flags: Mapping[str, Any]) -> str:
    name = str(detail["loc"][0])
    source = flag_name(name) if flags.get(name) is not None else env_name(name)
    return f"{source}: {detail['msg']} (got {detail['input']!r})"
