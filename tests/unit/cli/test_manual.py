"""The manual pages and the README agree with the programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ploopd.cli.ploopctl import cli as ploopctl
from ploopd.cli.ploopd import cli as ploopd
from ploopd.errors import ExitCode
from ploopd.gate.events import EventKind

ROOT = Path(__file__).resolve().parents[3]
MANUALS = {"ploopd": ROOT / "docs/man/ploopd.8.md", "ploopctl": ROOT / "docs/man/ploopctl.1.md"}
PROGRAMS: dict[str, click.Command] = {"ploopd": ploopd, "ploopctl": ploopctl}


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """All commands of a program with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for sub in command.list_commands(context):
            child = command.get_command(context, sub)
            assert child is not None
            yield from commands(child, f"{name} {sub}")


def options(command: click.Command) -> set[str]:
    """The long options, `--help` aside."""
    return {
        option
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
        if option.startswith("--")
    } - {"--help"}


def entry(manual: str, command: str) -> str:
    """The part of a manual that describes a command of ploopctl."""
    found = re.findall(
        rf"^\*\*{re.escape(command)}\*\*.*?(?=^\*\*ploopctl|^## )", manual, re.MULTILINE | re.DOTALL
    )
    assert found, f"no entry for {command}"
    return "".join(found)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_the_program_is_in_the_manual_and_no_other(program: str) -> None:
    manual = MANUALS[program].read_text()
    known = {"--help"}
    for _, command in commands(PROGRAMS[program], program):
        known |= options(command)
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", manual))
    # `ploopctl`'s manual may speak of ploopd's options and the other way round.
    other = {"--no-install-recommends"}
    assert known <= written, f"not in the manual: {sorted(known - written)}"
    assert written - other <= known, f"not in the program: {sorted(written - other - known)}"


def test_every_command_of_ploopctl_has_an_entry_with_its_options() -> None:
    manual = MANUALS["ploopctl"].read_text()
    for name, command in commands(ploopctl, "ploopctl"):
        if isinstance(command, click.Group):
            continue
        text = entry(manual, name)
        for option in options(command):
            assert f"**{option}**" in text, f"{name}: {option}"
        for parameter in command.params:
            if isinstance(parameter.type, click.Choice) and parameter.name != "action":
                choices = "|".join(parameter.type.choices)
                assert choices in text, f"{name}: {choices}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_defaults_of_the_help_are_those_of_the_manual(program: str) -> None:
    manual = MANUALS[program].read_text()
    for name, command in commands(PROGRAMS[program], program):
        for parameter in command.params:
            default = parameter.default
            if isinstance(parameter, click.Option) and parameter.show_default and default:
                text = f"{default:g}" if isinstance(default, float) else str(default)
                assert text in manual, f"{name} {parameter.name}: {text}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_says_what_it_does(program: str) -> None:
    for name, command in commands(PROGRAMS[program], program):
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name}: {parameter.name}"


@pytest.mark.parametrize("path", [*MANUALS.values(), ROOT / "README.md"], ids=lambda p: p.name)
def test_exit_codes_are_those_of_the_program(path: Path) -> None:
    rows = re.findall(r"(?:^|\| )(\d+) \| [^|\n]+ ?(?=\|)", path.read_text(), re.MULTILINE)
    written = {int(code) for code in rows}
    assert written <= {int(code) for code in ExitCode}
    if path == MANUALS["ploopd"]:
        # The codes that only a client can meet.
        assert written | {3, 7} == {int(code) for code in ExitCode}
    else:
        assert written == {int(code) for code in ExitCode}


def test_commands_in_the_readme_exist() -> None:
    names = {name for each in PROGRAMS for name, _ in commands(PROGRAMS[each], each)}
    text = (ROOT / "README.md").read_text()
    known = {
        option
        for each in PROGRAMS
        for _, c in commands(PROGRAMS[each], each)
        for option in options(c)
    }
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if not words or words[0] not in PROGRAMS:
                continue
            prefixes = {" ".join(words[:n]) for n in range(2, 5)}
            assert prefixes & names, line
            for option in re.findall(r"(?<!\S)--[a-z-]+", line):
                assert option in known, line


def test_no_environment_variable_of_the_manuals_is_unknown() -> None:
    used = {
        str(parameter.envvar)
        for each in PROGRAMS
        for _, command in commands(PROGRAMS[each], each)
        for parameter in command.params
        if parameter.envvar
    } | {"PLOOPD_DEBUG"}
    for path in MANUALS.values():
        section = path.read_text().split("## ENVIRONMENT")[1].split("\n## ")[0]
        written = set(re.findall(r"\bPLOOPD_[A-Z_]+", section))
        assert written
        assert written <= used


def test_every_event_is_in_the_manual_and_no_other() -> None:
    table = MANUALS["ploopctl"].read_text().split("## EVENTS")[1].split("\n## ")[0]
    written = set(re.findall(r"^\| ([a-z][a-z-]+) \|", table, re.MULTILINE))
    assert written == {kind.value for kind in EventKind}
