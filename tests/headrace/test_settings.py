"""Flags and environment variables."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from headrace.cli import COMMANDS, build_parser, main
from headrace.settings import Settings, SettingsError, commands_of, env_name, flag_name


def test_flags_win_over_variables_and_variables_over_defaults() -> None:
    """One order, everywhere."""
    settings = Settings.load({"port": 9000, "host": None}, {"HEADRACE_PORT": "1", "HEADRACE_HOST": "::1"})
    assert (settings.port, settings.host, settings.model) == (9000, "::1", "smollm2")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HEADRACE_PROT": "1"}, "did you mean HEADRACE_PORT"),
        ({"HEADRACE_PORT": "many"}, "HEADRACE_PORT"),
        ({"HEADRACE_BLOCK_SIZE": "0"}, "HEADRACE_BLOCK_SIZE"),
        ({"HEADRACE_DTYPE": "int3"}, "HEADRACE_DTYPE"),
    ],
)
def test_a_bad_variable_stops_the_start_and_is_named(environment: dict[str, str], said: str) -> None:
    """Nothing is dropped silently."""
    with pytest.raises(SettingsError, match=said):
        Settings.load({}, environment)


def test_secrets_come_from_files_where_one_is_named(tmp_path: Path) -> None:
    """So that they stand in no process's environment; a file that is missing is named."""
    file = tmp_path / "key"
    file.write_text("sk-1\n")
    assert Settings.load({}, {"HEADRACE_API_KEY_FILE": str(file)}).api_key == "sk-1"
    with pytest.raises(SettingsError, match="HEADRACE_REDIS_FILE: can't read /nowhere"):
        Settings.load({}, {"HEADRACE_REDIS_FILE": "/nowhere"})
    with pytest.raises(SettingsError, match="unknown environment variable HEADRACE_PORT_FILE"):
        Settings.load({}, {"HEADRACE_PORT_FILE": str(file)})


def test_settings_travel_to_a_child_by_its_environment() -> None:
    """What `up` was told, its workers are told."""
    settings = Settings.load({"model": "x.gguf", "max_num_seqs": 7, "dtype": "float32"}, {})
    assert Settings.load({}, settings.as_environment()) == settings


def test_every_field_has_help_and_a_command_and_every_help_lists_its_flags() -> None:
    """`--help` is complete."""
    parser = build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for name, field in Settings.model_fields.items():
        assert field.description
        assert set(commands_of(name)) <= set(COMMANDS)
        for command in commands_of(name):
            text = commands.choices[command].format_help()
            assert flag_name(name) in text
            assert env_name(name) in text.replace("\n", "")


def test_a_misspelled_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """And the exit code is that of a usage error."""
    with pytest.raises(SystemExit) as exit_:
        main(["decode", "--max-num-seq", "3"])
    assert exit_.value.code == 2
    assert "did you mean --max-num-seqs?" in capsys.readouterr().err
