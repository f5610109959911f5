"""The command line: `headrace COMMAND`, with flags made from `Settings`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from headrace import __version__
from headrace.errors import StartError
from headrace.scaling.commands import add_scaling_commands
from headrace.settings import Settings, commands_of, env_name, flag_name, nearest

EXIT_USAGE = 2
"""Exit code of a process that can't serve as it was started; a supervisor need not try again."""

COMMANDS = {
    "up": ("headrace.up", "start a whole mesh on this machine"),
    "gateway": ("headrace.gateway.main", "serve the OpenAI API and queue requests"),
    "prefill": ("headrace.prefill.main", "compute prompts' KV pages and hand them to decode workers"),
    "colocate": ("headrace.colocate.main", "be a prefill and a decode worker in one process"),
    "decode": ("headrace.decode.main", "receive KV pages and make tokens"),
    "status": ("headrace.status", "tell how a mesh is, at one look"),
    "top": ("headrace.top", "show a mesh at work, live"),
    "doctor": ("headrace.doctor", "check what this machine has and say what to fix"),
    "restart": ("headrace.restart", "replace the workers of a running `headrace up` one by one; no request notices"),
}

WITH_FLAGS_OF_ITS_OWN = {
    "loadtest": ("headrace.loadtest.load.cli", "load any OpenAI-compatible servers and report how they do"),
}
"""Commands that no process of a mesh is: what they are told is no setting."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in WITH_FLAGS_OF_ITS_OWN:
        return int(importlib.import_module(WITH_FLAGS_OF_ITS_OWN[arguments[0]][0]).main(arguments[1:]))
    parser = build_parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "keys":
            return _make_key(options["file"])
        if command == "train-drafter":
            return _train_drafter(options)
        if scaling := options.pop("scaling", None):
            scaling(argparse.Namespace(**options))
            return 0
        if (positional := options.pop("model_positional", None)) is not None:
            options["model"] = options["model"] or positional
        settings = Settings.load(options)
        _set_up_logging(settings.log_level)
        return _run(COMMANDS[command][0], settings)
    except StartError as error:
        print(f"headrace {command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


class Parser(argparse.ArgumentParser):
    """Names the nearest flag or command where one is misspelled."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            known = [option for action in self._all_actions() for option in action.option_strings]
            message += nearest(word, known)
        super().error(message)

    def _all_actions(self) -> list[argparse.Action]:
        actions = list(self._actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                actions += [inner for parser in action.choices.values() for inner in parser._actions]
        return actions


def build_parser() -> argparse.ArgumentParser:
    """All commands with all their flags."""
    parser = Parser(prog="headrace", description="Serve large language models with prefill split from decode.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (_, help) in COMMANDS.items():
        epilog = "Each flag has an environment variable: --max-model-len is HEADRACE_MAX_MODEL_LEN. The flag wins."
        subparser = commands.add_parser(command, help=help, description=help, epilog=epilog, allow_abbrev=False)
        for name in Settings.model_fields:
            if command in commands_of(name):
                _add_flag(subparser, name)
    add_scaling_commands(commands)
    for command, (_, help) in WITH_FLAGS_OF_ITS_OWN.items():
        commands.add_parser(command, help=help, add_help=False)
    keys = commands.add_parser("keys", help="make a key for a mesh that spans machines", allow_abbrev=False)
    drafter = commands.add_parser("train-drafter", help="train a draft head for a model", allow_abbrev=False)
    _add_training_flags(drafter)
    keys.add_argument("file", type=Path, help="where to write it; give this file to every process with --mesh-key")
    return parser


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="the target, as for `headrace up` (default: smollm2)")
    parser.add_argument("--output", type=Path, required=True, help="folder that the head is written to")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="how long it may take once the model runs (default: 7)"
    )
    parser.add_argument(
        "--prompts", type=Path, help="a user's message a line (default: the target makes prompts itself)"
    )
    parser.add_argument("--conversations", type=int, default=1_000_000, help="at most so many (default: 1000000)")
    parser.add_argument("--answer-tokens", type=int, default=224, help="of an answer at most (default: 224)")
    parser.add_argument("--steps", type=float, default=float("inf"), help="training steps at most")
    parser.add_argument("--vocabulary", type=int, default=16384, help="tokens that the head can draft (default: 16384)")
    parser.add_argument("--processes", type=int, help="that train together (default: one a GPU)")
    parser.add_argument("--seed", type=int, default=0)


def _train_drafter(options: dict[str, Any]) -> int:
    _import("headrace.decode.training.main").run(argparse.Namespace(**options))
    return 0


def _add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    field = Settings.model_fields[name]
    choices = [c for c in _alternatives(field.annotation) if isinstance(c, str)] or None
    if field.annotation is bool:
        help = f"{field.description} [{env_name(name)}]"
        parser.add_argument(flag_name(name), dest=name, action="store_const", const=True, help=help)
        return
    metavar = None if choices else name.split("_")[-1].upper()
    default = "" if field.default is None else f" (default: {field.default})"
    help = f"{field.description}{default} [{env_name(name)}]".replace("%", "%%")
    flags = [flag_name(name)]
    if name == "model":
        parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument(*flags, dest=name, choices=choices, metavar=metavar, help=help)


def _alternatives(annotation: Any) -> list[Any]:
    """The values of a Literal, looked for inside unions."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [value for part in typing.get_args(annotation) for value in _alternatives(part)]
    return []


def _make_key(path: Path) -> int:
    from headrace.keys import MeshKey

    try:
        MeshKey.make().write(path)
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}") from error
    print(f"wrote {path}: copy it to every machine of the mesh and start each process with --mesh-key {path}")
    return 0


def _set_up_logging(level: str) -> None:
    supervised = os.environ.get("HEADRACE_SUPERVISED") == "1"
    pattern = "%(message)s" if supervised else "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=level.upper(), format=pattern, datefmt="%H:%M:%S", stream=sys.stderr)


def _run(module: str, settings: Settings) -> int:
    """Run a command; returns its exit code. Imports it only now: a gateway must start where torch is not installed."""
    run: Callable[[Settings], Coroutine[None, None, int | None]] = _import(module).run
    return uvloop.run(run(settings)) or 0


def _import(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise StartError(f"{error.name} is not installed here: `pip install 'headrace[worker]'`") from error
