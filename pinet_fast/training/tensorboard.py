"""TensorBoard events of a run, beside log.jsonl; needs the package ``tensorboard``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pinet_fast.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


class TensorBoardLog:
    """Writes the numbers of log.jsonl's records as scalars, by stage.

    A resumed run writes a further file of events into the same folder; TensorBoard shows the later
    one where steps repeat.

    Args:
        folder: Where events go.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = summary_writer()(log_dir=str(folder))

    def write(self, record: dict[str, Any]) -> None:
        """Write a record of log.jsonl."""
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(f"{record['stage']}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def summary_writer() -> Any:
    """Return TensorBoard's writer of events.

    Raises:
        ConfigError: The package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "--tensorboard: the package is not installed; pip install tensorboard, or leave the "
            "option out: log.jsonl holds the same"
        ) from None
    return SummaryWriter


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record, strata by number; what a record lacks is left out."""
    names = ("loss", "train_loss", "events_per_second")
    found: dict[str, Any] = {name: record.get(name) for name in names}
    for name in ("stratum_losses", "weights", "norms"):
        for s, value in enumerate(record.get(name) or ()):
            found[f"{name}/{s}"] = value
    valid = record.get("valid")
    if valid:
        for name, value in valid["overall"].items():
            found[f"valid/{name}/overall"] = value
        for s, group in enumerate(valid["strata"]):
            found |= {f"valid/{name}/{s}": value for name, value in group.items()}
    return {name: float(v) for name, v in found.items() if v is not None and v == v}
