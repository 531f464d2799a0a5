"""IMTL-G: the combined gradient has the same projection on every stratum's direction."""

from __future__ import annotations

from pinet_fast.aggregation.rules.solved import SolvedRule


class IMTLG(SolvedRule):
    """Find weights that sum to one with ``<d, g_s / ||g_s||>`` the same for every stratum.

    With the cosines C and norms n: ``w ~ C^+ 1 / n``, the closed form of the paper in Gram terms.
    Weights may be negative, and where the strata's directions cancel (a sum near zero) they may be
    large; where there is no such combination all weigh alike. Directions that depend on each other
    share their weight; a stratum without gradient weighs 0.

    Source:
        Liu et al., Towards impartial multi-task learning (ICLR 2021), section 3.1, the closed form
        of IMTL-G.
    """

    claims = frozenset({"scale_invariant", "equivariant", "mean"})
    solver = "imtlg"

    def __repr__(self) -> str:
        return "IMTLG()"
