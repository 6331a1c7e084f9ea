"""How a command line ends: one line on stderr and an exit code, never a bare traceback."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import click

from ploopd.errors import ExitCode, PloopError

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


def run(program: str, command: click.Command) -> NoReturn:
    """Run `command` with this process's arguments and exit.

    `--debug` or PLOOPD_DEBUG=1 adds the traceback of whatever ended it.
    """
    raise SystemExit(run_to_code(program, command, sys.argv[1:]))


def run_to_code(program: str, command: click.Command, arguments: list[str]) -> int:
    """The exit code of `command`; its error has been printed."""
    try:
        result = command.main(args=arguments, prog_name=program, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else ExitCode.OK
    except BrokenPipeError:
        # `ploopctl … | head`: nobody reads any more, and nothing is left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except click.ClickException as error:
        return _usage(program, error)
    except PloopError as error:
        report(program, str(error))
        _traceback_if_wanted(error, arguments)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - the last supervisor of the process
        return _unexpected(program, error, arguments)


def report(program: str, text: str) -> None:
    """Print one line for a person; line ends inside (a file's name may have one) are escaped."""
    click.echo(f"{program}: {one_line(text)}", err=True)


def one_line(text: str) -> str:
    """`text` with everything escaped that would end the line or drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _usage(program: str, error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return ExitCode.USAGE
    hint = f"; see `{context.command_path} --help`" if context is not None else ""
    report(program, " ".join(error.format_message().split()).rstrip(".") + hint)
    return ExitCode.USAGE if isinstance(error, click.UsageError) else error.exit_code


def _unexpected(program: str, error: Exception, arguments: list[str]) -> int:
    inner = ploop_error_in(error)
    if inner is not None:
        report(program, str(inner))
        _traceback_if_wanted(error, arguments)
        return inner.exit_code
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    report(
        program,
        f"internal error: {what}; run it with `{program} --debug …` for the traceback",
    )
    _traceback_if_wanted(error, arguments)
    return ExitCode.ERROR


def ploop_error_in(error: BaseException) -> PloopError | None:
    """The first reportable error in an exception group, if every leaf of it is one."""
    if isinstance(error, PloopError):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    found = [ploop_error_in(one) for one in error.exceptions]
    return None if None in found else found[0]


def _traceback_if_wanted(error: BaseException, arguments: list[str]) -> None:
    if "--debug" in arguments or os.environ.get("PLOOPD_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
