"""What a report says of a run beside its baseline, as a rule the joint run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pinet_fast.report.compare import Comparison

if TYPE_CHECKING:
    from pinet_fast.report.compare import Cell
    from pinet_fast.report.run_files import RunFiles

_METRIC = "ndcg@10"


@dataclass(frozen=True)
class Against:
    """The final stages of two runs, test NDCG@10 by group.

    Attributes:
        baseline: The run that this one is set against.
        title: A heading.
        short: The baseline in a word or two.
        groups: ``overall`` and then the strata, from least to most active.
        users: Test users of each.
        before: Each group's cell of the baseline.
        after: Each group's cell of the run, with the difference.
        notes: What a reader must know.
    """

    baseline: RunFiles
    title: str
    short: str
    groups: tuple[str, ...]
    users: tuple[int, ...]
    before: tuple[Cell, ...]
    after: tuple[Cell, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, run: RunFiles, baseline: RunFiles) -> Against:
        """Compare a run with a baseline.

        Raises:
            ConfigError: They are of different logs, strata or protocols.
        """
        comparison = Comparison.of([baseline, run])
        is_joint = baseline.config["rule"] == "joint"
        cells = comparison.cells[_METRIC]
        return cls(
            baseline=baseline,
            title="Against joint training" if is_joint else f"Against {comparison.labels[0]}",
            short="joint" if is_joint else comparison.labels[0],
            groups=comparison.groups,
            users=comparison.users,
            before=tuple(group[0] for group in cells),
            after=tuple(group[1] for group in cells),
            notes=comparison.notes,
        )
