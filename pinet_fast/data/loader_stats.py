"""What a loader counts while it serves batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoaderStats:
    """What a loader did since it was made; rates are by the time spent iterating.

    Attributes:
        batches: Batches handed out.
        users: Their users.
        events: Their events.
        num_bytes: Their bytes.
        seconds: From asking for a batch to asking for the next, all added up.
        wait_seconds: Part of it in which the caller waited for a batch.
        ring_depth: Batches that lay ready when one was asked for, on average.
    """

    batches: int = 0
    users: int = 0
    events: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    ring_depth: float = 0.0

    @property
    def wait_share(self) -> float:
        """Return the share of the time in which the caller waited, 0..1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def users_per_second(self) -> float:
        """Return users a second."""
        return self.users / self.seconds if self.seconds else 0.0

    @property
    def events_per_second(self) -> float:
        """Return events a second."""
        return self.events / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Return bytes a second."""
        return self.num_bytes / self.seconds if self.seconds else 0.0


@dataclass(eq=False, slots=True)
class Counts:
    """What ``LoaderStats`` are made of, counted up by every batch."""

    batches: int = 0
    users: int = 0
    events: int = 0
    words: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    ready: int = 0

    def stats(self) -> LoaderStats:
        """Return the counts so far."""
        return LoaderStats(
            batches=self.batches,
            users=self.users,
            events=self.events,
            num_bytes=8 * self.words,
            seconds=self.seconds,
            wait_seconds=self.wait_seconds,
            ring_depth=self.ready / self.batches if self.batches else 0.0,
        )
