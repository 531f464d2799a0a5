"""What a run tells while it works; the command line draws progress bars from it."""

from __future__ import annotations

from typing import Any


class Observer:
    """Receives a run's progress; this one ignores it. Subclass what you need."""

    def note(self, text: str) -> None:
        """Something a person may want to know, in one line."""

    def stage_started(self, name: str, *, epochs: int, steps_per_epoch: int, step: int) -> None:
        """A stage begins, or goes on after ``step`` steps."""

    def step_done(self, loss: float) -> None:
        """One step is done."""

    def epoch_done(self, record: dict[str, Any]) -> None:
        """An epoch ended; ``record`` is its line of log.jsonl."""

    def stage_ended(self, name: str) -> None:
        """A stage is over."""

    def evaluation_started(self, part: str, users: int) -> None:
        """Ranking of a held-out part begins."""

    def evaluation_advanced(self, users: int) -> None:
        """So many more users are ranked."""

    def evaluation_ended(self) -> None:
        """The ranking is over."""
