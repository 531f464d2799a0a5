"""Evaluates a finished run again, by its own protocol or another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pinet_fast.errors import ConfigError
from pinet_fast.training.checkpoint import load_checkpoint
from pinet_fast.training.config import RunConfig
from pinet_fast.training.inputs import load_inputs
from pinet_fast.training.observer import Observer
from pinet_fast.training.recipe import Recipe
from pinet_fast.training.run_folder import RunFolder


def evaluate_run(
    run: str | Path,
    *,
    part: str = "test",
    eval_negatives: int | None = None,
    eval_dist: str | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Rank the held-out events with the model that a run kept; the folder is left as it is.

    Args:
        run: A finished run folder.
        part: ``"test"`` or ``"valid"``.
        eval_negatives: Frozen negatives to rank against, 0 for the catalogue; None as the run did.
        eval_dist: How they are drawn; None as the run did, or evenly for the catalogue.
        observer: Told of the progress.

    Returns:
        config, data, strata, final, the part's metrics, clicks and baselines, as in metrics.json.

    Raises:
        InputError: No finished run, another log than then, or an option out of its range.
    """
    folder = RunFolder(Path(run))
    if part not in ("test", "valid"):
        raise ConfigError(f"--part: expected test or valid, got {part!r}")
    config = RunConfig.load(folder.config)
    if not folder.metrics.exists():
        raise ConfigError(
            f"{run}: the run is not finished; finish it with: pinet-fast train --out {run} --resume"
        )
    negatives = config.eval_negatives if eval_negatives is None else eval_negatives
    dist = eval_dist or (config.eval_dist if negatives else "uniform")
    config = replace(config, eval_negatives=negatives, eval_dist=dist)
    observer = observer or Observer()
    recipe = Recipe(config, load_inputs(config, observer), folder, observer)
    recipe.restore(load_checkpoint(folder.checkpoint))
    return recipe.results((part,))  # type: ignore[arg-type] # checked above
