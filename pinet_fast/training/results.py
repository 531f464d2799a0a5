"""What a finished run reports, from the rankings of its held-out parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pinet_fast.data import training_counts
from pinet_fast.training.baselines import popularity_ranking
from pinet_fast.training.click_metrics import clicks_by_stratum
from pinet_fast.training.metrics import by_stratum, summarise

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pinet_fast.data import EvaluationBatch
    from pinet_fast.training.evaluate import Ranking
    from pinet_fast.training.inputs import Inputs

_HEAD_ITEMS = 0.8  # items above this quantile of training events are head items


class Results:
    """Metrics, baselines and ranks of a run.

    Args:
        inputs: The log.
        rankings: The ranking of every held-out part.
    """

    def __init__(self, inputs: Inputs, rankings: dict[str, Ranking]) -> None:
        self.inputs = inputs
        self.rankings = rankings
        self.item_counts = training_counts(inputs.store, inputs.split)

    def metrics(self) -> dict[str, Any]:
        """Return the parts of metrics.json that hold metrics."""
        out: dict[str, Any] = {part: self._part(r) for part, r in self.rankings.items()}
        if "test" in self.rankings:
            out["items"] = self._by_items(self.rankings["test"])
        out["clicks"] = {
            part: {stage: self._clicks(ranking, stage) for stage in ranking.scores}
            for part, ranking in self.rankings.items()
        }
        return out

    def baselines(self, blocks: Iterable[EvaluationBatch]) -> dict[str, Any]:
        """Return the test metrics of ranking by popularity.

        Args:
            blocks: The test part.
        """
        ranking = popularity_ranking(self.item_counts, blocks)
        strata = self.inputs.strata.num_strata
        out: dict[str, Any] = {
            "ranking": by_stratum(ranking.backbone, ranking.strata, strata),
            "clicks": None,
        }
        if ranking.scores:
            out["clicks"] = self._clicks(ranking, "backbone")
        return {"popularity": out}

    def ranks(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the arrays of test_ranks.npz."""
        store, strata, test = self.inputs.store, self.inputs.strata, self.rankings["test"]
        out = {
            "users": store.user_ids[test.users],
            "strata": test.strata,
            "activeness": strata.activeness[test.users],
            "target_events": self.item_counts[test.targets],
            "backbone": test.backbone,
        }
        if test.heads is not None:
            out["heads"] = test.heads
        return out

    def _part(self, ranking: Ranking) -> dict[str, Any]:
        args = (ranking.strata, self.inputs.strata.num_strata)
        return {
            "backbone": by_stratum(ranking.backbone, *args),
            "heads": None if ranking.heads is None else by_stratum(ranking.heads, *args),
        }

    def _clicks(self, ranking: Ranking, stage: str) -> dict[str, Any]:
        strata = self.inputs.strata.num_strata
        return clicks_by_stratum(ranking.scores[stage], ranking.strata, strata)

    def _by_items(self, ranking: Ranking) -> dict[str, Any]:
        """Return test metrics of targets that are tail and head items.

        Head items have more training events than the 80% quantile over the catalogue, so that
        equal items stay together (MELT's rule for items, with its quantile for users).
        """
        border = float(np.quantile(self.item_counts[1:], _HEAD_ITEMS))
        is_head = self.item_counts[ranking.targets] > border
        stages: dict[str, npt.NDArray[np.int64] | None] = {
            "backbone": ranking.backbone,
            "heads": ranking.heads,
        }
        return {
            "head_above": border,
            **{
                stage: None
                if ranks is None
                else {"tail": summarise(ranks[~is_head]), "head": summarise(ranks[is_head])}
                for stage, ranks in stages.items()
            },
        }
