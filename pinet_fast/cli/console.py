"""Where the command line writes: results to stdout, progress to stderr."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True)
class Output:
    """The two consoles of a command.

    Attributes:
        out: Results.
        err: Progress and notes.
        quiet: No progress.
    """

    out: Console
    err: Console
    quiet: bool

    def note(self, text: str) -> None:
        """Print a line of progress, unless quiet."""
        if not self.quiet:
            self.err.print(text, highlight=False, markup=False, soft_wrap=True)

    def print_json(self, text: str) -> None:
        """Print JSON as it is, for another program."""
        self.out.file.write(text + "\n")


def output(*, as_json: bool = False, quiet: bool = False) -> Output:
    """Return the consoles; with ``as_json`` nothing but JSON goes to stdout."""
    return Output(out=Console(), err=Console(stderr=True), quiet=quiet)
