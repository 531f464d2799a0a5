"""Progress bars on stderr; plain lines where stderr is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pinet_fast.training import Observer


class ProgressObserver(Observer):
    """Shows a run on a console.

    Args:
        console: Where to draw, usually stderr.
        quiet: Show nothing at all.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._stage: TaskID | None = None
        self._evaluation: TaskID | None = None
        self._name = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage_started(self, name: str, *, epochs: int, steps_per_epoch: int, step: int) -> None:
        """Open the stage's bar."""
        self._name = name
        total = epochs * steps_per_epoch
        self._stage = self._progress.add_task(name, total=total, completed=step)
        self.note(f"{name}: up to {epochs} epochs of {steps_per_epoch} steps")

    def step_done(self, loss: float) -> None:
        """Advance the stage's bar."""
        if self._stage is not None:
            self._progress.update(
                self._stage, advance=1, description=f"{self._name}  loss {loss:.4f}"
            )

    def epoch_done(self, record: dict[str, Any]) -> None:
        """Print the epoch's line."""
        line = f"{record['stage']} epoch {record['epoch']}: loss {record['train_loss']:.4f}"
        if record["valid"] is not None:
            strata = [_number(group["ndcg@10"]) for group in record["valid"]["strata"]]
            overall = _number(record["valid"]["overall"]["ndcg@10"])
            line += f", valid NDCG@10 {overall} (strata: {', '.join(strata)})"
        self.note(f"{line}, {record['seconds']:.0f} s")

    def stage_ended(self, name: str) -> None:
        """Close the stage's bar."""
        if self._stage is not None:
            self._progress.remove_task(self._stage)
            self._stage = None

    def evaluation_started(self, part: str, users: int) -> None:
        """Open a bar for the ranking."""
        self._evaluation = self._progress.add_task(f"ranking {part} events", total=users)

    def evaluation_advanced(self, users: int) -> None:
        """Advance the ranking's bar."""
        if self._evaluation is not None:
            self._progress.update(self._evaluation, advance=users)

    def evaluation_ended(self) -> None:
        """Close the ranking's bar."""
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
