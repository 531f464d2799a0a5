"""The command ``pinet-fast``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

import pinet_fast
from pinet_fast.cli.compare import compare
from pinet_fast.cli.demo import demo
from pinet_fast.cli.doctor import doctor
from pinet_fast.cli.evaluate import evaluate
from pinet_fast.cli.fetch import fetch
from pinet_fast.cli.inspect import inspect
from pinet_fast.cli.prepare import prepare
from pinet_fast.cli.profile import profile
from pinet_fast.cli.table import table
from pinet_fast.cli.train import train
from pinet_fast.errors import InputError, PinetError, TrainingInterrupted

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells expect

app = typer.Typer(
    name="pinet-fast",
    help="Deconfounded training of sequential recommenders: results by stratum of activeness.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(prepare)
app.command()(inspect)
app.command()(train)
app.command()(evaluate)
app.command()(compare)
app.command()(table)
app.command()(demo)
app.command()(fetch)
app.command()(doctor)
app.command()(profile)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(pinet_fast.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Deconfounded training of sequential recommenders: results by stratum of activeness."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error a user can cause is one line and exit code 2."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        code = app(arguments, standalone_mode=False)
    except TyperException as error:
        context = getattr(error, "ctx", None)  # of the command, where it was found
        command = "pinet-fast" if context is None else context.command_path
        return _fail(f"{error.format_message()} (see {command} --help)", EXIT_BAD_INPUT)
    except InputError as error:
        return _fail(_with_notes(error), EXIT_BAD_INPUT)
    except TrainingInterrupted as error:
        return _fail(str(error), EXIT_INTERRUPTED, label="interrupted")
    except PinetError as error:
        return _fail(_with_notes(error), EXIT_FAILURE)
    except (KeyboardInterrupt, typer.Abort):
        message = "nothing half-written is left; a run that has a checkpoint goes on with --resume"
        return _fail(message, EXIT_INTERRUPTED, label="interrupted")
    return code if isinstance(code, int) else 0


def _with_notes(error: PinetError) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", [])])


def _fail(message: str, code: int, label: str = "error") -> int:
    print(f"{label}: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
