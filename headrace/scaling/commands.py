"""Flags of `headrace scale | autoscale | simulate | plan`."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.errors import StartError
from headrace.settings import env_name

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)?")
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, None: 1.0}
MAX_TIER = 1024


def seconds(text: str) -> float:
    """`500ms`, `2s`, `1m`; a bare number is seconds."""
    match = DURATION.fullmatch(text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: write a time such as 500ms or 2s")
    return float(match[1]) * UNITS[match[2]]


def bounds(text: str) -> tuple[int, int]:
    """`2:8`, or one number for both."""
    least, _, most = text.partition(":")
    try:
        found = int(least), int(most or least)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1] <= MAX_TIER:
        raise argparse.ArgumentTypeError(f"{text!r}: write the fewest and the most workers as 1:8")
    return found


def add_scaling_commands(commands: Any) -> None:
    """Each sets `scaling` to what runs it, given the parsed options; they raise `StartError`."""
    scale = _add(commands, "scale", _scale, "change how many workers a running `headrace up` has")
    scale.add_argument("workers", nargs="+", metavar="TIER=N", help="such as prefill=2 decode=3")
    scale.add_argument("--port", type=int, default=8000, help="HTTP port of the mesh (default: 8000)")

    auto = _add(commands, "autoscale", _autoscale, "keep each tier as large as its targets need, until stopped")
    _add_targets(auto)
    auto.add_argument(
        "--executor",
        choices=("local", "compose", "kubernetes"),
        default="local",
        help="what runs the workers: `headrace up`, docker compose, or Kubernetes from a pod of it (default: local)",
    )
    for tier in ("prefill", "decode"):
        auto.add_argument(f"--{tier}", type=bounds, default=(1, 8), metavar="MIN:MAX", help="workers (default: 1:8)")
    auto.add_argument("--every", type=seconds, default=5.0, metavar="TIME", help="between two looks (default: 5s)")
    auto.add_argument("--port", type=int, default=8000, help="local: HTTP port of the mesh (default: 8000)")
    for name, help in (("redis", "compose, kubernetes: the mesh's Redis"), ("namespace", "prefix of its keys")):
        auto.add_argument(f"--{name}", default=os.environ.get(env_name(name)), help=f"{help} [{env_name(name)}]")
    auto.add_argument("--compose-file", type=Path, default=Path("docker-compose.yml"), help="compose: the project")
    auto.add_argument("--kubernetes-namespace", help="kubernetes: of the Deployments (default: the pod's own)")
    auto.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")

    simulate = _add(commands, "simulate", _simulate, "replay a trace against measured step costs")
    _add_trace(simulate)
    simulate.add_argument("--prefill", type=bounds, default=(1, 1), metavar="MIN[:MAX]", help="workers (default: 1)")
    simulate.add_argument("--decode", type=bounds, default=(1, 1), metavar="MIN[:MAX]", help="the same; scaled if MAX")
    simulate.add_argument("--colocate", type=int, metavar="N", help="instead: N workers that are both tiers")
    simulate.add_argument("--json", action="store_true", help="print JSON")

    plan = _add(commands, "plan", _plan, "say how few workers meet the targets, split and not split")
    _add_trace(plan)
    plan.add_argument("--attainment", type=float, default=0.95, help="share of requests that must (default: 0.95)")
    plan.add_argument("--most", type=int, default=64, help="workers to try (default: 64)")


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(scaling=run)
    return parser


def _add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ttft", type=seconds, default=0.5, metavar="TIME", help="to the first token (default: 500ms)")
    parser.add_argument("--itl", type=seconds, default=0.05, metavar="TIME", help="between tokens (default: 50ms)")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, help="Mooncake's JSON lines or Azure's CSV")
    parser.add_argument(
        "--step-costs", type=Path, required=True, metavar="FILE", help="JSON, see `headrace.loadtest.measure_costs`"
    )
    _add_targets(parser)


def _scale(options: argparse.Namespace) -> None:
    from headrace.control import give_order

    wanted: dict[str, str] = {}
    for word in options.workers:
        tier, sign, count = word.partition("=")
        if not sign:
            raise StartError(f"{word}: write the tier and its number of workers as decode=3")
        wanted[tier] = count
    asyncio.run(give_order(options.port, "scale", wanted, print))


def _autoscale(options: argparse.Namespace) -> None:
    from headrace.scaling.autoscale import autoscale

    asyncio.run(autoscale(options))


def _simulate(options: argparse.Namespace) -> None:
    from headrace.scaling.simulate import simulate

    simulate(options)


def _plan(options: argparse.Namespace) -> None:
    from headrace.scaling.plan import plan

    plan(options)
